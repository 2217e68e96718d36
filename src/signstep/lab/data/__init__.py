"""The lab's data sets: finding or downloading them, checking and reading them, splitting and augmenting them.

In memory images are uint8, and so are the bytes of texts. Which of them make up a step is not here but in
`signstep.lab.training`, `batches` and `text_batches`.

>>> images = load("digits")
>>> images.train_x.shape, images.train_x.dtype, images.num_classes
(torch.Size([1437, 1, 8, 8]), torch.uint8, 10)
>>> train_x, train_y, eval_x, eval_y = split(images, "tune", None)
"""

from signstep.lab.data.augmentation import augment, normalise
from signstep.lab.data.catalog import Listed, demo_dataset, listing, load, load_text
from signstep.lab.data.images import DataError, Images, split
from signstep.lab.data.text import Text, split_text

__all__ = [
    "DataError",
    "Images",
    "Listed",
    "Text",
    "augment",
    "demo_dataset",
    "listing",
    "load",
    "load_text",
    "normalise",
    "split",
    "split_text",
]
