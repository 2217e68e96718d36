"""1-bit Adam (Tang et al. 2021, arXiv 2102.02888): Adam first, then momentum in one bit over a frozen variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, ParamsT

from signstep.distributed.collectives import mean_over
from signstep.distributed.compressors.base import Page
from signstep.distributed.compressors.ef_sign import EFSign
from signstep.distributed.compressors.gradients import CompressedGradients
from signstep.distributed.compressors.mean import in_shape
from signstep.distributed.hooks import Bucket, Entry

__all__ = ["OneBitAdam"]


class OneBitAdam(Optimizer):
    r"""Adam whose workers, after a warm-up, exchange momenta of one bit per coordinate; optimizer and DDP hook in one.

    For `warmup_steps` steps it is Adam, with decoupled weight decay, on the full-precision mean of the gradients. Then
    the variance v is frozen, and with g_w the gradient of worker w and C the two-sided `EFSign`,

    .. math::
        m \leftarrow C\big(\beta_1 m + (1 - \beta_1) g_w\big)\ \text{averaged over}\ w, \qquad
        x \leftarrow x - \frac{\gamma}{1 - \beta_1^k} \frac{m}{\sqrt{v / (1 - \beta_2^T)} + \epsilon}

    at step k after a warm-up of T. Three things differ from the paper. Bias correction goes on, so that the step does
    not jump. A coordinate whose frozen variance is 0, which has had no gradient in T steps, does not move, as
    dividing by epsilon alone would throw it far away. And C has one scale per block of 1024 elements, the mean
    magnitude instead of the root of the mean square, with which error feedback has a bound (see `EFSign`).

    After the warm-up ``p.grad`` holds the new momentum: clipping acts on it. Gradients must not be scaled, so no
    GradScaler: take bfloat16. ``model.join()`` is not supported, as a rank that has joined makes no steps.

    Args:
        model: wrapped in DistributedDataParallel, with no other communication hook; all its parameters are optimized.
        lr: gamma; this and what follows can differ between param_groups. (default: 1e-3)
        betas: beta_1 and beta_2. (default: (0.9, 0.999))
        eps: epsilon. (default: 1e-8)
        weight_decay: p <- p - lr * weight_decay * p, as in torch.optim.AdamW. (default: 0)
        warmup_steps: T, at least 1, of all groups: until the variance is stable. Take more than 1 / (1 - beta_2), and
            go beyond the warm-up of the learning rate.
        params: of the model, as param_groups. (default: ``model.parameters()``)

    State:
        per parameter ``step``, ``exp_avg`` and ``exp_avg_sq``, in its place ``denominator`` after the warm-up; the
        residuals are in ``hook.state_dict()``, which differs between ranks: save both, the second per rank.

    Raises:
        TypeError: the model is not wrapped, or has complex parameters.
        ValueError: an option out of range, or params that are not those of the model.
        RuntimeError: in step, a parameter has had no gradient before the end of the warm-up.

    Example:
        .. code-block:: python

            model = DistributedDataParallel(net)
            optimizer = OneBitAdam(model, lr=1e-3, warmup_steps=2000)
            torch.save((optimizer.state_dict(), optimizer.hook.state_dict()), f"rank{dist.get_rank()}.pt")
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int,
        params: ParamsT | None = None,
    ) -> None:
        if warmup_steps < 1:
            raise ValueError(f"Invalid warmup_steps: {warmup_steps}, expected warmup_steps >= 1")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(list(model.parameters()) if params is None else params, defaults)
        for group in self.param_groups:
            _check_options(group)
            group.update(warmup_steps=warmup_steps, steps=0)
        self.hook = OneBitAdamHook(model, self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Part of the set-up; later the hook would not know the parameters: RuntimeError."""
        if "hook" in self.__dict__:
            raise RuntimeError(
                "OneBitAdam takes all parameters of its model at the start: make a new one with params=, on a new "
                "DistributedDataParallel"
            )
        super().add_param_group(param_group)

    @property
    def frozen(self) -> bool:
        """Whether the warm-up is over."""
        group = self.param_groups[0]
        return bool(group["steps"] >= group["warmup_steps"])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of Adam, or, after the warm-up, of the momentum in p.grad over the frozen variance."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        frozen = self.frozen
        if frozen:
            self._check_variances()
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], float(group["lr"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                if frozen:
                    state["exp_avg"].copy_(p.grad)
                    denominator = state["denominator"]
                else:
                    state["exp_avg"].lerp_(p.grad, 1 - beta1)
                    state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                    denominator = _denominator(state, beta2, group["eps"])
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(state["exp_avg"], denominator, value=-lr / (1 - beta1 ** state["step"]))
            group["steps"] += 1
        if self.frozen and not frozen:
            self._freeze()
        return loss

    def _freeze(self) -> None:
        for group in self.param_groups:
            for state in (self.state[p] for p in group["params"] if p in self.state):
                denominator = _denominator(state, group["betas"][1], group["eps"])
                state["denominator"] = denominator.masked_fill_(state.pop("exp_avg_sq") == 0, math.inf)

    def _check_variances(self) -> None:
        for p, name in self.hook.names.items():
            if p.grad is not None and p not in self.state:
                raise RuntimeError(
                    f"OneBitAdam: {name} has its first gradient after the warm-up and so no variance: use all "
                    "parameters in the first warmup_steps steps, or take more of them"
                )


def _check_options(group: dict[str, Any]) -> None:
    for option in ("lr", "eps", "weight_decay"):
        if not group[option] >= 0:
            raise ValueError(f"Invalid {option}: {group[option]}, expected {option} >= 0")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"Invalid betas: {group['betas']}, expected each in [0, 1)")


def _denominator(state: dict[str, Any], beta2: float, eps: float) -> Tensor:
    root: Tensor = state["exp_avg_sq"].sqrt()
    return root.div_(math.sqrt(1 - beta2 ** state["step"])).add_(eps)


class OneBitAdamHook(CompressedGradients):
    """The mean of gradients in the warm-up; then the compressed mean of what they make of the momentum."""

    def __init__(self, model: DistributedDataParallel, optimizer: OneBitAdam) -> None:
        super().__init__(model, EFSign(two_sided=True))
        self._optimizer = optimizer
        self._groups = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        if self._groups.keys() != self.names.keys():
            raise ValueError(
                "OneBitAdam: expected params to be all those of the model that require gradients, no others"
            )

    def reduce(self, bucket: Bucket) -> None:
        if self._optimizer.frozen:
            self.mean.average(bucket.entries, self._fill)
            self.mean.step += bucket.is_last
        else:
            mean_over(self.group, bucket.buffer)

    def _fill(self, entry: Entry, place: Tensor) -> bool:
        """The momentum with this worker's gradient in it, also where that is 0."""
        beta1, _ = self._optimizer.param_groups[self._groups[entry.param]]["betas"]
        place.copy_(entry.flat).mul_(1 - beta1)
        if entry.param in self._optimizer.state:
            exp_avg = self._optimizer.state[entry.param]["exp_avg"]
            in_shape(place, entry.param).add_(exp_avg, alpha=beta1)
        return True


PAGE = Page(
    paper="Tang et al. 2021, [2102.02888](https://arxiv.org/abs/2102.02888)",
    bytes="33/128 (M-1)/M, in the warm-up 8 (M-1)/M",
    biased="yes, fed back twice",
    state="4n + 4n/M bytes",
    good_for="long runs with Adam, mostly transformers",
    not_for="short runs; parameters that get gradients late or seldom",
)
