"""`CompressedGradients`: a DDP hook that leaves in p.grad the mean of what a compressor made of each worker's gradient.

There are two ways to average blocks. In two phases (all-to-all, all-gather) the owner of a block averages what the
workers have sent, compresses the mean, and sends it to all. In one phase every worker sends everything to everybody:
that loses nothing a second time, and costs M / 2 times as much. Each compressor has a file of its own beside this one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from signstep.distributed.collectives import CollectiveError, all_gather
from signstep.distributed.compressors.blocks import BLOCK, Blocks, Layout, own_blocks, pack, unpack
from signstep.distributed.compressors.noise import SERVER, WORKER, random_integers
from signstep.distributed.hooks import Bucket, Entry, GradientHook

__all__ = ["BlockCompressor", "CompressedGradients", "Compressor", "Offer", "Page"]

_PRESENT, _NOT_FINITE = 1, 2
"""Bits of a worker's flag for a parameter."""
_ROWS = 256


class Compressor(ABC):
    """What is sent in place of gradients. It has options and no state: residuals are kept by `CompressedGradients`."""

    error_feedback: bool
    """Whether what was not sent is added to the next step's gradient."""
    two_sided: bool
    """Whether its owner compresses the mean again, with error feedback of its own."""

    @abstractmethod
    def exchange(self, x: Tensor, message: Message) -> Tensor:
        """The mean of what all workers make of their x.

        Args:
            x: float32 [rows, BLOCK], finite; with error feedback, what was not sent is left in it.
            message: the way to the other workers; its first collective must be `scatter` or `gather`.

        Returns:
            float32 like x, the same on all ranks.
        """

    @abstractmethod
    def bytes_per_parameter(self, world_size: int) -> float:
        """What a worker sends per step, in bytes; short blocks and one flag byte per parameter come on top."""


class Page(NamedTuple):
    """What a compressor's row in docs/compressors.md says, beside what the compressor itself tells."""

    paper: str
    bytes: str
    """Formula of the bytes per parameter, of M workers."""
    biased: str
    state: str
    """Per worker, for n parameters."""
    good_for: str
    not_for: str


class Offer(NamedTuple):
    """A compressor with its options, as it is offered by name."""

    label: str
    """Its name in tables."""
    make: Callable[[], Compressor]
    page: Page


class Message:
    """One bucket on its way to the other workers."""

    def __init__(self, hook: CompressedGradients, layout: Layout, names: Sequence[str], flags: Sequence[int]) -> None:
        self.layout = layout
        self.anyone: list[bool] = []
        """Whether any rank's backward has reached the parameter; known after the first collective."""
        self._hook, self._names = hook, names
        self._flags = torch.tensor([*flags, *[0] * (-len(flags) % 4)], dtype=torch.uint8, device="cpu").view(
            torch.int32
        )

    def scatter(self, words: Tensor) -> Tensor:
        """Row r of int32 [M, n] to rank r: what the ranks have sent to this one, int32 [M, n]."""
        flags = self._flags.to(words.device).expand(len(words), -1)
        out = torch.cat([flags, words], dim=1)
        received = torch.empty_like(out)
        dist.all_to_all_single(received, out, group=self._hook.group)
        return self._open(received)

    def gather(self, words: Tensor) -> Tensor:
        """What all ranks have sent to all, int32 [M, n] of int32 [n] each."""
        return self._open(self.publish(torch.cat([self._flags.to(words.device), words])))

    def publish(self, words: Tensor) -> Tensor:
        """`gather`, after another collective."""
        received = words.new_empty(self._hook.world_size * len(words))
        all_gather(received, words, group=self._hook.group)
        return received.view(self._hook.world_size, -1)

    def draw(self, rank: int | None = None) -> Tensor:
        """Noise for what a worker sends, this one or that of a rank, see `random_integers`."""
        return self._hook.draw(self._names, self.layout.counts, WORKER, rank)

    def draw_own(self) -> Tensor:
        """Noise for what this rank sends of the blocks that it owns."""
        return self._hook.draw(self._names, self.layout.own_counts, SERVER)

    def own_residuals(self) -> Iterator[tuple[slice, Tensor]]:
        """What has been left of the means of the rows that this rank owns: which of them, and the residual."""
        begin = 0
        for name, rows, anyone in zip(self._names, self.layout.own_counts, self.anyone, strict=True):
            if anyone and name in self._hook.server:
                yield slice(begin, begin + rows), self._hook.server[name]
            begin += rows

    def _open(self, received: Tensor) -> Tensor:
        """The words without the flags; if a gradient was not finite, all ranks raise."""
        width = self._flags.numel()
        flags = received[:, :width].contiguous().view(torch.uint8)[:, : len(self._names)].cpu()
        found = (flags & _NOT_FINITE).nonzero()
        if len(found):
            rank, parameter = found[0].tolist()
            raise CollectiveError(
                f"rank {rank}: the gradient of {self._names[parameter]} is not finite, or too large for float32 sums; "
                "nothing was sent: lower the learning rate, or use bfloat16 instead of float16 with a GradScaler"
            )
        self.anyone = (flags & _PRESENT).any(dim=0).tolist()
        return received[:, width:]


class BlockCompressor(Compressor):
    """A compressor that makes of each block of 1024 elements some scales and a small code per element."""

    two_sided = True
    stochastic = False
    """Whether `encode` needs noise."""
    scales = 1
    """float32 numbers per block."""

    @property
    @abstractmethod
    def values(self) -> tuple[float, ...]:
        """What each code stands for, in units of the scale: 2, 4, 16 or 256 of them."""

    @abstractmethod
    def encode(self, x: Tensor, sizes: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The scales and codes of some blocks.

        Args:
            x: float32 [rows, BLOCK], zeros beyond the end of short rows.
            sizes: float32 [rows, 1], elements in each row.
            noise: int16 like x, uniform, if the compressor is stochastic; else not used.

        Returns:
            float32 [rows, scales], and uint8 or bool like x.
        """

    def decode(self, scales: Tensor, values: Tensor) -> Tensor:
        """Elements from scales and the values of their codes, float32 [rows, BLOCK], which may be overwritten."""
        return values.mul_(scales)

    def limit(self, x: Tensor, sizes: Tensor) -> None:
        """What a worker does to its gradient before it is encoded, in place."""

    def exchange(self, x: Tensor, message: Message) -> Tensor:
        """One phase, or two; see the module."""
        layout = message.layout
        wire = layout.wire(self.scales, self._bits, dealt=self.two_sided)
        for part in _parts(x):
            self.limit(x[part], layout.all.sizes[part])
        rows = self._encode(x, layout.all, message.draw() if self.stochastic else x)
        if not self.two_sided:
            return self._mean([wire.place(words) for words in message.gather(wire.send(rows).view(-1))])

        mean = layout.own.clear(self._mean([wire.place_own(words) for words in message.scatter(wire.send(rows))]))
        residuals = list(message.own_residuals())
        for own, residual in residuals:
            mean[own].add_(residual)
        rows = self._encode(mean, layout.own, message.draw_own() if self.stochastic else mean)
        for own, residual in residuals:
            residual.copy_(mean[own])
        return self._mean([wire.place(message.publish(wire.send_own(rows)))])

    def bytes_per_parameter(self, world_size: int) -> float:
        """One way: bits / 8 + 4 scales / 1024 bytes, times M - 1; two ways: times 2 (M - 1) / M."""
        times = 2 / world_size if self.two_sided else 1
        return times * (world_size - 1) * (self._bits / 8 + 4 * self.scales / BLOCK)

    @property
    def _bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    def _encode(self, x: Tensor, blocks: Blocks, noise: Tensor) -> Tensor:
        """Rows as they are sent, int32; with error feedback, x becomes what was lost."""
        rows = x.new_empty(len(x), self.scales + BLOCK * self._bits // 32, dtype=torch.int32)
        for part in _parts(x):
            scales, codes = self.encode(x[part], blocks.sizes[part], noise[part])
            rows[part, : self.scales] = scales.view(torch.int32)
            rows[part, self.scales :] = pack(codes, self._bits).view(torch.int32)
            if self.error_feedback:
                x[part].sub_(self._decode(rows[part]))
        if self.error_feedback:
            blocks.clear(x)
        return rows

    def _decode(self, rows: Tensor) -> Tensor:
        scales = rows[:, : self.scales].contiguous().view(torch.float32)
        return self.decode(scales, unpack(rows[:, self.scales :].contiguous().view(torch.uint8), self.values))

    def _mean(self, messages: Sequence[Tensor]) -> Tensor:
        """Of what the rows stand for, added up in the order of ranks, on every rank alike."""
        mean = torch.empty(len(messages[0]), BLOCK, dtype=torch.float32, device=messages[0].device)
        for part in _parts(mean):
            total = self._decode(messages[0][part])
            for rows in messages[1:]:
                total.add_(self._decode(rows[part]))
            torch.div(total, len(messages), out=mean[part])
        return mean


def _parts(x: Tensor) -> Iterator[slice]:
    """All rows, on a CPU as many at a time as its cache holds: one megabyte of float32."""
    rows = _ROWS if x.device.type == "cpu" else max(1, len(x))
    for begin in range(0, len(x), rows):
        yield slice(begin, begin + rows)


class CompressedGradients(GradientHook):
    r"""Averages the gradients of a DDP model in compressed form; any optimizer can follow.

    With C the compressor and e_w what worker w has not sent yet (of compressors with error feedback), p.grad becomes

    .. math::
        \bar g = \frac 1 M \sum_w C(g_w + e_w), \qquad e_w \leftarrow g_w + e_w - C(g_w + e_w)

    in two phases :math:`C(\bar g + e)`, where the owner of each block keeps e. It is the same on all ranks, bit for
    bit. A worker whose backward does not reach a parameter sends zeros for it, as in DDP's own mean, and keeps its
    residual. Residuals are in units of the gradient: when the learning rate changes, they are applied at the new one.

    Args:
        model: wrapped in DistributedDataParallel, on one device; gradients are compressed in float32.
        compressor: see `signstep.distributed.compressors`.
        seed: of stochastic rounding, the same on all ranks, in [0, 2^64). (default: 0)

    Raises:
        TypeError: the model is not wrapped, or has complex parameters.
        ValueError: the seed is out of range.
        CollectiveError: from backward, on all ranks: a gradient is not finite, with rank and parameter.

    Example:
        .. code-block:: python

            model = DistributedDataParallel(net)
            hook = CompressedGradients(model, EFSign(two_sided=True))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    """

    def __init__(self, model: DistributedDataParallel, compressor: Compressor, *, seed: int = 0) -> None:
        super().__init__(model)
        for p, name in self.names.items():
            if p.is_complex():
                raise TypeError(f"{type(self).__name__}: {name} is complex; use it as two real parameters")
        if not 0 <= seed < 2**64:
            raise ValueError(f"Invalid seed: {seed}, expected 0 <= seed < 2^64")
        self.compressor, self.seed, self.step = compressor, seed, 0
        self._ordinals = {name: i for i, name in enumerate(self.names.values())}
        self._firsts: dict[str, int] = {}
        elements = 0
        for p, name in self.names.items():
            self._firsts[name] = elements // BLOCK
            elements += p.numel()
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self.worker: dict[str, Tensor] = {}
        """By parameter, what this worker has not sent yet: float32 [elements], in the order of its memory."""
        self.server: dict[str, Tensor] = {}
        """By parameter, what it has not sent yet of the means of the blocks that it owns: [own blocks, BLOCK]."""
        for p, name in self.names.items() if compressor.error_feedback else ():
            self.worker[name] = torch.zeros(p.numel(), dtype=torch.float32, device=self.device)
            if compressor.two_sided:
                own = own_blocks(p.numel(), self._firsts[name], self.world_size, self.rank)
                self.server[name] = torch.zeros(len(own), BLOCK, dtype=torch.float32, device=self.device)
        self.attach(model)

    def reduce(self, bucket: Bucket) -> None:
        """Replace the gradients by the mean of what all workers have made of theirs."""
        layout = self._layout(bucket.entries)
        x = torch.zeros(layout.rows, BLOCK, dtype=torch.float32, device=self.device)
        flags, sends = [], []
        for entry, place in zip(bucket.entries, layout.places(x), strict=True):
            sends.append(self.fill(entry, place))
            flags.append(_PRESENT if entry.present else 0)
            if sends[-1] and entry.name in self.worker:
                place.add_(self.worker[entry.name])
        for row in x.sum(dim=1).isfinite().logical_not_().nonzero().view(-1).tolist():
            flags[layout.parameter_of(row)] |= _NOT_FINITE

        message = Message(self, layout, [e.name for e in bucket.entries], flags)
        mean = self.compressor.exchange(x, message)
        for i, (entry, rest, result) in enumerate(
            zip(bucket.entries, layout.places(x), layout.places(mean), strict=True)
        ):
            # What nobody's backward has reached is not applied by DDP: it must not count as sent.
            if entry.name in self.worker and sends[i] and message.anyone[i]:
                self.worker[entry.name].copy_(rest)
            entry.flat.copy_(result)
        self.step += bucket.is_last

    def fill(self, entry: Entry, place: Tensor) -> bool:
        """Write what this worker has to send of a parameter, before the residual, into zeros; False: nothing."""
        if entry.present:
            place.copy_(entry.flat)
        return entry.present

    def draw(self, names: Sequence[str], rows: Sequence[int], stream: int, rank: int | None = None) -> Tensor:
        """The noise of a rank in this step, of this one unless another is named, see `random_integers`."""
        ordinals = [self._ordinals[name] for name in names]
        whose = self.rank if rank is None else rank
        return random_integers(rows, ordinals, stream, seed=self.seed, rank=whose, step=self.step, device=self.device)

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
                name: in_shape(self.worker[name], p).clone() for p, name in self.names.items() if name in self.worker
            },
            "server": {name: residual.clone() for name, residual in self.server.items()},
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
        expected = {name: p.shape for p, name in self.names.items() if name in self.worker}
        for kind, shapes in (("worker", expected), ("server", {name: e.shape for name, e in self.server.items()})):
            for name in sorted(shapes.keys() | state[kind].keys()):
                saved = tuple(state[kind][name].shape) if name in state[kind] else "none"
                wanted = tuple(shapes[name]) if name in shapes else "none"
                if saved != wanted:
                    raise ValueError(
                        f"the {kind}'s residual of {name} was saved with shape {saved}, expected {wanted}: load the "
                        "state of this model and compressor"
                    )
        self.step = state["step"]
        for p, name in self.names.items():
            if name in self.worker:
                in_shape(self.worker[name], p).copy_(state["worker"][name])
        for name, residual in self.server.items():
            residual.copy_(state["server"][name])


def in_shape(flat: Tensor, param: Tensor) -> Tensor:
    """Elements in the order of a parameter's memory as a tensor of its shape, a view."""
    strides = torch.empty_like(param, device="meta").stride()
    return flat.as_strided(param.shape, strides, flat.storage_offset())
