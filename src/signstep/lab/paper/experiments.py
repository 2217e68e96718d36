"""The paper's Table I and Figures 1 to 3 as lists of runs.

An experiment is a list of methods (`presets/methods.toml`) trained by a recipe (`recipe-*.toml`) at a scale
(`scale-*.toml`) on some data sets (`datasets.toml`). Recipes and scales say what holds for images, and in a table
`text` what holds for texts instead. Where several set a field, the later one of this list has it:
recipe, data set, scale, method, the recipe's part for the method's optimizer.
Experiments that share a run share its `RunConfig`, so its hash, so its file.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from signstep.lab.errors import BadInput
from signstep.lab.training.config import Dataset, RunConfig
from signstep.lab.training.optimizers import OPTIMIZERS
from signstep.lab.training.tasks import FOLDER, TEXTS, Metric, is_own

Name = Literal[
    "table1",
    "fig1",
    "fig2",
    "fig3",
    "beyond",
    "state",
    "baselines",
    "remedies",
    "verdict",
    "switch",
    "handoff",
    "language",
    "demo",
]
Scale = Literal["smoke", "demo", "cpu", "cpu2", "full"]
Recipe = Literal["strong", "paper"]

OF_THE_PAPER: tuple[Name, ...] = ("table1", "fig1", "fig2", "fig3")
NAMES: tuple[Name, ...] = Name.__args__  # type: ignore[attr-defined]
TUNING_SEED = 1000
"""Seed of every tuning run; no final run has it, unless someone asks for more than a thousand seeds."""


@cache
def load_toml(name: str) -> dict[str, Any]:
    """What a file of `presets` has."""
    return tomllib.loads((Path(__file__).with_name("presets") / f"{name}.toml").read_text(encoding="utf-8"))


def grid_point(index: int) -> float:
    """10^(index/2) to three digits: the sweep's grid, two points per decade.

    >>> [grid_point(i) for i in (-6, -5, -4)]
    [0.001, 0.00316, 0.01]
    """
    return float(f"{10 ** (index / 2):.3g}")


@dataclass(frozen=True)
class Row:
    """One method of an experiment, under the experiment's recipe and scale."""

    key: str
    label: str
    lr: float
    """Default learning rate, the centre of the grid."""
    in_paper: bool = True
    note: str = ""
    paper: Mapping[str, float] = field(default_factory=dict)
    """The paper's final accuracy in percent, by data set; absent where the paper gives none."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By data set: the fields of `RunConfig` but dataset, lr and seed."""
    tune_epochs: int = 1
    lr_of: str = ""
    """Key of the row whose tuned learning rate this one takes, without trials of its own; empty: it is tuned itself."""
    short: str = ""
    """What a headline and charts call it; empty: its label."""

    @property
    def tuned_key(self) -> str:
        """The entry of tuned.json that has its learning rate."""
        return self.lr_of or self.key

    @property
    def short_label(self) -> str:
        """What a headline and charts call it; tables, legends and notes have the label.

        >>> load("verdict").row("pre-relative").short_label
        'Sign + dither'
        """
        return self.short or self.label

    def config(self, dataset: str, seed: int = 0, lr: float | None = None) -> RunConfig:
        """The final run: trained on the whole training set, evaluated on the test set.

        >>> load("table1", scale="cpu", recipe="strong").row("sgd").config("cifar10", seed=2).momentum
        0.9
        """
        return RunConfig(
            dataset=cast(Dataset, dataset), seed=seed, lr=self.lr if lr is None else lr, **self.options[dataset]
        )

    def tuning_config(self, dataset: str, lr: float) -> RunConfig:
        """The run that judges `lr`: evaluated once, on the tenth of the training set it was not trained on."""
        return replace(
            self.config(dataset, TUNING_SEED, lr), split="tune", epochs=self.tune_epochs, eval_every=self.tune_epochs
        )

    def grid(self, trials: int) -> tuple[int, ...]:
        """`trials` neighbouring indices for `grid_point`, centred on the default lr; if even, one more above it."""
        centre = round(2 * math.log10(self.lr))
        first = centre - (trials - 1) // 2
        return tuple(range(first, first + trials))


@dataclass(frozen=True)
class Lesson:
    """The rows, by key, that a headline compares which says what to take from an experiment."""

    plain: str
    """What the remedies are to mend."""
    peers: Sequence[str]
    """What it competes with."""
    remedies: Mapping[str, str]
    """Of each remedy as the paper publishes it, the row that is recommended in its place."""


@dataclass(frozen=True)
class Experiment:
    """A table or figure: which rows on which data sets, and the words that go with it."""

    name: str
    title: str
    caption: str
    scale: str
    recipe: str
    datasets: tuple[str, ...]
    rows: tuple[Row, ...]
    recipe_summary: str
    scale_summary: str
    guesses: tuple[str, ...]
    """What the recipe assumes because the paper does not say it."""
    tune_epochs: int
    lesson: Lesson | None = None
    """What its headline compares; None: the best row with the others."""
    tuned_on: str = "a held-out tenth of the training set"
    """What judges a learning rate, of images and examples."""
    of_paper: bool = True
    """One of those that the paper, or this library beside it, reports; False: a user's own comparison."""

    @property
    def metric(self) -> Metric:
        """What its runs are judged by."""
        return self.rows[0].config(self.datasets[0]).task.metric

    def row(self, key: str) -> Row:
        """The row called `key`; BadInput with the known keys otherwise."""
        for row in self.rows:
            if row.key == key:
                return row
        raise BadInput(f"{self.name} has no row {key!r}: it has {', '.join(row.key for row in self.rows)}")


def dataset_title(dataset: str) -> str:
    """How a data set's name is printed.

    >>> dataset_title("cifar10")
    'CIFAR-10'
    """
    if is_own(dataset):
        folder = dataset.removeprefix(FOLDER).rpartition("@")[0]  # folder:NAME@DIGEST, as signstep.lab.data has it
        return folder if dataset.startswith(FOLDER) else dataset.removeprefix("own:")
    return str(load_toml("datasets")[dataset]["title"])


def _for_task(name: str, datasets: Sequence[str]) -> dict[str, Any]:
    """A recipe or a scale, as it is for data sets that are all images or all texts."""
    values = load_toml(name)
    return {**values, **values["text"]} if datasets[0] in TEXTS else values


def make_row(key: str, recipe: Mapping[str, Any], scale: Mapping[str, Any], datasets: Sequence[str]) -> Row:
    """A row of `presets/methods.toml` under a recipe and at a scale, both as their files have them."""
    method = load_toml("methods")[key]
    optimizer = method["options"]["optimizer"]
    for_optimizer = recipe["optimizers"].get(optimizer, {})
    options: dict[str, dict[str, Any]] = {}
    for dataset in datasets:
        values = {} if is_own(dataset) else load_toml("datasets")[dataset]
        merged = {
            **recipe["options"],
            **values.get("options", {}),
            **scale["options"],
            **method["options"],
            **for_optimizer.get("options", {}),
        }
        if "train_size" in values and merged.get("subset", 0) > values["train_size"]:
            del merged["subset"]
        options[dataset] = merged
    return Row(
        key=key,
        label=for_optimizer.get("label", method["label"]),
        lr=recipe.get("lr", {}).get(optimizer, OPTIMIZERS[optimizer].lr),
        in_paper=method.get("in_paper", True),
        note=method.get("note", ""),
        paper=method.get("paper", {}),
        options=options,
        tune_epochs=scale["tune_epochs"],
        lr_of=method.get("lr_of", ""),
        short=for_optimizer.get("short", method.get("short", "")),
    )


def load(
    experiment: Name,
    *,
    scale: Scale = "cpu",
    recipe: Recipe = "strong",
    datasets: Sequence[str] | None = None,
    rows: Sequence[str] = (),
) -> Experiment:
    """Read an experiment's presets; `datasets` replaces the paper's, and `rows` keeps those with these keys only.

    >>> load("fig2").datasets
    ('cifar10',)
    """
    for kind, value, known in (
        ("experiment", experiment, NAMES),
        ("scale", scale, Scale.__args__),  # type: ignore[attr-defined]
        ("recipe", recipe, Recipe.__args__),  # type: ignore[attr-defined]
    ):
        if value not in known:
            raise BadInput(f"{kind} {value!r}: expected one of {', '.join(known)}")
    values = load_toml(experiment)
    chosen = tuple(dict.fromkeys(datasets or values["datasets"]))
    for dataset in chosen:
        if dataset not in load_toml("datasets"):
            raise BadInput(f"data set {dataset!r}: expected one of {', '.join(load_toml('datasets'))}")
    for key in rows:
        if key not in values["rows"]:
            raise BadInput(f"{experiment} has no row {key!r}: it has {', '.join(values['rows'])}")
        giver = load_toml("methods")[key].get("lr_of", key)
        if giver not in rows:
            raise BadInput(f"row {key} takes the learning rate of row {giver}: choose that one too")
    if 0 < sum(dataset in TEXTS for dataset in chosen) < len(chosen):
        raise BadInput(f"data sets {', '.join(chosen)}: an experiment is on images or on texts, not on both")
    recipe_values, scale_values = (_for_task(name, chosen) for name in (f"recipe-{recipe}", f"scale-{scale}"))
    return Experiment(
        name=experiment,
        title=values["title"],
        caption=values["caption"],
        scale=scale,
        recipe=recipe,
        datasets=chosen,
        rows=tuple(
            make_row(key, recipe_values, scale_values, chosen) for key in values["rows"] if not rows or key in rows
        ),
        recipe_summary=recipe_values["summary"],
        scale_summary=scale_values["summary"],
        guesses=tuple(recipe_values["guesses"]),
        tune_epochs=scale_values["tune_epochs"],
        lesson=Lesson(**values["lesson"]) if "lesson" in values and not rows else None,
    )


def load_all(
    name: Name | Literal["all"],
    *,
    scale: Scale,
    recipe: Recipe,
    datasets: Sequence[str] | None = None,
    rows: Sequence[str] = (),
) -> tuple[Experiment, ...]:
    """One experiment, of which `rows` may keep a part, or with "all" the table and the three figures.

    With "all", a figure keeps to those of `datasets` that the paper shows it on; where that leaves none, it is made on
    all of them.
    """
    if name != "all":
        return (load(name, scale=scale, recipe=recipe, datasets=datasets, rows=rows),)
    if rows:
        raise BadInput(f"rows {', '.join(rows)}: name one experiment that has them, not all")
    experiments = []
    for each in OF_THE_PAPER:
        usual = load(each, scale=scale, recipe=recipe).datasets
        kept = [d for d in datasets or usual if d in usual]
        experiments.append(load(each, scale=scale, recipe=recipe, datasets=kept or datasets))
    return tuple(experiments)
