"""The meter of a step's peak memory, against counts by hand."""

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from signstep.lab.bench.peak_memory import forward_pass, peaks

CPU = torch.device("cpu")


def block(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


@settings(max_examples=4)
@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 5)), min_size=1, max_size=30))
def test_peak_is_that_of_a_slow_count(pattern: Sequence[tuple[int, int]]) -> None:
    """Blocks are put into six places; what was there is released after the new one is made."""
    alive, most = [0] * 6, 0
    for size, place in pattern:
        most = max(most, sum(alive) + size)
        alive[place] = size

    def step() -> None:
        places: list[Tensor | None] = [None] * 6
        for size, place in pattern:
            places[place] = block(size)

    assert peaks(step, CPU) == (most, most)


def test_temporaries_inside_of_an_operator_count() -> None:
    x = torch.randn(10**5)
    sort = peaks(lambda: x.sort().values, CPU)
    assert sort[0] >= x.nbytes + 8 * len(x)  # values and int64 indices
    assert peaks(lambda: None, CPU) == (0, 0)


def test_what_a_pass_makes_and_releases_does_not_last() -> None:
    kept: list[Tensor] = []

    def step() -> None:
        with forward_pass():
            first = block(10**6)
            kept.append(block(300))
            del first
        second = block(2000)  # no backward has followed: the pass is over
        del second

    assert peaks(step, CPU) == (10**6 + 300, 2300)


def test_activations_of_every_pass_go_and_gradients_and_rows_stay() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)])
    gradients = sum(p.nbytes for p in model.parameters())
    rows: list[Tensor] = []
    next(model.parameters()).register_hook(lambda g: rows.append(torch.zeros(1000)))

    def step(passes: int, extra: int) -> None:
        for _ in range(passes):
            with forward_pass():
                loss = model(torch.ones(512, 64)).square().mean()
            loss.backward()
        block(extra)
        model.zero_grad()
        rows.clear()

    for passes in (1, 3):
        whole, lasting = peaks(lambda n=passes: step(n, 0), CPU)  # type: ignore[misc]
        assert lasting is not None
        assert 0 <= lasting - gradients - 4000 * passes < 1000  # the loss and such
        assert whole > gradients + 4 * 512 * 64 * 4  # four layers' outputs are alive at once
    whole, lasting = peaks(lambda: step(1, 10**5), CPU)
    assert lasting is not None
    assert 0 <= lasting - gradients - 4000 - 10**5 < 1000


def test_releases_of_what_was_there_before_do_not_count() -> None:
    there = [block(10**6)]

    def step() -> None:
        there.clear()
        block(500)

    assert peaks(step, CPU) == (500, 500)
