"""The figures of a monitor's records: what is drawn is what the records say."""

import math
from typing import Any

import pytest
import torch
from monitor_records import monitored

from signstep.lab.output import figures
from signstep.lab.studies import monitor_figures
from signstep.lab.studies.monitor_figures import NothingToDraw
from signstep.monitor.reliability import SNR_EDGES
from signstep.theory.stationarity import snr_squared


def test_figures_have_nothing_to_draw_of_nothing() -> None:
    for draw in (monitor_figures.snr_distribution, monitor_figures.violations, monitor_figures.dither_meters):
        with pytest.raises(NothingToDraw):
            draw([("a", [{"step": 0}]), ("b", [])])
    with pytest.raises(NothingToDraw):
        monitor_figures.calibration_rules([{"step": 0}])
    with pytest.raises(NothingToDraw):
        monitor_figures.noise_histograms({"step": 0}, {"step": 9})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.0] * 24, "all are 0"),
        ([2.0] * 24, "does not vary"),
        ([0.0] * 6 + [1.0] * 12 + [-1.0] * 6, "25 % are 0"),
        ([1.0, 2.0, 4.0] * 8, "no zeros"),
        ([0.0] + [float(i) for i in range(1, 300)], "under 1 % are 0"),
        ([1e-30, 2e-30, 4e-30] * 8, "no zeros"),
    ],
)
def test_zeros_are_said_in_words(values: list[float], words: str) -> None:
    record = {"step": 3, "samples": [{"name": "w", "index": 0, "values": values}]}
    drawn = monitor_figures.noise_histograms(record)
    assert f"step 3: {words}" in [text.get_text() for text in drawn.axes[0].texts]


def test_histograms_are_standardised(records: list[dict[str, Any]]) -> None:
    """A density: its integral is 1, its mean 0 and its variance 1 up to what bins of 1/2 add."""
    drawn = monitor_figures.noise_histograms(records[0], records[-1])
    assert len(drawn.axes) == 2 * len(records[0]["samples"])
    for axes in drawn.axes:
        for patch in axes.patches:
            values, edges, _ = patch.get_data()
            middle = (edges[1:] + edges[:-1]) / 2
            assert values.sum() * 0.5 == pytest.approx(1)
            assert (values * middle).sum() * 0.5 == pytest.approx(0, abs=0.26)
            assert (values * middle**2).sum() * 0.5 == pytest.approx(1, abs=0.4)


@pytest.mark.parametrize("count", [8, 32])
def test_grey_of_the_snr_figure_is_what_no_signal_shows(count: int) -> None:
    """Shares above each edge, of 200000 Gaussian coordinates without signal: within 5 standard errors of each."""
    n = 200_000
    rows = torch.randn(count, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    squared = snr_squared(rows)
    for edge in SNR_EDGES:
        chance = 1 - monitor_figures._silent(edge, count)
        above = float((squared > edge * edge).double().mean())
        assert abs(above - chance) <= 5 * math.sqrt(chance * (1 - chance) / n) + 1e-12


def test_gaussian_band_is_what_gaussian_noise_gives() -> None:
    s = torch.logspace(-4, 2, 10_000, dtype=torch.float64)
    ratio = 3 * torch.erf(s / math.sqrt(2)) / s.clamp(max=1)
    low, high = monitor_figures.GAUSSIAN
    assert (float(ratio.min()), float(ratio.max())) == pytest.approx((low, high), abs=0.005)


def test_snr_figure_draws_the_histogram(records: list[dict[str, Any]]) -> None:
    drawn = monitor_figures.snr_distribution([("", records)])
    solid = [line for line in drawn.axes[0].lines if line.get_linestyle() == "-"]
    shares = records[-1]["reliability"]["snr_histogram"]
    for edge, y in zip(*solid[0].get_data(), strict=True):
        above = 100 * sum(shares[SNR_EDGES.index(edge) + 2 :])
        assert y == pytest.approx(above) or (math.isnan(y) and above == 0)


def test_a_value_beyond_the_edge_is_a_triangle_on_it() -> None:
    part = {"ratio": -5.0, "phi": [3.0, 2.0, 4.0], "margin": [-6.0, -7.0, -5.0]}
    records = [{"step": 0, "reliability": part}, {"step": 9, "reliability": part | {"ratio": 2.0, "margin": [1, 0, 2]}}]
    drawn = monitor_figures.violations([("", records)])
    above = drawn.axes[0]
    marks = [line for line in above.lines if line.get_marker() == "v"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [(0, -2)]
    assert above.get_ylim()[0] == -2


def test_rules_end_where_sgd_begins() -> None:
    records = monitored(steps=13, switch_step=7, calibration="ratio")
    phases = {record["step"]: record["calibration"]["groups"][0]["phase"] for record in records}
    assert phases == {0: "sign", 2: "sign", 4: "sign", 6: "sgd", 8: "sgd", 10: "sgd", 12: "sgd"}
    axes = monitor_figures.calibration_rules(records).axes[0]
    ends = {line.get_color(): max(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) > 2}
    own = figures.shade(monitor_figures.RULE_COLOURS["calibrated_lr"])
    assert ends.pop(own) == 12
    assert set(ends.values()) == {4}
