"""Seeds of generators, as functions of what they are for."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derived_seed(*parts: object) -> int:
    """63 bits that follow from `parts`, all of them in the low 32 bits, the only ones that torch's CPU generator reads.

    >>> derived_seed("order", 0, 1) == derived_seed("order", 0, 1) != derived_seed("order", 1, 0)
    True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block the global generators of torch (on the CPU), NumPy and Python begin at a seed; after it they are
    where they were.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
