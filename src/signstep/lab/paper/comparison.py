"""Optimizers compared on a model and data of the user's: with the sweep, statistics and report of the paper's table.

`signstep.lab.compare` and `signstep compare` describe what is to be compared as a `Comparison`; its experiment is one
like those of `experiments.py`, and everything from there on is the paper's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from signstep.lab.errors import BadInput
from signstep.lab.paper.experiments import Experiment, Row, load_toml, make_row
from signstep.lab.paper.plan import first_seeds
from signstep.lab.paper.reproduce import reproduce, write_reports
from signstep.lab.paper.results import Results
from signstep.lab.paper.sweep import sweep
from signstep.lab.paper.tuned import read_tuned
from signstep.lab.training import own
from signstep.lab.training.example_batches import Examples
from signstep.lab.training.records import read_runs, require_same
from signstep.lab.training.run import TrainingRun
from signstep.lab.training.tasks import FOLDER
from signstep.lab.training.workers import Workers

_FEW = 200
"""With fewer examples to judge by, one of them is half a point or more."""
METHODS = ("adamw", "sgd", "signsgd", "dither", "lion", "hybrid")
"""What is compared unless something else is asked for."""


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    dataset: str
    """The name of the data set, as `RunConfig.dataset` has it."""
    options: Mapping[str, Any]
    """Fields of `RunConfig` that all runs have in common: model, epochs, batch_size, ..."""
    methods: Sequence[str] = METHODS
    """Names of presets/compare.toml, or rows of presets/methods.toml."""
    optimizers: Mapping[str, float] = field(default_factory=dict)
    """By the names of the user's own optimizers, which are registered, the centre of their grids."""
    data: Path | None = None
    """Where the images of a folder are."""

    @property
    def experiment(self) -> Experiment:
        """The rows on the data set.

        Raises:
            BadInput: there is no such method, or nothing to compare.
        """
        values, recipe = load_toml("compare"), load_toml("recipe-strong")
        known = load_toml("methods")
        epochs = self.options["epochs"]
        scale = {"options": self.options, "tune_epochs": epochs}
        rows: dict[str, Row] = {}
        for method in self.methods:
            key = values["methods"].get(method, method)
            if key not in known:
                raise BadInput(f"method {method!r}: expected {', '.join(values['methods'])} or {', '.join(known)}")
            if known[key].get("lr_of"):
                raise BadInput(f"method {method!r} takes the learning rate of another; name one that is tuned")
            rows[key] = make_row(key, recipe, scale, [self.dataset])
        plain = {**recipe["options"], **self.options}
        for name, lr in self.optimizers.items():
            if name in rows or name in values["methods"]:
                raise BadInput(f"optimizers: {name!r} is the name of a method already; give yours another one")
            rows[name] = Row(
                key=name,
                label=name,
                lr=lr,
                options={self.dataset: {**plain, "optimizer": f"own:{name}"}},
                tune_epochs=epochs,
            )
        if not rows:
            raise BadInput("there is no method to compare: name some")
        return Experiment(
            name="compare",
            title=values["title"],
            caption=values["caption"],
            scale="own",
            recipe="strong",
            datasets=(self.dataset,),
            rows=tuple(_as_own(row) for row in rows.values()),
            recipe_summary=values["summary"],
            scale_summary=f"Learning rates were tuned in runs as long as the final ones, {epochs} epochs.",
            guesses=tuple(values["guesses"]),
            tune_epochs=epochs,
            tuned_on=self._tuned_on(),
            of_paper=False,
        )

    def _tuned_on(self) -> str:
        if not self.dataset.startswith(FOLDER) and Examples.named(self.dataset).tune is not None:
            return "the set that was given to tune on"
        return "a held-out tenth of the training set"

    def run(
        self,
        folder: Path,
        *,
        trials: int,
        seeds: int,
        commands: Sequence[str],
        device: str = "auto",
        max_minutes: float | None = None,
        shard: tuple[int, int] = (0, 1),
        say: Callable[[str], None] = print,
    ) -> Results:
        """Tune every method, train the final runs, and write the report; what is there already is not trained again.

        Args:
            folder: where `tune`, `runs`, tuned.json and the report go.
            trials: points of every method's grid of learning rates.
            seeds: final runs of every method, with seeds 0, 1, ...
            commands: how to make this again, for the report.
            device: as of `signstep.lab.training.loop.train`.
            max_minutes: stop after so many minutes; the same call goes on. None: no limit.
            shard: (i, n): do the i-th of n shares of the work. Final runs begin once every shard's trials are over.
            say: takes a line of what is going on.

        Returns:
            What there is so far.

        Raises:
            BadInput: the comparison cannot be made as it is described, before anything is trained; or `folder` has runs
                of another model or other data under the same names.
        """
        started, experiment, counted = time.monotonic(), self.experiment, first_seeds(seeds)
        held_out = self._check(experiment, folder, device)
        if held_out is not None and held_out < _FEW:
            say(f"only {held_out} examples are there to choose learning rates by, so the choice is rough")
        tuned = sweep(
            [experiment],
            folder,
            data=self.data,
            device=device,
            trials=trials,
            max_minutes=max_minutes,
            shard=shard,
            say=say,
        )
        left = None if max_minutes is None else max(0.0, max_minutes - (time.monotonic() - started) / 60)
        choices = read_tuned(folder)
        if tuned:
            reproduce(
                [experiment],
                folder,
                seeds=seeds,
                tuned=choices,
                data=self.data,
                device=device,
                max_minutes=left,
                shard=shard,
                say=say,
            )
            for page in write_reports([experiment], folder, seeds=seeds, tuned=choices, commands=commands):
                say(f"table: {page.with_suffix('.md')}")
                say(f"report: {page}")
        return Results(experiment, read_runs(folder / "runs"), choices, counted)

    def _check(self, experiment: Experiment, folder: Path, device: str) -> int | None:
        """Begin a run of every method and train nothing; then see that earlier runs were of the same model and data.

        Returns:
            How many examples trials are judged on; None of a loader, which does not say.
        """
        starts = []
        for split in ("tune", "final"):
            row = experiment.rows[0]
            config = row.tuning_config(self.dataset, row.lr) if split == "tune" else row.config(self.dataset)
            starts.append(TrainingRun(config, Workers.join(device), self.data))
        for row in experiment.rows[1:]:
            row.config(self.dataset)
            if row.key in self.optimizers:
                own.optimizer(f"own:{row.key}", starts[0].model, row.lr)
        for name, begun in (("tune", starts[0]), ("runs", starts[1])):
            for found, run in read_runs(folder / name).items():
                if _same_names(run.config.to_dict(), begun.config.to_dict()):
                    require_same(run.start, {**begun.events[0], "hash": found})
        about = starts[0].batches.about
        return next((about[key] for key in ("eval_images", "eval_examples") if key in about), None)


def _same_names(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("dataset", "model", "version", "subset", "image_size"))


def _as_own(row: Row) -> Row:
    """A row as it is called here, without what is said of it beside the paper's."""
    note = row.note.removeprefix("Not in the paper: ")
    values = load_toml("compare")
    label, short = values["labels"].get(row.key, row.label), values["short"].get(row.key, row.short)
    return replace(row, label=label, short=short, in_paper=True, paper={}, note=note[:1].upper() + note[1:])


Better = Literal["higher", "lower"]


def compare(
    make_model: Callable[..., Any] | str,
    train_set: Any,
    val_set: Any,
    *,
    methods: Sequence[str] = METHODS,
    optimizers: Mapping[str, tuple[Callable[[Any, float], Any], float]] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    metric: Callable[[Any, Any], Any] | None = None,
    better: Better = "higher",
    tune_set: Any = None,
    epochs: int = 10,
    batch_size: int = 128,
    trials: int = 4,
    seeds: int = 3,
    out: str | Path = "comparison",
    name: str = "data",
    version: str = "",
    device: str = "auto",
    max_minutes: float | None = None,
    shard: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = print,
) -> Results:
    """Compare optimizers on a model and data of your own, as the paper's table compares them on its own.

    Each method's learning rate is tuned by `trials` runs of full length (and up to two more where the best is at the
    grid's edge) without `val_set`; then each is trained with `seeds` seeds and evaluated on `val_set` after the last
    epoch. The report in `out` has means with 95 % t-intervals, differences seed by seed, and p by Holm's correction.
    The same call goes on with what was stopped, and trains nothing twice.

    Args:
        make_model: makes a model with new weights; it is given ``num_classes`` and ``in_channels`` where it has such
            parameters and the data say them (``train_set.classes``). Or a name: "timm:resnet18",
            "torchvision:resnet18", "package.module:factory", "resnet8".
        train_set: a map-style data set, of which an item is a pair (input, target); or a function of a seed that
            returns an iterable of batches with a length, as a DataLoader.
        val_set: likewise; what the methods are judged on.
        methods: adamw, sgd, signsgd, dither (noise as large as the rms of the momentum), lion, hybrid (dither, then a
            switch to SGD that keeps the step's length), hybrid-paper, or a row of the lab's presets.
        optimizers: by name, a function of (params, lr) that makes a torch.optim.Optimizer, and the learning rate at the
            centre of its grid.
        loss: of a model's outputs and a batch's targets, a scalar, the mean over the batch; None: the cross-entropy.
        metric: of the same two, a number for the batch; the result is its mean over `val_set`, weighted by rows. None:
            accuracy in percent.
        better: which values of `metric` are.
        tune_set: what trials are judged on; None: a tenth of `train_set`, on which they are then not trained, and which
            a function of a seed cannot give.
        epochs: of every run.
        batch_size: of every run; that of a function of a seed is its own, and has to be the same.
        trials: points of each grid, sqrt(10) apart.
        seeds: final runs of each method.
        out: the folder of records and report.
        name: of the data, in the report and in the names of the runs.
        version: of model, data and functions: after a change of their code give another one, or another `out`. A model
            of other layers, or data of another length or shape, are noticed without.
        device: "auto" (a GPU if there is one), or what torch.device takes.
        max_minutes: stop after so many minutes; None: no limit.
        shard: (i, n): do the i-th of n shares of the work, in one folder or in several that are put together.
        say: takes a line of what is going on.

    Returns:
        The results: ``.cells[row, dataset].estimate``, ``.differences``, ...

    Raises:
        BadInput: the model does not fit the data, or the like; one sentence.

    Example:
        >>> import tempfile, torch
        >>> from signstep.lab import compare
        >>> x = torch.randn(200, 4)
        >>> points = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> with tempfile.TemporaryDirectory() as out:
        ...     results = compare(lambda: torch.nn.Linear(4, 2), points, points, methods=["sgd"], epochs=1, trials=1,
        ...                       batch_size=20, seeds=2, out=out, say=lambda line: None)
        >>> [(row, cell.estimate.n) for (row, _), cell in results.cells.items()]
        [('sgd', 2)]
    """
    dataset = f"own:{name}"
    if not name.isidentifier():
        raise BadInput(f"name={name!r}: expected a word of letters, digits and underscores")
    own.register(dataset, "data", Examples(train_set, val_set, tune_set))
    options: dict[str, Any] = {
        "model": _named(make_model, "model"),
        "epochs": epochs,
        "batch_size": batch_size,
        "better": better,
        "version": version,
    }
    for what, function in (("loss", loss), ("metric", metric)):
        if function is not None:
            options[what] = _named(function, what)
    rates = {}
    for key, (factory, lr) in (optimizers or {}).items():
        own.register(f"own:{key}", "optimizer", factory)
        rates[key] = lr
    comparison = Comparison(dataset, options, methods, rates)
    called = f"signstep.lab.compare({options['model']}, {name}, trials={trials}, seeds={seeds})"
    return comparison.run(
        Path(out),
        trials=trials,
        seeds=seeds,
        commands=[called],
        device=device,
        max_minutes=max_minutes,
        shard=shard,
        say=say,
    )


def _named(thing: Any, what: str) -> str:
    """The name of an object, under which it is registered; a name stays what it is."""
    if isinstance(thing, str):
        return thing
    plain = getattr(thing, "__qualname__", type(thing).__qualname__)
    name = f"{getattr(thing, '__module__', 'own')}:{plain}"
    own.register(name, what, thing)
    return name
