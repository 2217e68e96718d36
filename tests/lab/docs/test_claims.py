"""Claims about rows, benchmarks and files, on made folders of results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from signstep.lab.docs import claims
from signstep.lab.docs.claims import Claim, Verdict, read_claims, verdicts
from signstep.lab.docs.evidence import Evidence
from signstep.lab.docs.verdicts import Bound
from signstep.lab.errors import BadInput
from signstep.lab.output import stats
from signstep.lab.paper.experiments import NAMES, Name, Scale, load
from signstep.lab.training.tasks import task

ABOVE = Claim("a", "paper", "Sec. V", "Dither is above SGD.", Bound("above", 0), ("pre-relative", "sgd"), "cifar10")


def make(folder: Path, scale: Scale, dataset: str, results: Mapping[str, Mapping[int, float | None]]) -> None:
    """Write finished runs of the experiment that has the data set, at its presets' rates; None: it diverged."""
    name: Name = "language" if dataset == "bible" else "verdict"
    out = folder / f"{scale}-strong" / "runs"
    out.mkdir(parents=True, exist_ok=True)
    metric = task(dataset).metric
    for key, by_seed in results.items():
        row = load(name, scale=scale).row(key)
        for seed, value in by_seed.items():
            config = row.config(dataset, seed)
            lines: list[dict[str, Any]] = [{"event": "start", "config": config.to_dict()}]
            if value is None:
                lines.append({"event": "end", "status": "diverged", "epoch": 1})
            else:
                loss, accuracy = (0.0, value / 100) if metric.unit == "%" else (value * 0.6931471805599453, 0.5)
                line = {"event": "epoch", "epoch": config.epochs, "eval_accuracy": accuracy, "eval_loss": loss}
                lines += [line, {"event": "end", "status": "done", "epoch": config.epochs}]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (out / f"{config.hash}.jsonl").write_text(text)


def seeds(*values: float | None) -> dict[int, float | None]:
    return dict(enumerate(values))


def judge(folder: Path, *asked: Claim) -> list[Verdict]:
    return verdicts(Evidence(folder), asked)


def with_rows(first: str, second: str, dataset: str = "cifar10", **more: Any) -> Claim:
    return Claim(f"{first}-{second}-{dataset}", "ours", "", "", more.pop("bound", Bound("above", 0)), (first, second),
                 dataset, **more)  # fmt: skip


def test_a_difference_is_that_of_the_t_test(tmp_path: Path) -> None:
    first, second = [56.2, 57.1, 55.4, 58.0], [54.0, 54.9, 54.4, 55.1]
    make(tmp_path, "cpu", "cifar10", {"pre-relative": seeds(*first), "sgd": seeds(*second)})
    (found,) = judge(tmp_path, ABOVE)
    test = scipy.stats.ttest_rel(first, second)
    assert (found.outcome, found.n) == ("holds", 4)
    assert found.p == pytest.approx(test.pvalue)
    assert found.corrected == pytest.approx(test.pvalue)
    interval = test.confidence_interval()
    assert found.interval == f"+2.07 ± {stats.number((interval.high - interval.low) / 2)} points"


def test_each_direction_has_its_verdict(tmp_path: Path) -> None:
    make(tmp_path, "cpu", "cifar10", {"pre-relative": seeds(60, 61.1, 62), "sgd": seeds(50, 51, 52)})
    reverse = with_rows("sgd", "pre-relative")
    near, far = (with_rows("pre-relative", "sgd", bound=Bound("within", size)) for size in (1.0, 11.0))
    assert [each.outcome for each in judge(tmp_path, ABOVE, reverse, near, far)] == [
        "holds", "does not hold", "does not hold", "holds"]  # fmt: skip


@pytest.mark.parametrize("scale", ["cpu", "cpu2"])
def test_no_runs_are_not_measured_yet_and_the_command_is_named(tmp_path: Path, scale: Scale) -> None:
    (nothing,) = judge(tmp_path, ABOVE)
    make(tmp_path, scale, "cifar10", {"pre-relative": seeds(60, 61, 62)})
    (half,) = judge(tmp_path, ABOVE)
    assert nothing == half
    assert (nothing.outcome, nothing.n, nothing.p, nothing.interval) == ("not measured yet", 0, None, "")
    assert nothing.evidence.startswith("`signstep reproduce ")
    assert "--rows pre-relative sgd" in nothing.evidence


def test_seeds_that_only_one_row_has_do_not_count(tmp_path: Path) -> None:
    make(tmp_path, "cpu", "cifar10", {"pre-relative": seeds(60, 61, 62.2, 0, 0), "sgd": seeds(50, 51, 52)})
    (found,) = judge(tmp_path, ABOVE)
    assert (found.outcome, found.n) == ("holds", 3)
    apart = {"pre-relative": {0: 60.0, 1: 61.0}, "sgd": {2: 50.0, 3: 51.0}}
    make(tmp_path / "apart", "cpu", "cifar10", apart)
    assert judge(tmp_path / "apart", ABOVE)[0].outcome == "not measured yet"


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_seeds_decide_nothing_and_are_no_test(tmp_path: Path, count: int) -> None:
    values = [60.0, 60.1][:count]
    make(tmp_path, "cpu", "cifar10", {"pre-relative": seeds(*values), "sgd": seeds(*(v - 30 for v in values))})
    (found,) = judge(tmp_path, ABOVE)
    assert (found.outcome, found.n, found.p, found.corrected) == ("undecided", count, None, None)


def test_a_larger_scale_decides_once_it_has_three_seeds(tmp_path: Path) -> None:
    make(tmp_path, "cpu", "cifar10", {"pre-relative": seeds(60, 61, 62.1), "sgd": seeds(50, 51, 52)})
    make(tmp_path, "cpu2", "cifar10", {"pre-relative": seeds(70, 71), "sgd": seeds(80, 81.1)})
    (small,) = judge(tmp_path, ABOVE)
    assert (small.outcome, small.n) == ("holds", 3)
    make(tmp_path, "cpu2", "cifar10", {"pre-relative": seeds(70, 71, 72), "sgd": seeds(80, 81.1, 82)})
    (large,) = judge(tmp_path, ABOVE)
    assert (large.outcome, large.n) == ("does not hold", 3)
    assert "cpu2" in large.evidence
    assert large.interval.endswith("(without a test: cpu +10.03 ± 0.14)")
    assert small.interval.startswith("+10.03 ± 0.14 points (without a test: cpu2 −10.05")


def test_a_diverged_run_counts_as_chance(tmp_path: Path) -> None:
    make(tmp_path, "cpu", "cifar10", {"pre-relative": seeds(60, 61, None), "sgd": seeds(50, 51, 52)})
    (found,) = judge(tmp_path, ABOVE)
    assert found.n == 3
    assert found.estimate is not None
    assert found.estimate.mean == pytest.approx((10 + 10 - 42) / 3)
    assert found.outcome == "undecided"


def test_fewer_bits_per_byte_are_better(tmp_path: Path) -> None:
    better = with_rows("pre-relative", "adam", "bible")
    make(tmp_path, "cpu", "bible", {"pre-relative": seeds(1.9, 1.92, 1.91), "adam": seeds(2.0, 2.01, 2.02)})
    (found,) = judge(tmp_path, better)
    assert found.outcome == "holds"
    assert found.interval.startswith("+0.100 ± ")
    assert judge(tmp_path, with_rows("adam", "pre-relative", "bible"))[0].outcome == "does not hold"


def test_a_difference_of_differences_pairs_the_seeds(tmp_path: Path) -> None:
    make(tmp_path, "cpu", "cifar100", {"sgd": seeds(20, 30, 40), "signsgd": seeds(15.1, 25, 34.9)})
    make(tmp_path, "cpu", "cifar10", {"sgd": seeds(80, 70, 60), "signsgd": seeds(79, 69, 59)})
    (found,) = judge(tmp_path, with_rows("sgd", "signsgd", "cifar100", beside="cifar10"))
    assert found.outcome == "holds"
    assert found.estimate is not None
    assert found.estimate.mean == pytest.approx(4.0)
    other = tmp_path / "other"
    make(other, "cpu", "cifar100", {"sgd": seeds(20, 30, 40), "signsgd": seeds(15, 25, 35)})
    assert judge(other, with_rows("sgd", "signsgd", "cifar100", beside="cifar10"))[0].outcome == "not measured yet"


def test_all_tests_of_the_page_are_corrected_together(tmp_path: Path) -> None:
    make(tmp_path, "cpu", "cifar10", {"pre-relative": seeds(51.0, 51.9, 53.3), "sgd": seeds(50, 51, 52)})
    (alone,) = judge(tmp_path, ABOVE)
    many = judge(tmp_path, *[ABOVE] * 7, with_rows("lion", "sgd"))
    assert alone.outcome == "holds"
    assert alone.p is not None
    assert [each.corrected for each in many[:-1]] == pytest.approx([min(1, 7 * alone.p)] * 7)
    assert {each.outcome for each in many[:-1]} == {"undecided"}
    assert many[-1].outcome == "not measured yet"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(400, 700), st.integers(400, 700)), min_size=3, max_size=5), st.integers(1, 4))
def test_more_claims_never_decide_what_one_left_open(tmp_path: Path, pairs: list[tuple[int, int]], others: int) -> None:
    folder = tmp_path / str(hash((tuple(pairs), others)))
    make(folder, "cpu", "cifar10",
         {"pre-relative": seeds(*(a / 10 for a, _ in pairs)), "sgd": seeds(*(b / 10 for _, b in pairs))})  # fmt: skip
    (alone,) = judge(folder, ABOVE)
    among = judge(folder, *[ABOVE] * (1 + others))
    reverse = judge(folder, with_rows("sgd", "pre-relative"))[0]
    assert {each.outcome for each in among} <= {alone.outcome, "undecided"}
    turned = {"holds": "does not hold", "does not hold": "holds"}
    assert reverse.outcome == turned.get(alone.outcome, alone.outcome)


def bench(folder: Path, **met: list[str]) -> None:
    out = folder / "bench-cpu"
    out.mkdir(parents=True)
    for machine, found in met.items():
        targets = [{"target": "clean, time over torch SGD", "verdict": each} for each in found]
        workloads = {
            f"w{i}": {"targets": [each, {"target": "other", "verdict": "missed"}]} for i, each in enumerate(targets)
        }
        (out / f"bench-step-{machine}.json").write_text(json.dumps({"workloads": workloads}))


@pytest.mark.parametrize(
    ("intel", "amd", "outcome"),
    [
        (["met", "met"], ["met"], "holds"),
        (["missed", "missed"], ["missed"], "does not hold"),
        (["met", "missed"], ["met"], "holds"),
        (["met", "undecided"], ["met"], "undecided"),
        (["undecided"], ["undecided"], "undecided"),
    ],
)
def test_targets_of_the_benchmarks(tmp_path: Path, intel: list[str], amd: list[str], outcome: str) -> None:
    bench(tmp_path, intel=intel, amd=amd)
    (found,) = judge(tmp_path, Claim("t", "ours", "", "", Bound("above", 0), target="clean, time over torch SGD"))
    assert found.outcome == outcome
    assert found.n == len(intel) + len(amd)
    if "missed" in intel and "met" in intel:
        assert found.text == "holds under some machines: amd w0, intel w0"


def test_what_has_no_file_is_not_measured_yet(tmp_path: Path) -> None:
    (target,) = judge(tmp_path, Claim("t", "ours", "", "", Bound("above", 0), target="clean"))
    gone = Claim("m", "ours", "", "", Bound("below", 1), measured="file('gone.json').x", place="results/gone")
    plain = Claim("n", "paper", "", "", Bound("above", 0), place="no run of ours")
    measured, nothing = judge(tmp_path, gone, plain)
    assert {target.outcome, measured.outcome, nothing.outcome} == {"not measured yet"}
    assert (measured.evidence, nothing.evidence) == ("results/gone", "no run of ours")
    with pytest.raises(BadInput, match="nonsense"):
        judge(tmp_path, Claim("m", "ours", "", "", Bound("below", 1), measured="nonsense(1)"))


def test_measured_numbers_and_ranges(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"x": 3.0, "range": {"low": 2.0, "median": 3.0, "high": 5.0}}))
    cases = (
        ("x", Bound("below", 4)),
        ("x", Bound("below", 3)),
        ("range", Bound("below", 4)),
        ("range", Bound("above", 1)),
    )
    asked = [Claim(what, "ours", "", "", bound, measured=f"file('a.json').{what}") for what, bound in cases]
    found = judge(tmp_path, *asked)
    assert [each.outcome for each in found] == ["holds", "undecided", "undecided", "holds"]
    assert [each.interval for each in found] == ["3", "3", "3 (2 to 5)", "3 (2 to 5)"]


def test_every_claim_names_what_there_is() -> None:
    known = {(row.key, dataset) for name in NAMES for e in [load(name, scale="cpu2")] for row in e.rows
             for dataset in e.datasets}  # fmt: skip
    asked = read_claims()
    assert {each.whose for each in asked} == {"paper", "ours"}
    for each in asked:
        assert each.says.endswith(".")
        assert each.source
        kinds = [bool(part) for part in (each.rows, each.statement, each.measured, each.target)]
        assert sum(kinds) == 1 or (sum(kinds) == 0 and each.place), each.id
        for dataset in filter(None, (each.dataset, each.beside)):
            assert {(row, dataset) for row in each.rows} <= known, each.id


def test_a_claim_with_two_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = '[[claim]]\nid = "x"\nwhose = "ours"\nsource = "s"\nsays = "S."\n'
    monkeypatch.setattr(claims, "__file__", str(tmp_path / "claims.py"))
    for text, message in ((f"{head}above = 1\nbelow = 2\n", "expected one bound"), (head + head, "one id")):
        (tmp_path / "claims.toml").write_text(text)
        with pytest.raises(BadInput, match=message):
            read_claims()
