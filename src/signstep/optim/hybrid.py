"""Algorithm 2: SignSGD with momentum, then SGD at the learning rate that calibration measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from signstep.kernels.engine import Direction, Measured, Options
from signstep.optim.calibration import (
    CALIBRATION_STATE,
    RULES,
    complete_state,
    is_per_tensor,
    sizes_of,
    steady_steps,
    update_rate,
)
from signstep.optim.options import HYBRID_OPTIONS, SIGNSGD_OPTIONS, STATE_DTYPES, Option, rate_and_decay
from signstep.optim.shards import ALL
from signstep.optim.signsgd import SignSGD

__all__ = ["HybridSignSGD"]


class HybridSignSGD(SignSGD):
    r"""SignSGD with momentum that switches to SGD at a calibrated learning rate (Algorithm 2 of arXiv 2604.25550).

    Sign phase: the step of `SignSGD`, and a running average :math:`\bar\lambda` of the learning rate at which SGD goes
    on as the sign steps did: by default, at which its steps are as long. The paper's own rule, ``calibration="paper"``,
    makes SGD's step the sign step's projection on the gradient (eq. 11-12). SGD phase, with :math:`\delta` the
    scheduled ``lr`` and :math:`\bar\delta` its average over the sign steps, weighted as in :math:`\bar\lambda`:

    .. math::
        x_{k+1} = x_k - \bar\lambda\,\frac{\delta_k}{\bar\delta}\,g_k

    so a scheduler goes on scaling the step as it did before, and no single rate decides the scale. Each param_group
    runs the algorithm by itself: it has its own step count, its own :math:`\bar\lambda` and its own phase.
    ``print(optimizer)`` shows phase and step: without ``switch_step`` the sign phase does not end by itself.

    Args:
        params, lr, momentum: as in `SignSGD`.
        switch_step: sign steps before the switch, those of a loaded state included; None: only `switch()` switches. A
            group that is past it without having calibrated, from a state of SignSGD, takes one sign step more. With a
            value, the step reads its count on the host, so it cannot be captured whole (``capturable=True`` needs
            None). "auto" switches once the rate has been steady, see ``switch_tolerance``. (default: None)
        switch_tolerance, switch_patience: under "auto" a group switches when, ``switch_patience`` steps in a row, the
            rate that one step alone would have made differed from the average by at most ``switch_tolerance`` times
            that, in the mean over its coordinates, and at the earliest after 1 / (1 - ema_decay) steps. All ranks
            switch at the same step. (default: 0.25 and 50)
        ema_decay: eta, the decay of the running averages. (default: 0.99)
        calibration: the rule for the rate, see `signstep.optim.calibration`. "norm" keeps the length of the step:
            :math:`\bar\lambda = \delta \sqrt{d / E\|m\|^2}` with d coordinates. "paper" is eq. (12) to the letter;
            "ratio" averages the signed inner product and the squared norm and divides after; "applied" is "ratio" for
            the expected dithered step. "swats" is the projection on the step, as in SWATS. (default: "norm")
        calibration_scope: "group" has one rate for all parameters of a param_group, as the paper, "tensor" one for each
            parameter; one whose gradient has been 0 until the switch then goes on at the median of the others. None is
            "tensor" for "norm" and else "group". Read when a group is made or loaded. (default: None)
        sgd_momentum: mu in [0, 1) of the SGD phase, b <- mu b + (1 - mu) g, started from the sign phase's momentum: an
            average, so that the calibrated rate keeps its meaning. At 0 the memory of the momentum is freed at the
            switch; ``state_dict()`` has zeros in its place, so that checkpoints of both phases look alike. (default: 0)
        **others: every keyword of `SignSGD`. Dither acts in the sign phase only; decoupled weight decay uses the
            scheduled lr in both phases.

    Attributes:
        phase: "sign", or "sgd" once every group that has taken a step has switched.
        calibrated_lr: lambda_bar, in units of a learning rate for SGD, 0 before the first sign step; a list of them,
            one for each parameter, where there are as many; of several param_groups a list. Under "paper" and "swats"
            it averages over the learning rates of the sign steps, under the other rules it is that of the last one. A
            step of SGD has the rate ``group["lr_ratio"] * group["lr"]``. Reading it waits for the device.

    Raises:
        RuntimeError: `switch()` before the first sign step: there is no rate yet.
        TypeError, ValueError, RuntimeError: as `SignSGD`.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = HybridSignSGD(model.parameters(), lr=1e-3, switch_step=2)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 3)).sum().backward()
        ...     optimizer.step()
        >>> optimizer.phase
        'sgd'
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {**SIGNSGD_OPTIONS, **HYBRID_OPTIONS}
    calibrates: ClassVar[bool] = True
    _voted_sums: Sequence[Tensor] = ()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        *,
        switch_step: int | str | None = None,
        switch_tolerance: float = 0.25,
        switch_patience: int = 50,
        ema_decay: float = 0.99,
        calibration: str = "norm",
        calibration_scope: str | None = None,
        sgd_momentum: float = 0.0,
        dither: float = 0.0,
        dither_decay: float = 0.55,
        dither_position: str = "pre",
        dither_scale: str = "absolute",
        dither_law: str = "gaussian",
        state_dtype: torch.dtype | str | None = None,
        param_rounding: str | None = None,
        seed: int = 0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        self._init(params, locals())

    def _group_tensors(self, group: dict[str, Any]) -> dict[str, tuple[torch.dtype, torch.device]]:
        first = group["params"][0] if group["params"] else torch.empty(0, dtype=torch.float32, device="cpu")
        wide = torch.float64 if first.dtype in (torch.float64, torch.complex128) else torch.float32
        own = dict.fromkeys(CALIBRATION_STATE, (wide, first.device))
        return super()._group_tensors(group) | own | {"steady_steps": (torch.int64, torch.device("cpu"))}

    def _place_group_state(self, group: dict[str, Any]) -> None:
        group.setdefault("phase", "sign")
        complete_state(group)
        super()._place_group_state(group)
        if is_per_tensor(group):
            count = len(group["params"])
            group.update(
                {name: group[name].expand(count).clone() for name in CALIBRATION_STATE if not group[name].ndim}
            )

    @property
    def phase(self) -> str:
        """The phase: "sign", or "sgd" once every group that has taken a step has switched."""
        waiting = [g for g in self.param_groups if g["phase"] == "sign"]
        some_switched = len(waiting) < len(self.param_groups)
        return "sgd" if some_switched and not any(g["step"] > 0 for g in waiting) else "sign"

    @property
    def calibrated_lr(self) -> Any:
        """lambda_bar of one param_group, of several a list: a number, or a list of one for each parameter; 0 before the
        first sign step.
        """
        values = [g["calibrated_lr"].tolist() for g in self.param_groups]
        return values[0] if len(values) == 1 else values

    @property
    def voted_sums(self) -> Sequence[Tensor]:
        """The sums that the last vote measured, see `receive_voted_sums`; empty before the first vote."""
        return self._voted_sums

    def receive_voted_sums(self, sums: Sequence[Tensor]) -> None:
        """Take what a vote measured, see `SignSGD.receive_voted_sums`."""
        self._voted_sums = list(sums)

    def in_sign_phase(self, group: dict[str, Any]) -> bool:
        """Whether a param_group has not switched to SGD."""
        return bool(group["phase"] == "sign")

    def is_sign_step(self, group: dict[str, Any], step: int) -> bool:
        """Whether step number `step` of a param_group, counted from 0, takes the sign of its momentum."""
        last = group["switch_step"]
        if isinstance(last, str):
            return self.in_sign_phase(group)
        # A group that came late to its switch, from a state of SignSGD, takes one step to calibrate.
        return self.in_sign_phase(group) and (last is None or step < last or bool(group["step"] >= last))

    def switch(self) -> None:
        """Go to the SGD phase now: every group that has taken a sign step switches, a group that has not goes on
        waiting.

        Raises:
            RuntimeError: no group has taken a sign step, so there is no calibrated learning rate yet.
        """
        calibrated = [g for g in self.param_groups if g["avg_weight"].any()]
        if not calibrated:
            raise RuntimeError(
                "switch() before the first sign step along a gradient that is not 0: there is no calibrated learning "
                "rate yet; call step() first"
            )
        for group in calibrated:
            self._switch_group(group)

    def _switch_group(self, group: dict[str, Any]) -> None:
        group["phase"] = "sgd"
        ratio, known = group["lr_ratio"], group["avg_weight"] > 0
        if ratio.ndim:
            # A parameter that had no gradient until now goes on at the rate of the others.
            ratio.copy_(torch.where(known, ratio, ratio.masked_fill(~known, torch.nan).nanmedian().nan_to_num(nan=0.0)))
        self._free_unused(group)

    def _progress(self, group: dict[str, Any]) -> Collection[str]:
        return {"phase", *super()._progress(group)}

    def __repr__(self) -> str:
        """What torch shows of every optimizer, with the phase and the step of each param_group below."""
        lines = []
        for index, group in enumerate(self.param_groups):
            step, switch = group["step"], group["switch_step"]
            until = f"switches at step {switch}"
            if switch is None:
                until = "no switch_step: only switch() ends it"
            elif switch == "auto":
                until = "switches when its rate is steady"
            rates = group["lr_ratio"] * group["lr"]
            phase = f"sign phase ({until})"
            if not self.in_sign_phase(group):
                phase = "SGD phase at rate " + ("?" if rates.is_meta else _span(rates))
            lines.append(f"param_group {index}: {phase}, {'?' if step.is_meta else int(step)} steps taken")
        return "\n".join([super().__repr__(), *lines])

    def kept_state(self, group: dict[str, Any]) -> Mapping[str, bool]:
        """What is kept in any phase, and whether the next step uses it, see `SignSGD.kept_state`."""
        kept = dict(super().kept_state(group))
        if group["phase"] == "sgd":
            kept = dict.fromkeys(kept, False)
        if group["sgd_momentum"] > 0:
            kept["exp_avg"] = group["phase"] == "sgd" or kept.get("exp_avg", False)
        return kept

    def new_sums(self, group: dict[str, Any]) -> Tensor | None:
        """Zeros to which a sign step adds what it measures; under a vote, what the workers have measured."""
        if group["phase"] == "sgd":
            return None
        like = group["lr_ratio"]
        if self._driver == "vote":
            index = next(i for i, g in enumerate(self.param_groups) if g is group)
            return self._voted_sums[index].to(like.device, like.dtype)
        return torch.zeros(len(group["params"]), 2, dtype=like.dtype, device=like.device)

    def options(self, group: dict[str, Any], sums: Tensor | None, rows: Sequence[int] | slice = ALL) -> Options:
        """The engines' options for the next step of some of a group's parameters, in either phase."""
        if group["phase"] == "sign":
            return super().options(group, sums, rows)._replace(measured=RULES[group["calibration"]])
        ratio = group["lr_ratio"]
        if ratio.ndim:
            ratio = ratio[rows]
        lr, decay, coupled_weight_decay = rate_and_decay(group)
        return Options(
            step=group["step"],
            rate=ratio * lr,
            decay=decay,
            coupled_weight_decay=coupled_weight_decay,
            momentum=group["sgd_momentum"],
            state_dtype=STATE_DTYPES[group["state_dtype"]],
            direction=Direction.MOMENTUM,
            sigma=None,
            seed=group["seed"],
            maximize=group["maximize"],
            stochastic_params=group["param_rounding"] != "nearest",
        )

    def finish_step(self, group: dict[str, Any], sums: Tensor | None) -> None:
        """Count the step, bring the calibrated rate up to date, and switch where it is time."""
        super().finish_step(group, sums)
        if sums is None:
            return
        rule, ratio, switch = group["calibration"], group["lr_ratio"], group["switch_step"]
        sizes = sizes_of(group["params"], ratio)
        if ratio.ndim or RULES[rule] is Measured.MOMENTUM:
            # A parameter without a gradient, or with one that is 0, says nothing.
            sizes = sizes * (sums[:, 1] != 0)
        sums = sums.T if ratio.ndim else sums.sum(dim=0)
        sizes = sizes if ratio.ndim else sizes.sum()
        state = {name: group[name] for name in CALIBRATION_STATE}
        decay = group["ema_decay"]
        alone = update_rate(rule, state, sums, sizes, lr=rate_and_decay(group)[0], ema_decay=decay)
        if switch == "auto":
            steady = steady_steps(group, alone, sizes)
            if int(group["step"]) >= round(1 / (1 - decay)) and steady >= group["switch_patience"]:
                self._switch_group(group)
        elif switch is not None and group["step"] >= switch and (ratio.is_meta or bool(group["avg_weight"].any())):
            self._switch_group(group)


def _span(rates: Tensor) -> str:
    """One rate, or the smallest and the largest of several."""
    ends = (f"{float(end):.3g}" for end in (rates.min(), rates.max()))
    return " to ".join(dict.fromkeys(ends)) if rates.numel() else "?"
