"""Who takes part in `signstep bench step`: signstep's optimizers, torch's, other packages', and the bandwidth limit."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from signstep import HybridSignSGD, Lion, SignSGD
from signstep.lab.errors import BadInput

PEER, COPY = "sgd-fused", "copy"
"""The contestant that ratios are over, and the one that measures the memory's speed."""
SPARE_PEER = "sgd-foreach"
"""The peer where torch's fused SGD does not work."""

# A step that bfloat16 parameters of size 1 can show, so that a step without effect is noticed.
_LR = 1e-2
_ALPHA = 1e-4
_RELATIVE: dict[str, Any] = {"dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative"}


class Stepper(Protocol):
    """What is timed: an optimizer, or something with the same two attributes."""

    @property
    def state(self) -> Mapping[Any, Any]:
        """What it keeps between steps."""
        ...

    @property
    def step(self) -> Callable[[], object]:
        """Take one step."""
        ...


class NotAvailable(Exception):
    """A contestant cannot take part; the message is what the table says."""


@dataclass(frozen=True)
class Contestant:
    """One line of the benchmark's table."""

    key: str
    label: str
    kind: str
    """limit, signstep, torch, plain or package: what the figure colours by."""
    make: Callable[[list[Parameter]], Stepper]
    """Takes parameters that have gradients."""
    optional: bool = False
    """Where it cannot run, the table says why; any other contestant's failure ends the benchmark."""
    dtype: torch.dtype | None = None
    """Of its own parameters and gradients; None: it steps the ones that all share."""


class CopyLoop:
    """Moves the bytes that the clean step moves, in place as it does, with as little work on them as there can be.

    The step reads p, g and m and writes p and m. So does this, in three buffers as large as its three: m ^= g, p = ~p.
    A copy from one place to another is no limit for a step in place: on some machines it takes twice as long.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        words = max(1, sum(p.numel() for p in params) * params[0].element_size() // 8)
        self._p, self._g, self._m = (params[0].new_zeros(words, dtype=torch.int64) for _ in range(3))
        self.state: dict[Any, Any] = {}
        self.bytes_moved = 5 * 8 * words

    def step(self) -> None:
        self._m.bitwise_xor_(self._g)
        self._p.bitwise_not_()


class PlainDither:
    """The dithered sign step as one writes it with torch alone, eager or compiled."""

    def __init__(self, params: Sequence[Parameter], *, compiled: bool) -> None:
        self._params = params
        self._averages = [torch.zeros_like(p, requires_grad=False) for p in params]
        self.state = {p: {"exp_avg": m} for p, m in zip(params, self._averages, strict=True)}
        # With fullgraph, torch says so where it gives up compiling; else it would go on in eager mode.
        self._call: Callable[..., None] = torch.compile(_plain_dither, fullgraph=True) if compiled else _plain_dither

    @torch.no_grad()
    def step(self) -> None:
        self._call([p.detach() for p in self._params], [p.grad for p in self._params], self._averages)


def _plain_dither(params: list[Tensor], grads: list[Tensor], averages: list[Tensor]) -> None:
    # p -= lr * sign(m + sigma * randn_like(m))
    torch._foreach_lerp_(averages, grads, 0.1)
    noise = [torch.randn_like(m) for m in averages]
    torch._foreach_mul_(noise, math.sqrt(_ALPHA))
    torch._foreach_add_(noise, averages)
    torch._foreach_sign_(noise)
    torch._foreach_add_(params, noise, alpha=-_LR)


def fused_or_not(cls: Callable[..., Any], params: list[Parameter], **options: Any) -> Any:
    """An optimizer with fused=True, or, where there is no kernel, with what fused=None picks."""
    try:
        return cls(params, lr=_LR, fused=True, **options)
    except RuntimeError:
        return cls(params, lr=_LR, fused=None, **options)


def _ours(
    key: str, label: str, cls: Callable[..., Any] = SignSGD, *, own: torch.dtype | None = None, **options: Any
) -> Contestant:
    def make(params: list[Parameter]) -> Stepper:
        optimizer: Stepper = fused_or_not(cls, params, **options)
        return optimizer

    return Contestant(key, label, "signstep", make, optional="state_dtype" in options, dtype=own)


def _sgd_phase(params: list[Parameter]) -> Stepper:
    # The rule that is corrected for its start: after a single step the paper's would give a rate near 0.
    optimizer: HybridSignSGD = fused_or_not(HybridSignSGD, params, calibration="ratio")
    optimizer.step()
    optimizer.switch()
    return optimizer


def _eager(key: str, label: str, **options: Any) -> Contestant:
    def make(params: list[Parameter]) -> Stepper:
        return SignSGD(params, lr=_LR, foreach=True, fused=False, **options)

    return Contestant(key, label, "plain", make)


def _plain(key: str, label: str, *, compiled: bool) -> Contestant:
    return Contestant(key, label, "plain", lambda params: PlainDither(params, compiled=compiled), optional=True)


def _torch(key: str, name: str, implementation: str, **options: Any) -> Contestant:
    def make(params: list[Parameter]) -> Stepper:
        optimizer: Stepper = getattr(torch.optim, name)(params, lr=_LR, **{implementation: True}, **options)
        return optimizer

    text = ", ".join([*(f"{option}={value}" for option, value in options.items()), implementation])
    return Contestant(key, f"torch {name}({text})", "torch", make, optional=True)


def peer_for(dtype: torch.dtype, device: torch.device) -> str:
    """Key of the contestant that ratios are over: `PEER` if its step changes parameters of this kind.

    On a CPU, torch 2.13 leaves 16-bit parameters as they were (github.com/pytorch/pytorch/issues/191763).
    """
    p = Parameter(torch.zeros(256, dtype=dtype, device=device))
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=_LR, momentum=0.9, fused=True).step()
    return PEER if bool((p != 0).all()) else SPARE_PEER


def _sgd(key: str, peer: str) -> Contestant:
    contestant = _torch(key, "SGD", key.removeprefix("sgd-"), momentum=0.9)
    if key == peer:
        return replace(contestant, optional=False)
    return contestant if key != PEER else replace(contestant, make=_broken_sgd)


def _broken_sgd(params: list[Parameter]) -> Stepper:
    raise NotAvailable(
        f"not available: torch {torch.__version__} leaves {params[0].dtype} parameters as they were, see "
        "github.com/pytorch/pytorch/issues/191763"
    )


def _package(key: str, module: str, name: str, project: str) -> Contestant:
    def make(params: list[Parameter]) -> Stepper:
        if importlib.util.find_spec(module) is None:
            raise NotAvailable(f"not installed: pip install {project}")
        optimizer: Stepper = getattr(importlib.import_module(module), name)(params, lr=_LR)
        return optimizer

    return Contestant(key, f"{project} {name}", "package", make, optional=True)


def _everywhere(peer: str) -> Iterator[Contestant]:
    """What every group of contestants has, so that the groups can be compared."""
    yield Contestant(COPY, "same bytes in place", "limit", CopyLoop)
    yield _sgd(peer, peer)
    yield _ours("clean", "SignSGD")
    yield _ours("dither", "SignSGD, dither", dither=_ALPHA)
    yield _ours("relative", "SignSGD, relative dither", **_RELATIVE)


def _variants(dtype: torch.dtype) -> Iterator[Contestant]:
    yield _ours("momentum-0", "SignSGD(momentum=0)", momentum=0.0)
    yield _ours("lion", "Lion", Lion)
    yield _ours("hybrid", "HybridSignSGD, sign phase", HybridSignSGD)
    yield Contestant("hybrid-sgd", "HybridSignSGD, SGD phase", "signstep", _sgd_phase)
    if dtype != torch.bfloat16:
        yield _ours("state-bf16", "SignSGD, bf16 state", state_dtype=torch.bfloat16)
    yield _ours("state-int8", "SignSGD, int8 state", state_dtype=torch.int8)
    if dtype == torch.float32:
        yield _ours("bf16", "SignSGD, all bfloat16", own=torch.bfloat16)
        yield _ours("bf16-nearest", "the same, to the nearest", own=torch.bfloat16, param_rounding="nearest")
    yield _eager("eager", "SignSGD, foreach")


def groups(dtype: torch.dtype, peer: str = PEER, only: Collection[str] = ()) -> dict[str, list[Contestant]]:
    """The contestants by group. The groups run one after the other, which bounds the memory that states take.

    Args:
        dtype: of the parameters.
        peer: what `peer_for` said.
        only: keys of those that are wanted, beside the peer and the limit; none: all.

    Raises:
        BadInput: a key is nobody's.

    The group "plain dither" is many times slower than the others.
    """
    members = {
        "signstep": _variants(dtype),
        "torch": [
            _sgd(SPARE_PEER if peer == PEER else PEER, peer),
            _torch("adam-fused", "Adam", "fused"),
            _torch("adam-foreach", "Adam", "foreach"),
            _torch("adamw-fused", "AdamW", "fused"),
            _torch("adamw-foreach", "AdamW", "foreach"),
        ],
        "packages": [
            _package("pytorch-optimizer", "pytorch_optimizer", "SignSGD", "pytorch-optimizer"),
            _package("lion-pytorch", "lion_pytorch", "Lion", "lion-pytorch"),
            _package("heavyball", "heavyball", "SignLaProp", "heavyball"),
        ],
        "plain dither": [
            _eager("eager-dither", "SignSGD, foreach, dither", dither=_ALPHA),
            _plain("plain-foreach", "plain torch dither, foreach", compiled=False),
            _plain("plain-compiled", "plain torch dither, torch.compile", compiled=True),
        ],
    }
    found = {name: [*_everywhere(peer), *own] for name, own in members.items()}
    if not only:
        return found
    known = dict.fromkeys(each.key for group in found.values() for each in group)
    for key in only:
        if key not in known:
            raise BadInput(f"--only {key}: expected some of {', '.join(known)}")
    chosen: dict[str, list[Contestant]] = {}
    left = set(only)
    for name, group in found.items():
        wanted = [each for each in group if each.key in left]
        if wanted:
            left -= {each.key for each in wanted}
            chosen[name] = [*(each for each in group if each.key in (COPY, peer) and each not in wanted), *wanted]
    return chosen
