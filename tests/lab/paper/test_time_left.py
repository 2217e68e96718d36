"""How long a series of runs will take."""

from dataclasses import replace
from typing import Any

import torch

from signstep.lab.output.machine import environment
from signstep.lab.paper.time_left import TimeLeft
from signstep.lab.training.config import RunConfig
from signstep.lab.training.records import Run

HERE = environment(torch.device("cpu"), 1)
SMALL = RunConfig(dataset="digits", model="resnet8", epochs=4)
LEFT = TimeLeft("cpu")


def record(config: RunConfig, *seconds: float, **elsewhere: Any) -> Run:
    epochs = [{"epoch": i + 1, "timing": {"seconds": each}} for i, each in enumerate(seconds)]
    return Run(config, {"environment": {**HERE, **elsewhere}}, epochs, None)


def test_each_run_takes_the_epochs_it_lacks_times_the_median_epoch_of_its_network() -> None:
    wide = replace(SMALL, width=2.0, epochs=10)
    tuning = record(replace(SMALL, split="tune", seed=7, lr=3.0), 2.0)
    records = [record(replace(SMALL, seed=5), 50.0, 3.0, 3.0), tuning, record(wide, 9.0)]
    assert LEFT.seconds([SMALL, replace(SMALL, seed=1, epochs=6), wide], records) == (4 * 3 + 6 * 3 + 9 * 9, 0)
    assert LEFT.seconds([], records) == (0, 0)


def test_epochs_of_other_machines_and_networks_say_nothing() -> None:
    old = Run(SMALL, {}, [{"epoch": 1, "timing": {"seconds": 1.0}}], None)  # without an environment
    others = [
        record(replace(SMALL, seed=1), 1.0, device="NVIDIA H100"),
        record(replace(SMALL, seed=2), 1.0, threads=HERE["threads"] + 1),
        record(replace(SMALL, dataset="mnist"), 1.0),
        record(replace(SMALL, image_size=64, dataset="folder:x"), 1.0),
        replace(old, config=replace(SMALL, seed=3)),
    ]
    assert LEFT.seconds([SMALL], others) == (0, 1)
    assert LEFT.text([SMALL, SMALL], others) == "2 runs left, no estimate yet"
    assert LEFT.text([SMALL], [*others, record(replace(SMALL, seed=4), 30.0)]) == "1 run left, about 2 min"
    both = [SMALL, replace(SMALL, dataset="mnist")]
    assert LEFT.text(both, [record(replace(SMALL, seed=4), 30.0)]) == "2 runs left, about 2 min for 1 of them"


def test_nothing_is_asked_of_a_device_before_there_is_something_to_say() -> None:
    TimeLeft("a device that there is not")
