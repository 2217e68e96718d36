"""Byzantine workers: what each sends, alone and in a vote of real processes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gang import gang
from signstep import SignSGD
from signstep.distributed import CollectiveError, MajorityVote
from signstep.distributed.attacks import Attack, Collude, NotANumber, Random, SignFlip, Silent, Stale
from signstep.distributed.hooks import Entry


def entries_of(*gradients: Tensor | None) -> list[Entry]:
    return [
        Entry(f"p{i}", torch.zeros(4), torch.zeros(4) if g is None else g.clone(), g is not None)
        for i, g in enumerate(gradients)
    ]


@given(scale=st.floats(0.1, 100), values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9))
def test_sign_flip_multiplies(scale: float, values: list[float]) -> None:
    (sent,) = SignFlip(scale)(entries_of(torch.tensor(values)))
    assert torch.equal(sent.flat, torch.tensor(values).mul_(-scale))
    assert sent.present


@pytest.mark.parametrize("attack", [SignFlip(), Random(), Collude(), NotANumber(), Stale(1)])
def test_absent_parameters_stay_absent(attack: Attack) -> None:
    sent = attack(entries_of(torch.ones(4), None))
    assert [e.present for e in sent] == [True, False]
    assert torch.equal(sent[1].flat, torch.zeros(4))


def test_silent_is_absent_and_adds_nothing() -> None:
    sent = Silent()(entries_of(torch.ones(4), None))
    assert not any(e.present or e.flat.any() for e in sent)


def test_random_has_the_gradients_rms_and_not_its_direction() -> None:
    g = torch.linspace(-3, 3, 100_000)
    (sent,) = Random(scale=2)(entries_of(g))
    n, rms = g.numel(), float(g.square().mean().sqrt())
    assert float(sent.flat.square().mean().sqrt()) == pytest.approx(2 * rms, rel=5 / (2 * n) ** 0.5)
    assert abs(float(F.cosine_similarity(sent.flat, g, dim=0))) < 5 / n**0.5


def test_random_is_new_at_each_step_and_does_not_depend_on_the_order_of_buckets() -> None:
    one, other = Random(seed=5), Random(seed=5)
    first = one(entries_of(torch.ones(4), torch.ones(4)))
    second = one(entries_of(torch.ones(4), torch.ones(4)))
    assert not torch.equal(first[0].flat, second[0].flat)
    for expected in (first, second):
        entries = entries_of(torch.ones(4), torch.ones(4))
        other([entries[1]])
        other([entries[0]])
        assert all(torch.equal(a.flat, b.flat) for a, b in zip(entries, expected, strict=True))
    assert not torch.equal(Random(seed=6)(entries_of(torch.ones(4)))[0].flat, first[0].flat)


def test_colluders_push_the_same_way_in_all_steps() -> None:
    gradients = [torch.randn(1000) * k for k in range(1, 4)]
    sent = [Collude(seed=3)(entries_of(g))[0].flat for g in gradients]
    assert all(torch.equal(x.sign(), sent[0].sign()) for x in sent)
    assert abs(float(sent[0].sign().mean())) < 5 / 1000**0.5
    for g, x in zip(gradients, sent, strict=True):
        assert float(x.abs().mean()) == pytest.approx(float(g.square().mean().sqrt()), rel=1e-5)
    assert not torch.equal(Collude(seed=4)(entries_of(gradients[0]))[0].flat.sign(), sent[0].sign())


def test_colluders_that_know_the_honest_mean_send_its_negation() -> None:
    attack = Collude(scale=3)
    attack.honest = {"p0": torch.tensor([1.0, -2.0])}
    assert attack(entries_of(torch.ones(2)))[0].flat.tolist() == [-3.0, 6.0]


def test_stale_keeps_parameters_apart() -> None:
    attack = Stale(1)
    sent = [
        [int(e.flat[0]) for e in attack(entries_of(torch.full((1,), k), torch.full((1,), -k)))] for k in (1.0, 2.0, 3.0)
    ]
    assert sent == [[1, -1], [1, -1], [2, -2]]
    with pytest.raises(ValueError, match="Invalid steps"):
        Stale(0)


def _votes_of(attack: Attack | None, attacker: int, nonfinite: str) -> list[float]:
    """What `attacker` of the ranks makes of a vote on the gradients +1, +1, ..., -1 (the last rank's)."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    net = nn.Linear(3, 1, bias=False)
    model = DistributedDataParallel(net)
    vote = MajorityVote(model, SignSGD(model.parameters(), momentum=0.0), ties="abstain", nonfinite=nonfinite)
    if rank == attacker:
        vote.attack = attack
    sign = -1.0 if rank == size - 1 else 1.0
    model(sign * torch.ones(1, 3)).sum().backward()
    assert net.weight.grad is not None
    return net.weight.grad.flatten().tolist()


def test_attacks_in_real_processes() -> None:
    def votes(attack: Attack | None, attacker: int = 0, nonfinite: str = "abstain") -> list[float]:
        results = gang(4).run(_votes_of, attack, attacker, nonfinite)
        assert all(r == results[0] for r in results)
        return results[0]

    assert votes(None) == [1, 1, 1]
    assert votes(SignFlip()) == [0, 0, 0]  # two against two
    assert votes(SignFlip(), attacker=3) == [1, 1, 1]
    assert votes(Silent()) == [1, 1, 1]  # two against one
    assert votes(NotANumber()) == [1, 1, 1]
    assert votes(Stale(2)) == [1, 1, 1]


def _refused() -> str:
    try:
        _votes_of(NotANumber(), 2, "raise")
    except CollectiveError as error:
        return str(error)
    return ""


def test_not_a_number_raises_on_all_ranks() -> None:
    for message in gang(4).run(_refused):
        assert message.startswith("the gradient of weight on rank 2 is not finite")
