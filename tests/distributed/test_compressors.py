"""Compressed gradients: each compressor against a slow reference that reads like its paper, alone and among ranks.

Gradients are given: the loss is linear in the parameters, so what a rank's backward leaves is what the test chose.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gang import gang
from signstep.distributed import CollectiveError
from signstep.distributed.compressors import (
    COMPRESSORS,
    QSGD,
    CompressedGradients,
    Compressor,
    EFSign,
    OneBitAdam,
    OneBitSGD,
    TernGrad,
    TopK,
    base,
    one_bit_adam,
)
from signstep.distributed.compressors.blocks import BLOCK, Blocks, Layout, own_blocks, pack, unpack
from signstep.distributed.compressors.noise import SERVER, WORKER, random_integers, round_stochastically
from signstep.distributed.compressors.top_k import largest
from signstep.lab.output.tables import markdown_table

CPU = torch.device("cpu")
SHAPES = {"a": (7,), "b": (33, 50), "c": (1024,), "d": (1025,), "e": (3,), "conv": (8, 40, 3, 3), "f": (1,)}
"""Shorter than a block, exactly one, one and an element, and in an order that is not row-major."""
BLOCKWISE = {"ef-sign": EFSign(), "one-bit-sgd": OneBitSGD(), "qsgd": QSGD(), "terngrad": TernGrad(None)}
few = settings(max_examples=30)


# The references: one block as float64, element by element.


def ef_sign(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).sum() / len(x)
    return np.array([scale if v > 0 else -scale for v in x])


def one_bit_sgd(x: np.ndarray) -> np.ndarray:
    high = np.mean(x[x > 0]) if (x > 0).any() else 0.0
    low = np.mean(x[x <= 0]) if (x <= 0).any() else 0.0
    return np.array([high if v > 0 else low for v in x])


def qsgd(x: np.ndarray, u: np.ndarray, levels: int) -> np.ndarray:
    norm = np.abs(x).max()
    out = []
    for v, chance in zip(x, u, strict=True):
        y = levels * v / norm if norm > 0 else 0.0
        lower = math.floor(y)
        out.append(norm / levels * (lower + 1 if chance > 1 - (y - lower) else lower))
    return np.array(out)


def terngrad(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    return qsgd(x, u, 1)


def top_k(x: np.ndarray, ratio: float) -> np.ndarray:
    k = math.ceil(ratio * len(x))
    kept = np.argsort(-np.abs(x), kind="stable")[:k]
    out = np.zeros_like(x)
    out[kept] = x[kept]
    return out


def blockwise(x: np.ndarray, compress: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([compress(x[i : i + BLOCK]) for i in range(0, len(x), BLOCK)])


def decoded(compressor: Any, x: Tensor, noise: Tensor | None = None) -> Tensor:
    """What one vector becomes, by blocks."""
    rows = -(-len(x) // BLOCK)
    padded = torch.zeros(rows, BLOCK)
    padded.view(-1)[: len(x)] = x
    sizes = torch.tensor([min(BLOCK, len(x) - i * BLOCK) for i in range(rows)])
    codes = compressor._encode(padded, Blocks(sizes, CPU), torch.empty(rows) if noise is None else noise)
    return compressor._decode(codes).view(-1)[: len(x)]


# Bits and blocks.


@few
@given(bits=st.sampled_from([1, 2, 4, 8]), rows=st.integers(0, 3), data=st.data())
def test_pack_puts_the_first_code_in_the_low_bits(bits: int, rows: int, data: st.DataObject) -> None:
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=24 * rows, max_size=24 * rows)), np.uint8)
    per_byte = 8 // bits
    expected = sum(codes.reshape(-1, per_byte)[:, i].astype(int) << (bits * i) for i in range(per_byte))
    packed = pack(torch.from_numpy(codes).view(rows, 24), bits)
    assert packed.flatten().tolist() == list(expected)
    values = tuple(float(v) * 1.5 - 7 for v in range(2**bits))
    assert unpack(packed, values).flatten().tolist() == [values[c] for c in codes]


@few
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    workers=st.integers(1, 5),
    bits=st.sampled_from([1, 2, 4, 8]),
    scales=st.integers(1, 2),
    data=st.data(),
)
def test_words_reach_their_owner_and_come_back(
    sizes: list[int], workers: int, bits: int, scales: int, data: st.DataObject
) -> None:
    firsts = [data.draw(st.integers(0, 9)) for _ in sizes]
    layouts = [Layout(sizes, firsts, workers, rank, CPU) for rank in range(workers)]
    wires = [layout.wire(scales, bits, dealt=True) for layout in layouts]
    rows = torch.randint(-(2**31), 2**31 - 1, (layouts[0].rows, wires[0].width), dtype=torch.int32)
    meant = torch.zeros_like(rows, dtype=torch.bool)
    row_sizes = [min(BLOCK, size - j) for size in sizes for j in range(0, size, BLOCK)]
    for row, size in enumerate(row_sizes):
        meant[row, : scales + -(-size * bits // 32)] = True

    messages = wires[0].send(rows)
    assert messages.shape == (workers, wires[0].length)
    owners = [
        (j + first) % workers for size, first in zip(sizes, firsts, strict=True) for j in range(-(-size // BLOCK))
    ]
    returned = []
    for rank, (layout, wire) in enumerate(zip(layouts, wires, strict=True)):
        own = torch.tensor([o == rank for o in owners])
        assert sum(layout.own_counts) == int(own.sum())
        received = wire.place_own(messages[rank])
        assert torch.equal(received[meant[own]], rows[own][meant[own]])
        returned.append(wire.send_own(received))
    assert torch.equal(wires[0].place(torch.cat(returned))[meant], rows[meant])
    # No owner's message is padded by more than what the others' blocks differ in number, nor is anything sent twice.
    assert int(meant.sum()) <= workers * wires[0].length
    everything = layouts[0].wire(scales, bits, dealt=False)
    assert everything.length == int(meant.sum())
    assert torch.equal(everything.place(everything.send(rows))[meant], rows[meant])


@few
@given(size=st.integers(0, 9000), first=st.integers(0, 7), workers=st.integers(1, 6))
def test_every_block_has_one_owner(size: int, first: int, workers: int) -> None:
    owned = [j for rank in range(workers) for j in own_blocks(size, first, workers, rank)]
    assert sorted(owned) == list(range(-(-size // BLOCK)))


# One worker's side.

magnitudes = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6, 1e30])


@few
@given(size=st.integers(1, 2500), scale=magnitudes, seed=st.integers(0, 99), zeros=st.booleans())
def test_deterministic_compressors_agree_with_their_papers(size: int, scale: float, seed: int, zeros: bool) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    if zeros:
        x[::3] = 0
    for compressor, reference in ((EFSign(), ef_sign), (OneBitSGD(), one_bit_sgd)):
        expected = blockwise(x.double().numpy(), reference)
        np.testing.assert_allclose(decoded(compressor, x.clone()).numpy(), expected, rtol=1e-5, atol=1e-37)


@few
@given(size=st.integers(1, 2500), scale=magnitudes, seed=st.integers(0, 99), levels=st.sampled_from([1, 2, 7, 8, 127]))
def test_stochastic_compressors_agree_with_their_papers(size: int, scale: float, seed: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * scale
    x[::3] = 0
    noise = torch.randint(-(2**15), 2**15, (-(-size // BLOCK), BLOCK), generator=generator, dtype=torch.int16)
    u = (noise.view(-1)[:size].double().numpy() + 2**15 + 0.5) / 2**16
    pieces = range(0, size, BLOCK)
    exact = x.double().numpy()
    for compressor, s in ((QSGD(levels), levels), (TernGrad(clip=None), 1)):
        expected = np.concatenate([qsgd(exact[i : i + BLOCK], u[i : i + BLOCK], s) for i in pieces])
        got = decoded(compressor, x.clone(), noise).double().numpy()
        unit = np.concatenate(
            [np.full(len(exact[i : i + BLOCK]), np.abs(exact[i : i + BLOCK]).max() / s) for i in pieces]
        )
        steps = np.abs(got - expected) / np.maximum(unit, 1e-40)
        # A fraction within float32 rounding of u goes the other way.
        assert steps.max() < 1.001
        assert (steps > 1e-4).sum() <= 2
        assert (got[::3] == 0).all()


@pytest.mark.parametrize("compressor", [QSGD(1), QSGD(7), QSGD(127), TernGrad(clip=None)], ids=repr)
def test_rounding_is_unbiased(compressor: Any) -> None:
    """4000 draws of 200 elements: no mean is off by 5 of its standard errors, 1 chance in 10000 of a false alarm."""
    draws = 4000
    x = torch.randn(200, generator=torch.Generator().manual_seed(1))
    rows = torch.zeros(draws, BLOCK)
    rows[:, :200] = x
    noise = random_integers([draws], [0], WORKER, seed=3, rank=0, step=0, device=CPU)
    got = compressor._decode(compressor._encode(rows, Blocks(torch.full((draws,), 200), CPU), noise))[:, :200].double()
    unit = float(x.abs().max()) / getattr(compressor, "levels", 1)
    q = (x.double() / unit) % 1  # the chance to be rounded up
    error = unit * (q * (1 - q) / draws).sqrt()
    assert ((got.mean(dim=0) - x).abs() <= 5 * error + unit * 2**-16 + 1e-6).all()
    np.testing.assert_allclose(got.var(dim=0), unit**2 * q * (1 - q), atol=0.05 * unit**2)


def test_terngrad_limits_what_workers_send_and_not_what_owners_do() -> None:
    x = torch.randn(2, BLOCK)
    x[1, 100:] = 0
    sizes = torch.tensor([[float(BLOCK)], [100.0]])
    expected = x.clone()
    for row, size in ((0, BLOCK), (1, 100)):
        limit = 2.5 * x[row, :size].double().std(correction=0)
        expected[row] = x[row].clamp(-limit, limit)
    TernGrad().limit(x, sizes)
    torch.testing.assert_close(x, expected)
    assert not torch.equal(TernGrad().encode(x * 9, sizes, torch.zeros(2, BLOCK, dtype=torch.int16))[0], x * 0)


@few
@given(size=st.integers(1, 2000), seed=st.integers(0, 99), power=st.integers(0, 4))
def test_what_is_lost_is_bounded(size: int, seed: int, power: int) -> None:
    """||C(x) - x||^2 <= (1 - 1 / d) ||x||^2 on each block, what error feedback needs; sparse x is the worst case."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) ** (2 * power + 1)
    for compressor in (EFSign(), OneBitSGD()):
        lost = (decoded(compressor, x.clone()) - x).double().square().sum()
        assert lost <= (1 - 1 / BLOCK) * x.double().square().sum() * (1 + 1e-5)


@few
@given(
    size=st.integers(1, 5000),
    share=st.floats(0.0001, 1),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["normal", "ties", "zero", "ramp", "periodic"]),
)
def test_largest_are_the_largest(size: int, share: float, seed: int, kind: str) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":
        x = x.round()
    elif kind == "zero":
        x.zero_()
    elif kind == "ramp":
        x = torch.arange(size) - size / 3
    elif kind == "periodic":  # with the period of the sample
        x = torch.where(torch.arange(size) % 64 == 0, 100 + x, x)
    k = math.ceil(share * size)
    found = largest(x, k)
    assert len(set(found.tolist())) == k
    assert torch.equal(x[found].abs().sort().values, x.abs().sort().values[-k:])


def test_options_out_of_range_are_refused() -> None:
    for make in (lambda: QSGD(0), lambda: QSGD(128), lambda: TopK(0.0), lambda: TopK(1.5), lambda: TernGrad(0.0)):
        with pytest.raises(ValueError, match=r"^Invalid \w+: .*, expected "):
            make()


def test_noise_is_of_seed_rank_step_parameter_and_side() -> None:
    def draw(**changed: Any) -> Tensor:
        key: dict[str, Any] = {
            "parameters": [4, 5],
            "stream": WORKER,
            "seed": 2**40 + 1,
            "rank": 1,
            "step": 3,
            **changed,
        }
        return random_integers([3, 2], key.pop("parameters"), key.pop("stream"), **key, device=CPU)

    assert torch.equal(draw(), draw())
    # A parameter's noise does not depend on what else is in the bucket.
    assert torch.equal(draw(parameters=[5, 4])[:2], draw()[3:])
    changes = [{"stream": SERVER}, {"seed": 2**40}, {"seed": 1}, {"rank": 0}, {"step": 4}, {"parameters": [5, 6]}]
    for other in changes:
        assert (draw(**other) == draw()).float().mean() < 0.01
    x = draw(**{"parameters": [0, 1]}).double().flatten()
    # Uniform on 2^16 integers: mean -1/2, standard deviation 2^16 / sqrt(12); within 5 standard errors.
    assert abs(x.mean() + 0.5) < 5 * 2**16 / math.sqrt(12 * len(x))
    assert round_stochastically(torch.zeros(1, 8), torch.zeros(1, 1), 7, draw()[:1, :8]).eq(7).all()


# Real processes. A model whose gradients are what it is called with.


class Given(nn.Module):
    """Parameters x with the loss sum <x, g>; g None leaves a parameter out of backward."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            x = torch.zeros(shape)
            self.register_parameter(
                name, nn.Parameter(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)
            )

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return torch.stack([(self.get_parameter(name) * g).sum() for name, g in gradients.items()]).sum()


def in_memory(x: Tensor) -> np.ndarray:
    """As the Given model holds it, flat."""
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).reshape(-1).numpy()


def gradients_of(step: int, rank: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}


def hooked(compressor: Compressor, bucket_mb: float = 0.004, **options: Any) -> tuple[nn.Module, CompressedGradients]:
    model = DistributedDataParallel(Given(SHAPES), bucket_cap_mb=bucket_mb, **options)
    return model, CompressedGradients(model, compressor, seed=5)


def means(model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a backward leaves in p.grad."""
    model.zero_grad(set_to_none=True)
    model(gradients).backward()
    return {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}


def run_all_methods(steps: int) -> dict[str, Any]:
    """Means of every step, and residuals, of every method."""
    out = {}
    for key, offer in COMPRESSORS.items():
        model, hook = hooked(offer.make())
        grads = [means(model, gradients_of(step, dist.get_rank())) for step in range(steps)]
        out[key] = (grads, hook.state_dict())
        hook.close()
    return out


class Simulated:
    """M workers in numpy, parameter by parameter, as the papers have it."""

    def __init__(self, workers: int, compress: Callable[[np.ndarray], np.ndarray], two_sided: bool) -> None:
        self.residuals: list[dict[str, Any]] = [dict.fromkeys(SHAPES, 0.0) for _ in range(workers)]
        self.server: dict[str, Any] = dict.fromkeys(SHAPES, 0.0)
        self.compress, self.two_sided = compress, two_sided

    def step(self, gradients: Sequence[dict[str, Tensor]]) -> dict[str, np.ndarray]:
        out = {}
        for name in SHAPES:
            sent = []
            for e, g in zip(self.residuals, gradients, strict=True):
                p = in_memory(g[name]) + e[name]
                sent.append(self.compress(p))
                e[name] = p - sent[-1]
            mean = np.mean(sent, axis=0)
            if self.two_sided:
                p = mean + self.server[name]
                mean = self.compress(p)
                self.server[name] = p - mean
            out[name] = mean
        return out


SIMULATED: dict[str, tuple[Callable[[np.ndarray], np.ndarray], bool]] = {
    "ef-sign": (lambda x: blockwise(x, ef_sign), False),
    "ef-sign-two-sided": (lambda x: blockwise(x, ef_sign), True),
    "one-bit-sgd": (lambda x: blockwise(x, one_bit_sgd), True),
    "top-k": (lambda x: top_k(x, 0.01), False),
}


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_all_ranks_get_the_mean_of_the_papers(workers: int) -> None:
    """Several buckets, rebuilt after the first step; ranks agree bit for bit, and with the simulation to rounding."""
    steps = 3
    ranks = gang(workers).run(run_all_methods, steps)
    for key in COMPRESSORS:
        grads, state = ranks[0][key]
        for other, _ in (r[key] for r in ranks[1:]):
            assert all(torch.equal(a[name], b[name]) for a, b in zip(grads, other, strict=True) for name in SHAPES)
        given_ = [[gradients_of(step, rank) for rank in range(workers)] for step in range(steps)]
        if key in SIMULATED:
            simulated = Simulated(workers, *SIMULATED[key])
            for step in range(steps):
                for name, expected in simulated.step(given_[step]).items():
                    np.testing.assert_allclose(in_memory(grads[step][name]), expected, rtol=2e-5, atol=2e-6)
            for name in SHAPES:
                for rank in range(workers):
                    mine = ranks[rank][key][1]["worker"][name]
                    np.testing.assert_allclose(in_memory(mine), simulated.residuals[rank][name], rtol=1e-4, atol=3e-6)
            check_nothing_is_lost(key, ranks, given_)
        else:
            assert not state["worker"]
            check_rounding(key, grads, given_)


def check_nothing_is_lost(key: str, ranks: list[dict[str, Any]], given_: list[list[dict[str, Tensor]]]) -> None:
    """Sum of what was applied + residuals = sum of the mean gradients, to rounding."""
    workers = len(ranks)
    firsts, elements = {}, 0
    for name, shape in SHAPES.items():
        firsts[name] = elements // BLOCK
        elements += math.prod(shape)
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        applied = sum(in_memory(step[name]).astype(np.float64) for step in ranks[0][key][0])
        kept = sum(in_memory(r[key][1]["worker"][name]).astype(np.float64) for r in ranks) / workers
        owners = np.zeros((-(-size // BLOCK), BLOCK))
        for rank, answers in enumerate(ranks):
            server = answers[key][1]["server"]
            if name in server:
                owners[list(own_blocks(size, firsts[name], workers, rank))] = server[name].numpy()
        total = sum(in_memory(g[name]).astype(np.float64) for step in given_ for g in step) / workers
        np.testing.assert_allclose(applied + kept + owners.reshape(-1)[:size], total, atol=1e-5)
        assert not owners.reshape(-1)[size:].any()


def check_rounding(key: str, grads: list[dict[str, Tensor]], given_: list[list[dict[str, Tensor]]]) -> None:
    """Every mean is within one unit of the workers' rounding and one of the owner's."""
    for got, workers in zip(grads, given_, strict=True):
        for name in SHAPES:
            exact = [in_memory(g[name]) for g in workers]
            if key == "terngrad":
                exact = [limited(x) for x in exact]
            for i in range(0, len(exact[0]), BLOCK):
                blocks = [x[i : i + BLOCK] for x in exact]
                unit = max(np.abs(b).max() for b in blocks) / (1 if key == "terngrad" else 7)
                levels = 1 if key == "terngrad" else 7
                off = np.abs(in_memory(got[name])[i : i + BLOCK] - np.mean(blocks, axis=0)).max()
                assert off <= unit + unit * (levels + 1) / levels + 1e-6


def limited(x: np.ndarray) -> np.ndarray:
    def limit(block: np.ndarray) -> np.ndarray:
        return np.clip(block, -2.5 * block.std(), 2.5 * block.std())

    return blockwise(x, limit)


def run_with_restart(key: str, load: bool) -> list[dict[str, Tensor]]:
    rank = dist.get_rank()
    model, hook = hooked(COMPRESSORS[key].make())
    out = [means(model, gradients_of(step, rank)) for step in range(3)]
    if load:
        file = io.BytesIO()
        torch.save(hook.state_dict(), file)
        hook.close()
        # Other buckets than before.
        model, hook = hooked(COMPRESSORS[key].make(), bucket_mb=0.01)
        hook.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    out += [means(model, gradients_of(step, rank)) for step in range(3, 5)]
    hook.close()
    return out


@pytest.mark.parametrize("key", COMPRESSORS)
def test_a_restart_changes_nothing(key: str) -> None:
    whole, restarted = gang(2).run(run_with_restart, key, False), gang(2).run(run_with_restart, key, True)
    for a, b in zip(whole, restarted, strict=True):
        assert all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in SHAPES)
    assert all(torch.equal(whole[0][-1][name], whole[1][-1][name]) for name in SHAPES)


def refusals() -> list[str]:
    out = []
    rank = dist.get_rank()
    _, hook = hooked(EFSign(two_sided=True))
    good = hook.state_dict()
    no_server = {**good, "server": {}}
    other_shape = {**good, "worker": {**good["worker"], "b": torch.zeros(50, 33)}}
    foreign = {**good, "worker": {**good["worker"], "zz": torch.zeros(1)}}
    for state in ({**good, "world_size": 5}, {**good, "rank": 1 - rank}, no_server, other_shape, foreign):
        try:
            hook.load_state_dict(state)
        except ValueError as error:
            out.append(str(error))
    with pytest.raises(ValueError, match="Invalid seed"):
        CompressedGradients(DistributedDataParallel(Given(SHAPES)), EFSign(), seed=-1)
    with pytest.raises(TypeError, match="w is complex"):
        CompressedGradients(
            DistributedDataParallel(nn.ParameterDict({"w": torch.zeros(2, dtype=torch.complex64)})), EFSign()
        )
    with pytest.raises(TypeError, match="expected a model wrapped in DistributedDataParallel"):
        CompressedGradients(Given(SHAPES), EFSign())  # type: ignore[arg-type]
    hook.close()
    return out


def test_a_state_that_does_not_fit_is_refused() -> None:
    for messages in gang(2).run(refusals):
        world, rank, server, shape, foreign = messages
        assert "saved by 5 workers and there are 2 now" in world
        assert "state of rank" in rank
        assert "the server's residual of a was saved with shape none, expected" in server
        assert "the worker's residual of b was saved with shape (50, 33), expected (33, 50)" in shape
        assert "the worker's residual of zz was saved with shape (1,), expected none" in foreign


def run_unused() -> dict[str, Any]:
    """Rank 1 leaves "b" out in step 1, everybody leaves "c" out in step 2."""
    rank = dist.get_rank()
    out = {}
    for key, offer in COMPRESSORS.items():
        model, hook = hooked(offer.make(), find_unused_parameters=True)
        before = []
        grads = []
        for step in range(4):
            g = gradients_of(step, rank)
            if step == 1 and rank == 1:
                del g["b"]
            if step == 2:
                del g["c"]
            before.append(hook.state_dict())
            grads.append(means(model, g))
        out[key] = (grads, [*before, hook.state_dict()])
        hook.close()
    return out


def test_what_backward_does_not_reach_is_zero_and_keeps_its_residual() -> None:
    ranks = gang(2).run(run_unused)
    for key in COMPRESSORS:
        grads, states = ranks[1][key]
        assert all(torch.equal(a[n], b[n]) for a, b in zip(grads, ranks[0][key][0], strict=True) for n in a)
        assert "c" not in grads[2]
        assert "c" in grads[3]
        for kind, name, step in (("worker", "b", 1), ("worker", "c", 2), ("server", "c", 2)):
            if name in states[step][kind]:
                assert torch.equal(states[step][kind][name], states[step + 1][kind][name])
                if states[step][kind][name].numel():
                    assert not torch.equal(states[step + 1][kind][name], states[step + 2][kind][name])
    # Half of rank 0's scaled signs: as in DDP's mean, the absent rank counts.
    state0 = ranks[0]["ef-sign"][1][1]["worker"]["b"]
    expected = blockwise(in_memory(gradients_of(1, 0)["b"] + state0), ef_sign) / 2
    np.testing.assert_allclose(in_memory(ranks[0]["ef-sign"][0][1]["b"]), expected, rtol=1e-5)


def run_not_finite(key: str, value: float) -> tuple[str, str, bool]:
    model, hook = hooked(COMPRESSORS[key].make())
    rank = dist.get_rank()
    means(model, gradients_of(0, rank))
    before = hook.state_dict()["worker"]
    g = gradients_of(1, rank)
    if rank == 1:
        g["d"][1024] = value
    try:
        means(model, g)
    except CollectiveError as error:
        after = hook.state_dict()["worker"]
        hook.close()
        return (
            type(error).__name__,
            str(error),
            all(torch.equal(e, after[n]) for n, e in before.items() if n == "d"),
        )
    return "nothing", "", True


@pytest.mark.parametrize(
    ("key", "value"), [*((key, math.nan) for key in COMPRESSORS), ("qsgd", math.inf), ("top-k", -math.inf)]
)
def test_a_gradient_that_is_not_finite_raises_on_all_ranks(key: str, value: float) -> None:
    for kind, message, kept in gang(2).run(run_not_finite, key, value):
        assert kind == "CollectiveError"
        assert message.startswith("rank 1: the gradient of d is not finite")
        assert kept


def run_options() -> list[list[dict[str, Tensor]]]:
    """The same gradients in DDP's various ways to keep them."""
    out = []
    for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True}):
        model, hook = hooked(OneBitSGD(), **options)
        out.append([means(model, gradients_of(step, dist.get_rank())) for step in range(4)])
        hook.close()
    model, hook = hooked(OneBitSGD(), bucket_mb=25)
    with model.no_sync():
        model({name: g * 2 for name, g in gradients_of(0, dist.get_rank()).items()}).backward()
    model({name: -g for name, g in gradients_of(0, dist.get_rank()).items()}).backward()
    out.append([{name: p.grad for name, p in model.module.named_parameters()}])
    hook.close()
    return out


def test_how_ddp_keeps_gradients_changes_nothing() -> None:
    plain, *others = gang(2).run(run_options)[0]
    for other in others:
        for a, b in zip(plain, other, strict=False):
            for name in SHAPES:
                torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def run_bfloat16(dtype: torch.dtype) -> tuple[list[dict[str, Tensor]], set[torch.dtype]]:
    """Means of gradients that both types can hold."""
    model = DistributedDataParallel(Given(SHAPES).to(dtype), bucket_cap_mb=0.004)
    hook = CompressedGradients(model, EFSign(two_sided=True))
    out = []
    for step in range(3):
        gradients = {name: g.bfloat16().to(dtype) for name, g in gradients_of(step, dist.get_rank()).items()}
        out.append(means(model, gradients))
    hook.close()
    return out, {e.dtype for e in hook.state_dict()["worker"].values()}


def test_half_precision_gradients_are_compressed_in_float32() -> None:
    single, _ = gang(2).run(run_bfloat16, torch.float32)[0]
    half, dtypes = gang(2).run(run_bfloat16, torch.bfloat16)[0]
    assert dtypes == {torch.float32}
    for a, b in zip(single, half, strict=True):
        assert all(torch.equal(a[name].bfloat16(), b[name]) for name in SHAPES)


def run_join() -> list[Tensor]:
    """Rank 0 has three batches, rank 1 has one."""
    model, hook = hooked(EFSign(two_sided=True))
    out = []
    with model.join():
        for step in range(3 - 2 * dist.get_rank()):
            out.append(means(model, gradients_of(step, dist.get_rank()))["b"])
    kept = hook.state_dict()
    hook.close()
    return [*out, torch.tensor(float(kept["step"]))]


def test_a_rank_that_has_joined_sends_zeros() -> None:
    first, second = gang(2).run(run_join)
    assert torch.equal(first[0], second[0])
    assert float(first[-1]) == float(second[-1]) == 3
    assert all(g.isfinite().all() for g in first)


def count_bytes() -> dict[str, tuple[float, float]]:
    """Bytes per parameter sent to others in a step, counted at the collectives, and as the compressor says."""
    size = dist.get_world_size()
    sent = 0
    all_to_all, all_gather = dist.all_to_all_single, base.all_gather

    def counting_all_to_all(output: Tensor, input: Tensor, group: Any) -> Any:
        nonlocal sent
        sent += input.nbytes * (size - 1) // size
        return all_to_all(output, input, group=group)

    def counting_all_gather(output: Tensor, input: Tensor, group: Any) -> Any:
        nonlocal sent
        sent += input.nbytes * (size - 1)
        return all_gather(output, input, group=group)

    out = {}
    dist.all_to_all_single, base.all_gather = counting_all_to_all, counting_all_gather
    try:
        for key, offer in COMPRESSORS.items():
            model = DistributedDataParallel(nn.Linear(512, 513, bias=False))
            hook = CompressedGradients(model, offer.make())
            sent = 0
            model(torch.randn(2, 512)).sum().backward()
            out[key] = (sent / (512 * 513), offer.make().bytes_per_parameter(size))
            hook.close()
    finally:
        dist.all_to_all_single, base.all_gather = all_to_all, all_gather
    return out


def page_table() -> str:
    """The table of docs/compressors.md, from what the compressors say of themselves."""
    head = ["Key", "Compressor", "Paper", "Bytes", "M = 4", "Biased", "State per worker", "Good for", "Not for"]
    two_sided = EFSign(two_sided=True)
    entries = [(f"`{key}`", repr(offer.make()), offer.make(), "", offer.page) for key, offer in COMPRESSORS.items()]
    entries.append(("", "OneBitAdam", two_sided, ", 6.0", one_bit_adam.PAGE))
    rows = []
    for key, name, compressor, more, (paper, formula, *rest) in entries:
        rows.append([key, f"`{name}`", paper, formula, f"{compressor.bytes_per_parameter(4):.3f}{more}", *rest])
    return "\n".join(markdown_table(head, rows, left=range(len(head))))


def test_bytes_are_those_of_the_formula_and_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compressors.md").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+)` .*\| (0\.\d+) \|", page, re.MULTILINE))
    assert rows.keys() >= COMPRESSORS.keys()
    table = page_table()
    assert table in page, f"docs/compressors.md: put this table under The family:\n{table}"
    for key, (counted, promised) in gang(4).run(count_bytes)[0].items():
        assert counted == pytest.approx(promised, rel=0.015)
        assert f"{promised:.3f}" == rows[key]


# Training.


def descend(hook_needed: bool) -> float:
    """Karimireddy et al., section 3: |x1 + x2| / 2 + |x1 - x2|, where the sign of the gradient is always +-(1, -1)."""

    class Function(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor([1.3, 0.7]))

        def forward(self) -> Tensor:
            return (self.x[0] + self.x[1]).abs() / 2 + (self.x[0] - self.x[1]).abs()

    function = Function()
    model = DistributedDataParallel(function)
    hook = CompressedGradients(model, EFSign()) if hook_needed else None
    optimizer = torch.optim.SGD(function.parameters(), lr=0.03)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 / math.sqrt(step + 1)
        optimizer.zero_grad()
        model().backward()
        if hook is None:
            function.x.grad.sign_()
        optimizer.step()
    return float(function())


def test_error_feedback_converges_where_the_sign_does_not() -> None:
    assert gang(1).run(descend, False)[0] >= 1.0 - 1e-5  # x1 + x2 stays at 2
    assert gang(1).run(descend, True)[0] < 0.1


def adam_parameters() -> tuple[list[Tensor], list[Tensor], bool, list[Tensor]]:
    """20 steps of torch's AdamW on DDP's mean, and of the warm-up; then another 5 after it."""
    rank = dist.get_rank()
    theirs, ours = (DistributedDataParallel(Given(SHAPES), bucket_cap_mb=0.004) for _ in range(2))
    settings_: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    adamw = torch.optim.AdamW(theirs.parameters(), foreach=False, **settings_)
    one_bit = OneBitAdam(ours, warmup_steps=20, **settings_)
    frozen = False
    for step in range(20):
        frozen = frozen or one_bit.frozen
        means(theirs, gradients_of(step, rank))
        means(ours, gradients_of(step, rank))
        adamw.step()
        one_bit.step()
    warm = [p.detach().clone() for p in ours.parameters()]
    assert one_bit.frozen
    for step in range(20, 25):
        means(ours, gradients_of(step, rank))
        one_bit.step()
    after = [p.detach().clone() for p in ours.parameters()]
    one_bit.hook.close()
    return [p.detach() for p in theirs.parameters()], warm, frozen, after


def test_one_bit_adam_is_adam_in_the_warm_up() -> None:
    ranks = gang(2).run(adam_parameters)
    theirs, warm, frozen, _ = ranks[0]
    assert all(torch.equal(a, b) for a, b in zip(theirs, warm, strict=True))
    assert not frozen
    assert all(torch.equal(a, b) for a, b in zip(ranks[0][3], ranks[1][3], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(warm, ranks[0][3], strict=True))


def one_bit_adam_by_hand() -> list[tuple[np.ndarray, np.ndarray]]:
    """Parameters after each step, by `OneBitAdam` and by the paper's algorithm in numpy, on all workers' gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    beta1, beta2, lr, eps, warm = 0.9, 0.99, 0.01, 1e-8, 3
    model = DistributedDataParallel(Given(SHAPES), bucket_cap_mb=0.004)
    optimizer = OneBitAdam(model, lr=lr, betas=(beta1, beta2), eps=eps, warmup_steps=warm)
    simulated = Simulated(size, *SIMULATED["ef-sign-two-sided"])
    x, m, v = ({name: np.zeros(math.prod(shape)) for name, shape in SHAPES.items()} for _ in range(3))
    out = []
    for step in range(6):
        everyone = [gradients_of(step, r) for r in range(size)]
        means(model, everyone[rank])
        optimizer.step()
        if step < warm:
            for name in SHAPES:
                g = np.mean([in_memory(each[name]) for each in everyone], axis=0)
                m[name] = beta1 * m[name] + (1 - beta1) * g
                v[name] = beta2 * v[name] + (1 - beta2) * g**2
        else:
            local = [
                {name: torch.tensor(beta1 * m[name] + (1 - beta1) * in_memory(g[name])) for name in SHAPES}
                for g in everyone
            ]
            m = simulated.step(local)
        frozen = min(step + 1, warm)
        for name in SHAPES:
            direction = m[name] / (1 - beta1 ** (step + 1)) / (np.sqrt(v[name] / (1 - beta2**frozen)) + eps)
            x[name] = x[name] - lr * direction
            out.append((in_memory(model.module.get_parameter(name).detach()).copy(), x[name]))
    optimizer.hook.close()
    return out


def test_one_bit_adam_takes_the_steps_of_the_paper() -> None:
    for got, expected in gang(2).run(one_bit_adam_by_hand)[0]:
        close = np.isclose(got, expected, rtol=1e-3, atol=1e-5)
        assert close.mean() > 0.999  # an element within rounding of 0 may take the other sign


class Quadratic(nn.Module):
    """Sum of a (x - b)^2 / 2 with curvatures from 0.01 to 1, and noise of the rank's own in the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2000))
        self.curvature, self.optimum = torch.logspace(-2, 0, 2000), torch.linspace(-1, 1, 2000)

    def forward(self, noise: Tensor) -> Tensor:
        off = self.x - self.optimum
        return (self.curvature * off.square()).sum() / 2 + (off * noise).sum()


def minimise(restarts: Sequence[int]) -> tuple[float, float, Tensor]:
    """The loss before and after, and where it is; at restarts, optimizer and hook are saved and made anew."""
    function = Quadratic()
    model = DistributedDataParallel(function)
    optimizer = OneBitAdam(model, lr=0.02, betas=(0.9, 0.99), warmup_steps=100)
    generator = torch.Generator().manual_seed(dist.get_rank())
    first = float(function(torch.zeros(1)))
    steps = 300
    for step in range(steps):
        if step in restarts:
            file = io.BytesIO()
            torch.save((function.state_dict(), optimizer.state_dict(), optimizer.hook.state_dict()), file)
            optimizer.hook.close()
            function = Quadratic()
            model = DistributedDataParallel(function)
            optimizer = OneBitAdam(model, lr=99.0, warmup_steps=1)
            parts = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            for part, saved in zip((function, optimizer, optimizer.hook), parts, strict=True):
                part.load_state_dict(saved)
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        optimizer.zero_grad()
        model(torch.randn(2000, generator=generator) * 0.1).backward()
        optimizer.step()
    optimizer.hook.close()
    return first, float(function(torch.zeros(1))), function.x.detach()


def test_one_bit_adam_comes_near_the_optimum_also_after_restarts() -> None:
    (first, last, x), (_, _, other) = gang(2).run(minimise, ())
    assert last < 0.01 * first
    assert torch.equal(x, other)
    assert torch.equal(gang(2).run(minimise, (60, 200))[0][2], x)


def adam_refusals() -> list[str]:
    out = []

    def attempt(make: Callable[[], object]) -> None:
        try:
            make()
        except (ValueError, TypeError, RuntimeError) as error:
            out.append(str(error))

    for options in ({"warmup_steps": 0}, {"warmup_steps": 5, "betas": (0.9, 1.0)}, {"warmup_steps": 5, "lr": -1.0}):
        attempt(lambda: OneBitAdam(DistributedDataParallel(Given(SHAPES)), **options))  # noqa: B023
    model = DistributedDataParallel(Given(SHAPES))
    attempt(lambda: OneBitAdam(model, warmup_steps=5, params=list(model.parameters())[1:]))
    attempt(lambda: OneBitAdam(Given(SHAPES), warmup_steps=5))  # type: ignore[arg-type]

    # "c" gets its first gradient too late; one element of "b" has none before, and stays where it is.
    model = DistributedDataParallel(Given(SHAPES), find_unused_parameters=True)
    optimizer = OneBitAdam(model, lr=0.1, warmup_steps=2)
    for step in range(4):
        g = gradients_of(step, dist.get_rank())
        del g["c"]
        if step < 2:
            g["b"][3, 4] = 0
        means(model, g)
        optimizer.step()
    assert model.module.b[3, 4] == 0
    assert model.module.b.abs().max() < 2
    before = model.module.a.detach().clone()
    means(model, gradients_of(4, dist.get_rank()))
    attempt(optimizer.step)
    assert torch.equal(model.module.a, before)
    attempt(lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]}))
    optimizer.hook.close()
    return out


def test_one_bit_adam_refuses_what_would_go_wrong() -> None:
    for messages in gang(2).run(adam_refusals):
        assert len(messages) == 7
        for message, start in zip(
            messages,
            (
                "Invalid warmup_steps: 0, expected",
                "Invalid betas: (0.9, 1.0), expected",
                "Invalid lr: -1.0, expected",
                "OneBitAdam: expected params to be all those of the model",
                "OneBitAdamHook: expected a model wrapped in DistributedDataParallel",
                "OneBitAdam: c has its first gradient after the warm-up",
                "OneBitAdam takes all parameters of its model at the start",
            ),
            strict=True,
        ):
            assert message.startswith(start)
