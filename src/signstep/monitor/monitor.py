"""`Monitor`: it measures a live run at its own steps, and writes what it finds as a record.

Each part of a record has a file of its own, see `signstep.monitor`. This one decides when to measure, collects the
micro-batches of all ranks, and puts the parts together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from signstep.distributed import MajorityVote
from signstep.monitor.calibration_panel import CalibrationPanel
from signstep.monitor.dither_meter import DitherMeter
from signstep.monitor.last_step import did_nothing, is_sharded
from signstep.monitor.reliability import reliability
from signstep.monitor.sampling import Sampler
from signstep.monitor.sinks import Sink
from signstep.monitor.symmetry import symmetry
from signstep.monitor.untouched import untouched
from signstep.optim.signsgd import SignSGD
from signstep.optim.wrappers import unwrap

__all__ = ["Monitor"]

_TESTED = 1024
"""Coordinates whose noise is tested for symmetry."""
_SHOWN = 8
"""Coordinates whose values go into the record, for histograms, where there are enough micro-batches."""
_SHOWN_FROM = 20


class Monitor:
    r"""Measures, every so many steps, whether the signs of the gradients can be trusted.

    At its own steps (0, `every`, 2 `every`, ...) it writes a record to each sink: the reliability of signs with
    intervals and eq. (7) (`signstep.theory.stationarity`), the symmetry of the noise, the size of the dither beside the
    momentum, and the learning rate that each rule of calibration gives. At all other steps it does nothing.

    Only the signs of different micro-batches can be compared. Each backward pass of each rank is a micro-batch. A loop
    that accumulates gradients or runs on several ranks stays as it is:

        monitor = Monitor(model, optimizer, sinks=[JSONLines("monitor.jsonl")])

    A loop with one backward pass per step needs one more line before it. At the monitor's own steps that line takes the
    batch through the model once more, in `parts`:

        monitor.measure(lambda x, y: loss_fn(model(x), y), x, y)

    The optimizer may be any `torch.optim.Optimizer`; dither and calibration are then those that would suit its
    momentum. The monitor looks at the parameters that model and optimizer have in common when it is made. Gradients,
    batch norm's statistics and the random number generators stay as they were. A micro-batch whose gradient is not
    finite is left out, and a step that a GradScaler skips is measured again.

    Args:
        model: the module that is trained, bare or in DistributedDataParallel. Under DDP the ranks' micro-batches are
            gathered (one all_gather of how many there are, and one of the gradients), and rank 0 writes. Within
            `join()`, rank 0 compares its own alone.
        optimizer: the optimizer whose steps are counted and measured. It may be in wrappers that have it as their
            attribute `optimizer` or `base_optimizer`, as from `accelerator.prepare`. Of a ZeroRedundancyOptimizer,
            dither and calibration are those of rank 0's part.
        every: number of steps from one own step to the next, at least 1. (default: 50)
        sinks: objects with `write(record)` and `close()`, see `signstep.monitor.sinks`. (default: none)
        coordinates: how many coordinates of the gradient are looked at, spread evenly over the parameters. Each takes 4
            bytes per micro-batch. (default: 65536)
        scaler: the GradScaler of the loop, if it has one: gradients are divided by its scale.
        vote: the vote that the gradients come from, if there is one. Its workers have the momentum, and the dither
            meter reads that of rank 0.
        dip: also test whether the noise has one mode, with the package diptest if it is installed. (default: False)
        seed: seed of the random choice of coordinates. (default: 0)

    Attributes:
        step: optimizer steps so far.
        last: the last record, or None.

    Raises:
        TypeError: there is no optimizer in what was passed as one.
        ValueError: an option is out of range, the model has no parameter to train or is sharded by FSDP, or the
            optimizer steps inside backward.

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
        optimizer = unwrap(optimizer)
        if isinstance(optimizer, SignSGD) and optimizer.steps_in_backward:
            raise ValueError("optimizer steps inside backward (attach_to_backward): there is no gradient to look at")
        inner = _without_compile(model)
        wrapped = inner if isinstance(inner, DistributedDataParallel) else None
        bare = inner if wrapped is None else _without_compile(wrapped.module)
        optimized = {p for group in optimizer.param_groups for p in group["params"]}
        named = {name: p for name, p in bare.named_parameters() if p in optimized}
        if not any(p.requires_grad for p in named.values()):
            raise ValueError(
                "model has no parameter that requires a gradient and is the optimizer's: there is nothing to monitor"
            )
        sharded = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
        if sharded or any(is_sharded(p) for p in named.values()):
            raise ValueError("model has parameters sharded by FSDP: only whole ones, or DDP, can be monitored")
        self.model, self.optimizer, self.every, self.sinks = model, optimizer, every, list(sinks)
        self._local: Optimizer = getattr(optimizer, "optim", optimizer)  # a ZeroRedundancyOptimizer's on this rank
        self.step = 0
        self.last: dict[str, Any] | None = None
        self._scaler, self._dip = scaler, dip
        self._sampler = Sampler(named, coordinates, seed, None if scaler is None else self._scale)
        self._wrapped = wrapped
        self._group = None if wrapped is None else wrapped.process_group
        self._first = self._group is None or dist.get_rank(self._group) == 0
        self._measured: list[Tensor] | None = None
        self._largest = 0  # batch that was measured
        self._reason: str | None = None  # why this own step has nothing to compare
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
        """Whether the next step is one of the monitor's own."""
        return self.step % self.every == 0 and bool(self._hooks)

    @contextmanager
    def microbatch(self) -> Iterator[None]:
        """All backward passes inside are one micro-batch.

        Needed only where a micro-batch takes several of them: for several losses, or under reentrant checkpointing.
        """
        with self._sampler.one_row() if self.due else nullcontext():
            yield

    def measure(self, loss: Callable[..., Tensor], *batch: Any, parts: int = 8) -> None:
        """At an own step, take a batch through the model in equal parts, each a micro-batch; at others do nothing.

        Call it before the step's own forward pass. Model, optimizer and random number generators are left as they were.
        A batch that is smaller than an earlier one, or than `parts`, is not measured, and the record says so.

        Args:
            loss: takes a part of the batch to its mean loss, under the autocast of the loop, not scaled.
            batch: the arguments of `loss`. Tensors, also inside dicts, lists and tuples, are split along their first
                dimension, and a remainder is left out; anything else is handed on whole. Batch norm over single numbers
                needs two of them per part.
            parts: number of micro-batches, at least 4; intervals are close to 95 % from 16 on.

        Raises:
            ValueError: there are fewer than 4 parts, there is no tensor to split, or the model is in DDP with
                static_graph=True.
        """
        if not self.due:
            return
        if self._wrapped is not None and self._wrapped.static_graph:
            raise ValueError(
                "measure() with static_graph=True: DDP allows no other passes; accumulate gradients instead"
            )
        leaves, tree = tree_flatten(batch)
        sizes = {len(x) for x in leaves if isinstance(x, Tensor) and x.dim() > 0}
        if parts < 4 or not sizes:
            raise ValueError(f"parts={parts}, {len(sizes)} tensors to split: expected at least 4 parts and a tensor")
        size = min(sizes)
        self._largest = max(self._largest, size)
        if size < max(parts, self._largest):
            self._reason = f"a batch of {size} at this step, the last of its epoch perhaps: nothing was measured"
            return
        self._arm()
        sampler, optimized = self._sampler, [p for group in self.optimizer.param_groups for p in group["params"]]
        params = list(dict.fromkeys([*self.model.parameters(), *optimized]))
        ours, sampler.rows = sampler.rows, []
        measured = []
        scale = self._scale()
        try:
            with untouched(self.model, params, self._wrapped):
                for part in range(parts):
                    for p in params:
                        p.grad = None
                    pieces = tree_unflatten([_piece(x, part, parts) for x in leaves], tree)
                    with sampler.one_row():
                        (loss(*pieces) * scale).backward()  # type: ignore[no-untyped-call]
                    measured.append(sampler.rows.pop())
            self._measured = measured
        finally:
            sampler.rows = ours

    def state_dict(self) -> dict[str, Any]:
        """The step count and the running averages, as plain values for a checkpoint."""
        return {"step": self.step, "calibration": self._calibration.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, or from {"step": steps taken} alone."""
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
            self._dither.before_step(self._local)
            self._calibration.before_step(self._local)

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        if self.due and did_nothing(self.optimizer):
            self._sampler.rows, self._measured = [], None
            return
        try:
            record = self._record() if self.due else None
            if record is not None:
                self.last = record = _rounded(record)
                for sink in self.sinks:
                    sink.write(record)
        finally:
            if self.due:
                self._sampler.close()
                self._measured, self._reason = None, None
            self.step += 1
            self._arm()

    def _record(self) -> dict[str, Any] | None:
        """The record of this own step; None on ranks that do not write."""
        rows, used = self._rows()
        if not self._first:
            return None
        usable = rows.isfinite().all(1)
        finite = rows if usable.all() else rows[usable]
        found = reliability(finite, self._sampler.columns, micro_batches=used)
        alarms = found.pop("alarms", [])
        if self._reason is not None and "reason" in found:
            found["reason"] = self._reason
        if len(finite) < len(rows):
            alarms.append(f"{len(rows) - len(finite)} of {len(rows)} micro-batches had gradients that are not finite")
        width = self._sampler.width
        chosen = torch.arange(0, width, -(-width // _TESTED), device=finite.device)
        noise = symmetry(finite[:, chosen], dip=self._dip)
        dither, calibration = self._dither.after_step(self._local), self._calibration.after_step(self._local)
        record: dict[str, Any] = {
            "step": self.step,
            "optimizer": type(self._local).__name__,
            "lr": [float(g["lr"]) for g in self.optimizer.param_groups],
            "micro_batches": len(finite),
            "reliability": found,
            "symmetry": noise,
            "dither": dither,
            "calibration": calibration,
            "alarms": alarms,
            "advice": [f"reliability: {found['reason']}"] if "reason" in found else [],
        }
        record["advice"] += [part["advice"] for part in (noise, dither, calibration) if part.get("advice")]
        if len(finite) >= _SHOWN_FROM:
            record["samples"] = self._samples(finite)
        return record

    def _rows(self) -> tuple[Tensor, int]:
        """The rows of all ranks in the units of the step's gradient, and how many micro-batches are in it."""
        own = self._sampler.rows if self._measured is None else self._measured
        device = next(p.device for group in self.optimizer.param_groups for p in group["params"])
        rows = (
            torch.stack(own).to(device)
            if own
            else torch.zeros(0, self._sampler.width, dtype=torch.float32, device=device)
        )
        counts = [len(own)]
        own.clear()  # the stacked copy takes as much memory again
        # A rank that has joined, as it has no more data, does not come here.
        if self._wrapped is not None and not self._wrapped._join_config.enable:
            rows, counts = self._gathered(rows)
        # A rank's gradient is the sum over its micro-batches, and the gradient of the step is the mean over ranks.
        return rows.mul_(sum(counts) / len(counts) if self._measured is None else 1.0), sum(counts)

    def _gathered(self, rows: Tensor) -> tuple[Tensor, list[int]]:
        """Rows of all ranks, and how many each has."""
        world = dist.get_world_size(self._group)
        heads = [torch.zeros(2, dtype=torch.int64, device=rows.device) for _ in range(world)]
        dist.all_gather(heads, torch.tensor([len(rows), self.step], dtype=torch.int64, device=rows.device), self._group)
        counts, steps = zip(*(head.tolist() for head in heads), strict=True)
        if len(set(steps)) > 1:
            raise RuntimeError(
                f"the ranks' monitors are at steps {list(steps)}: load the same state_dict on all of them"
            )
        padded = torch.zeros(max(counts), rows.shape[1], dtype=torch.float32, device=rows.device)
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(gathered, padded, self._group)
        return torch.cat([g[:count] for g, count in zip(gathered, counts, strict=True)]), list(counts)

    def _samples(self, rows: Tensor) -> list[dict[str, Any]]:
        """The gradients of a few coordinates, each from the middle of its parameter; parameters are evenly chosen."""
        columns = [c for c in self._sampler.columns if c.sampled]
        picked = columns[:: max(1, -(-len(columns) // _SHOWN))]
        shown = []
        for c in picked:
            middle = c.sampled // 2
            values = rows[:, c.where.start + middle].tolist()
            shown.append({"name": c.name, "index": int(c.indices[middle]), "values": values})
        return shown


def _without_compile(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _rounded(x: Any) -> Any:
    """The same record with six digits per number, as records are kept by the thousand."""
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
