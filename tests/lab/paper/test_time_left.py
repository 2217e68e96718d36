"""How long a series of runs will take."""

from dataclasses import replace
from typing import Any

from signstep.lab.paper.time_left import seconds_left, text, this_machine
from signstep.lab.training.config import RunConfig
from signstep.lab.training.records import Run

HERE = this_machine("cpu")
SMALL = RunConfig(dataset="digits", model="resnet8", epochs=4)


def record(config: RunConfig, *seconds: float, **elsewhere: Any) -> Run:
    epochs = [{"epoch": i + 1, "timing": {"seconds": each}} for i, each in enumerate(seconds)]
    return Run(config, {"environment": {**HERE, **elsewhere}}, epochs, None)


def test_each_run_takes_its_epochs_times_the_median_epoch_of_its_network() -> None:
    wide = replace(SMALL, width=2.0, epochs=10)
    records = [
        record(SMALL, 50.0, 3.0, 3.0),
        record(replace(SMALL, split="tune", seed=7, lr=3.0), 2.0),
        record(wide, 9.0),
    ]
    assert seconds_left([SMALL, replace(SMALL, seed=1, epochs=6), wide], records, HERE) == 4 * 3 + 6 * 3 + 10 * 9
    assert seconds_left([], records, HERE) == 0


def test_epochs_of_other_machines_and_networks_say_nothing() -> None:
    others = [
        record(SMALL, 1.0, device="NVIDIA H100"),
        record(SMALL, 1.0, threads=HERE["threads"] + 1),
        record(replace(SMALL, dataset="mnist"), 1.0),
        record(SMALL),
    ]
    assert seconds_left([SMALL], others, HERE) is None
    assert text([SMALL, SMALL], others, HERE) == "2 runs left, for how long the next run will say"
    assert text([SMALL], [*others, record(SMALL, 30.0)], HERE) == "1 run left, about 2 min"
