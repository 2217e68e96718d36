"""A language model of bytes: its batches, its network, its metric, and a run that is killed."""

import functools
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import assert_same_bits, codes, outcome, start, two_workers, wait_for_checkpoint

from signstep.lab.errors import BadInput
from signstep.lab.training import gpt
from signstep.lab.training.config import RunConfig
from signstep.lab.training.loop import train
from signstep.lab.training.records import read_run
from signstep.lab.training.run import TrainingRun
from signstep.lab.training.tasks import TEXTS, task
from signstep.lab.training.text_batches import TextBatches
from signstep.lab.training.workers import Workers

ALONE = Workers(0, 1, torch.device("cpu"))
LION: dict[str, Any] = {"optimizer": "lion", "lr": 1e-2, "dither": 1.0, "dither_scale": "relative"}


def tiny(**changes: Any) -> RunConfig:
    small = {"dataset": "text", "model": "gpt", "width": 0.125, "context": 16, "batch_size": 8, "epochs": 3, "lr": 0.1}
    return RunConfig(**(small | changes))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,400 bytes of words in a random order: a final run of `tiny` takes 16 steps an epoch."""
    words, draw = ["in", "the", "beginning", "was", "word"], random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(draw.choice(words) for _ in range(1000))[:2400])
    return path


class _Worker(Workers):
    def in_turn(self, compute: Any) -> Any:
        return compute()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10), epoch=st.integers(0, 5), context=st.sampled_from([1, 5, 16]))
def test_an_epoch_goes_once_through_the_text_and_labels_are_one_further(
    seed: int, epoch: int, context: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "numbered"
    path.write_bytes(b"".join(i.to_bytes(2, "big") for i in range(600)))  # every pair of bytes is there once
    batches = TextBatches(tiny(seed=seed, context=context, batch_size=3), ALONE, path)
    parts = [batches.training(epoch, index) for index in range(batches.steps_per_epoch)]
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))
    assert torch.equal(x[:, 1:], y[:, :-1])
    whole = bytes(batches.train.tolist())
    places = [whole.find(bytes(row)) for row in torch.cat([x, y[:, -1:]], 1).tolist()]
    assert -1 not in places
    if context > 2:  # else a sequence is at several places
        assert len(set(places)) == len(places)
        assert len({start % context for start in places}) == 1
    assert len(x) * context > len(whole) - (3 + 2) * context
    again = TextBatches(tiny(seed=seed, context=context, batch_size=3), ALONE, path).training(epoch, 1)
    assert torch.equal(again[0], parts[1][0])


def test_every_byte_but_the_first_is_predicted_once_by_all_workers_together(file: Path) -> None:
    wanted = list(file.read_bytes()[-240:][1:])
    for size in (1, 2, 3):
        labels: list[int] = []
        for rank in range(size):
            batches = TextBatches(tiny(batch_size=6), _Worker(rank, size, torch.device("cpu")), file)
            for x, y in batches.evaluation():
                assert torch.equal(x[:, 1:], y[:, :-1])
                labels += y.flatten().tolist()
        assert sorted(labels) == sorted(wanted)
        if size == 1:
            assert labels == wanted


def test_workers_share_out_the_same_batch(file: Path) -> None:
    alone, *shared = (
        TextBatches(tiny(), _Worker(rank, size, torch.device("cpu")), file) for rank, size in [(0, 1), (0, 2), (1, 2)]
    )
    for epoch, index in [(0, 0), (2, 3), (1, 1)]:
        assert torch.equal(torch.cat([b.training(epoch, index)[1] for b in shared]), alone.training(epoch, index)[1])


def test_a_position_sees_nothing_after_it_and_all_before_it() -> None:
    torch.manual_seed(0)
    network = gpt.build("gpt", width=0.25)
    x = torch.randint(256, (2, 9))
    before = network(x)
    assert before.shape == (2, 9, 256)
    for place in (0, 4, 8):
        changed = x.clone()
        changed[:, place] = (changed[:, place] + 1) % 256
        same = (network(changed) == before).all(-1).all(0)
        assert same[:place].all()
        assert not same[place:].any()


def test_the_network_starts_as_it_says() -> None:
    torch.manual_seed(0)
    network = gpt.build("gpt")
    names = dict(network.named_parameters())
    assert not any("bias" in name for name in names)
    for name, parameter in names.items():
        if parameter.ndim == 2:
            wanted = 0.02 / math.sqrt(8) if "_out" in name else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.03), name
    loss = torch.nn.functional.cross_entropy(
        network(torch.randint(256, (4, 128))).flatten(0, 1), torch.randint(256, (512,))
    )
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)
    with pytest.raises(ValueError, match="expected one of gpt, gpt2"):
        gpt.build("gpt3")
    with pytest.raises(ValueError, match="expected both above 0"):
        gpt.build("gpt", context=0)


def test_bits_per_byte_are_those_of_an_arithmetic_coder(file: Path, tmp_path: Path) -> None:
    """A byte's cost is -log2 of the probability that the model gives it, added up by hand over the test part."""
    config = tiny(**LION)
    assert train(config, tmp_path, data=file, device="cpu", progress=False) == "done"
    run = read_run(tmp_path / f"{config.hash}.jsonl")
    trained = TrainingRun(config, ALONE, file)
    trained.model.load_state_dict(torch.load(tmp_path / f"{config.hash}.pt", weights_only=True)["model"])
    test, bits = list(file.read_bytes()[-240:]), 0.0
    for first in range(0, 239, 16):
        window = torch.tensor(test[first : first + 17])
        chances = trained.model(window[None, :-1])[0].double().softmax(-1)
        bits -= sum(math.log2(chances[i, byte].item()) for i, byte in enumerate(window[1:]))
    assert run.result == pytest.approx(bits / 239, rel=1e-5)
    assert run.result < 5
    assert {"train_bytes": 2160, "eval_bytes": 240}.items() <= run.start.items()
    assert run.metric == task("bible").metric


def test_a_diverged_run_has_eight_bits(file: Path, tmp_path: Path) -> None:
    config = tiny(lr=1e30)
    assert train(config, tmp_path, data=file, device="cpu", progress=False) == "diverged"
    assert read_run(tmp_path / f"{config.hash}.jsonl").result == 8.0


@pytest.mark.slow
def test_killed_at_random_moments(file: Path, tmp_path: Path) -> None:
    config = tiny(**LION, weight_decay=0.1)
    begin = functools.partial(start, config, data=file)
    process = begin(out=tmp_path / "whole", checkpoint_minutes=0)
    began = wait_for_checkpoint(config, tmp_path / "whole", process)
    process.join()
    lasted = time.monotonic() - began
    assert process.exitcode == 0
    moments = random.Random(20261129)
    for _ in range(2):
        process = begin(out=tmp_path / "broken", checkpoint_minutes=0)
        wait_for_checkpoint(config, tmp_path / "broken", process)
        time.sleep(moments.uniform(0, lasted / 8))
        process.kill()
        process.join()
    process = begin(out=tmp_path / "broken")
    process.join()
    assert process.exitcode == 0
    assert_same_bits(outcome(config, tmp_path / "broken"), outcome(config, tmp_path / "whole"))


@pytest.mark.slow
def test_two_workers_vote(file: Path, tmp_path: Path) -> None:
    config, said = tiny(**LION, reduce="vote", workers=2), tmp_path / "said"
    assert codes(two_workers(config, tmp_path / "runs", said, data=file)) == [0, 0], said.read_text()
    run = read_run(tmp_path / "runs" / f"{config.hash}.jsonl")
    assert run.done
    assert run.result < 6.5


def test_another_file_is_another_run(file: Path, tmp_path: Path) -> None:
    config, other = tiny(), tmp_path / "other.txt"
    other.write_bytes(file.read_bytes()[::-1])
    out = tmp_path / "runs"
    assert train(config, out, data=file, max_minutes=0, device="cpu", progress=False) == "stopped"
    record = out / f"{config.hash}.jsonl"
    wanted = rf"run {config.hash} has begun with another text .*: name that file with --data, or choose another --out"
    with pytest.raises(BadInput, match=wanted):
        train(config, out, data=other, device="cpu", progress=False)
    record.rename(tmp_path / "aside")  # the checkpoint alone knows
    with pytest.raises(BadInput, match=wanted):
        train(config, out, data=other, device="cpu", progress=False)
    assert train(config, out, data=file, device="cpu", progress=False) == "done"
    with pytest.raises(BadInput, match=wanted):
        train(config, out, data=other, device="cpu", progress=False)
    assert train(config, out, data=file, device="cpu", progress=False) == "done"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "resnet8"}, "model='resnet8': dataset text takes gpt or gpt2"),
        ({"dataset": "digits"}, "model='gpt': dataset digits takes resnet8 or resnet20 or resnet18 or convnet"),
        ({"dataset": "digits", "model": "resnet8"}, "context=16: expected a positive number of bytes, for a text"),
        ({"context": 0}, "context=0: expected a positive number of bytes"),
        ({"crop": 2}, "crop=2: dataset text has no images"),
        ({"stem": "imagenet"}, "stem='imagenet': dataset text has no images"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        tiny(**changes)


def test_a_text_too_short_for_a_batch_or_for_the_workers(file: Path) -> None:
    for config, workers in ((tiny(batch_size=256), ALONE), (tiny(), _Worker(0, 16, torch.device("cpu")))):
        config = tiny(batch_size=256 if workers is ALONE else 16)
        with pytest.raises(BadInput, match=r"words.txt is too short: 2160 bytes to train on and 240 to evaluate on"):
            TextBatches(config, workers, file)
    assert TEXTS == ("bible", "shakespeare", "text")
