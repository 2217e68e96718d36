"""`signstep find-lr`: the range test of a run, from the command line and on its own."""

import re
from pathlib import Path

import pytest
import tiny_runs
import torch
from PIL import Image

from signstep.lab.cli import main
from signstep.lab.errors import BadInput
from signstep.lab.training import lr_range
from signstep.lab.training.run import TrainingRun
from signstep.lab.training.workers import Workers
from signstep.optim import LrRange, find_lr

TINY = ["--model", "resnet8", "--width", "0.25", "--batch-size", "32", "--steps", "40"]


@pytest.mark.parametrize("optimizer", ["sgd", "signsgd"])
def test_the_command_suggests_a_rate_and_draws_it(
    optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["find-lr", "--dataset", "digits", "--optimizer", optimizer, *TINY, "--out", str(tmp_path)])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    found = re.search(r"suggested for a start: --lr (\S+);", out)
    assert found is not None
    assert 1e-6 < float(found[1]) < 10
    with Image.open(tmp_path / "find-lr.png") as picture:
        assert min(picture.size) > 400


def test_it_is_that_of_a_loop_of_ones_own() -> None:
    config = tiny_runs.tiny(optimizer="lion", warmup=0.5)
    found = lr_range.measure(config, None, "cpu", low=1e-5, high=0.1, steps=20)
    run = TrainingRun(config, Workers.join("cpu"), None)
    step = iter(range(100))

    def closure() -> torch.Tensor:
        x, y = run.batches.training(*divmod(next(step), run.steps_per_epoch))
        loss = torch.nn.functional.cross_entropy(run.model(x), y)
        loss.backward()
        return loss

    assert find_lr(run.model, run.optimizer, closure, low=1e-5, high=0.1, steps=20) == found


def test_a_picture_without_a_suggestion() -> None:
    figure = lr_range.draw(LrRange((1e-3, 1e-2), (1.0, 1.0), (1.0, 1.0)), "sgd on nothing")
    assert "suggested" not in " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        ("hybrid", {}, "find the rate of its first phase, with --optimizer signsgd"),
        ("sgd", {"low": 2.0}, "find-lr: low=2.0, high=1.0: expected 0 < low < high"),
        ("sgd", {"steps": 3}, "find-lr: steps=3: expected at least 10"),
    ],
)
def test_what_cannot_be_measured(optimizer: str, options: dict[str, float], message: str) -> None:
    config = tiny_runs.tiny(optimizer=optimizer, switch=0.5 if optimizer == "hybrid" else None)
    with pytest.raises(BadInput, match=message):
        lr_range.measure(config, None, "cpu", **({"low": 1e-4, "high": 1.0, "steps": 20} | options))
