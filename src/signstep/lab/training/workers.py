"""The processes of one training run: a single one, or those that torchrun started."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from signstep.lab.errors import BadInput

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """The place of this process among the run's workers; a single process has rank 0 of 1 and sends nothing."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> Workers:
        """Join the process group that torchrun describes in the environment, once per process.

        Args:
            device: "auto", or what torch.device takes; a bare "cuda" means this worker's own GPU.

        Raises:
            BadInput: no such device on this machine.
        """
        cuda = torch.cuda.is_available()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if device == "auto":
            device = "cuda" if cuda else "cpu"
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise BadInput(f"device={device!r}: expected auto, cpu, cuda, cuda:N or mps") from error
        if chosen.type == "cuda":
            chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
            if not cuda or chosen.index >= torch.cuda.device_count():
                raise BadInput(f"device={device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
            torch.cuda.set_device(chosen)
        if chosen.type == "mps" and not torch.backends.mps.is_available():
            raise BadInput("device='mps': this machine has no such device")
        if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
            # Both backends: what the host must know (shall we stop?) goes over gloo, without waiting for the GPU.
            # The group lives as long as the process: joining a second time would meet the first one's keys.
            dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        if not dist.is_initialized():
            return cls(0, 1, chosen)
        return cls(dist.get_rank(), dist.get_world_size(), chosen)

    def wrap(self, model: nn.Module) -> nn.parallel.DistributedDataParallel:
        """`model` with gradients averaged over the workers in its backward pass."""
        on_gpu = self.device.type == "cuda"
        return nn.parallel.DistributedDataParallel(model, device_ids=[self.device.index] if on_gpu else None)

    def from_first(self, compute: Callable[[], T]) -> T:
        """What `compute` returns or raises on rank 0, on every rank."""
        answer: list[T | Exception | None] = [None]
        if self.rank == 0:
            try:
                answer = [compute()]
            except Exception as error:
                if self.size == 1:
                    raise
                answer = [error]
        if self.size > 1:
            dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]  # type: ignore[return-value]

    def in_turn(self, compute: Callable[[], T]) -> T:
        """What `compute` returns on each rank; it runs on rank 0 first, then on the others."""
        mine: list[T] = []
        self.from_first(lambda: mine.append(compute()))
        return mine[0] if mine else compute()

    def gather(self, value: T) -> list[T]:
        """On rank 0 every rank's value; elsewhere nothing."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.gather_object(value, values if self.rank == 0 else None)
        return values if self.rank == 0 else []

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over the workers; the input is left as it is."""
        if self.size == 1:
            return tensor
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any worker."""
        return [count > 0 for count in self.total(torch.tensor(flags, dtype=torch.int32, device="cpu")).tolist()]

    def share_buffers(self, model: nn.Module) -> None:
        """Give every worker rank 0's buffers (batch norm's running statistics)."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    @contextlib.contextmanager
    def first_in(self, *contexts: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        """Within the block, rank 0 is in the contexts for all workers; what they raise as it enters, all raise."""
        with contextlib.ExitStack() as stack:
            for each in contexts:
                self.from_first(functools.partial(stack.enter_context, each))
            yield


class StopRequest:
    """Within the block, the first SIGINT or SIGTERM sets `received`; the second one kills the process.

    A request that the block has not `answered` is raised again at its end, for whoever comes next.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.answered = False
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            # A thread other than the main one may not set handlers: there the caller's stay in force.
            with contextlib.suppress(ValueError):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self.received is not None and not self.answered:
            signal.raise_signal(self.received)
            if self._previous[self.received] is signal.SIG_IGN:  # as a shell sets it for SIGINT of a background job
                raise KeyboardInterrupt
