"""Train one `RunConfig`: one loop, alone or as one of several workers under torchrun.

    signstep train --dataset cifar10 --optimizer signsgd --lr 1e-3
    torchrun --nproc-per-node 2 -m signstep train --dataset cifar10 --optimizer signsgd --lr 1e-3

When to step, evaluate, write and stop is here; what each of these does is in run.py.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from pathlib import Path
from typing import Literal

from signstep.lab.data import load_text
from signstep.lab.errors import BadInput
from signstep.lab.output.files import output_folder
from signstep.lab.training import checkpoint
from signstep.lab.training.config import RunConfig
from signstep.lab.training.display import Display
from signstep.lab.training.recipe import likely_cause
from signstep.lab.training.records import is_done, read_run, require_same
from signstep.lab.training.run import NotFinite, TrainingRun
from signstep.lab.training.watch import Watch, Watching
from signstep.lab.training.workers import StopRequest, Workers

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
        data: folder to look for the images in first, or the file of data set "text"; None: the usual places.
        device: "auto" (a GPU if there is one), or what torch.device takes.
        max_minutes: stop, with a checkpoint, after this many minutes; None: no limit.
        checkpoint_minutes: minutes between checkpoints; 0: after every step, of several workers after every 50th.
        progress: show progress, on a terminal as a bar, elsewhere as a line per epoch.
        tensorboard: write each epoch's numbers to `<out>/tensorboard/<hash>` as well.
        watching: what a monitor looks at, which changes nothing; its records go to `<out>/monitor/<hash>.jsonl`.

    Returns:
        "done", "diverged" (a loss was not finite; the record says at which step), "stopped" by the time limit, or
        "interrupted" by a signal; after the last two, call again to go on.

    Raises:
        RunBusy: another process is training this run.
        CannotWrite: `out` cannot be written, before any data is read; or later, when its disk is full: then the same
            call goes on from the last checkpoint.
        CheckpointError: the checkpoint is damaged.
        BadInput: the configuration does not fit the images, the workers or this machine.
    """
    if watching is not None and config.every is not None:
        raise BadInput(f"a monitor watches workers that have the same weights; with every={config.every} they have not")
    started = last_save = time.monotonic()
    if tensorboard:
        importlib.import_module("torch.utils.tensorboard")  # where its package is missing, say so before the run begins
    workers = Workers.join(device)
    record, saved = out / f"{config.hash}.jsonl", out / f"{config.hash}.pt"
    watched = out / "monitor" / record.name
    board = out / "tensorboard" / config.hash if tensorboard else None
    with workers.first_in(
        output_folder(out),
        output_folder(board),
        output_folder(None if watching is None else watched.parent),
        checkpoint.lock(out / f"{config.hash}.lock", over=lambda: is_done(record)),
    ):
        earlier = workers.from_first(lambda: read_run(record) if record.exists() else None)
        if earlier is not None and earlier.end is not None:
            if config.dataset == "text" and data is not None:
                same = {"hash": config.hash, "sha256": load_text("text", data).sha256}
                require_same(earlier.start, same)
            if watching is not None and not watched.exists():
                raise BadInput(f"{record} is of a run that has ended: delete it to train it again under the monitor")
            return "diverged" if earlier.diverged else "done"
        state = workers.from_first(lambda: checkpoint.load(saved, config.to_dict()))
        run = TrainingRun(config, workers, data)
        if earlier is not None:
            require_same(earlier.start, run.events[0])
        if state is not None:
            run.restore(state)
        if watching is not None:
            run.watch = Watch(watching, run, watched, state and state.get("monitor"))
        run.write(record)
        first = workers.rank == 0
        shown = Display(
            config, run.step, run.total_steps, show=progress, quiet=not first, board=board if first else None
        )
        with contextlib.closing(run), StopRequest() as stop, shown as display:
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
            except NotFinite as problem:
                reason = f"{problem}; {likely_cause(config, run.phase)}"
                run.end("diverged", reason)
                run.write(record)
                good = f"the last good checkpoint is {saved}" if saved.exists() else "there is no earlier checkpoint"
                display.say(f"{config.hash}: {reason}; {good}")
                return "diverged"
            run.end("done")
            run.write(record)
        return "done"
