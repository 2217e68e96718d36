"""`LocalVote`: real processes take the steps of the simulation, and both those of a vote that is counted by hand."""

import copy
import math
import pickle
import statistics
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_cases import equal_everywhere
from hypothesis import given
from hypothesis import strategies as st
from local_cases import OPTIMIZERS, local_step, network, same
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gang import gang
from signstep.distributed import CollectiveError, LocalVote, SimulatedLocalVote, resplit
from signstep.distributed.attacks import Attack, Collude, SignFlip
from signstep.distributed.rounds import Schedule


def train_local(
    name: str, steps: int, every: int, options: dict[str, Any], seed: int | None = None
) -> dict[str, Tensor]:
    """The weights after some steps; every rank's first model is its own unless a seed is given."""
    rank = dist.get_rank()
    model = network(rank if seed is None else seed)
    optimizer = OPTIMIZERS[name](model.parameters())
    local = LocalVote(model, optimizer, every=every, **options)
    for step in range(steps):
        local_step(model, optimizer, rank, step)
        if local.step() and local.since == 0:
            assert equal_everywhere(model)
    local.hold_round()
    assert equal_everywhere(model)
    return {key: x.clone() for key, x in model.state_dict().items()}


def simulate(name: str, workers: int, steps: int, every: int, options: dict[str, Any]) -> nn.Module:
    models = [network() for _ in range(workers)]
    simulation = SimulatedLocalVote(models, every=every, **options)
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in models]
    for step in range(steps):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            local_step(model, optimizer, rank, step)
        simulation.step()
    simulation.hold_round()
    return models[0]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """As each rank of the gang has: the rounding of a sum depends on how it is shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "momentum": ("sgd", 3, {"outer_momentum": 0.9}),
    "a length of its own": ("signsgd", 3, {"scale": "none", "outer_lr": 1e-2, "outer_momentum": 0.0}),
    "dither": ("adamw", 4, {"dither": 1.0, "seed": 5}),
    "error feedback": ("lion", 3, {"error_feedback": True}),
    "ties abstain": ("adamw", 4, {"ties": "abstain", "outer_lr": 0.7}),
    "delayed": ("adamw", 3, {"delay": 3, "outer_lr": 0.7, "outer_momentum": 0.5}),
    "fragments": ("signsgd", 3, {"fragments": 3, "error_feedback": True}),
    "delayed fragments": ("lion", 4, {"delay": 7, "fragments": 3, "dither": 0.5, "ties": "abstain"}),
}


IN_MAKE_TEST = ("momentum", "error feedback", "delayed fragments")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case if case in IN_MAKE_TEST else pytest.param(case, marks=pytest.mark.long) for case in CASES]
)
def test_ranks_take_the_steps_of_the_simulation(case: str) -> None:
    name, workers, options = CASES[case]
    steps, every = 500, 10
    everyone = gang(workers).run(train_local, name, steps, every, options)
    model = simulate(name, workers, steps, every, options)
    for weights in everyone:
        assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())


@given(
    workers=st.integers(1, 5),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    scale=st.sampled_from(["tensor", "none"]),
    ties=st.sampled_from(["random", "abstain"]),
    rounds=st.integers(1, 4),
    seed=st.integers(0, 50),
)
def test_a_round_is_a_vote_on_the_way_back(
    workers: int, momentum: float, scale: str, ties: str, rounds: int, seed: int
) -> None:
    """Against the formula, one coordinate after another; a coordinate that is tied or unmoved is left to the coins."""
    generator = torch.Generator().manual_seed(seed)
    models = [nn.Linear(4, 3) for _ in range(workers)]
    simulation = SimulatedLocalVote(models, outer_lr=0.25, outer_momentum=momentum, scale=scale, ties=ties)
    momenta = [[torch.zeros(p.shape) for p in model.parameters()] for model in models]
    for _ in range(rounds):
        start = [p.detach().clone() for p in models[0].parameters()]
        for model in models:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn(p.shape, generator=generator))
        ways = [[s - p.detach() for s, p in zip(start, model.parameters(), strict=True)] for model in models]
        simulation.vote()
        for i, (before, after) in enumerate(zip(start, models[0].parameters(), strict=True)):
            length = statistics.median(float(own[i].abs().mean()) for own in ways) if scale == "tensor" else 1.0
            balance = torch.zeros(before.shape)
            for own, m in zip(ways, momenta, strict=True):
                m[i] = momentum * m[i] + (1 - momentum) * own[i]
                balance += m[i].sign()
            moved = before - after.detach()
            decided = balance != 0
            torch.testing.assert_close(moved[decided], (0.25 * length * balance.sign())[decided], rtol=1e-4, atol=1e-6)
            if ties == "abstain":
                assert (moved[~decided] == 0).all()
            else:
                torch.testing.assert_close(moved[~decided].abs(), torch.full_like(moved[~decided], 0.25 * length))
        assert all(same(models[0], other) for other in models[1:])


def test_workers_begin_where_the_first_does_and_hold_a_last_round() -> None:
    ends = gang(2).run(begin_and_end)
    assert ends == [True, True]


def begin_and_end() -> bool:
    model = network(dist.get_rank())
    local = LocalVote(model, torch.optim.SGD(model.parameters(), lr=0.1), every=100)
    assert equal_everywhere(model)
    local_step(model, local.optimizer, dist.get_rank(), 0)
    assert not local.step()
    assert not equal_everywhere(model)
    local.hold_round()
    assert local.since == 0
    return equal_everywhere(model)


def stop_and_go_on(
    name: str, stop: int, steps: int, every: int, options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> bool:
    rank = dist.get_rank()

    def begin() -> tuple[nn.Module, torch.optim.Optimizer, LocalVote]:
        model = network().to(dtype)
        optimizer = OPTIMIZERS[name](model.parameters())
        return model, optimizer, LocalVote(model, optimizer, every=every, **options)

    model, optimizer, local = begin()
    for step in range(steps):
        local_step(model, optimizer, rank, step)
        local.step()
    whole = model.state_dict()
    model, optimizer, local = begin()
    for step in range(stop):
        local_step(model, optimizer, rank, step)
        local.step()
    saved = pickle.dumps([x.state_dict() for x in (model, optimizer, local)])
    model, optimizer, local = begin()
    for part, state in zip((model, optimizer, local), pickle.loads(saved), strict=True):
        part.load_state_dict(state)
    for step in range(stop, steps):
        local_step(model, optimizer, rank, step)
        local.step()
    return all(torch.equal(x, whole[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("stop", [10, 13])
def test_a_run_that_was_stopped_ends_with_the_same_bits(stop: int) -> None:
    """After a round, and between two."""
    options = {"dither": 0.5, "error_feedback": True}
    assert gang(2).run(stop_and_go_on, "signsgd", stop, 20, 5, options) == [True, True]
    assert gang(2).run(stop_and_go_on, "sgd", stop, 20, 5, {}, torch.bfloat16) == [True, True]


@pytest.mark.parametrize("stop", [10, 11, 13])
def test_a_run_that_was_stopped_with_a_vote_on_its_way_ends_with_the_same_bits(stop: int) -> None:
    options = {"dither": 0.5, "error_feedback": True, "delay": 3, "fragments": 2}
    assert gang(2).run(stop_and_go_on, "adamw", stop, 22, 5, options) == [True, True]


@given(every=st.integers(1, 12), delay=st.integers(0, 11), fragments=st.integers(1, 12), steps=st.integers(1, 60))
def test_every_fragment_departs_once_in_a_round_and_arrives_later(
    every: int, delay: int, fragments: int, steps: int
) -> None:
    if delay >= every or fragments > every:
        with pytest.raises(ValueError, match=f"as every is {every}"):
            Schedule(every, delay, fragments)
        return
    schedule = Schedule(every, delay, fragments)
    departures: dict[int, list[int]] = {f: [] for f in range(fragments)}
    arrivals: dict[int, list[int]] = {f: [] for f in range(fragments)}
    for step in range(1, steps + 1):
        arriving, departing = schedule.step()
        for f in arriving:
            arrivals[f].append(step)
        for f in departing:
            departures[f].append(step)
    for f in range(fragments):
        first = (f + 1) * every // fragments
        assert departures[f] == list(range(first, steps + 1, every))
        assert arrivals[f] == ([d + delay for d in departures[f] if d + delay <= steps] if delay else [])
    away, rest = schedule.end()
    assert sorted(away) == [
        f for f in range(fragments) if delay and departures[f] and departures[f][-1] + delay > steps
    ]
    assert rest == [f for f in range(fragments) if not departures[f] or departures[f][-1] < steps]


def test_no_step_is_lost_or_counted_twice_by_a_delay() -> None:
    """With one worker, no momentum and scale 1 / |d| the point goes as far as the ways: the sum of all steps."""
    model = nn.Linear(1, 1, bias=False)
    start = float(model.weight.detach())
    simulation = SimulatedLocalVote([model], every=5, delay=2, outer_momentum=0.0)
    steps = torch.randn(23, generator=torch.Generator().manual_seed(0))
    for step in steps:
        with torch.no_grad():
            model.weight += float(step)
        simulation.step()
    simulation.hold_round()
    assert math.isclose(float(model.weight.detach()), start + float(steps.sum()), rel_tol=1e-5, abs_tol=1e-5)


def test_late_votes_cannot_be_split_anew() -> None:
    state = {"rank": 0, "world_size": 1, "steps": [1], "state": {}, "away": {0: {}}}
    with pytest.raises(ValueError, match="call hold_round"):
        resplit([state], 2)


def test_buffers_that_are_the_same_everywhere_stay_as_they_are() -> None:
    models = [network() for _ in range(7)]
    simulation = SimulatedLocalVote(models)
    for _ in range(10):
        simulation.vote()
    assert all(torch.equal(model.constant, network().constant) for model in models)


def test_workers_go_back_if_none_has_finite_weights() -> None:
    models = [network() for _ in range(3)]
    simulation = SimulatedLocalVote(models, nonfinite="abstain")
    for model in models:
        torch.nn.init.constant_(model.linear.weight, math.nan)  # type: ignore[arg-type, union-attr]
    simulation.vote()
    begun = list(network().parameters())
    for model in models:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), begun, strict=True))


def test_no_vote_is_held_on_no_step() -> None:
    assert gang(2).run(hold_twice) == [True, True]


def hold_twice() -> bool:
    model = network()
    local = LocalVote(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1, scale="none")
    local_step(model, local.optimizer, dist.get_rank(), 0)
    assert local.step()
    after = copy.deepcopy(model)
    local.hold_round()
    return same(model, after)


def test_a_worker_whose_weights_are_not_finite_abstains_and_comes_back() -> None:
    good, bad = gang(2).run(break_one, "abstain")
    assert good == bad  # the point that both go on from
    assert math.isfinite(good)


def break_one(nonfinite: str) -> float:
    rank = dist.get_rank()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    local = LocalVote(model, optimizer, every=2, nonfinite=nonfinite)
    for step in range(4):
        local_step(model, optimizer, rank, step)
        if rank == 1 and step == 1:
            with torch.no_grad():
                model.linear.weight[0, 0] = torch.nan  # type: ignore[index, union-attr]
                model.norm.running_mean[1] = torch.inf  # type: ignore[index, union-attr]
            optimizer.state[model.linear.weight]["exp_avg"].fill_(torch.nan)  # type: ignore[index, union-attr]
        local.step()
    assert equal_everywhere(model)
    return float(sum(p.double().sum() for p in model.parameters()))


def refuse() -> str:
    try:
        break_one("raise")
    except CollectiveError as error:
        return str(error)
    return "nothing"


def test_weights_that_are_not_finite_are_named_on_every_rank() -> None:
    for message in gang(2).run(refuse):
        assert (
            "the change of linear.weight on rank 1 is not finite: lower the learning rate, or pass nonfinite" in message
        )


def other_numbers(steps: int) -> list[dict[str, Any]]:
    rank = dist.get_rank()
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    local = LocalVote(model, optimizer, every=2)
    for step in range(steps):
        local_step(model, optimizer, rank, step)
        local.step()
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, (model.state_dict(), local.state_dict()))
    return states


def go_on_with(states: list[Any]) -> bool:
    rank = dist.get_rank()
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    local = LocalVote(model, optimizer, every=2)
    model.load_state_dict(states[rank % len(states)][0])
    local.load_state_dict(resplit([state for _, state in states], dist.get_world_size())[rank])
    while not local.step():
        local_step(model, optimizer, rank, 0)
    return equal_everywhere(model)


@pytest.mark.parametrize("steps", [4, 5])
def test_a_run_goes_on_with_another_number_of_workers(steps: int) -> None:
    """After a round, and between two, where every rank has weights of its own."""
    assert gang(3).run(go_on_with, gang(2).run(other_numbers, steps)[0]) == [True] * 3


def machines() -> list[bool]:
    """Two machines of two ranks: DDP inside, votes between."""
    rank = dist.get_rank()
    inside = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    between = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    net = network()
    model = DistributedDataParallel(net, process_group=inside[rank // 2], find_unused_parameters=True)
    optimizer = OPTIMIZERS["signsgd"](model.parameters())
    local = LocalVote(model, optimizer, every=3, group=between[rank % 2])
    for step in range(9):
        local_step(model, optimizer, rank, step)
        local.step()
    parameters = torch.cat([p.detach().flatten() for p in net.parameters()])
    everyone = [torch.empty_like(parameters) for _ in range(4)]
    dist.all_gather(everyone, parameters)
    return [torch.equal(parameters, other) for other in everyone]


def test_machines_vote_and_their_ranks_average() -> None:
    assert gang(4).run(machines) == [[True] * 4] * 4


def test_low_precision_weights_share_a_point_in_float32() -> None:
    models = [nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(2)]
    simulation = SimulatedLocalVote(models, scale="none", outer_lr=2.0**-12, outer_momentum=0.0)
    torch.nn.init.ones_(models[0].bias)
    simulation.rounds.set_out()
    models[1].load_state_dict(models[0].state_dict())
    for _ in range(64):  # each step is lost in bfloat16, where 1 - 2^-12 is 1
        with torch.no_grad():
            for model in models:
                model.bias -= 2.0**-6
        simulation.vote()
    torch.testing.assert_close(models[0].bias, torch.full((8,), 1 - 2.0**-6, dtype=torch.bfloat16))


def test_local_votes_learn() -> None:
    """Four workers, each with digits of its own, end near the accuracy of one that has all."""
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    x, y = images.float() / 16, labels
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)) for _ in range(4)]
    simulation = SimulatedLocalVote(models, outer_momentum=0.5)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in models]
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    for _ in range(20):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for batch in train[rank::4].split(35):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        simulation.vote()
    accuracy = (models[0](x[test]).argmax(1) == y[test]).float().mean()
    assert accuracy > 0.9


def test_options_are_checked() -> None:
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for options, words in (
        ({"scale": "layer"}, "Invalid scale: 'layer', expected one of 'tensor', 'none'"),
        ({"ties": "never"}, "Invalid ties: 'never'"),
        ({"nonfinite": "skip"}, "Invalid nonfinite"),
        ({"outer_lr": 0.0}, "Invalid outer_lr: 0.0, expected a finite outer_lr > 0"),
        ({"outer_momentum": 1.0}, "Invalid outer_momentum"),
        ({"dither": -1.0}, "Invalid dither"),
    ):
        with pytest.raises(ValueError, match=words):
            SimulatedLocalVote(models, **options)


def test_states_of_others_are_refused() -> None:
    assert all(gang(2).run(load_wrong_states))


def load_wrong_states() -> bool:
    model = network()
    local = LocalVote(model, OPTIMIZERS["sgd"](model.parameters()), every=3)
    local_step(model, local.optimizer, 0, 0)
    local.step()
    state = local.state_dict()
    short = copy.deepcopy(state)
    short["start"]["linear.bias"] = torch.zeros(1)
    for wrong, words in (
        (short, "other parameters"),
        (state | {"rank": 5}, "of rank 5"),
        (state | {"world_size": 7}, "saved by 7 workers"),
        (state | {"method": "DiLoCo"}, "no state of LocalVote, but of DiLoCo"),
        (state | {"schedule": state["schedule"] | {"delay": 2}}, "saved with delay=2, and here it is 0"),
        (state | {"schedule": state["schedule"] | {"fragments": 2}}, "saved with fragments=2, and here it is 1"),
    ):
        with pytest.raises(ValueError, match=words):
            local.load_state_dict(wrong)
    with pytest.raises(ValueError, match="Invalid every: 0"):
        LocalVote(model, local.optimizer, every=0)
    return True


class _Huge(Attack):
    """Sends numbers without a bound, and some that are none."""

    def corrupt(self, name: str, gradient: Tensor) -> None:
        gradient.fill_(1e30 if gradient.dim() and gradient.numel() % 2 else -3e38)


@given(workers=st.integers(3, 9), seed=st.integers(0, 50), attack=st.sampled_from([_Huge, SignFlip, Collude]))
def test_fewer_than_half_of_the_workers_cannot_lengthen_the_step(workers: int, seed: int, attack: type[Attack]) -> None:
    generator = torch.Generator().manual_seed(seed)
    models = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(workers)]
    attackers = range((workers - 1) // 2)
    simulation = SimulatedLocalVote(models, attacks={rank: attack() for rank in attackers}, outer_momentum=0.0)
    start = [p.detach().clone() for p in models[0].parameters()]
    for rank, model in enumerate(models):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
            for b in model.buffers():
                if b.is_floating_point() and rank in attackers:
                    b.fill_(math.nan)
    honest = models[len(attackers) :]
    ways = [
        max(float((s - p.detach()).abs().mean()) for p in column)
        for s, *column in zip(start, *(model.parameters() for model in honest), strict=True)
    ]
    simulation.vote()
    for before, after, longest in zip(start, models[0].parameters(), ways, strict=True):
        assert float((before - after.detach()).abs().max()) <= longest * 1.0001
    assert all(x.isfinite().all() for x in models[0].state_dict().values())


def test_attackers_of_a_simulation_are_workers() -> None:
    models = [nn.Linear(2, 2) for _ in range(3)]
    with pytest.raises(ValueError, match="an attack on rank 3: ranks are 0 to 2"):
        SimulatedLocalVote(models, attacks={3: SignFlip()})


@pytest.mark.parametrize(("delay", "fragments"), [(0, 1), (0, 2), (1, 2), (2, 1)])
def test_a_worker_that_is_lost_comes_back_with_all_its_weights(delay: int, fragments: int) -> None:
    models = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(3)]
    simulation = SimulatedLocalVote(models, every=4, delay=delay, fragments=fragments, nonfinite="abstain")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    generator = torch.Generator().manual_seed(0)
    finite = []
    for step in range(16):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            x = torch.randn(5, 4, generator=generator)
            if rank == 1 and step == 5:
                x[0, 0] = math.nan
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        simulation.step()
        finite.append(all(p.isfinite().all() for p in models[1].parameters()))
    assert finite[5] == ((delay, fragments) == (0, 2))  # there a fragment departs after this very step
    assert all(finite[5 + 4 + delay :])


def test_buffers_that_are_not_numbers_are_as_if_nothing_was_said() -> None:
    models = [nn.BatchNorm1d(3).double() for _ in range(2)]
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    models[0].running_mean.copy_(third)  # type: ignore[union-attr]
    mask = torch.tensor([0.0, -math.inf])
    for model in models:
        model.register_buffer("mask", mask.clone())
    simulation = SimulatedLocalVote(models, nonfinite="abstain")
    models[1].running_var.fill_(math.nan)  # type: ignore[union-attr]
    simulation.vote()
    for model in models:
        assert torch.equal(model.running_mean, third)  # type: ignore[arg-type]  # in float64
        assert torch.equal(model.running_var, torch.ones(3, dtype=torch.float64))  # type: ignore[arg-type]
        assert torch.equal(model.mask, mask)  # type: ignore[arg-type]


def test_a_layer_that_is_unfrozen_later_is_refused() -> None:
    models = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)]
    for model in models:
        model[0].requires_grad_(False)
    simulation = SimulatedLocalVote(models)
    simulation.vote()
    models[0][0].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"0\.weight has been unfrozen since its rounds began"):
        simulation.vote()
    with pytest.raises(ValueError, match="at least one model, with a parameter"):
        SimulatedLocalVote([nn.BatchNorm1d(2, affine=False)])


def end_a_round_early() -> str:
    model = network()
    local = LocalVote(model, OPTIMIZERS["sgd"](model.parameters()), every=3)
    try:
        for step in range(3 - dist.get_rank()):
            local_step(model, local.optimizer, 0, step)
            local.step()
        local.hold_round()
    except CollectiveError as error:
        return str(error)
    finally:
        local.close()
    return "no error"


def test_workers_that_take_unequally_many_steps_are_told() -> None:
    for message in gang(2).run(end_a_round_early):
        assert "the workers end a round after 3, 2 steps" in message


def test_weights_that_are_loaded_before_the_first_step_are_where_all_set_out() -> None:
    assert all(gang(2).run(load_and_begin))


def load_and_begin() -> bool:
    model = network()
    local = LocalVote(model, OPTIMIZERS["sgd"](model.parameters()), every=1, scale="none", outer_lr=1e-3)
    trained = network(7)
    model.load_state_dict(trained.state_dict())
    local_step(model, local.optimizer, dist.get_rank(), 0)
    local.step()
    local.close()
    moved = [(p - q).abs().max() for p, q in zip(model.parameters(), trained.parameters(), strict=True)]
    return max(map(float, moved)) < 1.01e-3


def test_a_model_that_averages_over_all_ranks_is_refused() -> None:
    for message in gang(2).run(wrap_over_all):
        assert (
            "LocalVote: this DistributedDataParallel averages gradients between ranks that agree in rounds" in message
        )


def wrap_over_all() -> str:
    model = DistributedDataParallel(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="give the module itself") as raised:
        LocalVote(model, torch.optim.SGD(model.parameters(), lr=0.1), every=2)
    return str(raised.value)
