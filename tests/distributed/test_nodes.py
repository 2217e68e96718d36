"""Nodes of several ranks that vote as one worker: the simulation's steps, bytes between nodes, and what is saved."""

import copy
import io
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_cases import SMALL_BUCKETS, Branches, batch_of, equal_everywhere, share, small_net
from hypothesis import given
from hypothesis import strategies as st
from test_simulation import OPTIMIZERS, Coarse, images, network
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from gang import gang, on_ranks
from signstep import HybridSignSGD, SignSGD
from signstep.distributed import CollectiveError, MajorityVote, SimulatedVote, resplit
from signstep.distributed import collectives as collectives_module
from signstep.distributed.nodes import owners
from signstep.distributed.simulation import Gradients, per_worker_gradients

STEPS = 12


def columns(nodes: int, *, apart: bool = False) -> dist.ProcessGroup:
    """The ranks that vote with this one; nodes are neighbouring ranks, or those `apart`."""
    if apart:  # the mesh's second dimension: ranks 0 and 2 are a node
        mesh = init_device_mesh("cpu", (dist.get_world_size() // nodes, nodes), mesh_dim_names=("shard", "replicate"))
    else:
        mesh = init_device_mesh("cpu", (nodes, dist.get_world_size() // nodes), mesh_dim_names=("replicate", "shard"))
    return mesh["replicate"].get_group()


def node_of(rank: int, nodes: int, size: int, *, apart: bool = False) -> int:
    return rank % nodes if apart else rank // (size // nodes)


def mean_of(own: list[Gradients]) -> Gradients:
    """The mean gradient of a node, to which a rank without one adds 0."""
    out: dict[str, Tensor | None] = {}
    for name in dict.fromkeys(name for each in own for name in each):
        present = [g for each in own if (g := each.get(name)) is not None]
        out[name] = sum(g / len(own) for g in present) if present else None  # type: ignore[assignment]
    return out


def _follow(
    nodes: int, optimizer: str, options: dict[str, Any], steps: int, apart: bool, least_part: int
) -> dict[str, int]:
    """Train for some steps beside the simulation, whose workers get the mean of each node's gradients."""
    size = dist.get_world_size()
    net = network()
    twin = copy.deepcopy(net)
    ours, theirs = OPTIMIZERS[optimizer](net), OPTIMIZERS[optimizer](twin)
    model = DistributedDataParallel(net, find_unused_parameters=True, bucket_cap_mb=0.0005)
    vote = MajorityVote(model, ours, replicate_group=columns(nodes, apart=apart), **options)
    sim = SimulatedVote(twin, theirs, nodes, **options)
    # What SGD averages over four ranks, it adds up in an order of its own.
    coarse = Coarse() if isinstance(ours, HybridSignSGD) else None
    vote.attack = coarse
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    with mock.patch("signstep.distributed.vote.LEAST_PART", least_part):
        for step in range(steps):
            batches = [images(rank, step) for rank in range(size)]
            everyone = per_worker_gradients(
                twin, F.cross_entropy, *(torch.cat(c) for c in zip(*batches, strict=True)), size, vectorize=False
            )
            for name, g in ((n, g) for own in everyone for n, g in own.items() if g is not None and coarse):
                coarse.corrupt(name, g)  # type: ignore[union-attr]
            places = [node_of(rank, nodes, size, apart=apart) for rank in range(size)]
            theirs.zero_grad()
            sim.vote([mean_of([g for g, at in zip(everyone, places, strict=True) if at == n]) for n in range(nodes)])
            theirs.step()
            ours.zero_grad()
            F.cross_entropy(model(batches[dist.get_rank()][0]), batches[dist.get_rank()][1]).backward()
            ours.step()
            for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
                assert torch.equal(p, q), (step, name)
    moved = [name for name, p in net.named_parameters() if not torch.equal(p, start[name])]
    assert len(moved) == (2 if optimizer == "some" else len(start))
    worker = sim.workers[node_of(dist.get_rank(), nodes, size, apart=apart)]
    assert vote.worker.steps == worker.steps
    for name, kept in vote.state_dict()["state"].items():
        for key, x in kept.items():
            assert torch.equal(x, worker.state[name][key]), (name, key)
    kept = {name: len(state) for name, state in vote.state_dict()["state"].items() if state}
    vote.close()
    return kept


CASES: list[Any] = [
    (2, "clean", {}),
    (2, "dithered", {"ties": "abstain", "dither_workers": "scaled"}),
    (2, "relative", {}),
    (2, "int8", {}),
    (2, "lion", {"error_feedback": True}),
    (2, "some", {}),
    (2, "hybrid", {}),
    (2, "momentum", {}),
    (1, "clean", {}),
    (4, "clean", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "optimizer", "options"), CASES)
def test_a_node_of_two_is_a_worker_with_their_mean(nodes: int, optimizer: str, options: dict[str, Any]) -> None:
    kept = gang(4).run(_follow, nodes, optimizer, options, STEPS, False, 1 << 20)
    if optimizer in ("clean", "relative"):
        every_rank = [name for own in kept for name in own]
        assert len(every_rank) == nodes * len(set(every_rank)) == nodes * len(list(network().parameters()))
        if nodes < 4:
            assert kept[0].keys() != kept[1].keys()


@pytest.mark.parametrize("optimizer", ["dithered", "hybrid"])
def test_nodes_of_ranks_apart_and_parts_in_turns(optimizer: str) -> None:
    gang(4).run(_follow, 2, optimizer, {}, STEPS, True, 1)


@on_ranks(3)
def test_nodes_of_one_rank_are_the_vote_without_nodes() -> None:
    nets = small_net("linear"), small_net("linear")
    models = [DistributedDataParallel(net, bucket_cap_mb=0.001) for net in nets]
    optimizers = [SignSGD(net.parameters(), dither=1e-4) for net in nets]
    votes = [
        MajorityVote(models[0], optimizers[0], ties="abstain"),
        MajorityVote(models[1], optimizers[1], ties="abstain", replicate_group=columns(3)),
    ]
    for step in range(4):
        x, y = batch_of("linear", step)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    plain, nodes = (vote.state_dict() for vote in votes)
    assert plain.keys() == nodes.keys()
    assert all(torch.equal(s["exp_avg"], nodes["state"][n]["exp_avg"]) for n, s in plain["state"].items())
    votes[1].load_state_dict(plain)


def _bytes_sent(nodes: int) -> tuple[int, int]:
    """In one step, to other nodes and inside the own."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(200, 200) for _ in range(4)))
    model = DistributedDataParallel(net)
    optimizer = SignSGD(net.parameters())
    vote = MajorityVote(model, optimizer, replicate_group=columns(nodes))
    assert vote._node is not None
    sent = {vote._node.voters: 0, vote._node.group: 0}
    send = dist.all_to_all_single

    def count(out: Tensor, x: Tensor, received: Any = None, parts: Any = None, *, group: Any, async_op: bool) -> Any:
        own = dist.get_rank(group)
        elsewhere = x.numel() - (parts[own] if parts else x.numel() // dist.get_world_size(group))
        sent[group] += elsewhere * x.element_size()
        return send(out, x, received, parts, group=group, async_op=async_op)

    with (
        mock.patch.object(collectives_module.dist, "all_to_all_single", count),
        mock.patch.object(dist, "all_reduce", side_effect=AssertionError("of float gradients")),
    ):
        model(torch.randn(2, 200)).sum().backward()
    return sent[vote._node.voters], sent[vote._node.group]


@pytest.mark.parametrize(("size", "nodes"), [(4, 2), (3, 3), (4, 1)])
def test_bytes_between_nodes_and_inside(size: int, nodes: int) -> None:
    sent = gang(size).run(_bytes_sent, nodes)
    n, local = 4 * 200 * 201, size // nodes
    between, inside = (sum(column) / nodes for column in zip(*sent, strict=True))
    expected = n * (nodes - 1) / (4 * nodes)
    # Bits of a parameter fill words of 64, and each has a flag.
    assert expected <= between <= expected + 8 * 200
    # Per node: of its ranks' gradients what others own, and every owner's bits to all others.
    expected = 4 * n * (local - 1) + n / 8 * (local - 1) if local > 1 else 0
    assert expected <= inside <= expected + 8 * 200 * (local > 1)
    if local == 2:
        assert sent[0][0] == pytest.approx(sent[1][0], rel=0.01)


@on_ranks(4)
def test_who_has_no_gradient_abstains_and_strangers_are_averaged() -> None:
    """Rank 3 alone uses branch 1, and nobody branch 2; branch 0 is not the optimizer's."""
    net = Branches()
    before = [b.weight.detach().clone() for b in net.branches]
    model = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = SignSGD([*net.branches[1].parameters(), *net.branches[2].parameters()], lr=0.5)
    vote = MajorityVote(model, optimizer, replicate_group=columns(2))
    x = torch.tensor([[1.0, -1.0, 2.0, -3.0]])
    model(x, int(dist.get_rank() == 3)).backward()
    optimizer.step()
    assert net.branches[0].weight.grad is not None
    assert torch.equal(net.branches[0].weight.grad, 0.75 * x)
    assert torch.equal(net.branches[1].weight, before[1] - 0.5 * x.sign())
    assert torch.equal(net.branches[2].weight, before[2])
    momenta = share([kept["exp_avg"] for kept in vote.state_dict()["state"].values() if "exp_avg" in kept])
    found = [m for own in momenta[2:] for m in own]
    assert not any(momenta[:2])  # the first node has abstained
    assert len(found) == 1
    torch.testing.assert_close(found[0], 0.1 * x[0] / 2)


@pytest.mark.parametrize("switch_step", [4, 100])
@on_ranks(4)
def test_ranks_and_whole_nodes_that_have_joined(switch_step: int) -> None:
    """Ranks 0 and 1, a node, have 2 and 4 batches, the other node 3 and 6."""
    net = small_net("linear")
    twin = copy.deepcopy(net)
    model = DistributedDataParallel(net, **SMALL_BUCKETS)
    ours, theirs = (HybridSignSGD(n.parameters(), lr=3e-3, switch_step=switch_step, dither=1e-4) for n in (net, twin))
    MajorityVote(model, ours, replicate_group=columns(2)).attack = Coarse()
    sim = SimulatedVote(twin, theirs, 2)
    for step in range(6):
        everyone: list[Gradients] = []
        for rank, batches in enumerate((2, 4, 3, 6)):
            with mock.patch.object(dist, "get_rank", return_value=rank):
                x, y = batch_of("linear", step)
            gradients = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
            names = [name for name, _ in twin.named_parameters()]
            everyone.append(dict(zip(names, gradients, strict=True)) if step < batches else {})
            for g in everyone[-1].values():
                Coarse().corrupt("", g)  # type: ignore[arg-type]
        theirs.zero_grad()
        sim.vote([mean_of(everyone[:2]), mean_of(everyone[2:])])
        theirs.step()
    with model.join():
        for step in range((2, 4, 3, 6)[dist.get_rank()]):
            x, y = batch_of("linear", step)
            ours.zero_grad()
            F.cross_entropy(model(x), y).backward()
            ours.step()
    assert ours.phase == theirs.phase
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def _poisoned(nonfinite: str) -> tuple[str, list[list[float]], bool]:
    """Rank 2's gradient of the second layer is infinite, and so is that of the second node."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False))
    model = DistributedDataParallel(net, bucket_cap_mb=0.00001)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0) if nonfinite == "skip" else None
    optimizer = SignSGD(model.parameters(), lr=1.0)
    vote = MajorityVote(model, optimizer, nonfinite=nonfinite, grad_scaler=scaler, replicate_group=columns(2))
    if dist.get_rank() == 2:
        net[1].weight.register_hook(lambda g: g * torch.tensor([1.0, torch.inf, 1.0]))
    said = ""
    try:
        model(torch.ones(1, 3)).sum().backward()
    except CollectiveError as error:
        said = str(error)
    grads = [p.grad.flatten().tolist() for p in net.parameters() if p.grad is not None]
    return said, grads, "1.weight" in vote.worker.state


def test_a_gradient_that_is_not_finite_is_known_to_all_ranks() -> None:
    raised = gang(4).run(_poisoned, "raise")
    assert [said for said, *_ in raised] == [raised[0][0]] * 4
    assert raised[0][0].startswith("the gradient of 1.weight on rank 1 is not finite: ")
    abstained = gang(4).run(_poisoned, "abstain")
    assert [answer[:2] for answer in abstained] == [("", abstained[0][1])] * 4
    assert {abs(x) for x in abstained[0][1][1]} == {1.0}
    assert sum(kept for *_, kept in abstained) == 1  # of the first node, the owner
    for said, grads, _ in gang(4).run(_poisoned, "skip"):
        assert said == ""
        assert all(x != x for x in grads[1])


def _train(
    nodes: int | None, first: int, steps: int, saved: list[bytes] | None, states: list[dict[str, Any]] | None
) -> Any:
    """Steps with error feedback; from what ranks have saved, or from the first's model and states of votes."""
    net = small_net("linear")
    model = DistributedDataParallel(net, bucket_cap_mb=0.001)
    optimizer = SignSGD(model.parameters(), dither=1e-4)
    group = None if nodes is None else columns(nodes)
    vote = MajorityVote(model, optimizer, error_feedback=True, replicate_group=group)
    if saved is not None:
        rank = dist.get_rank()
        mine = torch.load(io.BytesIO(saved[rank if states is None else 0]), weights_only=True)
        net.load_state_dict(mine["net"])
        optimizer.load_state_dict(mine["optimizer"])
        vote.load_state_dict(mine["vote"] if states is None else states[vote.worker.rank])
    for step in range(first, steps):
        x, y = batch_of("linear", step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert equal_everywhere(net)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "vote": vote.state_dict()}, file)
    return file.getvalue()


def loaded(files: list[bytes]) -> list[dict[str, Any]]:
    return [torch.load(io.BytesIO(file), weights_only=True) for file in files]


def momenta(states: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The mean over workers, from the states of ranks that have a part of one each."""
    total: dict[str, Tensor] = {}
    for name, kept in ((n, k) for state in states for n, k in state["state"].items()):
        total[name] = total.get(name, torch.zeros(())) + kept["exp_avg"] / states[0]["world_size"]
    return total


def test_a_resumed_run_is_the_uninterrupted_one_and_other_ranks_states_are_refused() -> None:
    half = gang(4).run(_train, 2, 0, 4, None, None)
    whole = gang(4).run(_train, 2, 0, 8, None, None)
    again = gang(4).run(_train, 2, 4, 8, half, None)
    assert [set(state["vote"]["state"]) for state in loaded(half)[:2]] == [
        set(state["vote"]["state"]) for state in loaded(half)[2:]
    ]
    for one, other in zip(loaded(whole), loaded(again), strict=True):
        assert all(torch.equal(x, other["net"][name]) for name, x in one["net"].items())
        for name, kept in one["vote"]["state"].items():
            assert all(torch.equal(x, other["vote"]["state"][name][key]) for key, x in kept.items())
    said = gang(4).run(_load, half[1])
    assert said[0].startswith("this is the vote's state of rank 1 of the 2 of a node, and this is rank 0 of 2: gather")
    assert said[1] == ""
    assert "state of rank 0, and this is rank 1" in said[3]
    assert "2 workers and there are 4 now" in gang(4).run(_load, half[1], 4)[0]
    assert "this is rank 0 of 1" in gang(2).run(_load, half[0], 2)[0]


def _load(saved: bytes, nodes: int = 2) -> str:
    model = DistributedDataParallel(small_net("linear"))
    vote = MajorityVote(model, SignSGD(model.parameters()), error_feedback=True, replicate_group=columns(nodes))
    try:
        vote.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True)["vote"])
    except ValueError as error:
        return str(error)
    return ""


def test_nodes_are_split_anew() -> None:
    half = gang(4).run(_train, 2, 0, 4, None, None)
    states = [state["vote"] for state in loaded(half)]
    with pytest.raises(ValueError, match=r"each of the 2 nodes' 2 ranks once, got those of \[0, 0, 1\]"):
        resplit(states[:3], 2)
    expected = momenta(states)
    for size, nodes, workers in ((4, 2, 2), (4, None, 4), (3, None, 3), (2, 1, 1)):
        new = resplit(states, workers)
        assert len(new) == workers
        ends = loaded(gang(size).run(_train, nodes, 4, 4, half, new))
        for name, m in momenta([end["vote"] for end in ends]).items():
            torch.testing.assert_close(m, expected[name])
    # And a state without nodes goes to all ranks of a node.
    plain = gang(2).run(_train, None, 0, 4, None, None)
    states = [state["vote"] for state in loaded(plain)]
    ends = loaded(gang(4).run(_train, 2, 4, 4, plain, states))
    for name, m in momenta([end["vote"] for end in ends]).items():
        assert torch.equal(m, momenta(states)[name])


@on_ranks(4)
def test_groups_that_are_not_columns_are_refused_on_all_ranks() -> None:
    model = DistributedDataParallel(small_net("linear"))
    three, one = dist.new_group([0, 1, 2]), dist.new_group([3])
    rank = dist.get_rank()
    for group, said in ((three if rank < 3 else one, "[0, 1, 2] and [3]"), (three, "[] and [0, 1, 2]")):
        with pytest.raises(ValueError, match="expected groups of the same size that have each rank once") as error:
            MajorityVote(model, SignSGD(model.parameters()), replicate_group=group)
        assert said in str(error.value)


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 9))
def test_owners_have_about_as_much_each(sizes: list[int], ranks: int) -> None:
    named = {f"p{i}": size for i, size in enumerate(sizes)}
    shared = owners(named, ranks)
    assert shared.keys() == named.keys()
    loads = [sum(named[name] for name, owner in shared.items() if owner == rank) for rank in range(ranks)]
    assert max(loads) <= sum(sizes) / ranks + max(sizes, default=0)
    # No rank has more than another without its last and smallest.
    for rank in range(ranks):
        own = [named[name] for name, owner in shared.items() if owner == rank]
        assert not own or loads[rank] - min(own) <= min(loads)
