"""Algorithm 1: SignSGD with momentum and dither before (or after) the sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable

from signstep.kernels import fused as engines
from signstep.kernels import momentum as buffers
from signstep.kernels import reference
from signstep.kernels.engine import Dither, Options, Tensors, real, real_tensors, sigmas
from signstep.kernels.reference import Segment
from signstep.optim.dither import dither_std, expected_sign
from signstep.optim.options import check_options

__all__ = ["SignSGD", "signsgd"]


_OWN_DTYPE = ("exp_avg_scale", "mean_square")
"""State that is float32 whatever the parameter is."""


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
        dither_scale: "absolute" is eq. (9); "relative" multiplies sigma_k by the rms of each tensor's m_k, which the
            last step left, so that no second pass over memory is needed; the first step, with m_0 = 0, is not dithered.
            (default: "absolute")
        state_dtype (torch.dtype): how the momentum is kept. None is the parameter's dtype, to the nearest;
            torch.float32; torch.bfloat16 (2 bytes per element) and torch.int8 (1 byte, and a scale per 256) round
            stochastically, see `signstep.kernels.momentum`. (default: None)
        seed: key of the noise, in [0, 2^64). (default: 0)
        weight_decay: (default: 0)
        decoupled_weight_decay: True is p <- p - lr * weight_decay * p (as AdamW), False adds weight_decay * p to the
            gradient (as SGD). (default: True)
        maximize: ascend instead of descend. (default: False)
        foreach: True or False picks the multi-tensor or the one-by-one implementation; None takes the multi-tensor one
            where it applies. (default: None)
        fused: True demands the fused kernels, which do the step in one pass over memory (CPU: the native library; GPU:
            Triton, which has not run on one yet); None takes them on CPUs, if nothing else was asked for and not inside
            torch.compile. (default: None)
        capturable: keep the step count on the parameters' device, so that a CUDA graph of the step advances it.
        (default: False)
        differentiable: let autograd see the step; the sign's own derivative is 0. (default: False)

    State:
        per parameter ``exp_avg`` if momentum > 0, with ``exp_avg_scale`` in 8 bits, and ``mean_square`` (0-dim float32)
        of the momentum if dither is relative; ``step`` per param_group, a 0-dim int64 tensor that counts its steps.
        What has a dtype of its own keeps it when it is loaded.

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

    _driver: Literal["step", "backward", "vote"] = "step"

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
        state_dtype: torch.dtype | None = None,
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
            "state_dtype": state_dtype,
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
        if self.steps_in_backward:
            raise RuntimeError(
                "add_param_group: this optimizer steps inside backward, what the model had when it was attached"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group)
            if group["fused"]:
                engines.require(group["params"])
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        self._place_group_state(group)

    # What can move the parameters in place of `step`: `attach_to_backward`, and the votes of `signstep.distributed`.

    @property
    def takes_votes(self) -> bool:
        """Gradients are what workers have elected: only their sign counts. Momentum, dither and coupled weight decay
        were applied on the workers' side.
        """
        return self._driver == "vote"

    @property
    def steps_in_backward(self) -> bool:
        """Parameters move inside backward, see `signstep.optim.attach_to_backward`."""
        return self._driver == "backward"

    def start_taking_votes(self) -> None:
        """Leave momentum, dither and coupled weight decay to the workers of a vote from now on."""
        self._driver = "vote"

    def start_stepping_in_backward(self) -> None:
        """Let backward move the parameters from now on; groups can no longer be added."""
        self._driver = "backward"

    @property
    def calibrates(self) -> bool:
        """The optimizer measures its steps against the gradient, so a vote must call `receive_voted_sums`."""
        return False

    def receive_voted_sums(self, sums: Sequence[Tensor]) -> None:
        """Take what a vote measured for the next step of an optimizer that `calibrates`.

        Args:
            sums: for each param_group, [<v, g>, ||g||^2] of the votes v, shape (2,): means over the workers.
        """
        raise TypeError(f"{type(self).__name__} does not calibrate a learning rate")

    def is_sign_step(self, group: dict[str, Any], step: int) -> bool:
        """Whether step number `step` of a param_group, counted from 0, takes the sign of its momentum."""
        return True

    def count_step(self, group: dict[str, Any]) -> None:
        """Count a step that other workers of a vote take and this one does not, as it has no more batches."""
        self._finish_step(group, self._new_sums(group))

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
        "state_dtype": None,
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; what has a dtype of its own keeps it, see `torch.optim.Optimizer.load_state_dict`."""
        loaded: dict[str, Any] = {}

        def restore(_: Optimizer) -> None:
            # torch has cast all state to the parameters' dtype.
            for saved, group in zip(loaded["param_groups"], self.param_groups, strict=True):
                for index, p in zip(saved["params"], group["params"], strict=True):
                    for name, value in loaded["state"].get(index, {}).items():
                        own = group["state_dtype"] is not None if name == "exp_avg" else name in _OWN_DTYPE
                        if own:
                            self.state[p][name] = value.to(p.device)

        # The last of the hooks before loading sees what is loaded, and the first one after comes before the user's.
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, state: loaded.update(state)),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _batches(self) -> list[tuple[dict[str, Any], Tensors]]:
        """Each group that has gradients, with its tensors; state is made on first use."""
        batches = []
        first = 0
        for group in self.param_groups:
            batch = self._batch(group, group["params"], range(first, first + len(group["params"])))
            first += len(group["params"])
            if batch.params:
                # The model may have moved since the group was made.
                if any(group[name].device != device for name, (_, device) in self._group_tensors(group).items()):
                    self._place_group_state(group)
                batches.append((group, batch))
        return batches

    def _batch(self, group: dict[str, Any], params: Sequence[Tensor], ordinals: Sequence[int]) -> Tensors:
        """Those of a group's parameters that have a gradient, with their state."""
        batch = Tensors([], [], [], [], [], [], [])
        keeps_exp_avg, needs_mean_square = self._keeps_exp_avg(group), self._needs_mean_square(group)
        for p, ordinal in zip(params, ordinals, strict=True):
            grad = p.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients; parameter {ordinal} of shape "
                    f"{tuple(p.shape)} has one: use sparse=False in its layer, or torch.optim.SparseAdam for it"
                )
            batch.params.append(p)
            batch.grads.append(grad)
            batch.ordinals.append(ordinal)
            batch.offsets.append(0)
            if not (keeps_exp_avg or needs_mean_square):
                continue
            state = self.state[p]
            if keeps_exp_avg:
                if "exp_avg" not in state:
                    state.update(buffers.new_momentum(p, group["state_dtype"]))
                m, scale = state["exp_avg"], state.get("exp_avg_scale")
                if m.dtype != (group["state_dtype"] or p.dtype) or (scale is None) == (m.dtype == torch.int8):
                    buffers.check_state(real(p), real(m), scale, group["state_dtype"])
                batch.exp_avgs.append(m)
                if scale is not None:
                    batch.scales.append(scale)
            if needs_mean_square:
                if "mean_square" not in state:
                    # Of the momentum that is there, if relative dither comes late.
                    m = (
                        buffers.read(state["exp_avg"], state.get("exp_avg_scale"))
                        if keeps_exp_avg
                        else torch.zeros_like(p)
                    )
                    state["mean_square"] = buffers.mean_square(real(m)).to(p.device)
                batch.mean_squares.append(state["mean_square"])
        return batch

    def _needs_mean_square(self, group: dict[str, Any]) -> bool:
        return bool(group["dither"] > 0 and group["dither_scale"] == "relative" and not self.takes_votes)

    def _keeps_exp_avg(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"] > 0 and not self.takes_votes)

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

    def _changes_nothing(self, group: dict[str, Any], batch: Tensors) -> bool:
        """True for a step with lr 0 and zero gradients, which is not counted while the optimizer has no state.

        torch.distributed.checkpoint takes such a step, to make state, whenever it finds an optimizer without any.
        """
        lr = group["lr"]
        on_host = not isinstance(lr, Tensor) or lr.device.type == "cpu"
        if group["capturable"] or not on_host or lr != 0:
            return False
        return not any(_of_all_ranks(g.any()) for g in batch.grads)

    def _step_group(self, group: dict[str, Any], batch: Tensors) -> None:
        sums = self._new_sums(group)
        self._step_params(group, local_tensors(batch) if self.takes_votes else batch, sums)
        self._finish_step(group, sums)

    def _new_sums(self, group: dict[str, Any]) -> Tensor | None:
        """Where a step's [<s, g>, ||g||^2] is added up, if anyone wants to know."""
        return None

    def _step_params(self, group: dict[str, Any], batch: Tensors, sums: Tensor | None) -> None:
        """Move the parameters of a batch, which may be a part of the group's, with the group's present step count."""
        options = {name: group[name] for name in ("lr", "momentum", *SignSGD._ORIGINAL) if name != "capturable"}
        if self.takes_votes:
            options |= {"momentum": 0.0, "dither": 0.0, "maximize": False}
            if not group["decoupled_weight_decay"]:
                options["weight_decay"] = 0.0
            sums = None
        signsgd(
            batch.params,
            batch.grads,
            batch.exp_avgs,
            batch.scales,
            batch.mean_squares,
            ordinals=batch.ordinals,
            step=group["step"],
            sums=sums,
            sums_applied=group.get("calibration") == "applied",
            **options,
        )

    def _finish_step(self, group: dict[str, Any], sums: Tensor | None) -> None:
        """What comes once per step, after all of the group's parameters have moved."""
        group["step"] += 1


def signsgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    scales: Sequence[Tensor] = (),
    mean_squares: Sequence[Tensor] = (),
    *,
    step: Tensor,
    lr: float | Tensor,
    momentum: float,
    dither: float = 0.0,
    dither_decay: float = 0.55,
    dither_position: str = "pre",
    dither_scale: str = "absolute",
    state_dtype: torch.dtype | None = None,
    seed: int = 0,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
    differentiable: bool = False,
    ordinals: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    sums: Tensor | None = None,
    sums_applied: bool = False,
) -> None:
    """One step of Algorithm 1 on lists of tensors, in place on params and state; gradients are not touched.

    Args:
        params: dense tensors of any float or complex dtype (a complex one is two real coordinates).
        grads: their gradients.
        exp_avgs: their momentum buffers, updated; empty if momentum is 0.
        scales: of 8-bit momentum, see `signstep.kernels.momentum.new_momentum`; else empty.
        mean_squares: for "relative" dither, the mean square of each tensor's m_k, 0-dim float32, replaced by that of
            m_{k+1}; else empty.
        step: k, a 0-dim int64 tensor on the CPU or the parameters' device; read, not advanced.
        lr, momentum, dither, dither_decay, dither_position, dither_scale, state_dtype, seed, weight_decay,
        decoupled_weight_decay, maximize, foreach, fused, differentiable: as in `SignSGD`.
        ordinals: for each parameter, its number in the noise's key; None: 0, 1, 2, ...
        offsets: for each parameter, the row-major index of its first element in the whole tensor of which it is a
            shard; None: 0. "relative" dither takes the rms of what it is given, 8-bit momentum its blocks.
        sums: shape (2,), to which [<s, g>, ||g||^2] over all tensors is added, with s = sign(m) and g the gradient that
            entered the momentum.
        sums_applied: s is the expected dithered sign instead.
    """
    noise = Dither(dither_position, dither_std(step, dither, dither_decay)) if dither > 0 else None
    lr = scalar(lr)
    decay, coupled_weight_decay = decays(lr, weight_decay, decoupled_weight_decay)
    options = Options(
        step=step,
        rate=lr,
        decay=decay,
        coupled_weight_decay=coupled_weight_decay,
        momentum=momentum,
        state_dtype=state_dtype,
        dither=noise,
        seed=seed,
        maximize=maximize,
        sums=sums,
        sums_applied=sums_applied,
    )
    ordinals = list(range(len(params)) if ordinals is None else ordinals)
    offsets = [0] * len(params) if offsets is None else list(offsets)
    lists = (list(params), list(grads), list(exp_avgs), list(scales), list(mean_squares))
    move(Tensors(*lists, ordinals, offsets), options, foreach=foreach, fused=fused, differentiable=differentiable)


def move(tensors: Tensors, options: Options, *, foreach: bool | None, fused: bool | None, differentiable: bool) -> None:
    """Take a step with the implementation that was asked for, or else the fastest that there is."""
    if fused:
        engines.require(tensors.params)
    elif fused is None and foreach is None and not differentiable and not torch.compiler.is_compiling():
        alike = all(g.dtype == p.dtype for g, p in zip(tensors.grads, tensors.params, strict=True))
        tracked = torch.is_grad_enabled() and any(p.requires_grad for p in tensors.params)
        fused = alike and not tracked and engines.by_default(tensors.params)
    # One draw of noise serves all tensors, on any device.
    if foreach is None:
        foreach = not differentiable and {type(p) for p in tensors.params} <= {Tensor, torch.nn.Parameter}
    implementation = _multi_tensor_signsgd if foreach else _single_tensor_signsgd
    if fused:
        _fused_signsgd(tensors, options)
    else:
        implementation(real_tensors(tensors), options)


def scalar(lr: float | Tensor) -> float | Tensor:
    """A tensor of one element without its dimensions, so that it may be on the CPU while the parameters are not."""
    return lr.squeeze() if isinstance(lr, Tensor) else lr


def decays(lr: float | Tensor, weight_decay: float, decoupled: bool) -> tuple[float | Tensor, float]:
    """What the parameter is multiplied by, and what times the parameter is added to the gradient."""
    if not decoupled:
        return 1.0, weight_decay
    return (1 - lr * weight_decay if weight_decay != 0 else 1.0), 0.0


def _of_all_ranks(x: Tensor) -> Tensor:
    """A number that a sharded tensor was reduced to, over all shards."""
    whole: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole


def local_tensors(tensors: Tensors) -> Tensors:
    """Of every tensor that is sharded along its first dimension, the shard of this rank; others as they are."""

    def local(x: Any) -> Any:
        return x.to_local() if hasattr(x, "to_local") else x

    def begin(p: Any) -> int:
        if not hasattr(p, "to_local"):
            return 0
        rows = -(-p.shape[0] // p.device_mesh.size())
        return int(min(rows * p.device_mesh.get_local_rank(), p.shape[0]) * math.prod(p.shape[1:]))

    offsets = [offset + begin(p) for p, offset in zip(tensors.params, tensors.offsets, strict=True)]
    columns: list[Any] = [[local(x) for x in column] for column in tensors[:5]]
    return Tensors(*[*columns, tensors.ordinals, offsets])


def _wide(x: Tensor, param: Tensor | None = None) -> Tensor:
    """X in the dtype to compute in: at least float32, and the parameter's if that is wider."""
    return x.to(torch.promote_types((x if param is None else param).dtype, torch.float32))


def _apply_steps(params: list[Tensor], directions: Sequence[Tensor], options: Options) -> None:
    """Param <- decay * param - rate * direction, in at least float32 and rounded to the parameter's dtype once.

    May overwrite directions.
    """
    rate, decay = options.rate, options.decay
    decays = isinstance(decay, Tensor) or decay != 1
    targets = [_wide(p) for p in params] if decays else params
    if decays:
        torch._foreach_mul_(targets, decay)
    steps = [_wide(d, p) for d, p in zip(directions, params, strict=True)]
    if isinstance(rate, Tensor):
        torch._foreach_mul_(steps, -rate.to(params[0].device))
        torch._foreach_add_(targets, steps)
    else:
        torch._foreach_add_(targets, steps, alpha=-rate)
    if targets[0] is not params[0]:
        torch._foreach_copy_(params, targets)


def _add_sums(sums: Tensor, directions: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add [<s, g>, ||g||^2] over the lists to sums, in the dtype of sums."""
    for direction, grad in zip(directions, grads, strict=True):
        g = grad.to(sums.dtype)
        sums += torch.stack([(direction.to(sums.dtype) * g).sum(), g.square().sum()]).to(sums.device)


def _single_tensor_signsgd(tensors: Tensors, options: Options) -> None:
    for i, (param, grad) in enumerate(zip(tensors.params, tensors.grads, strict=True)):
        if options.maximize:
            grad = -grad
        if options.coupled_weight_decay != 0:
            grad = _wide(grad).add(_wide(param), alpha=options.coupled_weight_decay)
        m = buffers.update_entry(tensors, i, grad, options)
        expected = torch.sign(m)
        if options.gradient_step:
            # Under differentiable=True autograd holds this step's average, which the next step overwrites.
            direction = m.clone() if torch.is_grad_enabled() else m
        elif options.dither is None:
            direction = reference.sign(m)
        else:
            (sigma,) = sigmas(options.dither, tensors.mean_squares[i : i + 1], 1)
            (direction,) = reference.directions(
                [m.detach()],
                [sigma],
                [Segment(tensors.ordinals[i], tensors.offsets[i], m.numel())],
                seed=options.seed,
                step=options.step,
                position=options.dither.position,
            )
            if options.sums_applied and options.dither.position == "pre":
                expected = expected_sign(m, sigma)
        if tensors.mean_squares:
            tensors.mean_squares[i].copy_(buffers.mean_square(m))
        if options.sums is not None:
            _add_sums(options.sums, [expected], [grad])
        target = param
        if isinstance(options.decay, Tensor) or options.decay != 1:
            # Of a copy: autograd holds the factor of an lr that it differentiates, and param is overwritten.
            target = param.to(torch.promote_types(param.dtype, torch.float32), copy=True) * options.decay
        if isinstance(options.rate, Tensor):
            target = target + _wide(direction, param) * -options.rate.to(param.device)
        else:
            target = torch.add(target, _wide(direction, param), alpha=-options.rate)
        param.copy_(target)


def _multi_tensor_signsgd(tensors: Tensors, options: Options) -> None:
    grouped = Optimizer._group_tensors_by_device_and_dtype([tensors.params, tensors.grads], with_indices=True)  # type: ignore[list-item]
    for columns, indices in grouped.values():
        ps, gs = ([x for x in column if x is not None] for column in columns)
        if options.maximize:
            gs = list(torch._foreach_neg(gs))
        if options.coupled_weight_decay != 0:
            wide = [_wide(p) for p in ps]
            gs = list(torch._foreach_add([_wide(g) for g in gs], wide, alpha=options.coupled_weight_decay))
        ms = gs
        if tensors.exp_avgs and options.state_dtype is None and gs[0].dtype == ps[0].dtype:
            ms = [tensors.exp_avgs[i] for i in indices]
            torch._foreach_lerp_(ms, gs, 1 - options.momentum)
        elif tensors.exp_avgs:
            ms = [buffers.update_entry(tensors, i, g, options) for i, g in zip(indices, gs, strict=True)]
        mean_squares = [tensors.mean_squares[i] for i in indices] if tensors.mean_squares else []
        directions = _directions(tensors, options, indices, ms, gs, mean_squares)
        for kept, m in zip(mean_squares, ms, strict=bool(mean_squares)):
            kept.copy_(buffers.mean_square(m))
        _apply_steps(ps, directions, options)


def _directions(
    tensors: Tensors,
    options: Options,
    indices: Sequence[int],
    ms: list[Tensor],
    gs: list[Tensor],
    mean_squares: list[Tensor],
) -> list[Tensor]:
    """What the parameters move along, for tensors of one device and dtype; adds to the sums."""
    if options.gradient_step:
        return [m.to(torch.promote_types(m.dtype, torch.float32), copy=True) for m in ms]
    if options.dither is None:
        directions = list(torch._foreach_sign(ms))
        if options.sums is not None:
            _add_sums(options.sums, directions, gs)
        # sign, with NaN where m is not finite: see reference.sign.
        torch._foreach_add_(directions, ms, alpha=0)
        return directions
    stds = sigmas(options.dither, mean_squares, len(ms))
    if options.sums is not None:
        expected = options.sums_applied and options.dither.position == "pre"
        signs = [expected_sign(m, s) if expected else torch.sign(m) for m, s in zip(ms, stds, strict=True)]
        _add_sums(options.sums, signs, gs)
    segments = [Segment(tensors.ordinals[i], tensors.offsets[i], m.numel()) for i, m in zip(indices, ms, strict=True)]
    return reference.directions(
        ms, stds, segments, seed=options.seed, step=options.step, position=options.dither.position
    )


def _fused_signsgd(tensors: Tensors, options: Options) -> None:
    engines.step(tensors, options)
