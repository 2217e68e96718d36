"""Models, data, losses and metrics of the user's: they train as what is built in, or one sentence says why not."""

import functools
import json
import random
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch

from signstep.lab.errors import BadInput
from signstep.lab.training import own
from signstep.lab.training.config import RunConfig
from signstep.lab.training.example_batches import ExampleBatches, Examples
from signstep.lab.training.loop import train
from signstep.lab.training.run import TrainingRun
from signstep.lab.training.seeds import seeded
from signstep.lab.training.workers import Workers

OWN = "own_things"
plain = functools.partial(tiny_runs.tiny, subset=None, crop=0, batch_size=128, epochs=2)
line = functools.partial(
    RunConfig,
    dataset=f"{OWN}:line",
    model=f"{OWN}:Line",
    loss=f"{OWN}:mean_square",
    metric=f"{OWN}:mean_distance",
    better="lower",
    lr=0.1,
    batch_size=32,
    epochs=5,
)


def numbers(config: RunConfig, out: Path) -> list[dict[str, Any]]:
    """What a run's record says of its epochs, but for the time they took."""
    assert train(config, out, progress=False) == "done"
    return [{k: v for k, v in line.items() if k != "timing"} for line in tiny_runs.record(config, out).epochs]


@pytest.mark.parametrize("split", ["tune", "final"])
def test_what_is_built_in_and_the_same_brought_along_train_alike(split: str, tmp_path: Path) -> None:
    built_in = numbers(plain(split=split), tmp_path)
    own_data = functools.partial(plain, split=split, crop=4, flip=True)  # which are for images alone, so not in use
    assert numbers(plain(split=split, model=f"{OWN}:resnet"), tmp_path) == built_in
    assert numbers(own_data(dataset=f"{OWN}:digits", model=f"{OWN}:ten"), tmp_path) == built_in
    assert numbers(own_data(dataset=f"{OWN}:items", model="resnet8"), tmp_path) == built_in


@pytest.mark.parametrize("name", ["noisy_items", "loaders"])
def test_a_run_that_was_stopped_within_an_epoch_ends_with_the_same_numbers(name: str, tmp_path: Path) -> None:
    config = plain(dataset=f"{OWN}:{name}", model=f"{OWN}:Lazy", subset=None, batch_size=32, crop=4, flip=True)
    whole = numbers(config, tmp_path / "whole")
    workers, out = Workers.join("cpu"), tmp_path / "parts"
    out.mkdir()
    half = TrainingRun(config, workers, None)
    for _ in range(half.steps_per_epoch // 2):
        half.train_step()
    half.save(out / f"{config.hash}.pt")
    half.write(out / f"{config.hash}.jsonl")
    assert numbers(config, out) == whole


def test_the_global_generators_are_left_as_they_were(tmp_path: Path) -> None:
    def drawn() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    def begun() -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    begun()
    expected = [drawn(), drawn()]
    begun()
    found = [drawn()]
    with seeded(7):
        inside = drawn()
    found.append(drawn())
    assert found == expected
    with seeded(7):
        assert drawn() == inside


def test_a_loss_and_a_metric_of_ones_own(tmp_path: Path) -> None:
    config = line()
    epochs = numbers(config, tmp_path)
    assert epochs[-1]["eval_metric"] < epochs[0]["eval_metric"] < 2
    run = tiny_runs.record(config, tmp_path)
    assert run.result == epochs[-1]["eval_metric"]
    assert (run.metric.name, run.metric.sign) == ("mean_distance", -1)
    assert run.end is not None
    assert run.end["eval_metric"] == run.result
    # From the weights that were saved.
    state = torch.load(tmp_path / f"{config.hash}.pt", weights_only=True)["model"]
    x, y = own.resolve(f"{OWN}:line", "data")()[1].tensors
    outputs = (x @ state["linear.weight"].T + state["linear.bias"]).squeeze(1)
    assert run.result == pytest.approx((outputs - y).abs().mean().item(), rel=1e-5)
    assert epochs[-1]["eval_loss"] == pytest.approx((outputs - y).square().mean().item(), rel=1e-5)


def test_a_run_that_diverges_has_the_result_of_the_untrained_network(tmp_path: Path) -> None:
    config = line(dataset=f"{OWN}:far_line")
    assert train(config, tmp_path, progress=False) == "diverged"
    run = tiny_runs.record(config, tmp_path)
    untrained = TrainingRun(config, Workers.join("cpu"), None).evaluate()[1]
    assert run.result == untrained
    config = plain(dataset=f"{OWN}:items", model=f"{OWN}:resnet", lr=1e38, crop=4, flip=True)
    assert train(config, tmp_path, progress=False) == "diverged"
    assert tiny_runs.record(config, tmp_path).result == 10.0


def test_a_metric_that_is_undefined_on_the_batches_of_training(tmp_path: Path) -> None:
    config = line(metric=f"{OWN}:undefined_in_training")
    epochs = numbers(config, tmp_path)
    assert [epoch["train_metric"] for epoch in epochs] == [None] * 5
    assert epochs[-1]["eval_metric"] == epochs[-1]["eval_loss"]


def test_a_metric_that_is_not_finite_when_evaluated(tmp_path: Path) -> None:
    own.register("registered:undefined", "metric", own.resolve(f"{OWN}:Undefined", "metric")())
    config = line(metric="registered:undefined")
    assert train(config, tmp_path, progress=False) == "diverged"
    run = tiny_runs.record(config, tmp_path)
    assert run.end is not None
    assert "the evaluation undefined after step 4 (of 20) is nan" in run.end["reason"]
    assert run.result == 1.0
    with pytest.raises(BadInput, match=r"before any training, the evaluation undefined after step 0 .* is nan"):
        train(line(metric="registered:undefined", seed=1), tmp_path, progress=False)


def test_a_record_of_another_model_of_the_same_name_is_refused(tmp_path: Path) -> None:
    own.register("registered:model", "model", functools.partial(own.resolve(f"{OWN}:resnet", "model")))
    config = plain(model="registered:model")
    run = TrainingRun(config, Workers.join("cpu"), None)
    run.write(tmp_path / f"{config.hash}.jsonl")
    own.register("registered:model", "model", own.resolve(f"{OWN}:Lazy", "model"))
    with pytest.raises(BadInput, match=r"has begun with another model .* give this one another --version"):
        train(config, tmp_path, progress=False)
    assert plain(model="registered:model", version="2").hash != config.hash


def test_the_digest_of_a_model_is_that_of_what_it_is_made_of() -> None:
    made = own.resolve(f"{OWN}:resnet", "model")
    assert own.digest(made(10, 1)) == own.digest(made(10, 1)) != own.digest(made(10, 3))
    assert own.digest(torch.nn.Sequential(torch.nn.Dropout(0.1))) != own.digest(torch.nn.Sequential(torch.nn.Dropout()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no_such_module:Net"}, "module no_such_module cannot be imported .*ModuleNotFoundError"),
        ({"model": f"{OWN}:Nix"}, f"model {OWN}:Nix: module {OWN} has no Nix"),
        ({"model": f"{OWN}:A_STRING"}, "expected a function or a class that makes the model, not a str"),
        ({"model": f"{OWN}:needs_depth"}, "missing a required argument: 'depth', and all there is to give is num_cl"),
        ({"model": f"{OWN}:a_number"}, "its factory returned an int, expected a torch.nn.Module"),
        ({"model": f"{OWN}:Narrow"}, r"Narrow fails on inputs of shape \[2, 1, 8, 8\]: mat1 and mat2"),
        ({"model": "not a name:x"}, "expected package.module:name"),
        ({"model": "resnet9"}, "dataset digits takes resnet8 or .*, or package.module:factory"),
        ({"dataset": "digit"}, "dataset='digit': expected cifar10, .*, or name your own with --data"),
        ({"dataset": f"{OWN}:ragged", "model": f"{OWN}:Lazy"}, "its examples make no batch"),
        ({"dataset": f"{OWN}:triples", "model": f"{OWN}:Lazy"}, "an example has 3 parts, expected a pair"),
        ({"dataset": f"{OWN}:empty", "model": f"{OWN}:Lazy"}, "the training set: it is empty"),
        ({"dataset": f"{OWN}:with_an_argument"}, "missing 1 required positional argument: 'folder'; it is called wi"),
        ({"dataset": f"{OWN}:iterators"}, "neither a data set with a length and items nor a function of a seed; give"),
        ({"dataset": f"{OWN}:a_number"}, r"expected a function that returns \(train_set, val_set\)"),
        ({"dataset": f"{OWN}:digits", "model": "resnet8"}, "is for images .* of a data set that has `classes`"),
        ({"dataset": f"{OWN}:far_labels", "model": f"{OWN}:ten"}, "a target is 12: the model has 10 classes"),
        ({"dataset": f"{OWN}:loaders", "batch_size": 16}, "gives 32 examples at a time; say the same in both"),
        ({"dataset": f"{OWN}:loaders", "subset": 64, "batch_size": 32}, "of a loader there are no subsets"),
        ({"dataset": f"{OWN}:loaders_without_third", "split": "tune"}, "give a third set for it"),
        (
            {"dataset": f"{OWN}:line", "model": f"{OWN}:Line"},
            "expected logits .* give a loss and",
        ),
        (
            {"dataset": f"{OWN}:line", "model": f"{OWN}:Line", "loss": f"{OWN}:mean_square"},
            "expected logits .* give a loss and a metric",
        ),
        ({"better": "lower"}, "better='lower': name the metric of your own"),
        ({"loss": f"{OWN}:fails"}, r"loss own_things:fails fails on outputs \[128, 10\] and targets \[128\]: it is T"),
        ({"loss": f"{OWN}:mean_square", "label_smoothing": 0.1}, "a loss of your own has its own"),
        ({"dataset": "bible", "model": f"{OWN}:Lazy"}, "dataset bible takes gpt or gpt2$"),
        ({"dataset": "bible", "model": "gpt", "loss": "a:b", "crop": 4, "flip": True}, "dataset bible has its own"),
        ({"image_size": 8}, "expected pixels >= 1, for --data folder:PATH"),
        ({"optimizer": "sdg"}, "optimizer='sdg': expected one of sgd"),
        ({"optimizer": f"{OWN}:ten"}, r"too many positional arguments; its factory is called with \(params, lr\)"),
    ],
)
def test_one_sentence_says_what_is_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    if ":" in changes.get("dataset", ""):
        changes = {"crop": 4, "flip": True, **changes}
    with pytest.raises(BadInput, match=message) as caught:
        train(plain(**changes), tmp_path, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["of_each", "a_number"])
def test_a_loss_that_is_no_scalar(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"returned a tensor of shape .*: expected one number|fails on outputs"):
        train(line(loss=f"{OWN}:{name}"), tmp_path, progress=False)


def test_the_fields_for_ones_own_rename_no_run() -> None:
    before = json.loads(json.dumps(tiny_runs.tiny().to_dict()))
    for name in ("loss", "metric", "better", "version", "image_size"):
        del before[name]
    assert RunConfig.from_dict(before).hash == tiny_runs.tiny().hash


def test_a_worker_may_have_nothing_to_evaluate() -> None:
    """Three workers and two examples to evaluate on: the third's share is empty."""
    x = torch.arange(12.0).view(12, 1)
    points = torch.utils.data.TensorDataset(x, x)
    own.register("own:few", "data", Examples(points, torch.utils.data.Subset(points, [0, 1])))
    config = line(dataset="own:few", batch_size=6)
    shares = []
    for rank in range(3):
        worker: Any = types.SimpleNamespace(rank=rank, size=3, device=torch.device("cpu"), in_turn=lambda make: make())
        shares.append(len(list(ExampleBatches(config, worker).evaluation())))
    assert shares == [1, 1, 0]
