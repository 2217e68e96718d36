"""What one training run is: every field that changes its numbers, and nothing else.

Two runs with equal `RunConfig`s are the same run; `RunConfig.hash` names its files. Where and how long it runs
(device, folder, time limit) is not part of it: see `signstep.lab.training.loop.train`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from signstep.distributed.local_methods import LOCAL_METHODS
from signstep.distributed.reductions import TRAINED
from signstep.lab.errors import BadInput
from signstep.lab.training.optimizers import OPTIMIZERS, OptimizerName, known_optimizer
from signstep.lab.training.tasks import FOLDER, ImageModel, Task, TextModel, is_own, task

Dataset = Literal["cifar10", "cifar100", "fashion-mnist", "mnist", "digits", "bible", "shakespeare", "text"]
if TYPE_CHECKING:
    Reduce = str
else:
    Reduce = Literal[(*TRAINED, *LOCAL_METHODS)]


OF_IMAGES = ("crop", "flip", "cutout", "stem")
"""Fields of `RunConfig` that a text has no use for."""


@dataclass(frozen=True)
class RunConfig:
    """One run of `signstep train`.

    Fields left at None take the optimizer's own default; a field that the chosen optimizer does not have is refused.
    """

    # data
    dataset: Dataset | str = "cifar10"
    """Images, or bytes of a text: bible, shakespeare, or as text the file that --data names. Of your own images or
    examples the name that --data gives them."""
    split: Literal["tune", "final"] = "final"
    """final: train on the training set, evaluate on the test set; tune: hold out a tenth of the former to evaluate.
    Of a text the test set is the last tenth, and held out is the one before it."""
    subset: int | None = None
    """Train on this many images only, a fixed random choice from the training part, or on this many bytes, its first;
    None: all."""
    crop: int = 4
    """Random crop after padding by this many pixels; 0: off."""
    flip: bool = True
    """Mirror each training image with a probability of one half."""
    cutout: int = 0
    """Side of the square set to the mean; 0: off."""
    image_size: int | None = None
    """Side of the square that each image of a folder of yours is cut and resized to; None: they are of one size."""

    # model
    model: Literal[ImageModel, TextModel] | str = "resnet18"
    """The network; of a text gpt (4 layers of width 128) or gpt2 (12 of width 768). Of your own package.module:factory,
    timm:NAME or torchvision:NAME."""
    width: float = 1.0
    """Factor on the number of channels of every layer."""
    context: int | None = None
    """Bytes in a sequence of a text; None: the model's own, 128 of gpt and 1024 of gpt2."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers: cifar keeps the image's size, imagenet divides it by four."""

    # optimizer
    optimizer: OptimizerName = "sgd"
    """adamw: Adam with decoupled weight decay; swats: from Adam to SGD; noisy-sgd: SGD with annealed gradient noise;
    signsgd: SignSGD; lion: Lion; hybrid: HybridSignSGD; fixed-switch: the same without calibration."""
    lr: float = 0.1
    """Learning rate; of a sign method it is how far every weight moves in a step."""
    momentum: float | None = None
    """Decay of the momentum, of sgd, noisy-sgd and the sign methods but for lion; None: 0.9."""
    betas: tuple[float, float] | None = None
    """Decays of lion's averages, of the one whose sign is taken and of the one that is kept; None: 0.9 and 0.99."""
    weight_decay: float = 0.0
    """Weight decay; decoupled in adamw, swats and the sign methods."""
    nesterov: bool | None = None
    """Nesterov's momentum, of sgd."""
    switch_tolerance: float | None = None
    """How near the rate must come to its average before swats switches, None: 1e-9; of hybrid a share of the average,
    and in place of `switch`."""
    gradient_noise: float | None = None
    """Variance of the noise that noisy-sgd adds to every gradient, at the first step; None: 0.01."""
    dither: float | None = None
    """Variance of a sign method's noise at its first step; None: no noise."""
    dither_decay: float | None = None
    """The variance falls as (1 + step) to the power of minus this; None: 0.55."""
    dither_position: Literal["pre", "post", "expected"] | None = None
    """Add the noise before or after the sign, or step by the expectation of the former, without noise; None: before."""
    dither_scale: Literal["absolute", "relative"] | None = None
    """relative: the noise is in units of the rms of the last step's momentum; None: absolute."""
    dither_law: Literal["gaussian", "uniform"] | None = None
    """Of the noise, of the same variance; None: gaussian."""
    state_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """How a sign method keeps its momentum, the last two with stochastic rounding; None: as the weights, in float32."""
    switch: float | None = None
    """Share of the run's steps taken before hybrid and fixed-switch go on with SGD."""
    calibration: Literal["norm", "paper", "ratio", "applied", "swats"] | None = None
    """How HybridSignSGD finds SGD's learning rate: see its help; None: norm."""
    calibration_scope: Literal["group", "tensor"] | None = None
    """One rate for all parameters or one for each; None: one for each under norm, else one."""
    ema_decay: float | None = None
    """Decay of the calibration's running averages; None: 0.99."""
    sgd_momentum: float | None = None
    """SGD's momentum after the switch of hybrid and fixed-switch; None: 0."""
    sgd_lr: float | None = None
    """SGD's learning rate after the switch of fixed-switch; None: that of the sign steps."""

    # workers
    reduce: Reduce = "mean"
    """How the workers' gradients become one: their mean, in fewer bits, or the majority vote of a sign method; or how
    workers that train by themselves agree after --every steps: local-vote, and others."""
    every: int | None = None
    """Steps that each worker takes by itself before all agree, of local-vote and its like; an epoch ends a round."""
    outer_lr: float | None = None
    """How far these go along what they have agreed on; None: the method's own."""
    outer_momentum: float | None = None
    """Decay of the momentum of what workers say after their own steps; None: the method's own."""
    workers: int | None = None
    """Number of workers, on which the result of a reduction other than mean depends; set from torchrun's."""

    # recipe
    epochs: int = 200
    """Times that the run goes through its training images or bytes."""
    batch_size: int = 128
    """Images, or sequences of a text, per step over all workers."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """How lr changes over the run; cosine: falls to 0; step: times --gamma at each of --milestones."""
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)
    """Where schedule step lowers lr, as shares of the run."""
    gamma: float = 0.2
    """What schedule step multiplies lr by."""
    warmup: float = 0.0
    """Share of the run over which lr rises linearly from 0, before the schedule's own factor."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    loss: str | None = None
    """Your own, package.module:function of outputs and targets; None: the cross-entropy."""
    metric: str | None = None
    """Your own, a function of outputs and targets: its mean over what is evaluated. None: accuracy."""
    better: Literal["higher", "lower"] = "higher"
    """Which values of your metric are."""
    version: str = ""
    """Of your own model, data and functions, of which a run knows the name: after a change give another one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the network in bfloat16 where autocast allows it; weights and optimizer stay in fp32."""
    channels_last: bool = True
    """Memory layout of images and weights: faster on most machines."""
    compile: bool = False
    """Compile the network with torch.compile."""
    seed: int = 0
    """Of the initial weights, the order of the images, their augmentation and the dither."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(self.betas))
        for name, low, high in (
            ("epochs", 1, math.inf),
            ("batch_size", 1, math.inf),
            ("eval_every", 1, math.inf),
            ("crop", 0, math.inf),
            ("cutout", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("warmup", 0, 1),
            ("label_smoothing", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise BadInput(f"{name}={value!r}: expected a value in [{low}, {high}]")
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise BadInput(f"lr={self.lr!r}: expected a finite value >= 0")
        if not self.width > 0:
            raise BadInput(f"width={self.width!r}: expected a value > 0")
        if self.subset is not None and self.subset < 1:
            raise BadInput(f"subset={self.subset!r}: expected a positive number of images or bytes, or none for all")
        if any(not 0 < m < 1 for m in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise BadInput(f"milestones={self.milestones!r}: expected rising shares of the run, each in (0, 1)")
        self._check_task()
        known = known_optimizer(self.optimizer)
        if self.reduce == "vote" and not known.signs:
            voters = " or ".join(name for name, each in OPTIMIZERS.items() if each.signs)
            raise BadInput(f"reduce='vote': workers vote with signs, choose optimizer {voters}, not {self.optimizer}")
        if self.reduce != "mean" and self.workers is None:
            raise BadInput(
                f"reduce={self.reduce!r}: start the run's workers with torchrun --nproc-per-node N -m signstep"
            )
        local = self.reduce in LOCAL_METHODS
        if local != (self.every is not None) or (local and self.every < 1):  # type: ignore[operator]
            methods = " or ".join(LOCAL_METHODS)
            raise BadInput(
                f"every={self.every!r}, reduce={self.reduce!r}: --reduce {methods} needs --every, at least 1"
            )
        if self.outer_lr is not None and not 0 < self.outer_lr < math.inf:
            raise BadInput(f"outer_lr={self.outer_lr!r}: expected a finite value > 0")
        if self.outer_momentum is not None and not 0 <= self.outer_momentum < 1:
            raise BadInput(f"outer_momentum={self.outer_momentum!r}: expected a value in [0, 1)")
        if not local and (self.outer_lr is not None or self.outer_momentum is not None):
            raise BadInput(f"outer_lr or outer_momentum with reduce={self.reduce!r}: it has no such option")
        if {"switch", "switch_tolerance"} <= set(known.options):
            if (self.switch is None) == (self.switch_tolerance is None):
                raise BadInput(
                    f"switch={self.switch!r}, switch_tolerance={self.switch_tolerance!r}: optimizer {self.optimizer} "
                    "needs one of them, to know when to switch"
                )
        elif "switch" in known.options and self.switch is None:
            raise BadInput(f"switch=None: optimizer {self.optimizer} needs a share of the steps, in (0, 1]")
        if self.sgd_lr is not None and not 0 <= self.sgd_lr < math.inf:
            raise BadInput(f"sgd_lr={self.sgd_lr!r}: expected a finite value >= 0")
        if self.switch is not None and not 0 < self.switch <= 1:
            raise BadInput(f"switch={self.switch!r}: expected a share of the steps, in (0, 1]")
        for name in dict.fromkeys(name for each in OPTIMIZERS.values() for name in each.options):
            if name not in known.options and getattr(self, name) is not None:
                raise BadInput(f"{name}={getattr(self, name)!r}: optimizer {self.optimizer} has no such option")

    def _check_task(self) -> None:
        """Raise BadInput for a model or an option that the data set has no use for."""
        known = self.task
        if self.dataset not in get_args(Dataset) and not is_own(self.dataset):
            raise BadInput(
                f"dataset={self.dataset!r}: expected {', '.join(get_args(Dataset))}, or name your own with --data"
            )
        if self.model not in known.models and (known.row == "sequences" or not is_own(self.model)):
            own = "" if known.row == "sequences" else ", or package.module:factory"
            raise BadInput(f"model={self.model!r}: dataset {self.dataset} takes {' or '.join(known.models)}{own}")
        if self.image_size is not None and (not self.dataset.startswith(FOLDER) or self.image_size < 1):
            raise BadInput(f"image_size={self.image_size!r}: expected pixels >= 1, for --data folder:PATH")
        if known.row == "sequences" and (self.loss is not None or self.metric is not None):
            raise BadInput(f"loss={self.loss!r}, metric={self.metric!r}: dataset {self.dataset} has its own")
        if self.better == "lower" and self.metric is None:
            raise BadInput("better='lower': name the metric of your own of which lower values are better")
        if self.loss is not None and self.label_smoothing:
            raise BadInput(f"label_smoothing={self.label_smoothing}: a loss of your own has its own")
        if self.context is not None and (known.row != "sequences" or self.context < 1):
            raise BadInput(f"context={self.context!r}: expected a positive number of bytes, for a text")
        if known.row != "images":
            for name in OF_IMAGES:
                if getattr(self, name) != getattr(type(self), name):
                    raise BadInput(f"{name}={getattr(self, name)!r}: dataset {self.dataset} has no images")

    @property
    def task(self) -> Task:
        """What the run learns, and is judged by."""
        return task(self.dataset, self.metric, self.better)

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; an unknown field is BadInput."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise BadInput(f"unknown field(s) in a run's configuration: {', '.join(unknown)}")
        return cls(**values)

    @functools.cached_property
    def hash(self) -> str:
        """12 hex digits that name the run: of the fields that differ from their defaults, so that a field added later
        renames no old run.
        """
        defaults = _defaults()
        changed = {k: v for k, v in self.to_dict().items() if v != defaults[k]}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def _defaults() -> dict[str, Any]:
    return RunConfig().to_dict()
