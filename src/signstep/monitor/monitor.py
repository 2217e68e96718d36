"""`Monitor`: what a live training run says of the assumptions behind sign steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from signstep.monitor.calibration import CalibrationPanel
from signstep.monitor.dither import DitherMeter
from signstep.monitor.reliability import reliability
from signstep.monitor.sampling import Sampler
from signstep.monitor.symmetry import symmetry

if TYPE_CHECKING:
    from signstep.distributed.vote import MajorityVote
    from signstep.monitor.sinks import Sink

__all__ = ["Monitor"]

_TESTED = 1024
"""Coordinates whose noise is tested for symmetry."""
_SHOWN = 8
"""Coordinates whose values go into the record, for histograms, where there are enough micro-batches."""
_ENOUGH = 20
_PREFIX = re.compile(r"^((module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile


class Monitor:
    r"""Measures, every so many steps, whether the signs of the gradients can be trusted, and says so.

    At its own steps (0, `every`, 2 `every`, ...) it writes a record to each sink: the reliability of signs with
    intervals and eq. (7) (`signstep.theory.stationarity`), the symmetry of the noise, how dither compares with the
    momentum, and the learning rate that each rule of calibration gives. Other steps cost two empty calls.

    Signs can be compared between micro-batches only. Where gradients are accumulated or there are several ranks, each
    backward pass of each rank is one and the loop stays as it is:

        monitor = Monitor(model, optimizer, sinks=[JSONLines("monitor.jsonl")])

    In a loop with one backward pass per step, add one line before it; at the monitor's own steps the batch goes
    through the model once more, in `parts`:

        monitor.measure(lambda x, y: loss_fn(model(x), y), x, y)

    The optimizer may be any of torch.optim's kind; what concerns dither and calibration is that of its momentum.
    Gradients, batch norm's statistics and the generators of random numbers stay as they were. Rows whose gradients are
    not finite are left out, and a step that a GradScaler skips is measured again.

    Args:
        model: the module that is trained, bare or in DistributedDataParallel. Under DDP the ranks' micro-batches are
            gathered (an all_gather of the rows, and one of their numbers), and rank 0 writes.
        optimizer: whose `step` counts.
        every: steps between own steps, at least 1. (default: 50)
        sinks: what has `write(record)` and `close()`, see `signstep.monitor.sinks`. (default: none)
        coordinates: how many coordinates of the gradient are looked at, spread evenly over the parameters: memory is 4
            bytes for each and micro-batch. (default: 65536)
        scaler: the GradScaler of the loop, if it has one: gradients are divided by its scale.
        vote: of the workers, which then have the momentum; the dither meter and calibration read that of rank 0.
        dip: test the noise for one mode as well, with the package diptest, if it is installed. (default: False)
        seed: of the choice of coordinates. (default: 0)

    Attributes:
        step: optimizer steps so far.
        last: the last record, or None.

    Raises:
        ValueError: an option out of range, a model without parameters to train, or one sharded by FSDP.

    Example:
        >>> model = torch.nn.Linear(8, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> monitor = Monitor(model, optimizer, every=10)
        >>> for _ in range(16):  # micro-batches
        ...     (model(torch.randn(4, 8)).square().mean() / 16).backward()
        >>> optimizer.step()
        >>> monitor.last["micro_batches"], sorted(monitor.last["reliability"])[:2]
        (16, ['alignment', 'below_critical'])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 50,
        sinks: Sequence[Sink] = (),
        coordinates: int = 65536,
        scaler: torch.amp.GradScaler | None = None,
        vote: MajorityVote | None = None,
        dip: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in (("every", every), ("coordinates", coordinates)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
        if getattr(optimizer, "steps_in_backward", False):
            raise ValueError("optimizer steps inside backward (attach_to_backward): there is no gradient to look at")
        named = {_PREFIX.sub("", name): p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("model has no parameter that requires a gradient: there is nothing to monitor")
        if any(hasattr(p, "to_local") for p in named.values()):
            raise ValueError("model has parameters sharded by FSDP: only whole ones, or DDP, can be monitored")
        self.model, self.optimizer, self.every, self.sinks = model, optimizer, every, list(sinks)
        self.step = 0
        self.last: dict[str, Any] | None = None
        self._scaler, self._dip = scaler, dip
        self._sampler = Sampler(named, coordinates, seed, self._scale)
        inner = getattr(model, "_orig_mod", model)  # of torch.compile
        self._wrapped = inner if isinstance(inner, DistributedDataParallel) else None
        self._group = None if self._wrapped is None else self._wrapped.process_group
        self._first = self._group is None or dist.get_rank(self._group) == 0
        self._measured: list[Tensor] | None = None
        names = {p: name for name, p in named.items()}
        worker = None if vote is None else vote.worker
        self._dither = DitherMeter(names, worker=worker)
        self._calibration = CalibrationPanel(names)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._arm()

    @property
    def due(self) -> bool:
        """The coming step is one of the monitor's own."""
        return self.step % self.every == 0 and bool(self._hooks)

    @contextmanager
    def microbatch(self) -> Iterator[None]:
        """Everything that backward passes add to the gradients inside is one micro-batch.

        Needed only where a micro-batch takes several backward passes: several losses, reentrant checkpointing.
        """
        with self._sampler.one_row() if self.due else nullcontext():
            yield

    def measure(self, loss: Callable[..., Tensor], *batch: Any, parts: int = 8) -> None:
        """At an own step, take a batch through the model in equal parts, each a micro-batch; at others do nothing.

        Call it before the step's own forward pass. Nothing of the model changes.

        Args:
            loss: of the model's output, a mean over its arguments; under the autocast of the loop, not scaled.
            batch: tensors are split along their first dimension, whose remainder is left out; others are handed on.
            parts: micro-batches, at least 4; intervals are close to 95 % from 16 on.

        Raises:
            ValueError: fewer than 4 parts, or a batch of fewer elements than parts.
        """
        if not self.due:
            return
        sizes = {len(x) for x in batch if isinstance(x, Tensor) and x.dim() > 0}
        if parts < 4 or not sizes or min(sizes) < parts:
            raise ValueError(
                f"parts={parts} of a batch of {sorted(sizes)}: expected at least 4 parts with an element each"
            )
        params = [p for p in self.model.parameters() if p.requires_grad]
        kept = [(p, p.grad) for p in params]
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        scale = self._scale()
        self._arm()
        sampler = self._sampler
        ours, sampler.rows = sampler.rows, []
        measured = []
        try:
            with ExitStack() as stack:
                if self._wrapped is not None:
                    stack.enter_context(self._wrapped.no_sync())
                devices = [p.device for p in params if p.device.type == "cuda"]
                stack.enter_context(torch.random.fork_rng(devices=sorted({d.index for d in devices})))
                stack.enter_context(torch.enable_grad())
                for part in range(parts):
                    for p in params:
                        p.grad = None
                    pieces = [_piece(x, part, parts) for x in batch]
                    with sampler.one_row():
                        (loss(*pieces) * scale).backward()  # type: ignore[no-untyped-call]
                    measured.append(sampler.rows.pop())
            self._measured = measured
        finally:
            sampler.rows = ours
            for p, grad in kept:
                p.grad = grad
            with torch.no_grad():
                for b, value in buffers:
                    b.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The step count and the running averages: plain values, for a checkpoint."""
        return {"step": self.step, "calibration": self._calibration.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, or from {"step": steps taken} alone."""
        self.step = int(state["step"])
        if "calibration" in state:
            self._calibration.load_state_dict(state["calibration"])
        self._sampler.close()
        self._arm()

    def close(self) -> None:
        """Take the hooks off and close the sinks."""
        self._sampler.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for sink in self.sinks:
            sink.close()
        self.sinks = []

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _scale(self) -> float:
        return float(self._scaler.get_scale()) if self._scaler is not None else 1.0

    def _arm(self) -> None:
        if self.due:
            self._sampler.open()

    def _before_step(self, *_: object) -> None:
        if self.due and self._first:
            self._dither.before_step(self.optimizer)
            self._calibration.before_step(self.optimizer)

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        if self.due:
            record = self._record()
            self._sampler.close()
            self._measured = None
            if record is not None:
                self.last = record = _rounded(record)
                for sink in self.sinks:
                    sink.write(record)
        self.step += 1
        self._arm()

    def _record(self) -> dict[str, Any] | None:
        """What this own step shows; None on ranks that do not write."""
        rows, used = self._rows()
        if not self._first:
            return None
        finite = rows[rows.isfinite().all(1)]
        found = reliability(finite, self._sampler.columns, micro_batches=used)
        alarms = found.pop("alarms", [])
        if len(finite) < len(rows):
            alarms.append(f"{len(rows) - len(finite)} of {len(rows)} micro-batches had gradients that are not finite")
        width = self._sampler.width
        chosen = torch.arange(0, width, -(-width // _TESTED), device=finite.device)
        noise = symmetry(finite[:, chosen], dip=self._dip)
        dither, calibration = self._dither.after_step(self.optimizer), self._calibration.after_step(self.optimizer)
        record = {
            "step": self.step,
            "optimizer": type(self.optimizer).__name__,
            "lr": [float(g["lr"]) for g in self.optimizer.param_groups],
            "micro_batches": len(finite),
            "reliability": found,
            "symmetry": noise,
            "dither": dither,
            "calibration": calibration,
            "alarms": alarms,
            "advice": [part["advice"] for part in (noise, dither, calibration) if part.get("advice")],
        }
        if len(finite) >= _ENOUGH:
            record["samples"] = self._samples(finite)
        return record

    def _rows(self) -> tuple[Tensor, int]:
        """Rows of all ranks with the units of the step's gradient, and how many micro-batches that is the mean of."""
        own = self._sampler.rows
        rows = torch.stack(own) * len(own) if own else torch.zeros(0, self._sampler.width)
        used = len(own)
        if self._measured is not None:
            rows = torch.stack(self._measured)
            used = len(rows)
        rows = rows.to(next(p.device for p in self.model.parameters() if p.requires_grad))
        if self._group is None:
            return rows, used
        world = dist.get_world_size(self._group)
        counts = [torch.zeros(2, dtype=torch.int64, device=rows.device) for _ in range(world)]
        dist.all_gather(counts, torch.tensor([len(rows), used], device=rows.device), self._group)
        most = int(max(c[0] for c in counts))
        padded = torch.zeros(most, rows.shape[1], device=rows.device)
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(gathered, padded, self._group)
        kept = [g[: int(c[0])] for g, c in zip(gathered, counts, strict=True)]
        return torch.cat(kept), int(sum(c[1] for c in counts))

    def _samples(self, rows: Tensor) -> list[dict[str, Any]]:
        """Gradients of a few coordinates, each of the middle of an evenly chosen parameter."""
        columns = [c for c in self._sampler.columns if c.sampled]
        picked = columns[:: max(1, -(-len(columns) // _SHOWN))]
        shown = []
        for c in picked:
            middle = c.sampled // 2
            values = rows[:, c.where.start + middle].tolist()
            shown.append({"name": c.name, "index": int(c.indices[middle]), "values": values})
        return shown


def _rounded(x: Any) -> Any:
    """The same with numbers of six digits: records are kept by the thousand."""
    if isinstance(x, dict):
        return {name: _rounded(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_rounded(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def _piece(x: Any, part: int, parts: int) -> Any:
    if not (isinstance(x, Tensor) and x.dim() > 0):
        return x
    size = len(x) // parts
    return x[part * size : (part + 1) * size]
