"""`CompressedMean`: the mean of what a compressor makes of every worker's tensors, and what lasts between two means.

It knows nothing of DDP: gradients.py takes means of gradients with it, and other things can be averaged as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from signstep.distributed.collectives import release_at_exit
from signstep.distributed.compressors.base import NOT_FINITE, PRESENT, Compressor, Message, Part
from signstep.distributed.compressors.blocks import BLOCK, Layout, own_blocks
from signstep.distributed.compressors.noise import Noise
from signstep.distributed.hooks import Entry

__all__ = ["CompressedMean", "in_shape"]


def _fill(entry: Entry, place: Tensor) -> bool:
    if entry.present:
        place.copy_(entry.flat)
    return entry.present


class CompressedMean:
    r"""The mean over workers of tensors in compressed form, the same on all ranks bit for bit.

    With C the compressor and e_w what worker w has not sent yet (of compressors with error feedback), it makes of x_w

    .. math::
        \bar x = \frac 1 M \sum_w C(x_w + e_w), \qquad e_w \leftarrow x_w + e_w - C(x_w + e_w)

    in two phases :math:`C(\bar x + e)`, where the owner of each block keeps e. A compressor may let e_w decay first.

    Args:
        params: by name, in the same order on all ranks: what has the shapes of the tensors, on one device.
        group: the workers.
        compressor: see `signstep.distributed.compressors`.
        seed: of stochastic rounding, the same on all ranks, in [0, 2^64). (default: 0)
        what: the tensors are of a parameter, for messages. (default: "gradient")

    Attributes:
        step: how many times all tensors have been averaged. The caller counts it, because it may come in parts.

    Raises:
        TypeError: a parameter is complex.
        ValueError: the seed is out of range.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        group: dist.ProcessGroup,
        compressor: Compressor,
        *,
        seed: int = 0,
        what: str = "gradient",
    ) -> None:
        for name, p in params.items():
            if p.is_complex():
                raise TypeError(f"{name} is complex, which no compressor can be given: use it as two real parameters")
        if not 0 <= seed < 2**64:
            raise ValueError(f"Invalid seed: {seed}, expected 0 <= seed < 2^64")
        self.params, self.group, self.compressor, self._what = dict(params), group, compressor, what
        release_at_exit(self)
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.device = next(iter(params.values())).device
        self._noise = Noise(seed, self.rank, self.device, {name: i for i, name in enumerate(params)})
        self._firsts: dict[str, int] = {}
        elements = 0
        for name, p in params.items():
            self._firsts[name] = elements // BLOCK
            elements += p.numel()
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._worker: dict[str, Tensor] = {}
        """By parameter, what this worker has not sent yet: float32 [elements], in the order of its memory."""
        self._server: dict[str, Tensor] = {}
        """By parameter, what it has not sent yet of the means of the blocks that it owns: [own blocks, BLOCK]."""
        for name, p in params.items() if compressor.error_feedback else ():
            self._worker[name] = torch.zeros(p.numel(), dtype=torch.float32, device=self.device)
            if compressor.two_sided:
                own = own_blocks(p.numel(), self._firsts[name], self.world_size, self.rank)
                self._server[name] = torch.zeros(len(own), BLOCK, dtype=torch.float32, device=self.device)

    @property
    def step(self) -> int:
        return self._noise.step

    @step.setter
    def step(self, step: int) -> None:
        self._noise.step = step

    def average(self, entries: Sequence[Entry], fill: Callable[[Entry, Tensor], bool] = _fill) -> list[int]:
        """Replace the entries' `flat` by the mean of what the compressor makes of all workers'. A collective.

        Args:
            entries: some of the parameters, the same on all ranks in the same order. One that is not present on a rank
                counts as zeros from it and keeps its residual there; one that is present nowhere keeps all residuals.
            fill: writes what this worker has to send of an entry, before the residual, into zeros, float32
                [elements]; False: nothing. (default: `flat`, if present)

        Returns:
            On how many ranks each entry is present.

        Raises:
            CollectiveError: on all ranks: something is not finite, with rank and parameter; nothing was sent then.
        """
        layout = self._layout(entries)
        x = torch.zeros(layout.rows, BLOCK, dtype=torch.float32, device=self.device)
        flags, sends = [], []
        for entry, place in zip(entries, layout.places(x), strict=True):
            sends.append(fill(entry, place))
            flags.append(PRESENT if entry.present else 0)
            if sends[-1] and entry.name in self._worker:
                place.add_(self._worker[entry.name], alpha=self.compressor.decay)
        for row in x.sum(dim=1).isfinite().logical_not_().nonzero().view(-1).tolist():
            flags[layout.parameter_of(row)] |= NOT_FINITE

        parts = [Part(e.name, _in_memory(self.params[e.name]), flag) for e, flag in zip(entries, flags, strict=True)]
        message = Message(self.group, self._noise, self._server, layout, parts, self._what)
        mean = self.compressor.exchange(x, message)
        for i, (entry, rest, result) in enumerate(zip(entries, layout.places(x), layout.places(mean), strict=True)):
            # What nobody's backward has reached is not applied by DDP: it must not count as sent.
            if entry.name in self._worker and sends[i] and message.present[i]:
                self._worker[entry.name].copy_(rest)
            entry.flat.copy_(result)
        return message.present

    def _layout(self, entries: Sequence[Entry]) -> Layout:
        # DDP rebuilds its buckets after the first backward.
        names = tuple(e.name for e in entries)
        if names not in self._layouts:
            sizes, firsts = [e.flat.numel() for e in entries], [self._firsts[name] for name in names]
            self._layouts[names] = Layout(sizes, firsts, self.world_size, self.rank, self.device)
        return self._layouts[names]

    def state_dict(self) -> dict[str, Any]:
        """The rank's own state, residuals by parameter name: every rank must save its own."""
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "step": self.step,
            "worker": {
                name: in_shape(self._worker[name], p).clone() for name, p in self.params.items() if name in self._worker
            },
            "server": {name: residual.clone() for name, residual in self._server.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` of the same rank gave.

        Raises:
            ValueError: it is another rank's, of another number of workers, or of other parameters or compressors.
        """
        if state["world_size"] != self.world_size:
            raise ValueError(
                f"this state was saved by {state['world_size']} workers and there are {self.world_size} now; residuals "
                "belong to workers: go on without loading it, at the price of what they had not sent"
            )
        if state["rank"] != self.rank:
            raise ValueError(f"this is the state of rank {state['rank']}, and this is rank {self.rank}: load its own")
        expected = {name: p.shape for name, p in self.params.items() if name in self._worker}
        for kind, shapes in (("worker", expected), ("server", {name: e.shape for name, e in self._server.items()})):
            for name in sorted(shapes.keys() | state[kind].keys()):
                saved = tuple(state[kind][name].shape) if name in state[kind] else "none"
                wanted = tuple(shapes[name]) if name in shapes else "none"
                if saved != wanted:
                    raise ValueError(
                        f"the {kind}'s residual of {name} was saved with shape {saved}, expected {wanted}: load the "
                        "state of this model and compressor"
                    )
        self.step = state["step"]
        for name, p in self.params.items():
            if name in self._worker:
                in_shape(self._worker[name], p).copy_(state["worker"][name])
        for name, residual in self._server.items():
            residual.copy_(state["server"][name])


def in_shape(flat: Tensor, param: Tensor) -> Tensor:
    """Elements in the order of a parameter's memory as a tensor of its shape, a view."""
    strides = torch.empty_like(param, device="meta").stride()
    return flat.as_strided(param.shape, strides, flat.storage_offset())


def _in_memory(param: Tensor) -> tuple[int, ...]:
    """A parameter's shape in the order of its memory, the outermost dimension first."""
    strides = torch.empty_like(param, device="meta").stride()
    return tuple(param.shape[i] for i in sorted(range(param.dim()), key=lambda i: -strides[i]))
