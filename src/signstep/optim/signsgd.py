"""Algorithm 1: SignSGD with momentum and dither before (or after) the sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable

from signstep.kernels import reference
from signstep.kernels.reference import Segment
from signstep.optim import calibration
from signstep.optim.dither import dither_std, expected_sign

__all__ = ["SignSGD", "signsgd"]


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    allowed: str


def _number(low: float, high: float = math.inf, *, open_end: bool = False) -> _Rule:
    end = f"{high})" if open_end or high == math.inf else f"{high}]"

    def holds(x: float) -> bool:
        return low <= x <= high and math.isfinite(x) and not (open_end and x == high)

    return _Rule(holds, f"a number in [{low}, {end}")


def _integer(low: int, high: int) -> _Rule:
    return _Rule(lambda x: low <= x < high, f"an integer in [{low}, {high})")


def _choice(*names: str) -> _Rule:
    return _Rule(lambda x: x in names, "one of " + ", ".join(repr(n) for n in names))


_FLAG = (bool,)
_RULES: dict[str, tuple[tuple[type, ...], _Rule]] = {
    "lr": ((Real, Tensor), _number(0)),
    "momentum": ((Real,), _number(0, 1, open_end=True)),
    "dither": ((Real,), _number(0)),
    "dither_decay": ((Real,), _number(0)),
    "dither_position": ((str,), _choice("pre", "post")),
    "dither_scale": ((str,), _choice("absolute", "relative")),
    "seed": ((Integral,), _integer(0, 1 << 64)),
    "weight_decay": ((Real,), _number(0)),
    "switch_step": ((Integral, type(None)), _Rule(lambda x: x is None or x >= 1, "None or an integer >= 1")),
    "ema_decay": ((Real,), _number(0, 1, open_end=True)),
    "calibration": ((str,), _choice(*calibration.RULES)),
    "sgd_momentum": ((Real,), _number(0, 1, open_end=True)),
    "decoupled_weight_decay": (_FLAG, _Rule(lambda x: True, "True or False")),
    "maximize": (_FLAG, _Rule(lambda x: True, "True or False")),
    "capturable": (_FLAG, _Rule(lambda x: True, "True or False")),
    "differentiable": (_FLAG, _Rule(lambda x: True, "True or False")),
    "foreach": ((bool, type(None)), _Rule(lambda x: True, "True, False or None")),
    "fused": ((bool, type(None)), _Rule(lambda x: True, "True, False or None")),
}


def check_options(options: dict[str, Any]) -> None:
    """Raise a TypeError or ValueError that names the first bad option, its value and what is allowed."""
    for name, value in options.items():
        if name not in _RULES:
            continue
        types, rule = _RULES[name]
        if isinstance(value, Tensor) and name == "lr" and value.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(value.shape)}")
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeError(f"Invalid {name}: {value!r} of type {type(value).__name__}, expected {rule.allowed}")
        if not rule.holds(float(value.detach()) if isinstance(value, Tensor) else value):
            raise ValueError(f"Invalid {name}: {value!r}, expected {rule.allowed}")
    if options["fused"]:
        raise RuntimeError("Invalid fused: True, this version has no fused kernels; pass fused=None or foreach=True")
    if options["capturable"] and options.get("switch_step") is not None:
        raise ValueError(
            f"Invalid switch_step: {options['switch_step']!r} with capturable=True, whose step count is on the device; "
            "pass switch_step=None and call switch()"
        )
    if options["foreach"] and options["differentiable"]:
        raise RuntimeError("Invalid foreach: True, _foreach ops do not support differentiable=True; pass foreach=None")


class Batch(NamedTuple):
    """What one step of one param_group works on: parameters that have a gradient, and their state."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    ordinals: list[int]


class SignSGD(Optimizer):
    r"""SignSGD with momentum, optionally dithered (Algorithm 1 of arXiv 2604.25550).

    .. math::
        m_{k+1} &= \beta m_k + (1 - \beta) g_k \\
        x_{k+1} &= x_k - \delta\,\mathrm{sign}(m_{k+1} + \xi_k), \qquad
        \xi_k \sim \mathcal N(0, \sigma_k^2 I), \quad \sigma_k^2 = \alpha (1 + k)^{-\gamma}

    A coordinate whose momentum is exactly 0 does not move. A momentum that is not finite makes its coordinate NaN, as a
    non-finite gradient does in torch.optim.SGD; under relative dither, all that share its rms. The noise is a pure
    function of (seed, step, parameter, element): a resumed run, every replica and every engine draw the same, and no
    generator state is kept.

    Args:
        params: parameters, (name, parameter) pairs or param_groups; a group may override every option below.
        lr (float or 1-element Tensor): delta, how far every coordinate moves per step, in units of the parameter.
        (default: 1e-3)
        momentum: beta in [0, 1); at 0 no momentum buffer is kept. (default: 0.9)
        dither: alpha of eq. (9), the noise's variance at step 0, in squared units of the momentum; 0 is no noise. A
            fixed alpha must match the momentum's scale, which changes over training: see ``dither_scale``. (default: 0)
        dither_decay: gamma of eq. (9). (default: 0.55)
        dither_position: "pre" adds the noise before the sign (Algorithm 1), "post" after it (eq. 10). (default: "pre")
        dither_scale: "absolute" is eq. (9); "relative" multiplies sigma_k by rms(m) of each tensor. (default:
        "absolute")
        seed: key of the noise, in [0, 2^64). (default: 0)
        weight_decay: (default: 0)
        decoupled_weight_decay: True is p <- p - lr * weight_decay * p (as AdamW), False adds weight_decay * p to the
            gradient (as SGD). (default: True)
        maximize: ascend instead of descend. (default: False)
        foreach: True or False picks the multi-tensor or the one-by-one implementation; None takes the multi-tensor one
            where it applies. (default: None)
        fused: None uses fused kernels where there are any; True demands them. (default: None)
        capturable: keep the step count on the parameters' device, so that a CUDA graph of the step advances it.
        (default: False)
        differentiable: let autograd see the step; the sign's own derivative is 0. (default: False)

    State:
        ``exp_avg`` per parameter, of its dtype, if momentum > 0; ``step`` per param_group, a 0-dim int64 tensor that
        counts the group's steps and is never cast on load.

    Raises:
        TypeError: an option of the wrong type or an unknown one.
        ValueError: an option out of range; the message names it, its value and the range.
        RuntimeError: a sparse gradient, or ``fused=True`` where no kernel is to be had.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = SignSGD(model.parameters(), lr=1e-3, dither=1.0, dither_decay=0.0, dither_scale="relative")
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        *,
        dither: float = 0.0,
        dither_decay: float = 0.55,
        dither_position: str = "pre",
        dither_scale: str = "absolute",
        seed: int = 0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dither": dither,
            "dither_decay": dither_decay,
            "dither_position": dither_position,
            "dither_scale": dither_scale,
            "seed": seed,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        self._init(params, defaults)

    def _init(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its own step count from 0; see `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group)
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        self._place_group_state(group)

    def _group_tensors(self, group: dict[str, Any]) -> dict[str, tuple[torch.dtype, torch.device]]:
        """The 0-dim tensors that a group keeps beside its options: dtype and device by name."""
        capturable = group["capturable"] and len(group["params"]) > 0
        return {"step": (torch.int64, group["params"][0].device if capturable else torch.device("cpu"))}

    def _place_group_state(self, group: dict[str, Any]) -> None:
        """Create what is missing and move what was loaded; load_state_dict itself moves nothing in a param_group."""
        for name, (dtype, device) in self._group_tensors(group).items():
            value = group.get(name, 0)
            if not isinstance(value, Tensor):
                value = torch.tensor(value)
            group[name] = value.to(device, dtype)

    # Options as they were before they existed, for states saved by older versions.
    _ORIGINAL: dict[str, Any] = {  # noqa: RUF012
        "dither": 0.0,
        "dither_decay": 0.55,
        "dither_position": "pre",
        "dither_scale": "absolute",
        "seed": 0,
        "weight_decay": 0.0,
        "decoupled_weight_decay": True,
        "maximize": False,
        "foreach": None,
        "fused": None,
        "capturable": False,
        "differentiable": False,
    }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self._ORIGINAL.items():
                group.setdefault(name, value)
            self._place_group_state(group)

    def _batches(self) -> list[tuple[dict[str, Any], Batch]]:
        """Each group that has gradients, with its tensors; momentum buffers are made on first use."""
        batches = []
        ordinal = 0
        for group in self.param_groups:
            batch = Batch([], [], [], [])
            for p in group["params"]:
                ordinal += 1
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients; parameter {ordinal - 1} of shape "
                        f"{tuple(p.shape)} has one: use sparse=False in its layer, or torch.optim.SparseAdam for it"
                    )
                batch.params.append(p)
                batch.grads.append(p.grad)
                batch.ordinals.append(ordinal - 1)
                if self._keeps_exp_avg(group):
                    state = self.state[p]
                    if "exp_avg" not in state:
                        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    batch.exp_avgs.append(state["exp_avg"])
            if batch.params:
                # The model may have moved since the group was made.
                if any(group[name].device != device for name, (_, device) in self._group_tensors(group).items()):
                    self._place_group_state(group)
                batches.append((group, batch))
        return batches

    def _keeps_exp_avg(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"] > 0)

    def _graph_capture_health_check(self) -> None:
        # torch renamed it between 2.6 and 2.13.
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; with a closure, re-evaluate the loss under grad first and return it."""
        self._graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Not asked while compiling: a guard on the state's keys would compile anew at every step.
        stateless = not torch.compiler.is_compiling() and not self.state
        for group, batch in self._batches():
            if not (stateless and self._changes_nothing(group, batch)):
                self._step_group(group, batch)
        return loss

    def _changes_nothing(self, group: dict[str, Any], batch: Batch) -> bool:
        """True for a step with lr 0 and zero gradients, which is not counted while the optimizer has no state.

        torch.distributed.checkpoint takes such a step, to make state, whenever it finds an optimizer without any.
        """
        lr = group["lr"]
        on_host = not isinstance(lr, Tensor) or lr.device.type == "cpu"
        if group["capturable"] or not on_host or lr != 0:
            return False
        return not any(g.any() for g in batch.grads)

    def _step_group(self, group: dict[str, Any], batch: Batch, sums: Tensor | None = None) -> None:
        signsgd(
            batch.params,
            batch.grads,
            batch.exp_avgs,
            ordinals=batch.ordinals,
            step=group["step"],
            sums=sums,
            sums_applied=group.get("calibration") == "applied",
            **{name: group[name] for name in SignSGD._ORIGINAL if name not in ("fused", "capturable")},
            lr=group["lr"],
            momentum=group["momentum"],
        )
        group["step"] += 1


def signsgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    step: Tensor,
    lr: float | Tensor,
    momentum: float,
    dither: float = 0.0,
    dither_decay: float = 0.55,
    dither_position: str = "pre",
    dither_scale: str = "absolute",
    seed: int = 0,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    foreach: bool | None = None,
    differentiable: bool = False,
    ordinals: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    sums: Tensor | None = None,
    sums_applied: bool = False,
) -> None:
    """One step of Algorithm 1 on lists of tensors, in place on params and exp_avgs; gradients are not touched.

    Args:
        params: dense tensors of any float or complex dtype (a complex one is two real coordinates).
        grads: their gradients.
        exp_avgs: their momentum buffers, updated; empty if momentum is 0.
        step: k, a 0-dim int64 tensor on the CPU or the parameters' device; read, not advanced.
        lr, momentum, dither, dither_decay, dither_position, dither_scale, seed, weight_decay, decoupled_weight_decay,
        maximize,
        foreach, differentiable: as in `SignSGD`.
        ordinals: for each parameter, its number in the noise's key; None: 0, 1, 2, ...
        offsets: for each parameter, the row-major index of its first element in the whole tensor of which it is a
            shard; None: 0. "relative" dither takes the rms of what it is given.
        sums: shape (2,), to which [<s, g>, ||g||^2] over all tensors is added, with s = sign(m) and g the gradient that
            entered the momentum.
        sums_applied: s is the expected dithered sign instead.
    """
    if ordinals is None:
        ordinals = range(len(params))
    if offsets is None:
        offsets = [0] * len(params)
    implementation = _multi_tensor_signsgd if picks_foreach(foreach, differentiable, params) else _single_tensor_signsgd
    options = _Options(
        step=step,
        lr=scalar(lr),
        momentum=momentum,
        dither=_Dither(dither, dither_decay, dither_position, dither_scale, seed) if dither > 0 else None,
        weight_decay=weight_decay if decoupled_weight_decay else 0.0,
        coupled_weight_decay=0.0 if decoupled_weight_decay else weight_decay,
        maximize=maximize,
        ordinals=ordinals,
        offsets=offsets,
        sums=sums,
        sums_applied=sums_applied,
    )
    implementation(params, grads, exp_avgs, options)


def picks_foreach(foreach: bool | None, differentiable: bool, params: Sequence[Tensor]) -> bool:
    """The user's choice, or else multi-tensor for plain tensors on any device: one draw of noise serves them all."""
    if foreach is None:
        return not differentiable and all(type(p) in (Tensor, torch.nn.Parameter) for p in params)
    return foreach


class _Dither(NamedTuple):
    alpha: float
    decay: float
    position: str
    scale: str
    seed: int

    def sigmas(self, ms: Sequence[Tensor], step: Tensor) -> list[Tensor]:
        """Eq. (9) for each tensor, 0-dim float32."""
        sigma = dither_std(step, self.alpha, self.decay)
        if self.scale == "absolute":
            return [sigma] * len(ms)
        return [sigma * m.float().square().mean().sqrt() for m in ms]


class _Options(NamedTuple):
    """What `signsgd` was asked for."""

    step: Tensor
    lr: float | Tensor
    momentum: float
    dither: _Dither | None
    weight_decay: float
    coupled_weight_decay: float
    maximize: bool
    ordinals: Sequence[int]
    offsets: Sequence[int]
    sums: Tensor | None
    sums_applied: bool


def scalar(lr: float | Tensor) -> float | Tensor:
    """A tensor of one element without its dimensions, so that it may be on the CPU while the parameters are not."""
    return lr.squeeze() if isinstance(lr, Tensor) else lr


def real(x: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary coordinates, another as it is."""
    return torch.view_as_real(x) if torch.is_complex(x) else x


def _apply_steps(params: list[Tensor], directions: Sequence[Tensor], lr: float | Tensor) -> None:
    """Param <- param - lr * direction, in at least float32 and rounded to the parameter's dtype once.

    May overwrite directions.
    """
    if isinstance(lr, Tensor):
        wide = [d.to(torch.promote_types(p.dtype, torch.float32)) for p, d in zip(params, directions, strict=True)]
        torch._foreach_mul_(wide, -lr)
        torch._foreach_add_(params, wide)
    else:
        torch._foreach_add_(params, list(directions), alpha=-lr)


def _add_sums(sums: Tensor, directions: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add [<s, g>, ||g||^2] over the lists to sums, in the dtype of sums."""
    for direction, grad in zip(directions, grads, strict=True):
        g = grad.to(sums.dtype)
        sums += torch.stack([(direction.to(sums.dtype) * g).sum(), g.square().sum()]).to(sums.device)


def _segment(param: Tensor, m: Tensor, ordinal: int, offset: int) -> Segment:
    return Segment(ordinal, offset * (2 if torch.is_complex(param) else 1), m.numel())


def _single_tensor_signsgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    options: _Options,
) -> None:
    for i, whole in enumerate(params):
        param, grad = real(whole), real(grads[i])
        if options.maximize:
            grad = -grad
        if options.coupled_weight_decay != 0:
            grad = grad.add(param, alpha=options.coupled_weight_decay)
        if options.weight_decay != 0:
            param.mul_(1 - options.lr * options.weight_decay)
        m = grad
        if options.momentum > 0:
            m = real(exp_avgs[i])
            m.lerp_(grad, 1 - options.momentum)
        expected = torch.sign(m)
        if options.dither is None:
            direction = reference.sign(m)
        else:
            (sigma,) = options.dither.sigmas([m], options.step)
            (direction,) = reference.directions(
                [m.detach()],
                [sigma],
                [_segment(whole, m, options.ordinals[i], options.offsets[i])],
                seed=options.dither.seed,
                step=options.step,
                position=options.dither.position,
            )
            if options.sums_applied and options.dither.position == "pre":
                expected = expected_sign(m, sigma)
        if options.sums is not None:
            _add_sums(options.sums, [expected], [grad])
        if isinstance(options.lr, Tensor):
            param.add_(direction.to(torch.promote_types(param.dtype, torch.float32)) * -options.lr)
        else:
            param.add_(direction, alpha=-options.lr)


def _multi_tensor_signsgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    options: _Options,
) -> None:
    lists = [list(params), list(grads)] + ([list(exp_avgs)] if options.momentum > 0 else [])
    grouped = Optimizer._group_tensors_by_device_and_dtype(lists, with_indices=True)  # type: ignore[arg-type]
    for columns, indices in grouped.values():
        ps, gs, *state = [[real(x) for x in column if x is not None] for column in columns]
        if options.maximize:
            gs = list(torch._foreach_neg(gs))
        if options.coupled_weight_decay != 0:
            gs = list(torch._foreach_add(gs, ps, alpha=options.coupled_weight_decay))
        if options.weight_decay != 0:
            torch._foreach_mul_(ps, 1 - options.lr * options.weight_decay)
        ms = gs
        if options.momentum > 0:
            ms = state[0]
            torch._foreach_lerp_(ms, gs, 1 - options.momentum)
        if options.dither is None:
            if options.sums is not None:
                _add_sums(options.sums, torch._foreach_sign(ms), gs)
            # sign, with NaN where m is not finite: see reference.sign.
            directions = list(torch._foreach_sign(ms))
            torch._foreach_add_(directions, ms, alpha=0)
            _apply_steps(ps, directions, options.lr)
            continue
        sigmas = options.dither.sigmas(ms, options.step)
        if options.sums is not None:
            expected = options.sums_applied and options.dither.position == "pre"
            signs = [expected_sign(m, s) if expected else torch.sign(m) for m, s in zip(ms, sigmas, strict=True)]
            _add_sums(options.sums, signs, gs)
        segments = [
            _segment(params[i], m, options.ordinals[i], options.offsets[i]) for i, m in zip(indices, ms, strict=True)
        ]
        directions = reference.directions(
            ms, sigmas, segments, seed=options.dither.seed, step=options.step, position=options.dither.position
        )
        _apply_steps(ps, directions, options.lr)
