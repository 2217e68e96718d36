"""Train one `RunConfig`: one loop, alone or as one of several workers under torchrun.

    signstep train --dataset cifar10 --optimizer signsgd --lr 1e-3
    torchrun --nproc-per-node 2 -m signstep train --dataset cifar10 --optimizer signsgd --lr 1e-3

Everything random in a step follows from (seed, epoch, step, rank), so a checkpoint holds no generator state and a run
that was killed and resumed on the same CPU with the same number of threads ends with the same bits.
"""

from __future__ import annotations

import gc
import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from signstep.distributed import CollectiveError, reductions
from signstep.lab.errors import BadInput
from signstep.lab.training import checkpoint, models
from signstep.lab.training import records as runs
from signstep.lab.training.batches import Batches
from signstep.lab.training.checkpoint import CheckpointError, RunBusy
from signstep.lab.training.config import RunConfig
from signstep.lab.training.display import Display
from signstep.lab.training.recipe import build_model, build_optimizer, likely_cause, lr_factor, require_compiler
from signstep.lab.training.watch import Watch, Watching
from signstep.lab.training.workers import StopRequest, Workers
from signstep.optim import HybridSignSGD

__all__ = ["CheckpointError", "RunBusy", "Status", "build_optimizer", "lr_factor", "train"]

Status = Literal["done", "diverged", "stopped", "interrupted"]


def train(
    config: RunConfig,
    out: Path,
    *,
    data: Path | None = None,
    device: str = "auto",
    max_minutes: float | None = None,
    checkpoint_minutes: float = 5.0,
    progress: bool = True,
    tensorboard: bool = False,
    watching: Watching | None = None,
) -> Status:
    """Train `config` to its end, or go on with it from where an earlier call was stopped or killed.

    Writes `<out>/<hash>.jsonl` (see `training.records`) and the checkpoint `<out>/<hash>.pt`, which holds the final
    weights once the run is done. Ctrl-C and SIGTERM end the current step, checkpoint and return; a second one kills.

    Args:
        config: the run.
        out: folder of the run's files, made if missing.
        data: folder to look for the images in first; None: the usual places.
        device: "auto" (a GPU if there is one), or what torch.device takes.
        max_minutes: stop, with a checkpoint, after this many minutes; None: no limit.
        checkpoint_minutes: minutes between checkpoints; 0: after every step.
        progress: show progress, on a terminal as a bar, elsewhere as a line per epoch.
        tensorboard: write each epoch's numbers to `<out>/tensorboard/<hash>` as well.
        watching: what a monitor looks at, which changes nothing; its records go to `<out>/monitor/<hash>.jsonl`.

    Returns:
        "done", "diverged" (a loss was not finite; the record says at which step), "stopped" by the time limit, or
        "interrupted" by a signal; after the last two, call again to go on.

    Raises:
        RunBusy: another process is training this run.
        CheckpointError: the checkpoint is damaged.
        BadInput: the configuration does not fit the images, the workers or this machine.
    """
    started = last_save = time.monotonic()
    workers = Workers.join(device)
    out.mkdir(parents=True, exist_ok=True)
    record, saved = out / f"{config.hash}.jsonl", out / f"{config.hash}.pt"
    records = out / "monitor" / record.name
    with workers.lock(out / f"{config.hash}.lock", over=lambda: runs.is_done(record)):
        earlier = workers.from_first(lambda: runs.read_run(record) if record.exists() else None)
        if earlier is not None and earlier.end is not None:
            if watching is not None and not records.exists():
                raise BadInput(f"{record} is of a run that has ended: delete it to train it again under the monitor")
            return "diverged" if earlier.diverged else "done"
        state = workers.from_first(lambda: checkpoint.load(saved, config.to_dict()))
        run = _Run(config, workers, data)
        if state is not None:
            run.restore(state)
        if watching is not None:
            run.watch = Watch(watching, run, records, state and state.get("monitor"))
        run.write(record)
        first = workers.rank == 0
        board = out / "tensorboard" / config.hash if tensorboard and first else None
        shown = Display(config, run.step, run.total_steps, show=progress, quiet=not first, board=board)
        with StopRequest() as stop, shown as display:
            if state is not None:
                epoch = math.ceil(run.step / run.steps_per_epoch)
                where = f"step {run.step} of {run.total_steps}, in epoch {epoch} of {config.epochs}"
                display.say(f"{config.hash}: goes on after {where}")
            try:
                while run.step < run.total_steps:
                    run.train_step()
                    epoch_ended = run.step % run.steps_per_epoch == 0
                    if not epoch_ended and run.step % run.check_every:
                        continue

                    # From here on the host waits for the device.
                    losses, accuracies = run.read_history()
                    display.step(run.step, losses, accuracies)
                    if epoch_ended:
                        display.epoch(run.end_epoch(losses, accuracies))
                        run.write(record)
                    now, ended = time.monotonic(), run.step == run.total_steps
                    out_of_time = max_minutes is not None and now - started >= 60 * max_minutes
                    due = now - last_save >= 60 * checkpoint_minutes
                    interrupted, out_of_time, due = workers.any(stop.received is not None, out_of_time, due)
                    if interrupted or out_of_time or ended or due:
                        run.save(saved)
                        last_save = now
                    if (interrupted or out_of_time) and not ended:
                        stop.answered = True
                        return "interrupted" if interrupted else "stopped"
            except _NotFinite as problem:
                reason = f"{problem}; {likely_cause(config, run.phase)}"
                run.end("diverged", reason)
                run.write(record)
                good = f"the last good checkpoint is {saved}" if saved.exists() else "there is no earlier checkpoint"
                display.say(f"{config.hash}: {reason}; {good}")
                return "diverged"
            run.end("done")
            run.write(record)
        return "done"


class _NotFinite(Exception):
    """A loss is infinite or not a number."""


class _Run:
    """What a run consists of while it trains: images, model, optimizer, and the record so far."""

    def __init__(self, config: RunConfig, workers: Workers, folder: Path | None) -> None:
        # A run's optimizer and scheduler hold each other: without this, a sweep's earlier runs pile up in memory.
        gc.collect()
        self.config, self.workers, device = config, workers, workers.device
        self.batches = Batches(config, workers, folder)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch

        images = self.batches.images
        self.model = build_model(config, images, device, config.batch_size // workers.size)
        self.optimizer = build_optimizer(config, self.model, self.total_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(config, min(step, self.total_steps), self.total_steps)
        )
        if config.compile:
            require_compiler(device.type)
            torch.compiler.reset()  # else many runs in one process reach the limit on recompilations
        self.network: nn.Module = torch.compile(self.model) if config.compile else self.model  # type: ignore[assignment]
        self.reduction = None
        if config.workers is not None and (config.workers != workers.size or not dist.is_initialized()):
            raise BadInput(
                f"workers={config.workers}: there are {workers.size}, and the result of reduce={config.reduce!r} "
                "depends on it; start as many with torchrun"
            )
        if workers.size > 1 or config.workers is not None:
            self.network = wrapped = workers.wrap(self.network)
            self.reduction = reductions.attach(config.reduce, wrapped, self.optimizer)

        self.watch: Watch | None = None
        self.step = 0
        self.began, self.began_at = time.perf_counter(), 0  # this epoch's time and first step in this process
        # This worker's part of each step's mean loss (row 0) and accuracy (row 1) within the epoch.
        self.history = torch.zeros(2, self.steps_per_epoch, device=device)
        # Reading a loss makes the host wait for the device: nothing on a CPU, dear on a GPU.
        self.check_every = 1 if device.type == "cpu" else 50
        images_used = len(self.batches.train_x), len(self.batches.eval_x)
        start = runs.start_event(config, models.count_parameters(self.model), *images_used, device, workers.size)
        self.events: list[dict[str, Any]] = [start]

    @property
    def phase(self) -> str | None:
        """Which phase the hybrid optimizer is in, "sign" or "sgd"; None of another optimizer."""
        return self.optimizer.phase if isinstance(self.optimizer, HybridSignSGD) else None

    def train_step(self) -> None:
        """One optimizer step on the next batch."""
        epoch, index = divmod(self.step, self.steps_per_epoch)
        if self.watch is not None:
            self.watch.measure(epoch, index)
        x, y = self.batches.training(epoch, index)
        logits = self.logits(self.network, x)
        loss = self.loss(logits, y)
        self.optimizer.zero_grad()
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except CollectiveError as error:  # on all workers
            raise _NotFinite(f"step {self.step + 1} (of {self.total_steps}): {error}") from error
        self.optimizer.step()
        self.scheduler.step()
        self.history[0, index] = loss.detach() / self.workers.size
        self.history[1, index] = (logits.detach().argmax(1) == y).sum() / self.config.batch_size
        self.step += 1

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean that training makes smaller."""
        return F.cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)

    def logits(self, network: nn.Module, x: Tensor) -> Tensor:
        """float32 [B, classes], computed in the run's precision."""
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.workers.device.type, torch.bfloat16, enabled=bf16):
            return network(x).float()  # type: ignore[no-any-return]

    def read_history(self) -> tuple[Tensor, Tensor]:
        """Losses and accuracies of the epoch's steps so far, over all workers, float64 on the CPU; _NotFinite."""
        steps = (self.step - 1) % self.steps_per_epoch + 1
        losses, accuracies = self.workers.total(self.history[:, :steps]).cpu().double()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = self.step - steps + 1 + int(bad[0])
            raise _NotFinite(f"the loss of step {step} (of {self.total_steps}) is {losses[bad[0]].item()}")
        return losses, accuracies

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean cross-entropy and accuracy over the evaluation images, which the workers share out; _NotFinite."""
        self.workers.share_buffers(self.model)
        self.model.eval()
        sums = []
        for x, y in self.batches.evaluation():
            logits = self.logits(self.model, x)
            sums.append(torch.stack([F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()]))
        self.model.train()
        totals = self.workers.total(torch.stack(sums).cpu().double().sum(0))
        loss, accuracy = (totals / len(self.batches.eval_x)).tolist()
        if not math.isfinite(loss):
            raise _NotFinite(f"the evaluation loss after step {self.step} (of {self.total_steps}) is {loss}")
        return loss, accuracy

    def end_epoch(self, losses: Tensor, accuracies: Tensor) -> dict[str, Any]:
        """Evaluate where that is due, add the epoch's line to the record, and return it; _NotFinite."""
        trained = time.perf_counter() - self.began
        epoch = self.step // self.steps_per_epoch
        line: dict[str, Any] = {
            "event": "epoch",
            "epoch": epoch,
            "step": self.step,
            "lr": self.config.lr * lr_factor(self.config, self.step - 1, self.total_steps),
            "train_loss": losses.mean().item(),
            "train_accuracy": accuracies.mean().item(),
        }
        if epoch % self.config.eval_every == 0 or epoch == self.config.epochs:
            line["eval_loss"], line["eval_accuracy"] = self.evaluate()
        if isinstance(self.optimizer, HybridSignSGD):
            rate = self.optimizer.calibrated_lr
            assert isinstance(rate, float)
            line["phase"] = self.phase
            line["calibrated_lr"] = rate if math.isfinite(rate) else None
        images, now = (self.step - self.began_at) * self.config.batch_size, time.perf_counter()
        line["timing"] = {"seconds": round(now - self.began, 3), "images_per_second": round(images / trained, 1)}
        self.began, self.began_at = now, self.step
        self.events.append(line)
        return line

    def end(self, status: Status, reason: str | None = None) -> None:
        """Add the record's last line."""
        accuracy = next((e["eval_accuracy"] for e in reversed(self.events) if "eval_accuracy" in e), None)
        epoch = math.ceil(self.step / self.steps_per_epoch)
        line = {"event": "end", "status": status, "epoch": epoch, "step": self.step, "eval_accuracy": accuracy}
        self.events.append(line if reason is None else line | {"reason": reason})

    def write(self, record: Path) -> None:
        """Write the record so far, from rank 0."""
        if self.workers.rank == 0:
            runs.write_events(record, self.events)

    def save(self, path: Path) -> None:
        """Write the checkpoint, from rank 0, unless the weights are no longer finite: then the last good one stays."""
        history = self.workers.total(self.history)
        reduction = self.workers.gather(None if self.reduction is None else self.reduction.state_dict())
        if self.workers.rank == 0 and all(p.isfinite().all() for p in self.model.parameters()):
            state = {
                "config": self.config.to_dict(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "reduction": reduction,
                "monitor": None if self.watch is None else self.watch.state_dict(),
                "step": self.step,
                "history": history,
                "events": self.events,
            }
            checkpoint.save(path, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what `save` wrote."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.reduction is not None:
            self.reduction.load_state_dict(state["reduction"][self.workers.rank])
        self.step, self.events = state["step"], state["events"]
        self.began_at = self.step
        if self.workers.rank == 0:
            self.history.copy_(state["history"])
