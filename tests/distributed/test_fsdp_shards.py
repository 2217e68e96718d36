"""How FSDP2's shards are cut: the bits for each owner, the bytes they take, and what is refused."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_cases import needs_custom_reduce_scatter
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from gang import gang, on_ranks
from signstep import HybridSignSGD, SignSGD
from signstep.distributed import fsdp as module
from signstep.distributed.fsdp import FSDPMajorityVote
from signstep.distributed.fsdp_shards import Part, Routes
from signstep.kernels import bits
from signstep.kernels.bits import word_count

pytestmark = needs_custom_reduce_scatter


def test_bytes_on_the_wire() -> None:
    """Bits for the shards of others, and what is padded; the hybrid, and DDP, twice that."""
    sent = gang(4).run(_payload)
    elements, rows = 64 * 37 + 64, 4
    for sign, hybrid in sent:
        assert elements * 3 / 32 <= sign <= elements * 3 / 32 + 8 * 2 * rows + 8 * 3
        assert elements * 3 / 16 <= hybrid <= elements * 3 / 16 + 16 * 2 * rows + 8 * 3


def _payload() -> list[int]:
    own = 3 / 4  # of what a collective moves leaves the rank
    totals = []
    all_to_all, all_gather = dist.all_to_all_single, module.all_gather
    from signstep.distributed import vote as collective

    for optimizer_class in (SignSGD, HybridSignSGD):
        model: Any = fully_shard(nn.Linear(37, 64))
        optimizer = optimizer_class(model.parameters())
        FSDPMajorityVote(model, optimizer)
        sent: list[float] = []

        def counting(function: Callable[..., Any], sent: list[float] = sent) -> Callable[..., Any]:
            def count(out: Tensor, *arguments: Any, **options: Any) -> Any:
                sent.append(out.numel() * out.element_size() * own)
                return function(out, *arguments, **options)

            return count

        dist.all_to_all_single, collective.all_gather = counting(all_to_all), counting(all_gather)
        try:
            model(torch.ones(1, 37)).sum().backward()
        finally:
            dist.all_to_all_single, collective.all_gather = all_to_all, all_gather
        totals.append(int(sum(sent)))
    return totals


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 90)), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 2**32),
)
def test_bits_are_cut_where_shards_are(shapes: list[tuple[int, int]], ranks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [Part(str(i), None, r * c, -(-r // ranks) * c) for i, (r, c) in enumerate(shapes)]  # type: ignore[arg-type]
    ups = [torch.rand(part.size, generator=generator) > 0.5 for part in parts]
    cut = Routes.of(parts, ranks, torch.device("cpu")).cut(torch.cat([bits.pack(up) for up in ups]))
    first = 0
    for part, up in zip(parts, ups, strict=True):
        for rank in range(ranks):
            begin, count = part.begin(rank), part.count(rank)
            found = bits.bits(cut[rank, first : first + word_count(part.run)], count)
            assert torch.equal(found, up[begin : begin + count])
        first += word_count(part.run)
        table = part.rows(up, ranks)
        assert table.shape == (ranks, part.run)
        assert torch.equal(part.whole(table, 0), up)
    assert cut.shape == (ranks, first)


@on_ranks(4)
def test_what_does_not_fit_is_refused() -> None:
    plain = nn.Linear(8, 8)
    early = SignSGD(plain.parameters())
    with pytest.raises(TypeError, match="expected a model under fully_shard, got Linear"):
        FSDPMajorityVote(plain, early)
    model: Any = fully_shard(plain)
    with pytest.raises(ValueError, match="make it after fully_shard"):
        FSDPMajorityVote(model, early)
    optimizer = SignSGD(model.parameters())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(ValueError, match="Invalid ties: 'up'"):
        FSDPMajorityVote(model, optimizer, ties="up")
    with pytest.raises(ValueError, match="Invalid error_feedback: True with replicate_group"):
        FSDPMajorityVote(model, optimizer, error_feedback=True, replicate_group=mesh["shard"].get_group())
    with pytest.raises(ValueError, match="replicate_group shares ranks"):
        FSDPMajorityVote(model, optimizer, replicate_group=mesh["shard"].get_group())
    with pytest.raises(TypeError, match="a vote needs SignSGD, HybridSignSGD or Lion, got SGD"):
        FSDPMajorityVote(model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("Invalid state_dtype: torch.int8 with sgd_momentum > 0")):
        FSDPMajorityVote(model, HybridSignSGD(model.parameters(), sgd_momentum=0.5, state_dtype=torch.int8))
    native: Any = fully_shard(nn.Linear(8, 8), mesh=mesh)
    with pytest.raises(ValueError, match="sharded over a 2-D mesh"):
        FSDPMajorityVote(native, SignSGD(native.parameters()))
    columns: Any = fully_shard(nn.Linear(8, 8, bias=False), shard_placement_fn=lambda p: Shard(1))
    with pytest.raises(ValueError, match=re.escape("weight is sharded as (Shard(dim=1),)")):
        FSDPMajorityVote(columns, optimizer)
    with torch.device("meta"):
        empty: Any = nn.Linear(8, 8)
    fully_shard(empty)
    with pytest.raises(ValueError, match="on the meta device"):
        FSDPMajorityVote(empty, SignSGD(empty.parameters()))
    mixed: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fully_shard(mixed[0], mesh=mesh["shard"])
    fully_shard(mixed)
    with pytest.raises(ValueError, match="takes one mesh"):
        FSDPMajorityVote(mixed, SignSGD(mixed.parameters()))
