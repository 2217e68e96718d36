"""Compressed means without DDP, and the exact one."""

import io

import pytest
import torch
import torch.distributed as dist
from compressor_cases import SHAPES, Given, gradients_of, hooked, means
from torch import Tensor, nn

from bytes_sent import bytes_sent
from gang import gang, on_ranks
from signstep.distributed import CollectiveError, CompressedMean, Compressor, EFSign, Entry, Exact
from signstep.distributed.compressors import COMPRESSORS
from signstep.distributed.worker import in_memory_order


def of(compressor: Compressor) -> CompressedMean:
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    return CompressedMean(dict(Given(SHAPES).named_parameters()), group, compressor, seed=5)


def averaged(mean: CompressedMean, tensors: dict[str, Tensor], parts: int = 1) -> dict[str, Tensor]:
    """The mean of tensors like `SHAPES`, in several calls."""
    entries = []
    for name, p in mean.params.items():
        held = torch.empty_like(p).copy_(tensors[name])
        entries.append(Entry(name, p, in_memory_order(held), True))
    for part in range(parts):
        mean.average(entries[part::parts])
    mean.step += 1
    return {
        e.name: in_memory_order(torch.empty_like(e.param)).copy_(e.flat).as_strided(e.param.shape, e.param.stride())
        for e in entries
    }


@on_ranks(2)
def test_a_mean_does_not_depend_on_ddp_nor_on_its_parts() -> None:
    rank = dist.get_rank()
    for offer in COMPRESSORS.values():
        model, hook = hooked(offer.make())
        whole, parted = of(offer.make()), of(offer.make())
        for step in range(3):
            by_hook = means(model, gradients_of(step, rank))
            for mean, parts in ((whole, 1), (parted, 3)):
                found = averaged(mean, gradients_of(step, rank), parts)
                assert all(torch.equal(found[name], by_hook[name]) for name in SHAPES)
        assert hook.state_dict().keys() == whole.state_dict().keys()
        hook.close()


def exact_means() -> list[dict[str, Tensor]]:
    mean = of(Exact())
    return [averaged(mean, gradients_of(step, dist.get_rank(), 10.0**step)) for step in range(2)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_exact_mean_adds_up_in_the_order_of_ranks(workers: int) -> None:
    ranks = gang(workers).run(exact_means)
    for step in range(2):
        everyone = [gradients_of(step, rank, 10.0**step) for rank in range(workers)]
        for name in SHAPES:
            expected = everyone[0][name].clone()
            for other in everyone[1:]:
                expected += other[name]
            expected /= workers
            assert all(torch.equal(found[step][name], expected) for found in ranks)


@on_ranks(4)
def test_the_exact_mean_sends_the_bytes_of_a_ring() -> None:
    p, size = nn.Parameter(torch.zeros(512, 513)), dist.get_world_size()
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    with bytes_sent() as sent:
        CompressedMean({"p": p}, group, Exact()).average([Entry("p", p, torch.randn(p.numel()), True)])
    assert sum(sent) / p.numel() == pytest.approx(Exact().bytes_per_parameter(size), rel=0.015)


@on_ranks(2)
def test_what_is_not_finite_raises_on_all_ranks_and_changes_no_residual() -> None:
    mean = of(EFSign(two_sided=True))
    averaged(mean, gradients_of(0, dist.get_rank()))
    file = io.BytesIO()
    torch.save(mean.state_dict(), file)
    spoilt = gradients_of(1, dist.get_rank())
    if dist.get_rank() == 1:
        spoilt["conv"][0, 0, 0, 0] = torch.inf
    with pytest.raises(CollectiveError, match=r"^rank 1: .* conv is not finite"):
        averaged(mean, spoilt)
    again = of(EFSign(two_sided=True))
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    expected = averaged(again, gradients_of(1, dist.get_rank()))
    found = averaged(mean, gradients_of(1, dist.get_rank()))
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)
