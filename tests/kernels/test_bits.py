"""Packing, counting and spreading of votes: plain torch against integers, native library and Triton against it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import CPU, DEVICE, DTYPES, STATE_DTYPES, Dither, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from signstep.kernels import bits, native, reference, triton_bits
from signstep.kernels.engine import Options, Slot, Tensors
from signstep.kernels.momentum import new_momentum
from signstep.kernels.reference import TIE_COINS, ZERO_COINS, Segment

STEP = torch.tensor(3)
NATIVE = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
ISAS = list(native.ISAS)[1 : 1 + native.ISAS[native.best_isa()]] if native.unavailable() is None else []
SIZES = st.lists(st.integers(0, 1000), min_size=1, max_size=5)


def slots_of(sizes: list[int], starts: list[int] | None = None, gap: int = 0) -> tuple[list[Slot], int]:
    slots, first = [], gap
    for i, size in enumerate(sizes):
        slots.append(Slot(first, Segment(i, starts[i] if starts else 0, size)))
        first += bits.word_count(size) + gap
    return slots, first


def ballots_of(workers: int, slots: list[Slot], width: int, seed: int, share: float = 0.5) -> Tensor:
    """Random ballots, zero beyond each slot's elements."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(workers, width, dtype=torch.int64)
    for slot in slots:
        for row in out:
            up = torch.rand(slot.segment.size, generator=generator) < share
            row[slot.first : slot.first + bits.word_count(slot.segment.size)] = bits.pack(up)
    return out


@given(size=st.integers(0, 300), seed=st.integers(0, 99))
def test_pack_is_the_inverse_of_bits(size: int, seed: int) -> None:
    up = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5
    words = bits.pack(up)
    assert len(words) == bits.word_count(size) == math.ceil(size / 64)
    assert torch.equal(bits.bits(words, size), up)
    # Bit e % 64 of word e // 64, as numpy packs little-endian bytes.
    packed = np.packbits(up.numpy(), bitorder="little")
    assert words.numpy().tobytes()[: len(packed)] == packed.tobytes()


@given(start=st.integers(0, 700), size=st.integers(0, 700), cut=st.integers(0, 700))
def test_coins_do_not_depend_on_how_a_parameter_is_cut(start: int, size: int, cut: int) -> None:
    def draw(begin: int, count: int) -> Tensor:
        return bits.coins(Segment(2, begin, count), TIE_COINS, seed=5, step=STEP, device=CPU)

    cut = min(cut, size)
    assert torch.equal(torch.cat([draw(start, cut), draw(start + cut, size - cut)]), draw(start, size))


def test_coins_are_fair_and_differ() -> None:
    n = 1 << 18
    streams = [
        bits.coins(Segment(p, 0, n), stream, seed=seed, step=torch.tensor(k), device=CPU)
        for p, stream, seed, k in [(0, 3, 0, 0), (1, 3, 0, 0), (0, 4, 0, 0), (0, 3, 1, 0), (0, 3, 0, 1)]
    ]
    for i, a in enumerate(streams):
        assert abs(float(a.double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)
        for b in streams[:i]:
            assert abs(float((a == b).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)


def naive_count(
    ballots: Tensor, voters: list[int], slots: list[Slot], ties: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    out, tied = torch.zeros_like(ballots[0]), torch.zeros_like(ballots[0])
    for slot, number in zip(slots, voters, strict=True):
        words = slice(slot.first, slot.first + bits.word_count(slot.segment.size))
        ups = sum(bits.bits(row[words], slot.segment.size).long() for row in ballots)
        coin = bits.coins(slot.segment, TIE_COINS, seed=seed, step=STEP, device=CPU)
        equal = 2 * ups == number if number else torch.zeros(slot.segment.size, dtype=torch.bool)
        up = 2 * ups > number if number else torch.zeros(slot.segment.size, dtype=torch.bool)
        out[words] = bits.pack(up if ties is not None else up | (equal & coin))
        tied[words] = bits.pack(equal)
    return out, tied


WORKERS = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 63, 127, 128, 255, 256]))


@given(
    workers=WORKERS,
    sizes=SIZES,
    gap=st.integers(0, 2),
    start=st.integers(0, 300),
    absent=st.integers(0, 3),
    mark=st.booleans(),
    seed=st.integers(0, 9),
)
def test_count(workers: int, sizes: list[int], gap: int, start: int, absent: int, mark: bool, seed: int) -> None:
    slots, width = slots_of(sizes, [start + 7 * i for i in range(len(sizes))], gap)
    voters = [max(0, workers - (absent if i % 2 else 0)) for i in range(len(sizes))]
    # Rows are not adjacent, as headers are between them.
    table = torch.full((workers, width + 3), -1)
    table[:, :width] = ballots_of(workers, slots, width, seed)
    ballots = table[:, :width]
    for slot, number in zip(slots, voters, strict=True):
        ballots[number:, slot.first : slot.first + bits.word_count(slot.segment.size)] = 0
    ties = torch.full((width,), -1) if mark else None
    expected, tied = naive_count(ballots, voters, slots, ties, seed)
    for counted in (bits.count, bits.reference_count):
        marked = torch.full((width,), -1) if mark else None
        assert torch.equal(counted(ballots, voters, slots, seed=seed, step=STEP, ties=marked), expected)
        assert marked is None or torch.equal(marked, tied)
    for isa in ISAS:
        for own_threads in (False, True):
            marked = torch.full((width,), -1) if mark else None
            result = native.count(
                ballots, voters, slots, seed=seed, step=STEP, ties=marked, isa=isa, own_threads=own_threads
            )
            assert result is not None
            assert torch.equal(result, expected), isa
            assert marked is None or torch.equal(marked, tied), isa


@pytest.mark.parametrize("workers", [1000, 4097])
def test_count_of_many_workers(workers: int) -> None:
    """Half of them up, give or take, so that counts are near the threshold."""
    slots, width = slots_of([500])
    ballots = ballots_of(workers, slots, width, 0)
    expected, _ = naive_count(ballots, [workers], slots, None, 7)
    assert torch.equal(bits.count(ballots, [workers], slots, seed=7, step=STEP), expected)
    assert torch.equal(bits.reference_count(ballots, [workers], slots, seed=7, step=STEP), expected)


def case(
    sizes: list[int], dtype: torch.dtype, state_dtype: torch.dtype | None, momentum: float, zeros: float, relative: bool
) -> Tensors:
    generator = torch.Generator().manual_seed(len(sizes))
    tensors = Tensors([], [], [], [], [], [], [])
    for i, size in enumerate(sizes):
        g = torch.randn(size, generator=generator, dtype=torch.float64) * 0.1
        g[torch.rand(size, generator=generator) < zeros] = 0
        tensors.params.append(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))
        tensors.grads.append(g.to(dtype))
        tensors.ordinals.append(i)
        tensors.offsets.append(256 * i + i)
        if momentum > 0:
            for name, x in new_momentum(tensors.grads[-1], state_dtype).items():
                (tensors.exp_avgs if name == "exp_avg" else tensors.scales).append(x)
        if relative:
            tensors.mean_squares.append(torch.tensor(0.003))
    return tensors


def copied(tensors: Tensors) -> Tensors:
    lists: list[Any] = [[x.clone() if isinstance(x, Tensor) else x for x in column] for column in tensors]
    return Tensors(*lists)


@NATIVE
@given(
    sizes=SIZES,
    dtype=st.sampled_from(DTYPES),
    state_dtype=st.sampled_from(STATE_DTYPES),
    momentum=st.sampled_from([0.0, 0.9]),
    zeros=st.sampled_from([0.0, 0.02, 1.0]),
    sigma=st.sampled_from([None, 1e-3, 0.1]),
    relative=st.booleans(),
    coupled=st.booleans(),
    maximize=st.booleans(),
    seed=st.sampled_from([0, 5, (1 << 63) + 12345]),
    law=st.sampled_from(["gaussian", "uniform"]),
)
def test_native_cast_is_the_plain_one(
    sizes: list[int],
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    momentum: float,
    zeros: float,
    sigma: float | None,
    relative: bool,
    coupled: bool,
    maximize: bool,
    seed: int,
    law: str,
) -> None:
    relative &= sigma is not None
    start = case(sizes, dtype, state_dtype if momentum else None, momentum, zeros, relative)
    slots, width = slots_of(sizes, start.offsets, gap=1)
    options = request(
        momentum=momentum,
        state_dtype=state_dtype if momentum else None,
        dither=None if sigma is None else Dither("pre", torch.tensor(sigma * (30 if relative else 1)), law),
        coupled_weight_decay=0.1 if coupled else 0.0,
        maximize=maximize,
        seed=seed,
    )
    plain, plain_words = copied(start), torch.full((width,), 77)
    for step in range(2):
        bits.reference_cast(plain, options._replace(step=torch.tensor(step)), plain_words, slots)
    for isa in ISAS:
        tensors, words = copied(start), torch.full((width,), 77)
        for step in range(2):
            assert native.cast(tensors, options._replace(step=torch.tensor(step)), words, slots, isa=isa)
        if not relative:
            assert torch.equal(words, plain_words), isa
            for ours, theirs in zip(tensors[:4], plain[:4], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), isa
        else:  # its second step's rms is a sum that rounds differently
            assert int(bits.bits(words ^ plain_words, 64 * width).sum()) <= 2
            for size, a, b in zip(sizes, tensors.mean_squares, plain.mean_squares, strict=True):
                if size > 0:
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-12)


@given(size=st.integers(1, 2000), sigma=st.sampled_from([0.0, 0.05]), start=st.integers(0, 500))
def test_a_lone_vote_is_the_step_of_the_optimizer(size: int, sigma: float, start: int) -> None:
    m = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 0.1
    m[::5] = 0
    segment = Segment(3, start, size)
    slots = [Slot(0, segment)]
    dither = Dither("pre", torch.tensor(sigma)) if sigma else None
    tensors = Tensors([m], [m.clone()], [], [], [], [3], [start])
    words = torch.zeros(bits.word_count(size), dtype=torch.int64)
    bits.cast(tensors, request(momentum=0.0, dither=dither, seed=9), words, slots)
    words = bits.count(words[None], [1], slots, seed=9, step=STEP)
    out = m.clone()
    sums = torch.zeros(1, 2, dtype=torch.float64)
    bits.spread(words, None, slots, [out], sums)
    coin = bits.coins(segment, ZERO_COINS, seed=9, step=STEP, device=m.device)
    expected = reference.sign(m)
    if sigma:
        (expected,) = reference.directions([m], [torch.tensor(sigma)], [segment], seed=9, step=STEP, position="pre")
    assert torch.equal(out, torch.where(m == 0, torch.where(coin, 1.0, -1.0), expected))
    wide = m.double()
    torch.testing.assert_close(sums[0], torch.stack([wide @ out.double(), wide @ wide]), rtol=1e-6, atol=1e-6)


@given(sizes=SIZES, dtype=st.sampled_from(DTYPES), ties=st.booleans(), sums=st.booleans(), seed=st.integers(0, 99))
def test_spread(sizes: list[int], dtype: torch.dtype, ties: bool, sums: bool, seed: int) -> None:
    slots, width = slots_of(sizes, gap=1)
    words, marks = ballots_of(2, slots, width, seed, 0.4)
    words = words & ~marks
    before = [torch.randn(s, generator=torch.Generator().manual_seed(seed)).to(dtype) for s in sizes]
    results = []
    for isa in ["plain", *ISAS]:
        outs = [b.clone() for b in before]
        total = torch.full((len(sizes), 2), 7.0, dtype=torch.float64) if sums else None
        arguments = (words, marks if ties else None, slots, outs, total)
        if isa == "plain":
            bits.reference_spread(*arguments)
        else:
            assert native.spread(*arguments, isa=isa)
        results.append((outs, total))
        for slot, out, b, i in zip(slots, outs, before, range(len(sizes)), strict=True):
            own = slice(slot.first, slot.first + bits.word_count(slot.segment.size))
            up, tied = (bits.bits(w[own], slot.segment.size) for w in (words, marks))
            expected = torch.where(up, 1.0, -1.0)
            assert torch.equal(out.float(), torch.where(tied, 0.0, expected) if ties else expected), isa
            if total is not None:
                g, v = b.double(), out.double()
                torch.testing.assert_close(total[i], torch.stack([g @ v, g @ g]), rtol=1e-5, atol=1e-4)


def test_tensors_that_the_library_cannot_read_take_the_plain_way() -> None:
    """Strided gradients, words that are too few: nothing is read or written beyond a tensor."""
    g = torch.randn(40)[::2]
    slots = [Slot(0, Segment(0, 0, 20))]
    options: Options = request(momentum=0.0, dither=None)
    words = torch.zeros(1, dtype=torch.int64)
    tensors = Tensors([g], [g], [], [], [], [0], [0])
    assert not native.cast(tensors, options, words, slots)
    bits.cast(tensors, options, words, slots)
    assert torch.equal(bits.bits(words, 20), g > 0)
    beyond = [Slot(5, Segment(0, 0, 20))]
    assert native.count(torch.zeros(2, 1, dtype=torch.int64), [2], beyond, seed=0, step=STEP) is None
    assert not native.spread(words, None, [Slot(0, Segment(0, 0, 200))], [torch.zeros(200)])


@NATIVE
@pytest.mark.parametrize("own_threads", [False, True])
def test_results_do_not_depend_on_threads(own_threads: bool) -> None:
    """Three pieces or more in each call."""
    start = case([200_003, 70, 140_000], torch.float32, None, 0.9, 0.01, True)
    slots, width = slots_of([200_003, 70, 140_000], start.offsets, gap=1)
    options = request(momentum=0.9, dither=Dither("pre", torch.tensor(0.3)))
    ballots = torch.randint(-(2**63), 2**63 - 1, (9, width), generator=torch.Generator().manual_seed(1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            tensors, words = copied(start), torch.zeros(width, dtype=torch.int64)
            assert native.cast(tensors, options, words, slots, own_threads=own_threads)
            counted = native.count(ballots, [9, 8, 8], slots, seed=1, step=STEP, own_threads=own_threads)
            assert counted is not None
            outs, sums = [g.clone() for g in tensors.grads], torch.zeros(3, 2, dtype=torch.float64)
            assert native.spread(counted, words, slots, outs, sums, own_threads=own_threads)
            results.append([words, *tensors.exp_avgs, *tensors.mean_squares, counted, *outs, sums])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sigma", [None, 0.0, 0.5, math.inf, math.nan])
def test_momenta_that_are_not_finite_or_underflow(sigma: float | None, dtype: torch.dtype) -> None:
    """1e-60 is 0 once it is a float32, in which dither decides: it casts a coin then, not always the same vote."""
    values = torch.tensor([0.0, -0.0, 1e-60, 1e-45, -1e-45, 1.0, -1.0, 3e38, math.inf, -math.inf, math.nan] * 60)
    m = values.double().to(dtype)
    if dtype == torch.float64:
        m[2::11] = 1e-60
    slots = [Slot(0, Segment(1, 77, len(m)))]
    options = request(dither=None if sigma is None else Dither("pre", torch.tensor(sigma)))
    tensors, expected = Tensors([m], [m], [], [], [], [1], [77]), torch.zeros(len(m) // 64 + 1, dtype=torch.int64)
    bits.reference_cast(tensors, options, expected, slots)
    ups = bits.bits(expected, len(m)).view(60, 11)
    assert 0 < ups[:, 0].sum() < 60
    if sigma is not None and dtype == torch.float64:
        assert 0 < ups[:, 2].sum() < 60
    assert not ups[:, 10].any()
    for isa in ISAS:
        words = torch.zeros_like(expected)
        assert native.cast(tensors, options, words, slots, isa=isa)
        assert torch.equal(words, expected), isa


@given(
    start=st.sampled_from([0, 1, 64, 100, 128 * 2**31 - 70, 2**40 + 3]),
    sizes=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    sigma=st.sampled_from([None, 0.3]),
)
def test_a_parameter_cut_in_two_has_the_same_bits(start: int, sizes: tuple[int, int], sigma: float | None) -> None:
    """Cast with noise and coins at zeros, counted with coins at ties, wherever the cut and the first element are."""
    cut, size = sizes[0], sum(sizes)
    generator = torch.Generator().manual_seed(size)
    m = torch.randn(size, generator=generator)
    m[torch.rand(size, generator=generator) < 0.3] = 0
    ballots = torch.rand(4, size, generator=generator) < 0.5
    options = request(dither=None if sigma is None else Dither("pre", torch.tensor(sigma)))

    def outcome(first: int, count: int) -> Tensor:
        part, slots = m[first : first + count], [Slot(0, Segment(2, start + first, count))]
        words = torch.zeros(bits.word_count(count), dtype=torch.int64)
        bits.cast(Tensors([part], [part], [], [], [], [2], [start + first]), options, words, slots)
        rows = torch.stack([bits.pack(b[first : first + count]) for b in ballots])
        counted = bits.count(rows, [4], slots, seed=3, step=STEP)
        return torch.stack([bits.bits(words, count), bits.bits(counted, count)])

    assert torch.equal(torch.cat([outcome(0, cut), outcome(cut, size - cut)], dim=1), outcome(0, size))


@NATIVE
@pytest.mark.parametrize("workers", [65534, 65535])
def test_as_many_workers_as_there_may_be(workers: int) -> None:
    """One vote more or less than half, and just half."""
    ballots = torch.zeros(workers, 1, dtype=torch.int64)
    for element, ups in enumerate([0, workers // 2 - 1, workers // 2, workers // 2 + 1, workers]):
        ballots[:ups] |= 1 << element
    slots = [Slot(0, Segment(0, 0, 5))]
    for isa in ISAS:
        ties = torch.zeros(1, dtype=torch.int64)
        counted = native.count(ballots, [workers], slots, seed=0, step=STEP, ties=ties, isa=isa)
        assert counted is not None
        assert counted.tolist() == [0b11000]
        assert ties.tolist() == [0b00100 if workers % 2 == 0 else 0]
    assert native.count(torch.zeros(65536, 1, dtype=torch.int64), [65536], slots, seed=0, step=STEP) is None


# --- Triton: on a GPU, else in its interpreter -----------------------------------------------------------------------

TRITON_SIZES = st.lists(
    st.sampled_from([0, 1, 63, 64, 65, 500, 64 * triton_bits.WORDS, 64 * triton_bits.WORDS + 1]), min_size=1, max_size=3
)
STARTS = [0, 64, 100, 127, 128 * 2**31 - 3, 2**40 + 1]
FEW = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def gpus_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors go the way of a GPU's."""
    pytest.importorskip("triton_cases")  # skips where Triton cannot run
    if (reason := triton_bits.unavailable()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(bits, "_triton", lambda x: triton_bits)
    monkeypatch.setattr(native, "_load", lambda: (None, "not wanted here"))


@pytest.mark.usefixtures("gpus_way")
@FEW
@given(
    sizes=TRITON_SIZES,
    start=st.sampled_from(STARTS),
    dtype=st.sampled_from(DTYPES),
    zeros=st.sampled_from([0.0, 0.01, 1.0]),
    sigma=st.sampled_from([None, 0.5]),
    seed=st.sampled_from([0, 2**32 - 1, 2**64 - 1]),
)
def test_triton_cast(
    sizes: list[int], start: int, dtype: torch.dtype, zeros: float, sigma: float | None, seed: int
) -> None:
    slots, width = slots_of(sizes, [start + 7 * i for i in range(len(sizes))], 1)
    options = request(dither=sigma and Dither("pre", torch.tensor(sigma)), seed=seed, step=torch.tensor(2**32 + 7))
    generator = torch.Generator().manual_seed(1)
    grads = []
    for size in sizes:
        g = torch.randn(size, generator=generator, dtype=torch.float64)
        g[torch.rand(size, generator=generator) < zeros] = 0
        if size > 3:
            g[1], g[2], g[3] = torch.inf, -torch.inf, torch.nan
        grads.append(g.to(dtype))
    results = []
    for cast, device in ((bits.cast, DEVICE), (bits.reference_cast, CPU)):
        words = torch.full((width,), 77, device=device)
        there = [g.to(device) for g in grads]
        starts = [s.segment.start for s in slots]
        cast(Tensors(there, there, [], [], [], list(range(len(slots))), starts), options, words, slots)
        results.append(words.cpu())
    assert torch.equal(*results)


@pytest.mark.usefixtures("gpus_way")
@FEW
@given(
    workers=st.sampled_from([1, 2, 3, 4, 9]),
    sizes=TRITON_SIZES,
    start=st.sampled_from(STARTS),
    absent=st.integers(0, 9),
    mark=st.booleans(),
    seed=st.sampled_from([0, 2**63 + 1]),
)
def test_triton_count(workers: int, sizes: list[int], start: int, absent: int, mark: bool, seed: int) -> None:
    slots, width = slots_of(sizes, [start + 7 * i for i in range(len(sizes))], 1)
    voters = [max(0, workers - absent % (i + 2)) for i in range(len(sizes))]
    ballots = torch.randint(-(2**63), 2**63 - 1, (workers, width + 2), generator=torch.Generator().manual_seed(workers))
    results: list[list[Tensor]] = []
    for count, device in ((bits.count, DEVICE), (bits.reference_count, CPU)):
        ties = torch.full((width,), -1, device=device) if mark else None
        rows = ballots.to(device)[:, :width]
        counted = count(rows, voters, slots, seed=seed, step=torch.tensor(5), ties=ties)
        results.append([x.cpu() for x in (counted, ties) if x is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("gpus_way")
@FEW
@given(sizes=TRITON_SIZES, dtype=st.sampled_from(DTYPES), tied=st.booleans(), wanted=st.booleans())
def test_triton_spread(sizes: list[int], dtype: torch.dtype, tied: bool, wanted: bool) -> None:
    slots, width = slots_of(sizes, gap=1)
    generator = torch.Generator().manual_seed(1)
    words, marks = torch.randint(-(2**63), 2**63 - 1, (2, width), generator=generator)
    before = [torch.randn(s, generator=generator).to(dtype) for s in sizes]
    results: list[list[Tensor]] = []
    for spread, device in ((bits.spread, DEVICE), (bits.reference_spread, CPU)):
        outs = [b.clone().to(device) for b in before]
        sums = torch.full((len(sizes), 2), 7.0, dtype=torch.float64, device=device) if wanted else None
        spread(words.to(device), marks.to(device) if tied else None, slots, outs, sums)
        results.append([x.cpu() for x in (*outs, sums) if x is not None])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12 if a.dtype == torch.float64 else 0, atol=0)
