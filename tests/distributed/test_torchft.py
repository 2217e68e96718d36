"""`DiLoCo` beside torchft's, where that is installed (`pip install torchft`): the same weights after the same steps."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from local_cases import small, small_step

from gang import gang
from signstep.distributed import DiLoCo

pytest.importorskip("torchft", reason="torchft, to compare with, is not installed")


def train_both(lighthouse: str) -> tuple[float, float]:
    """How far the weights of both are from each other at most, and how far they have gone."""
    from torchft import Manager, ProcessGroupGloo
    from torchft.local_sgd import DiLoCo as TheirDiLoCo

    rank, size, wait = dist.get_rank(), dist.get_world_size(), timedelta(seconds=30)
    theirs = small()
    inner = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    outer = torch.optim.SGD(theirs.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=wait),
        min_replica_size=size,
        use_async_quorum=False,
        load_state_dict=lambda state: None,
        state_dict=dict,
        replica_id=f"replica-{rank}",
        store_addr="localhost",
        store_port=store.port,
        rank=0,
        world_size=1,
        lighthouse_addr=lighthouse,
        port=0,
        hostname="localhost",
        init_sync=False,
        timeout=wait,
        quorum_timeout=wait,
    )
    with TheirDiLoCo(manager, [theirs], inner, outer, sync_every=5):
        for step in range(50):
            small_step(theirs, inner, rank, step)
    manager.shutdown(wait=False)

    ours = small()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    local = DiLoCo(ours, optimizer, every=5)
    for step in range(50):
        small_step(ours, optimizer, rank, step)
        local.step()
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    gone = max(
        float((p - q).detach().abs().max()) for p, q in zip(ours.parameters(), small().parameters(), strict=True)
    )
    return max(float((p - q).detach().abs().max()) for p, q in pairs), gone


@pytest.mark.parametrize("workers", [2, 3])
def test_diloco_is_that_of_torchft(workers: int) -> None:
    """Bit for bit with two workers; with more, an all-reduce may add up in another order."""
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=workers, join_timeout_ms=20_000)
    try:
        address = "http://localhost:" + lighthouse.address().rpartition(":")[2]
        for apart, gone in gang(workers).run(train_both, address):
            assert apart == 0.0 if workers == 2 else apart < 1e-5
            assert gone > 0.5
    finally:
        lighthouse.shutdown()
