"""Algorithm 1: SignSGD with momentum and dither before (or after) the sign."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable

from signstep.kernels import fused as fused_engines
from signstep.kernels.engine import Direction, Options, Tensors, real
from signstep.kernels.momentum import MOMENTUM, check_momentum, freed, is_freed
from signstep.kernels.plain import multi_tensor_step, single_tensor_step
from signstep.optim import step_length
from signstep.optim.dither import dither_std
from signstep.optim.options import (
    SIGNSGD_OPTIONS,
    STATE_DTYPES,
    Option,
    check_options,
    name_state_dtype,
    rate_and_decay,
)
from signstep.optim.ordinals import check_first_ordinal, noise_ordinals
from signstep.optim.saving import changes_nothing, completed_group, fill_freed
from signstep.optim.shards import (
    ALL,
    WHOLE,
    Measurement,
    Shards,
    add_up,
    check_sharding,
    is_sharded,
    mean_square,
    new_momentum,
    shards_of,
)

__all__ = ["ENGINE_CHOICE", "SignSGD", "signsgd"]

ENGINE_CHOICE = ("foreach", "fused", "differentiable")
"""The options of a param_group that choose between engines, see `signsgd`."""

_OWN_DTYPE = ("exp_avg_scale", "mean_square")
"""State that is float32 for parameters of every dtype."""

_DIRECTIONS = {"pre": Direction.PRE, "post": Direction.POST, "expected": Direction.EXPECTED}

_CAPTURE_CHECK = "_accelerator_graph_capture_health_check"
if not hasattr(Optimizer, _CAPTURE_CHECK):  # before torch 2.9
    _CAPTURE_CHECK = "_cuda_graph_capture_health_check"


class SignSGD(Optimizer):
    r"""SignSGD with momentum, optionally dithered (Algorithm 1 of arXiv 2604.25550).

    .. math::
        m_{k+1} &= \beta m_k + (1 - \beta) g_k \\
        x_{k+1} &= x_k - \delta\,\mathrm{sign}(m_{k+1} + \xi_k), \qquad
        \xi_k \sim \mathcal N(0, \sigma_k^2 I), \quad \sigma_k^2 = \alpha (1 + k)^{-\gamma}

    A coordinate whose momentum is exactly 0 does not move. A momentum that is not finite makes its coordinate NaN, as a
    non-finite gradient does in torch.optim.SGD; under relative dither it makes its whole tensor NaN. The noise is a
    pure function of (seed, step, parameter, element): a resumed run, every replica and every engine draw the same
    noise, and no generator state is kept.

    Args:
        params: parameters, (name, parameter) pairs or param_groups; a group may override every option below.
        lr (float or 1-element Tensor): delta, how far every coordinate moves per step, in units of the parameter: near
            AdamW's, far below SGD's. Above 0.03 the constructor warns, once. (default: 1e-3)
        momentum: beta in [0, 1); at 0 no momentum buffer is kept. (default: 0.9)
        dither: alpha of eq. (9), the noise's variance at step 0, in squared units of the momentum; 0 is no noise. A
            fixed alpha must match the momentum's scale, which changes over training: see ``dither_scale``. (default: 0)
        dither_decay: gamma of eq. (9). (default: 0.55)
        dither_position: "pre" adds the noise before the sign (Algorithm 1), "post" after it (eq. 10). "expected" draws
            none: the step is the expectation of "pre" (Sec. IV), which is not one bit. (default: "pre")
        dither_scale: "absolute" is eq. (9); "relative" multiplies sigma_k by the rms of each tensor's m_k, which the
            last step left, so that no second pass over memory is needed; the first step, with m_0 = 0, is not dithered.
            (default: "absolute")
        dither_law: "gaussian" is Algorithm 1; "uniform" draws from [-D, D] with D = sqrt(3) sigma_k, of the same
            variance: the expected sign is then linear, m / D between -1 and 1 (Schuchman 1964). (default: "gaussian")
        state_dtype (torch.dtype or str): how the momentum is kept. None is the parameter's dtype, to the nearest;
            torch.float32; torch.bfloat16 (2 bytes per element) and torch.int8 (1 byte, and a scale per 256) round
            stochastically, see `signstep.kernels.momentum`. Param_groups keep the name, as "int8". (default: None)
        param_rounding (str): how the new bfloat16 parameters are rounded. "stochastic" rounds up or down at random, so
            that on average no step is lost, see `signstep.kernels.rounding`; "nearest" loses every step below half the
            spacing of bfloat16: at lr 1e-3 weights above 0.5 never move. None is "stochastic" for bfloat16. Other
            parameters are always rounded to the nearest: float32 has bits to spare, float16 weights above 0.25 stand
            still at lr 1e-4, and float16 with "stochastic" is refused. Without fused kernels the noise costs as much
            as dither. (default: None)
        seed: key of the noise, in [0, 2^64). Two optimizers of one seed draw the same noise for parameters of the same
            number, see `noise_ordinals`. (default: 0)
        weight_decay: (default: 0)
        decoupled_weight_decay: True is p <- p - lr * weight_decay * p (as AdamW), False adds weight_decay * p to the
            gradient (as SGD). (default: True)
        maximize: ascend instead of descend. (default: False)
        foreach: True or False picks the multi-tensor or the one-by-one implementation; None takes the multi-tensor one
            where it applies. (default: None)
        fused: True demands the fused kernels, which do the step in one pass over memory (CPU: the native library; GPU:
            Triton); None takes them where they can be used, if nothing else was asked for, and warns where they cannot.
            No GPU has run the Triton kernels yet: on each they must first pass `signstep.kernels.self_check`. Inside
            torch.compile they are one operator. (default: None)
        capturable: keep the step count on the parameters' device, so that a CUDA graph of the step advances it.
            (default: False)
        differentiable: let autograd see the step; the sign's own derivative is 0. (default: False)

    A param_group may have ``first_ordinal``, the number of its first parameter in the noise, see `noise_ordinals`.

    State:
        per parameter ``exp_avg`` if momentum > 0, with ``exp_avg_scale`` in 8 bits, and ``mean_square`` (0-dim float32)
        of the momentum if dither is relative; ``step`` per param_group, a 0-dim int64 tensor that counts its steps.
        State that has a dtype of its own keeps it when it is loaded. Under `fully_shard` momentum is sharded as its
        parameter is.

    Raises:
        TypeError: an option of the wrong type or an unknown one.
        ValueError: an option out of range; the message names it, its value and the range. A parameter that is sharded
            other than along dimension 0.
        RuntimeError: a sparse gradient, ``fused=True`` where there is no kernel, or ``differentiable=True`` where
            parameters are sharded.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = SignSGD(model.parameters(), lr=1e-3, dither=1.0, dither_decay=0.0, dither_scale="relative")
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = SIGNSGD_OPTIONS
    """The options that the constructor takes; a param_group may override each."""

    calibrates: ClassVar[bool] = False
    """The optimizer measures its steps against the gradient, so a vote must call `receive_voted_sums`."""

    _driver: Literal["step", "backward", "vote"] = "step"
    _step_length_said = False

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

    def _init(self, params: ParamsT, values: Mapping[str, Any]) -> None:
        """Construct from the arguments of a constructor, which are the options and others."""
        defaults = {name: value for name, value in values.items() if name in self.OPTIONS}
        check_options(defaults)
        name_state_dtype(defaults)
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
            name_state_dtype(group)
            check_first_ordinal(group)
            own = check_sharding(group["params"], differentiable=group["differentiable"])
            if group["fused"]:
                fused_engines.require(own)
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        self._place_group_state(group)
        said = step_length.advice(group["lr"])
        if said is not None and not self._step_length_said:
            self._step_length_said = True
            step_length.warn(f"{type(self).__name__}: {said}")

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

    def receive_voted_sums(self, sums: Sequence[Tensor]) -> None:
        """Take what a vote measured for the next step of an optimizer that `calibrates`.

        Args:
            sums: for each param_group, what is measured of each of its parameters, shape (n, 2), with the votes for
                signs: means over the workers.
        """
        raise TypeError(f"{type(self).__name__} does not calibrate a learning rate")

    def in_sign_phase(self, group: dict[str, Any]) -> bool:
        """Whether a param_group has not switched to SGD."""
        return True

    def is_sign_step(self, group: dict[str, Any], step: int) -> bool:
        """Whether step number `step` of a param_group, counted from 0, takes the sign of its momentum."""
        return True

    def count_step(self, group: dict[str, Any]) -> None:
        """Count a step that other workers of a vote take and this one does not, as it has no more batches."""
        self.finish_step(group, self.new_sums(group))

    def averages(self, group: dict[str, Any]) -> tuple[float, float | None]:
        """`Options.momentum` and `Options.interpolation` of a sign step; momentum is kept if one of them is not 0."""
        return group["momentum"], None

    def _group_tensors(self, group: dict[str, Any]) -> dict[str, tuple[torch.dtype, torch.device]]:
        """The 0-dim tensors that a group keeps beside its options: dtype and device by name."""
        capturable = group["capturable"] and len(group["params"]) > 0
        return {"step": (torch.int64, group["params"][0].device if capturable else torch.device("cpu"))}

    def _place_group_state(self, group: dict[str, Any]) -> None:
        """Create what is missing and move what was loaded; load_state_dict itself moves nothing in a param_group."""
        for name, (dtype, device) in self._group_tensors(group).items():
            group[name] = torch.as_tensor(group.get(name, 0), dtype=dtype, device=device)

    def _follow_parameters(self, group: dict[str, Any]) -> None:
        if any(group[name].device != device for name, (_, device) in self._group_tensors(group).items()):
            self._place_group_state(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, option in self.OPTIONS.items():
                if not option.always:
                    group.setdefault(name, option.default)
            name_state_dtype(group)
            self._place_group_state(group)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, see `torch.optim.Optimizer.state_dict`; momentum that is not used is 0 there."""
        saved: dict[str, Any] = super().state_dict()
        fill_freed(saved["state"], self.param_groups)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of `SignSGD` or `HybridSignSGD`, see `torch.optim.Optimizer.load_state_dict`.

        What the state does not have stays as it was constructed: options that its version or its class did not know.

        Raises:
            ValueError: the state of another optimizer, or one that has switched to SGD for an optimizer that cannot.
        """
        loaded: dict[str, Any] = {}

        def complete(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            if len(state["param_groups"]) == len(self.param_groups):  # else torch says what is wrong
                groups = [
                    completed_group(saved, own, self.OPTIONS.keys(), self._progress(own), type(self).__name__)
                    for saved, own in zip(state["param_groups"], self.param_groups, strict=True)
                ]
                state = state | {"param_groups": groups}
            loaded.update(state)
            return state

        def restore(_: Optimizer) -> None:
            # torch has converted all state to the parameters' dtype.
            for saved, group in zip(loaded["param_groups"], self.param_groups, strict=True):
                for index, p in zip(saved["params"], group["params"], strict=True):
                    for name, value in loaded["state"].get(index, {}).items():
                        own = group["state_dtype"] is not None if name == "exp_avg" else name in _OWN_DTYPE
                        if own:
                            self.state[p][name] = value.to(p.device)
                self._free_unused(group)

        # The last of the hooks before loading sees what is loaded, and the first one after comes before the user's.
        hooks = [
            self.register_load_state_dict_pre_hook(complete),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _progress(self, group: dict[str, Any]) -> Collection[str]:
        """The keys of a param_group that say how far it has come."""
        return self._group_tensors(group).keys()

    def _free_unused(self, group: dict[str, Any]) -> None:
        """Give back the memory of momenta that this phase does not use; they keep their names and shapes."""
        if self.calibrates and not self.kept_state(group).get("exp_avg"):
            for p in group["params"]:
                state = self.state.get(p, {})
                state.update({name: freed(state[name]) for name in MOMENTUM if name in state})

    def collect(self, group: dict[str, Any], params: Sequence[Tensor], ordinals: Sequence[int]) -> Tensors:
        """Those of a group's parameters that have a gradient, with their state, which is made on first use."""
        batch = Tensors([], [], [], [], [], [], [])
        kept = self.kept_state(group)
        dtype = STATE_DTYPES[group["state_dtype"]]
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
            if not kept:
                continue
            state = self.state[p]
            fresh = "exp_avg" not in state
            if "exp_avg" in kept and fresh:
                zeros = new_momentum(p, dtype)
                state.update(zeros if kept["exp_avg"] else {name: freed(x) for name, x in zeros.items()})
            if kept.get("exp_avg"):
                if self.calibrates and is_freed(state["exp_avg"]):  # it has been in a phase that did not use it
                    state.update(new_momentum(p, dtype))
                m, scale = state["exp_avg"], state.get("exp_avg_scale")
                dims = 1 + is_sharded(p) if m.dtype == torch.int8 else None  # of the scales
                if m.dtype != (dtype or p.dtype) or (None if scale is None else scale.ndim) != dims:
                    check_momentum(real(p), real(m), scale, dtype)
                batch.exp_avgs.append(m)
                if scale is not None:
                    batch.scales.append(scale)
            if "mean_square" in kept and "mean_square" not in state:
                # That of the momentum that is there, if relative dither comes late.
                state["mean_square"] = mean_square(p, {} if fresh or not kept.get("exp_avg") else state)
            if kept.get("mean_square"):
                batch.mean_squares.append(state["mean_square"])
        return batch

    def kept_state(self, group: dict[str, Any]) -> Mapping[str, bool]:
        """What is kept of each parameter of this group, "exp_avg" and "mean_square", and whether the next step uses it.

        With "exp_avg" comes ``exp_avg_scale`` in 8 bits.
        """
        kept: dict[str, bool] = {}
        if self._driver == "vote":
            return kept
        if any(self.averages(group)):
            kept["exp_avg"] = True
        if group["dither"] > 0 and group["dither_scale"] == "relative":
            kept["mean_square"] = True
        return kept

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; with a closure, re-evaluate the loss under grad first and return it."""
        getattr(self, _CAPTURE_CHECK)()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Not asked while compiling: a guard on the state's keys would compile anew at every step.
        stateless = not torch.compiler.is_compiling() and not self.state
        # All state is made, and all gradients are checked, before the first parameter moves.
        batches = []
        for group, ordinals in zip(self.param_groups, noise_ordinals(self.param_groups), strict=True):
            batch = self.collect(group, group["params"], ordinals)
            if batch.params:
                sharded = any(hasattr(type(p), "to_local") for p in batch.params)  # is_sharded, which would cost a call
                batches.append((group, ordinals, batch, shards_of(batch) if sharded else [Shards(batch, [], WHOLE)]))
                # The model may have moved since the group was made.
                if group["capturable"] or self.calibrates or group["step"].device.type != "cpu":
                    self._follow_parameters(group)
        taken: list[tuple[dict[str, Any], Tensor | None]] = []
        measured: list[Measurement] = []
        for group, ordinals, batch, parts in batches:
            if stateless and changes_nothing(group, batch.grads):
                continue
            total = self.new_sums(group) if self.calibrates else None
            for part in parts:
                rows = part.rows(ordinals) if self.calibrates else ALL
                options = self.options(group, None if total is None else total[rows], rows)
                signsgd(part.tensors, options, **{name: group[name] for name in ENGINE_CHOICE})
                measured.append(Measurement(part, options.sums, total, rows))
            taken.append((group, total))
        if self.calibrates or any(each.part.place.group is not None for each in measured):
            add_up(measured)
        for group, total in taken:
            self.finish_step(group, total)
        return loss

    # The parts of a step, for callers that do not take it in one call: backward, and the ranks of a vote.

    def new_sums(self, group: dict[str, Any]) -> Tensor | None:
        """Zeros to which a step adds what it measures, a row for each parameter; None if that is not used."""
        return None

    def finish_step(self, group: dict[str, Any], sums: Tensor | None) -> None:
        """Count the step, once all of the group's parameters have moved."""
        group["step"] += 1

    def options(self, group: dict[str, Any], sums: Tensor | None, rows: Sequence[int] | slice = ALL) -> Options:
        """The engines' options for the next step of those of a group's parameters that have these rows of its sums."""
        lr, decay, coupled_weight_decay = rate_and_decay(group)
        voted = self._driver == "vote"
        dithered = group["dither"] > 0 and not voted
        momentum, interpolation = self.averages(group)
        return Options(
            step=group["step"],
            rate=lr,
            decay=decay,
            coupled_weight_decay=0.0 if voted else coupled_weight_decay,
            momentum=0.0 if voted else momentum,
            interpolation=None if voted else interpolation,
            state_dtype=STATE_DTYPES[group["state_dtype"]],
            direction=_DIRECTIONS[group["dither_position"]] if dithered else Direction.SIGN,
            sigma=dither_std(group["step"], group["dither"], group["dither_decay"]) if dithered else None,
            seed=group["seed"],
            maximize=group["maximize"] and not voted,
            sums=None if voted else sums,
            stochastic_params=group["param_rounding"] != "nearest",
            law=group["dither_law"],
        )


def signsgd(
    tensors: Tensors, options: Options, *, foreach: bool | None, fused: bool | None, differentiable: bool
) -> None:
    """One step of Algorithm 1 (or of SGD) in place on parameters and state, by the engine asked for or the fastest.

    Args:
        tensors: parameters, gradients and state; gradients are not changed.
        options: what the step is asked for; the step count in it is read, not advanced. "relative" dither takes the rms
            of what it is given, 8-bit momentum its blocks.
        foreach, fused, differentiable: as in `SignSGD`.

    Raises:
        RuntimeError: ``fused=True`` where no kernel can step these parameters.

    Example:
        >>> from signstep.kernels.engine import Direction
        >>> p, g = torch.ones(2), torch.tensor([0.5, -3.0])
        >>> options = Options(
        ...     step=torch.tensor(0), rate=0.25, decay=1.0, coupled_weight_decay=0.0, momentum=0.0, state_dtype=None,
        ...     direction=Direction.SIGN, sigma=None, seed=0, maximize=False,
        ... )
        >>> signsgd(Tensors([p], [g], [], [], [], [0], [0]), options, foreach=None, fused=None, differentiable=False)
        >>> p
        tensor([0.7500, 1.2500])
    """
    params, demanded = tensors.params, bool(fused)
    if demanded:
        fused_engines.require(params)
    elif fused is None and foreach is None and not differentiable:
        fused = fused_engines.by_default(tensors)
    if foreach is None:
        # One draw of noise serves all tensors, on any device.
        foreach = not differentiable and {type(p) for p in params} <= {Tensor, torch.nn.Parameter}
    if fused:
        fused_engines.step(tensors, options, demanded=demanded)
    elif foreach:
        multi_tensor_step(tensors, options)
    else:
        single_tensor_step(tensors, options)
