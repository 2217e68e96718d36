"""What a run consists of while it trains: a step, an evaluation, the lines of its record, and its checkpoint.

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
from torch import Tensor, nn

from signstep.distributed import CollectiveError, reductions
from signstep.distributed.local_methods import LOCAL_METHODS
from signstep.distributed.rounds import LocalSteps
from signstep.lab.errors import BadInput
from signstep.lab.training import checkpoint, models, own, records
from signstep.lab.training.batches import batches_of
from signstep.lab.training.config import RunConfig
from signstep.lab.training.objective import Objective
from signstep.lab.training.own_state import OwnState
from signstep.lab.training.recipe import (
    build_model,
    build_optimizer,
    lr_factor,
    require_compiler,
)
from signstep.lab.training.swats import SWATS
from signstep.lab.training.tasks import is_own
from signstep.lab.training.text_batches import TextBatches
from signstep.lab.training.watch import Watch
from signstep.lab.training.workers import Workers
from signstep.optim import HybridSignSGD


class NotFinite(Exception):
    """A loss is infinite or not a number."""


class TrainingRun:
    """Images or text, model, optimizer, and the record so far.

    Args:
        config: the run.
        workers: the processes that train it, this one among them.
        folder: folder to look for the images in first, or the file of a text; None: the usual places.

    Raises:
        BadInput: the configuration does not fit the images, the workers or this machine.
    """

    def __init__(self, config: RunConfig, workers: Workers, folder: Path | None) -> None:
        # A run's optimizer and scheduler hold each other: without this, a sweep's earlier runs pile up in memory.
        gc.collect()
        self.config, self.workers, device = config, workers, workers.device
        self.batches = batches_of(config, workers, folder)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch

        self.objective = Objective(config)
        self.model = build_model(config, self.batches, device, config.batch_size // workers.size)
        self.optimizer = build_optimizer(config, self.model, self.total_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(config, min(step, self.total_steps), self.total_steps)
        )
        if config.compile:
            require_compiler(device.type)
            torch.compiler.reset()  # else many runs in one process reach the limit on recompilations
        self.network: nn.Module = torch.compile(self.model) if config.compile else self.model  # type: ignore[assignment]
        self.reduction: reductions.Stateful | None = None
        self.local: LocalSteps | None = None
        if config.workers is not None and (config.workers != workers.size or not dist.is_initialized()):
            raise BadInput(
                f"workers={config.workers}: there are {workers.size}, and the result of reduce={config.reduce!r} "
                "depends on it; start as many with torchrun"
            )
        if config.every is not None:
            self.local = LOCAL_METHODS[config.reduce].start(
                self.model, self.optimizer, config.every, config.outer_lr, config.outer_momentum, config.seed
            )
            self.reduction = OwnState(self.model, self.optimizer, self.local)
        elif workers.size > 1 or config.workers is not None:
            self.network = wrapped = workers.wrap(self.network)
            self.reduction = reductions.attach(config.reduce, wrapped, self.optimizer)

        self.watch: Watch | None = None
        self.step = 0
        # This worker's part of each step's mean loss (row 0) and accuracy (row 1) within the epoch.
        self.history = torch.zeros(2, self.steps_per_epoch, dtype=torch.float32, device=device)
        # Reading a loss makes the host wait for the device and for the other workers: nothing alone on a CPU, dear on a
        # GPU, and over a slow link some round trips.
        self.check_every = 1 if device.type == "cpu" and workers.size == 1 else 50
        parameters = models.count_parameters(self.model)
        about = {**self.batches.about, **self._about_own()}
        start = records.start_event(config, parameters, about, device, workers.size)
        self.events: list[dict[str, Any]] = [start]
        # This epoch's time and first step in this process: not before the evaluation of an untrained network above.
        self.began, self.began_at = time.perf_counter(), 0

    @property
    def phase(self) -> str | None:
        """Which phase an optimizer that switches is in, "sgd" after the switch; None of another optimizer."""
        return self.optimizer.phase if isinstance(self.optimizer, HybridSignSGD | SWATS) else None

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
            self.optimizer.step()
            if self.local is not None:
                self.local.step()
        except CollectiveError as error:  # on all workers
            raise NotFinite(f"step {self.step + 1} (of {self.total_steps}): {error}") from error
        self.scheduler.step()
        self.history[0, index] = loss.detach() / self.workers.size
        with torch.no_grad():
            score = self.objective.score(logits, y)
        self.history[1, index] = score / (self.objective.count(y) * self.workers.size)
        self.step += 1

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean that training makes smaller."""
        return self.objective.loss(logits, y)

    def logits(self, network: nn.Module, x: Tensor) -> Any:
        """float32 [B, classes], of a text [B, T, 256], computed in the run's precision; of a model of the user's what
        it returns, if that is no floating-point tensor.
        """
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.workers.device.type, torch.bfloat16, enabled=bf16):
            outputs = network(x)
        return outputs.float() if isinstance(outputs, Tensor) and outputs.is_floating_point() else outputs

    def _about_own(self) -> dict[str, Any]:
        """What the record says of a model and data of the user's: the model's digest, and the result of one that knows
        nothing, which is that of a guess among the classes, or else of the untrained network.
        """
        config = self.config
        about: dict[str, Any] = {}
        if is_own(config.model):
            about["model_digest"] = own.digest(self.model)
        if config.metric is None and not is_own(config.dataset):
            return about
        classes = None if isinstance(self.batches, TextBatches) else self.batches.num_classes
        if config.metric is None and classes is not None:
            return about | {"chance": 100 / classes}
        try:
            loss, score = self.evaluate()
        except NotFinite as error:
            raise BadInput(f"before any training, {error}: see the model's first weights and the data") from error
        return about | {"chance": config.task.metric.of(loss, score)}

    def read_history(self) -> tuple[Tensor, Tensor]:
        """Losses and accuracies of the epoch's steps so far, over all workers, float64 on the CPU; NotFinite."""
        steps = (self.step - 1) % self.steps_per_epoch + 1
        losses, accuracies = self.workers.total(self.history[:, :steps]).cpu().double()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = self.step - steps + 1 + int(bad[0])
            raise NotFinite(f"the loss of step {step} (of {self.total_steps}) is {losses[bad[0]].item()}")
        return losses, accuracies

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and score over all labels to evaluate on, which the workers share out; NotFinite if one is not."""
        self.workers.share_buffers(self.model)
        self.model.eval()
        sums, count = (
            [torch.zeros(2, dtype=torch.float32, device=self.workers.device)],
            0,
        )  # a worker's share may be empty
        for x, y in self.batches.evaluation():
            sums.append(self.objective.sums(self.logits(self.model, x), y))
            count += self.objective.count(y)
        self.model.train()
        total = torch.stack(sums).cpu().double().sum(0)
        *totals, counted = self.workers.total(
            torch.cat([total, torch.tensor([count], dtype=torch.float64, device="cpu")])
        ).tolist()
        mean_loss, score = (each / counted for each in totals)
        for what, value in (("loss", mean_loss), (self.config.task.metric.name, score)):
            if not math.isfinite(value):
                raise NotFinite(f"the evaluation {what} after step {self.step} (of {self.total_steps}) is {value}")
        return mean_loss, score

    def end_epoch(self, losses: Tensor, accuracies: Tensor) -> dict[str, Any]:
        """Evaluate where that is due, add the epoch's line to the record, and return it; NotFinite."""
        if self.local is not None:
            try:
                self.local.hold_round()
            except CollectiveError as error:
                raise NotFinite(f"step {self.step} (of {self.total_steps}): {error}") from error
        trained = time.perf_counter() - self.began
        epoch = self.step // self.steps_per_epoch
        train_score = accuracies.mean().item()
        line: dict[str, Any] = {
            "event": "epoch",
            "epoch": epoch,
            "step": self.step,
            "lr": self.config.lr * lr_factor(self.config, self.step - 1, self.total_steps),
            "train_loss": losses.mean().item(),
            # A user's metric may be undefined on some batch, as one that needs examples of every class.
            f"train_{self.config.task.metric.score}": train_score if math.isfinite(train_score) else None,
        }
        if epoch % self.config.eval_every == 0 or epoch == self.config.epochs:
            line["eval_loss"], line[f"eval_{self.config.task.metric.score}"] = self.evaluate()
        if isinstance(self.optimizer, HybridSignSGD | SWATS):
            # Of a rate for each parameter the one in the middle.
            rates = torch.tensor(self.optimizer.calibrated_lr, dtype=torch.float64, device="cpu")
            rate = float(rates.median())
            line["phase"] = self.phase
            line["calibrated_lr"] = rate if math.isfinite(rate) else None
        rows, now = (self.step - self.began_at) * self.config.batch_size, time.perf_counter()
        per_second = f"{self.config.task.row}_per_second"
        line["timing"] = {"seconds": round(now - self.began, 3), per_second: round(rows / trained, 1)}
        self.began, self.began_at = now, self.step
        self.events.append(line)
        return line

    def end(self, status: Literal["done", "diverged"], reason: str | None = None) -> None:
        """Add the record's last line."""
        name = f"eval_{self.config.task.metric.score}"
        score = next((e[name] for e in reversed(self.events) if name in e), None)
        epoch = math.ceil(self.step / self.steps_per_epoch)
        line = {"event": "end", "status": status, "epoch": epoch, "step": self.step, name: score}
        self.events.append(line if reason is None else line | {"reason": reason})

    def close(self) -> None:
        """End what local steps have begun; a later step raises."""
        if self.local is not None:
            self.local.close()

    def write(self, record: Path) -> None:
        """Write the record so far, from rank 0."""
        if self.workers.rank == 0:
            records.write_events(record, self.events)

    def save(self, path: Path) -> None:
        """Write the checkpoint, from rank 0, unless the weights are no longer finite: then the last good one stays."""
        history = self.workers.total(self.history)
        reduction = self.workers.gather(None if self.reduction is None else self.reduction.state_dict())
        (bad,) = self.workers.any(not all(p.isfinite().all() for p in self.model.parameters()))
        if self.workers.rank == 0 and not bad:
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
        """Go back to what `save` wrote; BadInput if that was of another text."""
        records.require_same(state["events"][0], self.events[0])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.reduction is not None:
            self.reduction.load_state_dict(state["reduction"][self.workers.rank])
        self.step, self.events = state["step"], state["events"]
        self.began_at = self.step
        if self.workers.rank == 0:
            self.history.copy_(state["history"])
