"""What an experiment's results say, in words; every number in a sentence is computed from the runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from signstep.lab.output import stats
from signstep.lab.paper.experiments import Lesson, Row
from signstep.lab.paper.results import Results
from signstep.lab.training.tasks import ACCURACY, BITS_PER_BYTE, is_own


class Sentences:
    """The sentences of a report."""

    def __init__(self, results: Results) -> None:
        self._results, self._experiment = results, results.experiment
        self._cells, self._titles, self._metric = results.cells, results.titles, results.metric

    @property
    def headline(self) -> str:
        """The outcome in one sentence; for an experiment that has a lesson, what to take from it in a few."""
        if self._experiment.lesson is not None and self._metric is ACCURACY:
            return " ".join(self._draw(self._experiment.lesson, d) for d in self._experiment.datasets)
        parts = [f"on {self._titles[d]}, {self._outcome(d)}" for d in self._experiment.datasets]
        sentence = "; ".join(parts)
        return f"{sentence[0].upper()}{sentence[1:]}."

    def _outcome(self, dataset: str) -> str:
        cells = [(row, self._cells[row.key, dataset].estimate) for row in self._experiment.rows]
        means = [(estimate.mean, row) for row, estimate in cells if estimate]
        metric, digits = self._metric, self._metric.digits
        ranked = [row for _, row in sorted(means, key=lambda pair: -metric.sign * pair[0])]
        if not ranked:
            any_run = any(self._cells[row.key, dataset].runs for row in self._experiment.rows)
            return "every run diverged" if any_run else "no run has finished yet"
        best = ranked[0]
        reached = f"{self._cells[best.key, dataset].text} {metric.unit}"
        if len(ranked) == 1:
            return f"{best.short_label}, the only method with a result, reaches {reached}"
        if doubts := self._doubts(dataset, ranked):
            low, high = (stats.number(end(mean for mean, _ in means), digits) for end in (min, max))
            return (
                f"{len(ranked)} methods reach {low} to {high} {metric.unit}, which ranks none of them: {listed(doubts)}"
            )
        rival = next((row for row in ranked[1:] if row.key == "sgd"), ranked[1])
        gap = stats.paired_difference(self._cells[best.key, dataset].results, self._cells[rival.key, dataset].results)
        assert gap is not None
        corrected = self._results.corrected(dataset, best, rival)
        if corrected is None or corrected >= stats.LEVEL:
            points = stats.with_interval(gap, sign=True, digits=digits)
            p = "" if corrected is None else f", corrected p {stats.probability(corrected)}"
            return (
                f"{best.short_label} is {metric.best_word}, but {gap.n} seeds do not tell it from {rival.short_label} "
                f"({points} {metric.points}{p})"
            )
        ahead = replace(gap, mean=metric.sign * gap.mean)
        verb = "beats" if ahead.mean > 0 else f"is {metric.best_word}, but is beaten seed by seed by"
        name = rival.short_label if rival.key == "sgd" else f"the next best, {rival.short_label},"
        return f"{best.short_label} {verb} {name} by {stats.with_interval(ahead, digits=digits)} {metric.points}"

    def _draw(self, lesson: Lesson, dataset: str) -> str:
        """What sign steps reach beside their peers, what each remedy adds to them, and which of two to use.

        The last is left open where seeds of either lie as far apart as the two.
        """
        keys = (lesson.plain, *lesson.peers, *lesson.remedies, *lesson.remedies.values())
        rows = {key: self._experiment.row(key).short_label for key in keys}
        cells = {key: self._cells[key, dataset] for key in keys}
        means = {key: estimate.mean for key, cell in cells.items() if (estimate := cell.estimate)}
        title, plain = self._titles[dataset], rows[lesson.plain]
        if missing := [rows[key] for key in rows if key not in means]:
            return f"On {title} there is no result yet of {listed(missing)}."
        peers = listed([f"{rows[key]} {stats.number(means[key], 1)} %" for key in lesson.peers])
        sentences = [f"On {title}, {plain} reaches {stats.number(means[lesson.plain], 1)} %, {peers}."]
        use, open_ = [], []
        for published, ours in lesson.remedies.items():
            added = [stats.signed(means[key] - means[lesson.plain], 1) for key in (ours, published)]
            sentences.append(
                f"{rows[ours]} adds {added[0]} points to {plain}, the paper's {rows[published]} {added[1]}."
            )
            values = [list(cells[key].results.values()) for key in (ours, published)]
            ahead, apart = means[ours] - means[published], max(max(each) - min(each) for each in values)
            if min(map(len, values)) == 1 or abs(ahead) <= apart:
                open_.append(f"{rows[ours]} or {rows[published]}")
            else:
                use.append(rows[ours if ahead > 0 else published])
        if use:
            sentences.append(f"Use {listed(use)}: seeds lie less far apart.")
        if open_:
            sentences.append(f"Whether to use {', and whether '.join(open_)}, these runs do not tell.")
        return " ".join(sentences)

    def _doubts(self, dataset: str, rows: Sequence[Row]) -> list[str]:
        """Why no row may be called the best."""
        doubts = []
        tuned = [row.tuned_key in self._results.tuned.get(dataset, {}) for row in rows]
        if not all(tuned):
            doubts.append("not every learning rate was tuned" if any(tuned) else "no learning rate was tuned")
        if len(set.intersection(*(set(self._cells[row.key, dataset].results) for row in rows))) < stats.MIN_SEEDS:
            doubts.append(f"fewer than {stats.MIN_SEEDS} seeds are common to all")
        return doubts

    @property
    def short_names(self) -> str:
        """Which rows the headline and the charts call by a shorter name than the tables."""
        shorter = [f"{row.short_label}: {row.label}" for row in self._experiment.rows if row.short_label != row.label]
        return f"Short names: {'; '.join(shorter)}." if shorter else ""

    @property
    def setting(self) -> str:
        """Net, images or bytes, epochs and seeds, as of the runs."""
        configs, noun = self._results.configs, self._results.configs[0].task.noun
        images = sorted({int(run.start[f"train_{noun}"]) for run in self._results.finished})
        parts = [" and ".join(sorted({_net(c.model, c.width) for c in configs}))]
        if images:
            parts.append(f"{' and '.join(f'{n:,}' for n in images)} training {noun}")
        epochs = sorted({c.epochs for c in configs})
        parts.append(f"{' and '.join(map(str, epochs))} {plural(epochs[-1], 'epoch')}")
        parts.append(f"{len(self._results.seeds)} {plural(len(self._results.seeds), 'seed')}")
        return ", ".join(parts)

    @property
    def scope(self) -> str:
        """What was trained, and how far it compares with the paper's."""
        sentences = [f"{self.setting}."]
        if self._experiment.scale in ("smoke", "demo"):
            sentences.append(self._experiment.scale_summary)
        unknown = [self._titles[d] for d in self._experiment.datasets if not self._results.in_paper(d)]
        smaller = any(c.model != "resnet18" or c.width != 1 or c.subset is not None for c in self._results.configs)
        if unknown and self._experiment.of_paper:
            sentences.append(f"The paper has no numbers on {listed(unknown)}.")
        if smaller and self._results.any_in_paper:
            sentences.append(
                "The paper trained ResNet-18 on all images, so its accuracies are printed for reference; "
                "what can be compared is the order of the methods and the differences between them."
            )
        return " ".join(sentences)

    @property
    def tally(self) -> str:
        """How many of the paper's differences are borne out."""
        verdicts = Counter(d.verdict for d in self._results.differences if d.verdict)
        total = sum(verdicts.values())
        if not total:
            return ""
        names = listed([row.label for row in self._results.baselines])
        same, opposite, open_ = (verdicts[verdict] for verdict in ("same sign", "opposite sign", "undecided"))
        return (
            f"Of the paper's {total} {plural(total, 'difference')} to {names} that were measured here, "
            f"{same} {_have(same)} its sign, {opposite} the opposite one, and {open_} {_are(open_)} undecided: "
            "p is not below 0.05 by Holm's correction for all differences of this report."
        )

    @property
    def gap_summary(self) -> str:
        """How much is missing or went wrong, in one sentence; empty if nothing is."""
        diverged = sum(len(cell.diverged) for cell in self._cells.values())
        missing = sum(len(cell.missing) for cell in self._cells.values())
        edges = len(self._results.edges)
        parts = []
        if diverged:
            parts.append(f"{diverged} {plural(diverged, 'run')} diverged")
        if missing:
            parts.append(f"{missing} {plural(missing, 'run')} {_are(missing)} missing")
        if edges:
            parts.append(f"{edges} {plural(edges, 'learning rate')} {_are(edges)} at the edge of the sweep's grid")
        return listed(parts)

    @property
    def gaps(self) -> tuple[str, ...]:
        """What is missing or went wrong, one sentence each."""
        sentences, metric = [], self._metric.name
        for row in self._experiment.rows:
            for dataset in self._experiment.datasets:
                cell = self._cells[row.key, dataset]
                name = f"{row.label} on {self._titles[dataset]}"
                if cell.diverged:
                    seeds = listed([str(seed) for seed in cell.diverged])
                    sentences.append(
                        f"{name}: {cell.caveat} diverged (seed {seeds}), counted with the {metric} of chance."
                    )
                if cell.missing and not cell.results:
                    sentences.append(f"{name}: no finished run.")
                elif cell.missing:
                    sentences.append(f"{name}: seed {listed([str(s) for s in cell.missing])} missing.")
        for run in self._results.unfinished:
            sentences.append(
                f"Unfinished, not counted: {run.config.hash}, at epoch {len(run.epochs)} of {run.config.epochs}."
            )
        for row, dataset, lr in self._results.edges:
            sentences.append(
                f"{row.label} on {self._titles[dataset]}: the best learning rate of the sweep, {lr:g}, is at the edge "
                "of its grid; the method may want one beyond it."
            )
        return tuple(sentences)

    @property
    def untuned(self) -> str:
        """Which learning rates the sweep did not choose for their own row."""
        names = {
            d: [row.label for row in self._experiment.rows if row.tuned_key not in self._results.tuned.get(d, {})]
            for d in self._experiment.datasets
        }
        if all(len(missing) == len(self._experiment.rows) for missing in names.values()):
            return "The learning rates were not tuned: every method has its preset's."
        sentences = [
            f"Not tuned on {self._titles[d]}, with the preset's learning rate: {listed(missing)}."
            for d, missing in names.items()
            if missing
        ]
        for key in dict.fromkeys(row.lr_of for row in self._experiment.rows if row.lr_of):
            takers = listed([row.label for row in self._experiment.rows if row.lr_of == key])
            sentences.append(f"Not tuned, with the learning rate of {self._experiment.row(key).label}: {takers}.")
        return " ".join(sentences)

    @property
    def trials(self) -> str:
        """How many trials chose each learning rate: a grid goes on where its best is at its edge."""
        counts: dict[int, list[str]] = {}
        for dataset, choices in self._results.tuned.items():
            for row in self._experiment.rows:
                if row.key in choices:
                    names = counts.setdefault(len(choices[row.key]["trials"]), [])
                    names.append(f"{row.label} on {self._titles[dataset]}")
        if len(counts) == 1:
            return f"Each had {next(iter(counts))} trials."
        parts = [f"{count} trials: {listed(names)}" for count, names in sorted(counts.items())]
        return f"It goes on where the best is at its edge. {'; '.join(parts)}."

    @property
    def guesses(self) -> tuple[str, ...]:
        """What the paper does not say and is assumed here, the choice of the learning rates among it."""
        held_out = self._experiment.tuned_on
        if self._metric is BITS_PER_BYTE:
            held_out = "the tenth of the text before the last, which is the test part"
        tuning = (
            f"Learning rates are chosen on {held_out}, by runs of "
            f"{self._experiment.tune_epochs} {plural(self._experiment.tune_epochs, 'epoch')}, "
            f"with the same grid for every method. {self.trials}"
        )
        tuned = any(self._results.tuned.values())
        return tuple(filter(None, (*self._experiment.guesses, tuning if tuned else "", self.untuned)))


def _net(model: str, width: float) -> str:
    if is_own(model):
        return model
    name = model.replace("resnet", "ResNet-").replace("gpt", "GPT-").removesuffix("-")
    return name if width == 1 else f"{name} at width {width:g}"


def plural(count: int, noun: str) -> str:
    """The noun, with an s unless there is one of it."""
    return noun if count == 1 else f"{noun}s"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
