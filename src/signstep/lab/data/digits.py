"""scikit-learn's bundled digits: 1,797 real 8 x 8 images, for where there is no network and nothing on disk."""

from __future__ import annotations

import numpy as np
import sklearn
import torch
from sklearn.datasets import load_digits

from signstep.lab.data.images import Images

_SPLIT_SEED = 20260722
_TEST = 360


def read() -> Images:
    """Return the 8 x 8 images with their ink 0..16 scaled to 0..255; a fixed random fifth is the test set."""
    bunch = load_digits()
    x = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    y = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.from_numpy(np.random.RandomState(_SPLIT_SEED).permutation(len(y)))
    train, test = order[_TEST:], order[:_TEST]
    return Images(
        name="digits",
        train_x=x[train],
        train_y=y[train],
        test_x=x[test],
        test_y=y[test],
        classes=tuple(str(digit) for digit in bunch.target_names),
        source=f"scikit-learn {sklearn.__version__}",
    )
