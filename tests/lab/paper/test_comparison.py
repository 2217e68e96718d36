"""A user's own comparison: the paper's statistics on the same numbers, and real comparisons from start to report."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import made_runs
import numpy as np
import pytest
import torch
from own_made import digits_in_folder, three_classes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from signstep.lab import compare
from signstep.lab.cli import main
from signstep.lab.errors import BadInput
from signstep.lab.paper import report
from signstep.lab.paper.comparison import METHODS, Comparison
from signstep.lab.paper.experiments import load
from signstep.lab.paper.results import Results
from signstep.lab.training import own
from signstep.lab.training.example_batches import Examples
from signstep.lab.training.loop import train
from signstep.lab.training.records import read_run

SEEDS = 5
QUIET: dict[str, Any] = {"say": lambda line: None}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def wide_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3))


def registered(**options: Any) -> Comparison:
    train_set, val_set = three_classes()
    own.register("own:points", "data", Examples(train_set, val_set))
    own.register("tests:net", "model", net)
    return Comparison("own:points", {"model": "tests:net", "epochs": 4, "batch_size": 20} | options)


def test_the_same_numbers_have_the_statistics_of_the_paper_s_table(tmp_path: Path) -> None:
    keys = ["sgd", "adam", "signsgd", "pre-relative", "lion", "dither-norm"]
    table = load("verdict", scale="cpu2", datasets=["cifar10"], rows=[k for k in keys if k != "hybrid"])
    mine = registered().experiment
    assert {row.key for row in mine.rows} == {row.key for row in table.rows} == set(keys)
    draw = np.random.default_rng(3)
    value = {(key, seed): 60 + 5 * i + draw.normal(0, 3) for i, key in enumerate(keys) for seed in range(SEEDS)}
    value["lion", 2] = math.nan  # diverged

    def results(experiment: Any, dataset: str) -> Results:
        runs = []
        for row in experiment.rows:
            for seed in range(SEEDS):
                number = value[row.key, seed]
                run = made_runs.run(row, dataset, seed, None if math.isnan(number) else number)
                run.start["chance"] = 10.0
                run.start["train_examples"] = 5000
                runs.append(run)
        return Results(experiment, made_runs.by_hash(*runs), {}, range(SEEDS))

    ours, papers = results(mine, "own:points"), results(table, "cifar10")
    for key in keys:
        own_cell, cell = ours.cells[key, "own:points"], papers.cells[key, "cifar10"]
        assert own_cell.results == cell.results
        assert own_cell.estimate == cell.estimate
        assert ours.is_best(own_cell) == papers.is_best(cell)

    def differences(found: Results) -> dict[tuple[str, str], Any]:
        return {(d.row.key, d.baseline.key): (d.estimate, d.corrected) for d in found.differences}

    assert differences(ours) == differences(papers)
    assert len(ours.differences) == 5 + 4 + 3
    report.write(mine, {r.config.hash: r for r in ours.finished}, tmp_path, tuned={}, commands=["-"])
    text = (tmp_path / "compare.md").read_text()
    assert "paper" not in text
    assert "# Comparison" in text
    assert "paper" not in (tmp_path / "compare.html").read_text().partition("<main>")[2]


def test_a_comparison_is_what_its_runs_say(tmp_path: Path) -> None:
    train_set, val_set = three_classes()
    lines: list[str] = []
    results = compare(
        net,
        train_set,
        val_set,
        methods=["sgd", "signsgd"],
        optimizers={"rms": (lambda params, lr: torch.optim.RMSprop(params, lr=lr), 0.01)},
        epochs=3,
        batch_size=20,
        trials=2,
        seeds=2,
        out=tmp_path,
        say=lines.append,
    )
    assert [row.key for row in results.experiment.rows] == ["sgd", "signsgd", "rms"]
    for row in results.experiment.rows:
        cell = results.cells[row.key, "own:data"]
        assert cell.trials >= 2
        for seed, reached in cell.results.items():
            config = row.config("own:data", seed, cell.lr)
            assert read_run(tmp_path / "runs" / f"{config.hash}.jsonl").result == reached
            alone = tmp_path / "alone"
            assert train(config, alone, progress=False) == "done"
            assert read_run(alone / f"{config.hash}.jsonl").result == reached
        trial = row.tuning_config("own:data", cell.lr)
        assert trial.epochs == 3
        assert read_run(tmp_path / "tune" / f"{trial.hash}.jsonl").start["train_examples"] == 108
    assert (tmp_path / "compare.html").exists()
    numbers = json.loads((tmp_path / "compare.json").read_text())
    assert [row["key"] for row in numbers["rows"]] == ["sgd", "signsgd", "rms"]

    # The same call trains nothing again; one with another model of the same name is refused.
    lines.clear()
    options: dict[str, Any] = {"methods": ["sgd"], "epochs": 3, "batch_size": 20, "trials": 2, "seeds": 2}
    compare(net, train_set, val_set, out=tmp_path, say=lines.append, **options)
    assert sum("nothing to train" in line for line in lines) == 2
    other = wide_net
    other.__qualname__ = "net"
    with pytest.raises(BadInput, match="has begun with another model"):
        compare(other, train_set, val_set, out=tmp_path, **options, **QUIET)
    with pytest.raises(BadInput, match="has begun with another training set"):
        compare(net, TensorDataset(*train_set[:100]), val_set, out=tmp_path, **options, **QUIET)


def test_loaders_with_a_loss_and_a_metric(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 80)[:, None]
    points = TensorDataset(x, (2 * x - 1).squeeze(1))

    def loader(seed: int) -> DataLoader:
        return DataLoader(points, 16, shuffle=True, generator=torch.Generator().manual_seed(seed))

    results = compare(
        lambda: nn.Sequential(nn.Linear(1, 1), nn.Flatten(0)),
        loader,
        points,
        tune_set=points,
        methods=["lion"],
        optimizers={"plain": (lambda params, lr: torch.optim.SGD(params, lr=lr), 0.1)},
        loss=nn.MSELoss(),
        metric=lambda outputs, y: (outputs - y).abs().mean(),
        better="lower",
        epochs=5,
        batch_size=16,
        trials=1,
        seeds=2,
        out=tmp_path,
        **QUIET,
    )
    assert results.metric.better == "lower"
    assert [(d.row.key, d.baseline.key) for d in results.differences] == [("plain", "lion")]
    assert all(0 < value < 2 for cell in results.cells.values() for value in cell.results.values())
    text = (tmp_path / "compare.md").read_text()
    assert "lower is better" in text
    assert "the set that was given to tune on" in text


class Pictures(torch.utils.data.Dataset):
    """A plain data set of the user's: 40 pictures of noise, brighter in one class than in the other."""

    classes = ("dark", "bright")

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.random.RandomState(index).rand(3, 32, 32).astype(np.float32) + index % 2, index % 2


def test_a_timm_model_on_a_plain_data_set(tmp_path: Path) -> None:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision that was built for another torch
        pytest.skip(f"timm cannot be imported: {error}")
    options: dict[str, Any] = {"methods": ["sgd", "signsgd"], "epochs": 1, "batch_size": 10, "trials": 1, "seeds": 2}
    results = compare("timm:test_resnet", Pictures(), Pictures(), out=tmp_path, **options, **QUIET)
    weights = sum(p.numel() for p in timm.create_model("test_resnet", num_classes=2).parameters())
    for cell in results.cells.values():
        assert [run.start["parameters"] for run in cell.runs] == [weights, weights]
        assert [run.result for run in cell.runs] == list(cell.results.values())
        assert cell.estimate is not None
        assert cell.estimate.mean == pytest.approx(np.mean(list(cell.results.values())))
    (difference,) = results.differences
    gaps = [
        results.cells["signsgd", "own:data"].results[s] - results.cells["sgd", "own:data"].results[s] for s in (0, 1)
    ]
    assert difference.estimate is not None
    assert difference.estimate.mean == pytest.approx(np.mean(gaps))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["adamm"]}, "method 'adamm': expected adamw, dither, hybrid"),
        ({"methods": []}, "there is no method to compare"),
        ({"methods": ["signsgd-int8"]}, "takes the learning rate of another"),
        ({"optimizers": {"sgd": (torch.optim.SGD, 0.1)}}, "'sgd' is the name of a method already"),
        ({"optimizers": {"own": (lambda params: None, 0.1)}}, r"its factory is called with \(params, lr\)"),
        ({"optimizers": {"own": (lambda params, lr: 3, 0.1)}}, "its factory returned an int, expected a torch.optim"),
        ({"name": "my data"}, "expected a word of letters, digits and underscores"),
        ({"seeds": 0}, "seeds=0: expected at least 1"),
        ({"batch_size": 500}, "this run has only 108 training examples"),
        ({"loss": lambda outputs, y: outputs}, r"returned a tensor of shape"),
    ],
)
def test_one_sentence_says_what_is_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    train_set, val_set = three_classes()
    options: dict[str, Any] = {"methods": ["sgd"], "epochs": 1, "batch_size": 20, "trials": 1, "out": tmp_path}
    with pytest.raises(BadInput, match=message) as caught:
        compare(net, train_set, val_set, **(options | QUIET | changes))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.html"))


def test_the_methods_are_tuned_at_the_full_length_of_a_run() -> None:
    experiment = registered(epochs=7).experiment
    assert len(experiment.rows) == len(METHODS)
    for row in experiment.rows:
        assert row.tuning_config("own:points", 0.1).epochs == row.config("own:points").epochs == 7


def test_a_new_user_compares_three_methods_on_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    digits_in_folder(tmp_path / "digits", 12)
    (tmp_path / "new_users_nets.py").write_text(
        "from torch import nn\n\n\ndef net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, num_classes))\n"
    )
    words = "compare --model new_users_nets:net --data folder:digits --methods adamw sgd hybrid --epochs 2"
    words += " --batch-size 12 --trials 1 --seeds 2 --image-size 8"
    for again in (False, True):
        with pytest.raises(SystemExit) as ended:
            main(words.split())
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert ("nothing to train" in out) == again
        assert out.splitlines()[-3].endswith("AdamW")
    page = (tmp_path / "comparison" / "compare.md").read_text()
    assert "signstep compare --model new_users_nets:net --data folder:digits --methods adamw sgd hybrid" in page
    assert "folder:" not in page.partition("## Machine")[0]
    sys.modules.pop("new_users_nets")
