"""Compressed gradients in real processes: all ranks get the mean of the papers, and nothing is lost."""

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from compressor_cases import (
    SHAPES,
    SIMULATED,
    Given,
    Simulated,
    blockwise,
    ef_sign,
    gradients_of,
    hooked,
    in_memory,
    means,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bytes_sent import bytes_sent
from gang import gang, on_ranks
from signstep.distributed import CollectiveError, ddp, diloco, local, power_sgd
from signstep.distributed.compressors import COMPRESSORS, CompressedGradients, EFSign, OneBitSGD, one_bit_adam
from signstep.distributed.compressors.blocks import BLOCK, own_blocks
from signstep.distributed.local_methods import LOCAL_METHODS
from signstep.distributed.reductions import REDUCTIONS, Gradients, Payload
from signstep.lab.output.tables import markdown_table


def run_all_methods(steps: int) -> dict[str, Any]:
    """Means of every step, and residuals, of every method."""
    out = {}
    for key, offer in COMPRESSORS.items():
        model, hook = hooked(offer.make())
        grads = [means(model, gradients_of(step, dist.get_rank())) for step in range(steps)]
        out[key] = (grads, hook.state_dict())
        hook.close()
    return out


@pytest.mark.parametrize("workers", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_all_ranks_get_the_mean_of_the_papers(workers: int) -> None:
    """Several buckets, rebuilt after the first step; ranks agree bit for bit, and with the simulation to rounding."""
    steps = 2
    ranks = gang(workers).run(run_all_methods, steps)
    for key in COMPRESSORS:
        grads, state = ranks[0][key]
        for other, _ in (r[key] for r in ranks[1:]):
            assert all(torch.equal(a[name], b[name]) for a, b in zip(grads, other, strict=True) for name in SHAPES)
        given_ = [[gradients_of(step, rank) for rank in range(workers)] for step in range(steps)]
        if key in SIMULATED:
            simulated = Simulated(workers, SIMULATED[key])
            for step in range(steps):
                for name, expected in simulated.step(given_[step]).items():
                    np.testing.assert_allclose(in_memory(grads[step][name]), expected, rtol=2e-5, atol=2e-6)
            for name in SHAPES:
                for rank in range(workers):
                    mine = ranks[rank][key][1]["worker"][name]
                    np.testing.assert_allclose(in_memory(mine), simulated.residuals[rank][name], rtol=1e-4, atol=3e-6)
            if SIMULATED[key].decay == 1:
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
            if key in ("terngrad", "dithered-sign"):
                exact = [limited(x) for x in exact]
            for i in range(0, len(exact[0]), BLOCK):
                blocks = [x[i : i + BLOCK] for x in exact]
                levels = 7 if key == "qsgd" else 1
                unit = max(np.abs(b).max() for b in blocks) / levels
                off = np.abs(in_memory(got[name])[i : i + BLOCK] - np.mean(blocks, axis=0)).max()
                assert off <= unit + (0 if key == "dithered-sign" else unit * (levels + 1) / levels) + 1e-6


def limited(x: np.ndarray) -> np.ndarray:
    def limit(block: np.ndarray) -> np.ndarray:
        limit = 2.5 * np.sqrt(np.mean(np.square(block)))
        return np.clip(block, -limit, limit)

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
        return (type(error).__name__, str(error), all(torch.equal(e, after[n]) for n, e in before.items() if n == "d"))
    return "nothing", "", True


@pytest.mark.parametrize(
    ("key", "value"), [*((key, math.nan) for key in COMPRESSORS), ("qsgd", math.inf), ("top-k", -math.inf)]
)
def test_a_gradient_that_is_not_finite_raises_on_all_ranks(key: str, value: float) -> None:
    for kind, message, kept in gang(2).run(run_not_finite, key, value):
        assert kind == "CollectiveError"
        assert message.startswith("rank 1: the gradient of d is not finite")
        assert kept


@on_ranks(2)
def test_how_ddp_keeps_gradients_changes_nothing() -> None:
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
    plain, *others = out
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


def count_bytes() -> dict[str, tuple[int, float, float]]:
    """Collectives of a step, bytes sent to others in it, and as the compressor says."""
    out = {}
    for key, offer in COMPRESSORS.items():
        model = DistributedDataParallel(nn.Linear(512, 513, bias=False))
        hook = CompressedGradients(model, offer.make())
        with bytes_sent() as sent:
            model(torch.randn(2, 512)).sum().backward()
        out[key] = (len(sent), sum(sent), offer.make().payload([(513, 512)], dist.get_world_size()))
        hook.close()
    return out


def page_table() -> str:
    """The table of docs/compressors.md, from what the methods say of themselves."""
    head = ["Key", "Made by", "Paper", "Bytes", "M = 4", "Biased", "State per worker", "Good for", "Not for"]
    many = Gradients.square(4_000_000)

    def each(payload: Payload) -> str:
        return f"{payload(many, 4) / many.parameters:.3f}"

    rows = []
    for key, offer in COMPRESSORS.items():
        made = offer.make()
        rows.append((f"`{key}`", f"`{made}`", f"{made.bytes_per_parameter(4):.3f}", offer.page))
    two_sided = EFSign(two_sided=True).bytes_per_parameter(4)
    rows.append(("", "`OneBitAdam`", f"{two_sided:.3f}, 6.0", one_bit_adam.PAGE))
    rows.append(("`powersgd`", "torch's PowerSGD hook", each(REDUCTIONS["powersgd"].payload), power_sgd.PAGE))
    for name, page in ddp.PAGES.items():
        rows.append(("`vote`", f"`MajorityVote` with `{name}`", each(REDUCTIONS["vote"].payload), page))
    makes = {
        "local-vote": ("`LocalVote`", local.PAGE),
        "diloco": ("`DiLoCo`", diloco.PAGES["diloco"]),
        "diloco-int8": ("`DiLoCo(compressor=QSGD(levels=127))`", diloco.PAGES["diloco-int8"]),
    }
    for key, (made_by, page) in makes.items():
        rows.append((f"`{key}`", made_by, each(LOCAL_METHODS[key].payload) + " / H", page))
    lines = [[key, by, page.paper, page.bytes, four, *page[2:]] for key, by, four, page in rows]
    return "\n".join(markdown_table(head, lines, left=range(len(head))))


def test_bytes_are_those_of_the_formula_and_of_the_page() -> None:
    page = (Path(__file__).parents[3] / "docs" / "compressors.md").read_text()
    table = page_table()
    assert table in page, f"docs/compressors.md: put this table under The family:\n{table}"
    rows = dict(re.findall(r"^\| `([\w-]+)` .*\| (0\.\d+) \|", page, re.MULTILINE))
    assert set(LOCAL_METHODS) <= set(re.findall(r"^\| `([\w-]+)`", page, re.MULTILINE))
    assert rows.keys() >= COMPRESSORS.keys()
    one = Gradients(((513, 512),))
    for key, (trips, counted, promised) in gang(4).run(count_bytes)[0].items():
        assert trips == REDUCTIONS[key].least_trips(one, 4)  # DDP has all of it in one bucket
        assert counted == pytest.approx(promised, rel=0.015)
        assert f"{COMPRESSORS[key].make().bytes_per_parameter(4):.3f}" == rows[key]


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
