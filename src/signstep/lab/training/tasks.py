"""What a run learns, by its data set's name: to classify images, or to predict the bytes of a text.

Everything that differs between the two and is no tensor is here: which models can be trained, and what a run's result
is. Nothing here imports torch, so that a command's help need not wait for it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from signstep.lab.output import stats

FOLDER = "folder:"
"""What the name of a folder of images begins with, as `signstep.lab.data` has it."""


@dataclass(frozen=True)
class Metric:
    """The number that a run is judged by."""

    name: str
    unit: str
    """Of a value, as printed after it: "%" or "bits per byte"."""
    points: str
    """Of a difference of two values."""
    key: str
    """Its name in files."""
    better: Literal["higher", "lower"]
    digits: int
    """Decimal places in a table."""
    most: float
    """No value is larger."""
    chance: float
    """The value of a guess that knows nothing: that of a diverged run. Of a user's own data the record has it."""
    least: float = 0.0
    """No value is smaller."""
    score: str = "accuracy"
    """What a line of a run's record calls the number beside the loss."""

    def of(self, loss: float, accuracy: float) -> float:
        """The value, from a mean cross-entropy in nats and a share of right answers, or from the score that it is.

        >>> round(task("bible").metric.of(2.0, 0.5), 3), task("digits").metric.of(2.0, 0.5)
        (2.885, 50.0)
        """
        if self.key == "accuracy":
            return 100.0 * accuracy
        return loss / math.log(2) if self.key == "bits_per_byte" else accuracy

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is: what a value is multiplied by to be ranked."""
        return 1 if self.better == "higher" else -1

    @property
    def best_word(self) -> str:
        """What the best value is called among the others: "highest" or "lowest"."""
        return "highest" if self.better == "higher" else "lowest"

    @property
    def heading(self) -> str:
        """What the numbers of a table are, and which are better where that has to be said.

        >>> task("bible").metric.heading, task("own:data", "nets:mse", "lower").metric.heading
        ('Bits per byte, fewer are better', 'mse, lower is better')
        """
        if self.unit == "%":
            return "Percent"
        return (
            "Bits per byte, fewer are better"
            if self.key == "bits_per_byte"
            else f"{self.name}, {self.better} is better"
        )

    def text(self, value: float) -> str:
        """A value with its unit.

        >>> task("bible").metric.text(2.0), task("digits").metric.text(91.2)
        ('2.000 bits per byte', '91.20 %')
        """
        return f"{stats.number(value, self.digits)} {self.unit}"


ACCURACY = Metric("accuracy", "%", "points", "accuracy", "higher", 2, 100.0, 10.0)
"""Share of the images that are classified right, in percent; chance is that of ten classes."""
BITS_PER_BYTE = Metric("bits per byte", "bits per byte", "bits per byte", "bits_per_byte", "lower", 3, math.inf, 8.0)
"""Total cross-entropy of the predicted bytes / (ln 2 times their number): the size to which an arithmetic coder with
the model's predictions would compress a byte."""


@dataclass(frozen=True)
class Task:
    """What the runs of a data set have in common."""

    metric: Metric
    noun: Literal["images", "bytes", "examples"]
    """What the parts of the data set are counted in."""
    row: Literal["images", "sequences", "examples"]
    """What `RunConfig.batch_size` counts."""
    models: tuple[str, ...]
    """The networks that can be trained on it."""


ImageModel = Literal["resnet8", "resnet20", "resnet18", "convnet"]
TextModel = Literal["gpt", "gpt2"]
_IMAGES = Task(ACCURACY, "images", "images", ImageModel.__args__)  # type: ignore[attr-defined]
_CIFAR100 = Task(Metric(**{**vars(ACCURACY), "chance": 1.0}), "images", "images", _IMAGES.models)
_TEXT = Task(BITS_PER_BYTE, "bytes", "sequences", TextModel.__args__)  # type: ignore[attr-defined]
_EXAMPLES = Task(ACCURACY, "examples", "examples", _IMAGES.models)
TEXTS = ("bible", "shakespeare", "text")


_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_name(text: str) -> bool:
    """Whether a text could name something to import, as ``package.module:function``.

    >>> is_name("nets:Net"), is_name("folder/of/images"), is_name("folder:x/y")
    (True, False, False)
    """
    return _NAME.fullmatch(text) is not None


def is_own(name: str) -> bool:
    """Whether this is the name of a user's own data set, model or optimizer: it has a colon in it."""
    return ":" in name


def task(dataset: str, metric: str | None = None, better: Literal["higher", "lower"] = "higher") -> Task:
    """The task of a data set; of one that is not known, to classify its images.

    Args:
        dataset: its name.
        metric: the name of the user's own, if runs are judged by one.
        better: which of its values are.
    """
    if dataset in TEXTS:
        return _TEXT
    known = _CIFAR100 if dataset == "cifar100" else _IMAGES
    if is_own(dataset) and not dataset.startswith(FOLDER):
        known = _EXAMPLES
    if metric is None:
        return known
    word = metric.rpartition(":")[2]
    return replace(known, metric=Metric(word, word, word, "metric", better, 4, math.inf, math.nan, -math.inf, "metric"))
