"""The numbers of a monitor's record in words: their digits, which layers are violated, which record counts."""

from typing import Any

import pytest
import torch

from signstep.lab.studies import monitor_numbers
from signstep.monitor.reliability import reliability
from signstep.monitor.sampling import Columns


def test_layers_are_violated_where_the_monitor_raises_its_alarm() -> None:
    """The same rows, judged by the alarm and by the table: with noise of every kind they agree."""
    generator = torch.Generator().manual_seed(0)
    columns = [Columns(f"layer {i}", slice(50 * i, 50 * i + 50), 50, torch.arange(50)) for i in range(6)]
    seen = set()
    for trial in range(40):
        rows = torch.randn(16, 300, generator=generator).double()
        bad = trial % 4
        rows[:, : 50 * bad] = 0.25 - (torch.rand(16, 50 * bad, generator=generator).double().log() + 1)
        found = reliability(rows, columns, micro_batches=16)
        alarm = next((a for a in found["alarms"] if "layers" in a), "in 0 of")
        below, count = monitor_numbers.below_one({"reliability": found})
        assert f"in {sum(below.values())} of" in alarm
        assert count == 6
        seen.add(sum(below.values()))
    assert {0, 3} <= seen


def test_of_a_step_that_was_measured_twice_the_last_record_counts(records: list[dict[str, Any]]) -> None:
    again = [{**record, "lr": [7.0]} for record in records[2:4]]
    ordered = monitor_numbers.by_step([*records[:4], *again, *records[4:], {"step": None}])
    assert [record["step"] for record in ordered] == [0, 2, 4, 6, 8]
    assert [record["lr"] == [7.0] for record in ordered] == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "—"), (0.0, "0"), (-0.5, "−0.5"), (1234567.0, "1.23e6"), (2.5e-12, "2.5e−12"), (99999.0, "100000")],
)
def test_number(value: float | None, text: str) -> None:
    assert monitor_numbers.number(value) == text


def test_ratio_is_told_only_where_phi_or_the_ratio_is_known() -> None:
    part: dict[str, Any] = {"ratio": 2.4, "phi": [3.0, 1.0, 5.0], "margin": [1.4, -0.5, 3.3]}
    assert monitor_numbers.ratio(part) == pytest.approx((2.4, 0.5, 4.3))
    part["phi"][1] = -1.0
    assert monitor_numbers.ratio(part) is None
    part["margin"] = [-1.5, -2.5, -0.5]
    assert monitor_numbers.ratio(part) == pytest.approx((2.4, -1.5, 0.5))
    for key in ("ratio", "phi"):
        assert monitor_numbers.ratio(part | {key: None}) is None
