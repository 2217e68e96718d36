"""Parameters under fully_shard: the steps of an optimizer that has them whole."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from gang import gang, on_ranks
from signstep import HybridSignSGD, Lion, SignSGD
from signstep.kernels.engine import Tensors
from signstep.kernels.momentum import new_momentum
from signstep.optim import attach_to_backward
from signstep.optim.signsgd import signsgd

Options = dict[str, Any]

UNEVEN = ((7, 5), (3, 4), (6, 2, 3), (9,), (2,))
"""Rows that no number of ranks divides, and fewer rows than ranks."""
BLOCKS = ((10, 256), (3, 256), (1024,), (4, 2, 128))
"""Whose shards on 1, 2 and 4 ranks begin with blocks of 8-bit momentum."""

RELATIVE = {"dither": 1.0, "dither_scale": "relative", "dither_decay": 0.1}
SHARDED: Mapping[str, tuple[type[SignSGD], Options]] = {
    # No number depends on other shards: the same bits.
    "clean": (SignSGD, {}),
    "clean, fused": (SignSGD, {"fused": True}),
    "clean, foreach": (SignSGD, {"foreach": True, "weight_decay": 0.1, "maximize": True}),
    "one by one": (SignSGD, {"foreach": False, "dither": 0.1}),
    "coupled decay": (SignSGD, {"weight_decay": 0.1, "decoupled_weight_decay": False}),
    "no momentum": (SignSGD, {"momentum": 0.0, "dither": 0.5, "capturable": True}),
    "before the sign": (SignSGD, {"dither": 0.1, "seed": 2**63 + 5}),
    "before the sign, foreach": (SignSGD, {"dither": 0.1, "foreach": True}),
    "after the sign": (SignSGD, {"dither": 0.1, "dither_position": "post"}),
    "uniform": (SignSGD, {"dither": 0.1, "dither_law": "uniform"}),
    "expected": (SignSGD, {"dither": 0.1, "dither_position": "expected"}),
    "bf16": (SignSGD, {"dither": 0.1, "state_dtype": torch.bfloat16}),
    "bf16, foreach": (SignSGD, {"state_dtype": torch.bfloat16, "foreach": True}),
    "float32": (SignSGD, {"state_dtype": torch.float32, "lr": torch.tensor(0.01)}),
    "int8": (SignSGD, {"dither": 0.1, "state_dtype": torch.int8}),
    "int8, foreach": (SignSGD, {"state_dtype": torch.int8, "foreach": True}),
    "lion": (Lion, {"weight_decay": 0.1}),
    "lion, int8": (Lion, {"dither": 0.1, "state_dtype": torch.int8, "betas": (0.8, 0.95)}),
    "bfloat16": (SignSGD, {"lr": 1e-3, "weight_decay": 0.1}),
    "bfloat16, foreach": (SignSGD, {"lr": 1e-3, "dither": 0.1, "foreach": True}),
    # The rest goes by sums over all shards.
    "relative": (SignSGD, RELATIVE),
    "relative, foreach": (SignSGD, {"foreach": True} | RELATIVE),
    "relative, no momentum": (SignSGD, {"momentum": 0.0} | RELATIVE),
    "relative, after the sign": (SignSGD, {"dither_position": "post"} | RELATIVE),
    "relative, uniform, expected": (SignSGD, {"dither_law": "uniform", "dither_position": "expected"} | RELATIVE),
    "relative, int8": (SignSGD, {"state_dtype": torch.int8} | RELATIVE),
    "lion, relative": (Lion, {"foreach": True} | RELATIVE),
    "paper": (HybridSignSGD, {"switch_step": 3}),
    "paper, foreach": (HybridSignSGD, {"switch_step": 3, "foreach": True}),
    "ratio": (HybridSignSGD, {"switch_step": 3, "calibration": "ratio", "sgd_momentum": 0.9}),
    "applied": (HybridSignSGD, {"switch_step": 3, "calibration": "applied", "sgd_momentum": 0.9} | RELATIVE),
    "hybrid, bf16": (HybridSignSGD, {"switch_step": 3, "sgd_momentum": 0.9, "state_dtype": torch.bfloat16}),
    "hybrid, int8": (HybridSignSGD, {"switch_step": 3, "sgd_momentum": 0.9, "state_dtype": torch.int8, "dither": 0.1}),
}
EXACT = list(itertools.takewhile(lambda name: name != "relative", SHARDED))


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


class Holder(nn.Module):
    """Parameters of some shapes, and one that is left whole."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.kept = nn.Parameter(torch.randn(5, generator=generator).to(dtype))
        self.cut = nn.ParameterList(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def sharded(shapes: tuple[tuple[int, ...], ...], mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> Holder:
    holder = Holder(shapes, dtype)
    fully_shard(holder, mesh=mesh, ignored_params={holder.kept})
    return holder


def own(whole: Tensor, p: Any) -> Tensor:
    """The shard of this rank, as torch.chunk gives it."""
    if not isinstance(p, DTensor):
        return whole
    mesh = p.device_mesh
    chunks = torch.chunk(whole, mesh.size(mesh.ndim - 1))
    rank = mesh.get_local_rank(mesh.ndim - 1)
    return chunks[rank] if rank < len(chunks) else whole[:0]


def local(p: Any) -> Tensor:
    return p.detach().to_local() if isinstance(p, DTensor) else p.detach()


def set_gradients(params: Iterator[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        g = (torch.randn(p.shape, generator=generator) + 0.3).to(p.dtype)
        if isinstance(p, DTensor):
            g = DTensor.from_local(
                own(g, p), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )
        p.grad = g


def assert_follows(model: nn.Module, reference: nn.Module, note: object, *, exact: bool) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(local(p), own(q.detach(), p), **tolerance, msg=lambda m: f"{note}: {m}")


def follow(name: str, mesh: DeviceMesh) -> None:
    optimizer_class, options = SHARDED[name]
    shapes = BLOCKS if options.get("state_dtype") == torch.int8 else UNEVEN
    dtype = torch.bfloat16 if name.startswith("bfloat16") else torch.float32  # of the parameters
    model, whole = sharded(shapes, mesh, dtype), Holder(shapes, dtype)
    ours, theirs = (optimizer_class(m.parameters(), **{"lr": 0.01} | options) for m in (model, whole))
    for step in range(6):
        for m in (model, whole):
            set_gradients(m.parameters(), step)
        ours.step()
        theirs.step()
        assert_follows(model, whole, (name, step), exact=name in EXACT or mesh.size(mesh.ndim - 1) == 1)
    if isinstance(ours, HybridSignSGD):
        assert ours.phase == "sgd"
        assert ours.calibrated_lr == pytest.approx(theirs.calibrated_lr, rel=1e-6)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        for key, value in ours.state[p].items():
            if key != "exp_avg_scale":
                torch.testing.assert_close(local(value), own(theirs.state[q][key], value), rtol=1e-6, atol=1e-7)


def follow_all(mesh_shape: tuple[int, ...], names: list[str]) -> None:
    mesh = mesh_of(*mesh_shape)
    for name in names:
        follow(name, mesh)


MESHES = [(1,), (2,), (4,), (2, 2), (2, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh_shape", "names"),
    # All on two ranks, and a third on each other mesh.
    [(shape, list(SHARDED)[i % 3 :: 1 if shape == (2,) else 3]) for i, shape in enumerate(MESHES, start=2)]
    + [pytest.param(shape, list(SHARDED), marks=pytest.mark.long) for shape in MESHES],
)
def test_steps_are_those_of_whole_parameters(mesh_shape: tuple[int, ...], names: list[str]) -> None:
    gang(torch.Size(mesh_shape).numel()).run(follow_all, mesh_shape, names)


@on_ranks(4)
def test_blocks_of_8_bits_lie_within_the_shards() -> None:
    """Each shard takes the steps of a tensor of its own whose elements have their numbers in the whole parameter."""
    mesh, options = mesh_of(4), {"lr": 0.01, "dither": 0.1, "state_dtype": torch.int8}
    model, whole = sharded(((11, 100), (3, 400), (700,)), mesh), Holder(((11, 100), (3, 400), (700,)))
    ours, theirs = SignSGD(model.parameters(), **options), SignSGD(whole.parameters(), **options)
    pieces = [own(q.detach(), p).clone() for p, q in zip(model.parameters(), whole.parameters(), strict=True)]
    states = [new_momentum(piece, torch.int8) for piece in pieces]
    begins = [0, *(min(dist.get_rank() * run, size) for run, size in ((300, 1100), (400, 1200), (175, 700)))]
    for step in range(4):
        set_gradients(model.parameters(), step)
        grads = [local(p.grad) for p in model.parameters()]
        averages, scales = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_scale"))
        tensors = Tensors(pieces, grads, averages, scales, [], list(range(4)), begins)
        signsgd(tensors, theirs.options(theirs.param_groups[0], None), foreach=None, fused=None, differentiable=False)
        theirs.param_groups[0]["step"] += 1
        ours.step()
        for p, piece, state in zip(model.parameters(), pieces, states, strict=True):
            assert torch.equal(local(p), piece)
            assert torch.equal(local(ours.state[p]["exp_avg"]), state["exp_avg"])
            scale = local(ours.state[p]["exp_avg_scale"]).flatten()
            assert torch.equal(scale[: len(state["exp_avg_scale"])], state["exp_avg_scale"])


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 3))


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The same on all ranks, so that the mean of a power of 2 of them is each one's."""
    generator = torch.Generator().manual_seed(step)
    return F.cross_entropy(model(torch.randn(6, 11, generator=generator)), torch.arange(6) % 3)


@on_ranks(4)
def test_training_under_fully_shard() -> None:
    for mesh in (mesh_of(4), mesh_of(2, 2)):
        for optimizer_class, options in ((SignSGD, {"dither": 1e-4}), (HybridSignSGD, {"switch_step": 3} | RELATIVE)):
            model: Any = net()
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
            whole = net()
            ours, theirs = (optimizer_class(m.parameters(), lr=0.01, **options) for m in (model, whole))
            for step in range(6):

                def closure(model: nn.Module, optimizer: SignSGD, step: int = step) -> float:
                    optimizer.zero_grad()
                    loss = loss_of(model, step)
                    loss.backward()
                    return float(loss)

                losses = [o.step(lambda m=m, o=o: closure(m, o)) for m, o in ((model, ours), (whole, theirs))]
                assert losses[0] == pytest.approx(losses[1], rel=1e-6)
                assert_follows(model, whole, (options, step), exact=optimizer_class is SignSGD)


@on_ranks(2)
def test_one_sum_over_the_ranks_for_each_step() -> None:
    """Whatever the number of groups: of the mean squares of 5 parameters, and of two sums for each."""
    lengths: list[int] = []
    all_reduce = dist.all_reduce

    def counted(x: Tensor, *arguments: Any, **named: Any) -> Any:
        lengths.append(x.numel())
        return all_reduce(x, *arguments, **named)

    cases: tuple[tuple[type[SignSGD], Options, list[int]], ...] = (
        (SignSGD, {"dither": 0.1}, []),
        (SignSGD, RELATIVE, [5]),
        (HybridSignSGD, {}, [10]),
        (HybridSignSGD, RELATIVE | {"calibration": "applied"}, [15]),
    )
    for optimizer_class, options, expected in cases:
        model, whole = sharded(UNEVEN, mesh_of(2)), Holder(UNEVEN)
        runs = []
        for m in (model, whole):
            groups = [{"params": [m.kept, *m.cut[:3]]}, {"params": [*m.cut[3:]]}]
            runs.append((m, optimizer_class(groups, lr=0.01, **options)))
        for step in range(3):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "all_reduce", counted)
                lengths.clear()
                for m, optimizer in runs:
                    set_gradients(m.parameters(), step)
                    optimizer.step()
            assert lengths == expected
        assert_follows(model, whole, options, exact=not expected)


@on_ranks(2)
def test_relative_dither_that_comes_late() -> None:
    for state_dtype in (None, torch.bfloat16, torch.int8):
        model, whole = sharded(BLOCKS, mesh_of(2)), Holder(BLOCKS)
        runs = [(m, SignSGD(m.parameters(), dither=1.0, state_dtype=state_dtype)) for m in (model, whole)]
        for step in range(4):
            for m, optimizer in runs:
                set_gradients(m.parameters(), step)
                if step == 2:
                    optimizer.param_groups[0]["dither_scale"] = "relative"
                optimizer.step()
        assert_follows(model, whole, state_dtype, exact=False)


@pytest.mark.slow
@on_ranks(2)
def test_compiled_steps() -> None:
    torch.compiler.reset()
    model, whole = sharded(((5, 3),), mesh_of(2)), Holder(((5, 3),))
    ours, theirs = (HybridSignSGD(m.parameters(), lr=0.01, calibration="ratio") for m in (model, whole))
    compiled = torch.compile(ours.step, backend="eager")
    for step in range(3):
        for m in (model, whole):
            set_gradients(m.parameters(), step)
        compiled()
        theirs.step()
        assert_follows(model, whole, step, exact=True)
    assert ours.calibrated_lr == pytest.approx(theirs.calibrated_lr, rel=1e-6)


RESUMED: Mapping[str, tuple[type[SignSGD], Options]] = {
    "bf16": (SignSGD, {"dither": 1e-4, "state_dtype": torch.bfloat16}),
    "int8": (SignSGD, {"dither": 1e-4, "state_dtype": torch.int8}),
    "relative": (SignSGD, RELATIVE),
    "relative, int8": (SignSGD, RELATIVE | {"state_dtype": torch.int8}),
    "before the switch": (HybridSignSGD, RELATIVE | {"switch_step": 5, "calibration": "ratio"}),
    "at the switch": (HybridSignSGD, {"switch_step": 3, "sgd_momentum": 0.9, "momentum": 0.0}),
    "at the switch, int8": (HybridSignSGD, {"switch_step": 3, "sgd_momentum": 0.9, "state_dtype": torch.int8}),
    "after the switch": (HybridSignSGD, {"switch_step": 2, "sgd_momentum": 0.9}),
    "after the switch, int8": (HybridSignSGD, {"switch_step": 2, "sgd_momentum": 0.9, "state_dtype": torch.int8}),
    "after the switch, freed": (HybridSignSGD, RELATIVE | {"switch_step": 2, "state_dtype": torch.int8}),
}


def train(name: str, steps: range, load: Path | None = None) -> tuple[nn.Module, SignSGD]:
    optimizer_class, options = RESUMED[name]
    model: Any = fully_shard(net(), mesh=mesh_of(dist.get_world_size()))
    optimizer = optimizer_class(model.parameters(), lr=0.01, **options)
    if load is not None:
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=load / name)
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    go_on(model, optimizer, steps)
    return model, optimizer


def go_on(model: nn.Module, optimizer: SignSGD, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
@on_ranks(2)
def test_states_of_every_form_resume_to_the_same_bits(every: int) -> None:
    """Each so many-th of all pairs of an optimizer and a form: with three, which shares no factor, all of both."""
    forms: tuple[tuple[Options, Options], ...] = (
        ({}, {}),
        ({"cpu_offload": True}, {"cpu_offload": True}),
        ({"full_state_dict": True}, {"full_state_dict": True}),
        ({"full_state_dict": True}, {"full_state_dict": True, "broadcast_from_rank0": True}),
        ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
    )
    for name, (saved, loaded) in itertools.islice(itertools.product(RESUMED, forms), None, None, every):
        model, optimizer = train(name, range(3))
        # A copy, as the tensors of a state are those of the optimizer.
        states = copy.deepcopy(get_state_dict(model, optimizer, options=StateDictOptions(**saved)))
        go_on(model, optimizer, range(3, 6))
        again, resumed = train(name, range(0))
        set_state_dict(
            again,
            resumed,
            model_state_dict=states[0],
            optim_state_dict=states[1],
            options=StateDictOptions(**loaded),
        )
        go_on(again, resumed, range(3, 6))
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(local(p), local(q)), (name, saved, loaded)


def save_all(folder: Path) -> list[list[Tensor]]:
    ends = []
    for name in RESUMED:
        model, optimizer = train(name, range(3))
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder / name)
        go_on(model, optimizer, range(3, 6))
        ends.append([p.detach().full_tensor() for p in model.parameters()])  # type: ignore[operator]
    return ends


def resume_all(folder: Path) -> list[list[Tensor] | str]:
    ends: list[list[Tensor] | str] = []
    for name in RESUMED:
        try:
            model, _ = train(name, range(3, 6), folder)
        except CheckpointException as error:
            ends.append(str(error))
        else:
            ends.append([p.detach().full_tensor() for p in model.parameters()])  # type: ignore[operator]
    return ends


@pytest.mark.slow
def test_distributed_checkpoint_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """And on another number of ranks, but for 8-bit momentum."""
    saved = gang(2).run(save_all, tmp_path)[0]
    for size in (2, 4):
        for name, there, here in zip(RESUMED, saved, gang(size).run(resume_all, tmp_path)[0], strict=True):
            if size == 4 and RESUMED[name][1].get("state_dtype") == torch.int8:
                assert "Size mismatch between saved torch.Size([2, 1]) and current: torch.Size([4, 1])" in here
                continue
            for a, b in zip(there, here, strict=True):
                if size == 2:
                    assert torch.equal(a, b), name
                else:
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@on_ranks(4)
def test_what_cannot_be_stepped_is_refused_by_name() -> None:
    mesh, wide = mesh_of(4), mesh_of(2, 2)
    for where, placements, match in (
        (mesh, [Shard(1)], r"shape \(8, 8\) is sharded as \(Shard\(dim=1\),\) over a mesh of shape \(4,\)"),
        (mesh, [Partial()], r"sharded as \(Partial\(sum\),\)"),
        (wide, [Shard(0), Shard(0)], r"over a mesh of shape \(2, 2\)"),
        (wide, [Shard(0), Shard(1)], r"Shard\(dim=1\)"),
    ):
        p = nn.Parameter(distribute_tensor(torch.ones(8, 8), where, placements))
        with pytest.raises(ValueError, match=match):
            SignSGD([p])
        optimizer = SignSGD([torch.ones(1)])
        optimizer.param_groups[0]["params"][0] = p  # as Accelerate does
        p.grad = p.detach().clone()
        with pytest.raises(ValueError, match=match):
            optimizer.step()
    cut = nn.Linear(8, 8, bias=False)
    cut.weight = nn.Parameter(distribute_tensor(torch.ones(8, 8), wide["shard"], [Shard(0)]))
    with pytest.raises(ValueError, match="_StridedShard"):
        SignSGD(fully_shard(cut, mesh=wide["replicate"]).parameters())
    model: Any = fully_shard(net(), mesh=mesh)
    with pytest.raises(RuntimeError, match="differentiable: True with sharded parameters"):
        SignSGD(model.parameters(), differentiable=True)
    with pytest.raises(RuntimeError, match="attach_to_backward: parameters are sharded"):
        attach_to_backward(model, {})
    p = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.ones(8, 8), mesh, [Partial()], run_check=False)
    with pytest.raises(RuntimeError, match=r"the gradient of a parameter of shape \(8, 8\).*Partial"):
        SignSGD([p]).step()


@on_ranks(2)
def test_state_of_whole_parameters_is_refused() -> None:
    for state_dtype in (None, torch.int8):
        model, whole = sharded(UNEVEN, mesh_of(2)), Holder(UNEVEN)
        ours, theirs = (SignSGD(m.parameters(), state_dtype=state_dtype) for m in (model, whole))
        for m in (model, whole):
            set_gradients(m.parameters(), 0)
        theirs.step()
        ours.load_state_dict(theirs.state_dict())
        with pytest.raises(RuntimeError, match="the exp_avg of a parameter"):
            ours.step()


@on_ranks(2)
def test_scales_of_other_shards_are_refused() -> None:
    model = sharded(UNEVEN, mesh_of(2))
    optimizer = SignSGD(model.parameters(), state_dtype=torch.int8)
    set_gradients(model.parameters(), 0)
    optimizer.step()
    state = optimizer.state[model.cut[0]]
    state["exp_avg_scale"] = DTensor.from_local(torch.zeros(2, 1), mesh_of(2), [Shard(0)], run_check=False)
    with pytest.raises(RuntimeError, match=r"has scales of shape \(4, 1\), not those of 2 shards: load it on as many"):
        optimizer.step()


def test_momentum_of_shards_is_refused_for_whole_parameters() -> None:
    """Two shards of 200 elements have two scales, as 400 elements have, and not the same ones."""
    for fused in (True, False):
        p = nn.Parameter(torch.ones(400))
        p.grad = torch.ones(400)
        optimizer = SignSGD([p], state_dtype=torch.int8, fused=fused)
        optimizer.step()
        optimizer.state[p]["exp_avg_scale"] = torch.ones(2, 1)
        with pytest.raises(RuntimeError, match=r"400 elements has 2 scales, \(2, 1\), .* of a whole parameter"):
            optimizer.step()


@on_ranks(2)
def test_a_replicated_parameter_is_whole_everywhere() -> None:
    for shape in ((), (5, 3)):
        for state_dtype in (None, torch.int8):
            q = nn.Parameter(torch.ones(shape))
            p = nn.Parameter(distribute_tensor(torch.ones(shape), mesh_of(2), [Replicate()]))
            ours, theirs = (HybridSignSGD([x], state_dtype=state_dtype, **RELATIVE) for x in (p, q))
            for step in range(3):
                set_gradients(iter([q]), step)
                p.grad = distribute_tensor(q.grad, mesh_of(2), [Replicate()])
                ours.step()
                theirs.step()
            assert torch.equal(local(p), q.detach())
            assert ours.calibrated_lr == theirs.calibrated_lr
