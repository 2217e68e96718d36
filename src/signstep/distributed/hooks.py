"""What all communication hooks of DistributedDataParallel share: `GradientHook` has `reduce` in place of DDP's mean.

What is sent is decided by its subclasses, in ddp.py, power_sgd.py and compressors/.

A reduction takes several collectives. On gloo a second one that is chained to the first with `Future.then` hangs,
because the ranks issue them in different orders. So each hook has one thread and a process group of its own: the thread
works on one bucket after the other while backward goes on. On CUDA the work is queued on a stream of its own instead.
"""

# Without postponed annotations: DDP compares those of the hook with the types themselves.

import itertools
import queue
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.autograd import Variable
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from signstep.distributed.collectives import CollectiveError, failure, own_group, release_at_exit

__all__ = ["Bucket", "Entry", "GradientHook"]


class Entry(NamedTuple):
    """One parameter's part of a bucket."""

    name: str
    """The name of the parameter in the module that DDP wraps."""
    param: Tensor
    flat: Tensor
    """Its gradient, a 1-D view of the bucket's buffer in the order of the parameter's memory; results go here too."""
    present: bool
    """Whether this rank's backward has reached the parameter. If not (unused, or the rank has joined), flat is 0."""


@dataclass(frozen=True)
class Bucket:
    """Gradients that are reduced together: DDP's bucket, opened."""

    buffer: Tensor
    """The gradients of all entries side by side, 1-D."""
    entries: Sequence[Entry]
    index: int
    is_last: bool
    """Whether it is the last bucket of this backward."""
    original: GradBucket
    joined: bool
    """Whether this rank has no more batches and is inside `model.join()`: its gradients are zeros then."""


class GradientHook(ABC):
    """Replaces the mean of gradients in a DDP model by `reduce`, bucket by bucket, while backward goes on.

    Args:
        model: wrapped in DistributedDataParallel, with no other communication hook. Its process group is copied.

    Attributes:
        names: names of the parameters that require a gradient, by parameter.
        group: the workers, a copy of the model's process group; rank and world_size: in it.

    Raises:
        TypeError: the model is not wrapped in DistributedDataParallel.
        RuntimeError: the model has a communication hook already. In backward, on every rank: what went wrong in
            `reduce`, as the message of a `CollectiveError` or as a rank that has died; after that the hook, like the
            process group, is of no more use.
    """

    attack: Callable[[Sequence[Entry]], Sequence[Entry]] | None = None
    """For tests and studies: what this rank does to each bucket's entries first, see `signstep.distributed.attacks`."""

    def __init__(self, model: DistributedDataParallel) -> None:
        if not isinstance(model, DistributedDataParallel):
            raise TypeError(
                f"{type(self).__name__}: expected a model wrapped in DistributedDataParallel, got "
                f"{type(model).__name__}; wrap it first (for fully_shard see signstep.distributed.fsdp)"
            )
        if model._comm_hooks:
            raise RuntimeError(
                f"{type(self).__name__}: this DistributedDataParallel has a communication hook already, and takes one: "
                "wrap the module anew"
            )
        # A compiled module puts its own prefix before every name.
        named = model.module.named_parameters()
        self.names: Mapping[Tensor, str] = {p: n.removeprefix("_orig_mod.") for n, p in named if p.requires_grad}
        self.device = next(iter(self.names)).device
        self.group = own_group(model.process_group, self.device)
        release_at_exit(self)
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._reached: set[Tensor] = set()
        self._failure: BaseException | None = None
        self._backward = -1
        self._seen: tuple[weakref.ref[Tensor], int] | None = None
        self._handles = [p.register_post_accumulate_grad_hook(self._reached.add) for p in self.names]  # type: ignore[no-untyped-call]
        first = next(iter(self.names))
        own = weakref.ref(self)
        self._handles.append(first.register_hook(lambda _: _warn_of_second_backward(own(), first)))  # type: ignore[no-untyped-call]
        self._closed = False
        self._jobs: queue.SimpleQueue[tuple[Bucket, Future[Tensor]] | None] = queue.SimpleQueue()
        self._stream = torch.Stream(self.device) if self.device.type == "cuda" else None
        thread = threading.Thread(target=_work, args=(self._jobs, weakref.ref(self)), daemon=True)
        if self._stream is None:
            thread.start()
            weakref.finalize(self, _end, self._jobs, thread)

    def attach(self, model: DistributedDataParallel) -> None:
        """Register the hook: the last thing that a constructor does, because DDP takes one hook for good."""
        model.register_comm_hook(None, self._hook)

    def begin(self) -> None:  # noqa: B027
        """Called before the first bucket of a backward, while nothing is reduced; not on a rank that has joined."""

    @abstractmethod
    def reduce(self, bucket: Bucket) -> None:
        """Write into bucket.buffer what all ranks agree on.

        Called for one bucket after another, in the same order on all ranks; may use collectives of `group`.
        """

    def close(self) -> None:
        """End the thread and the process group, once the model is not trained any more.

        A collective: every rank calls it. A later backward raises.
        """
        if self._closed:
            return
        self._closed = True
        for handle in self._handles:
            handle.remove()
        self._jobs.put(None)
        dist.destroy_process_group(self.group)

    def _hook(self, state: object, bucket: GradBucket) -> Future[Tensor]:
        self._raise_failure()
        if self._closed:
            raise RuntimeError(f"{type(self).__name__} has been closed: wrap the module anew to train it")
        params = bucket.parameters()
        ends = list(itertools.accumulate(p.numel() for p in params))
        buffer = bucket.buffer()
        entries = []
        for p, end in zip(params, ends, strict=True):
            entries.append(Entry(self.names[p], p, buffer[end - p.numel() : end], p in self._reached))
            self._reached.discard(p)
        task = torch._C._current_graph_task_id()
        joined = task == -1  # outside of backward
        opened = Bucket(buffer, entries, bucket.index(), bucket.is_last(), bucket, joined)
        if not joined and task != self._backward:
            self._backward = task
            self.begin()
            Variable._execution_engine.queue_callback(self._after_backward)
        if self._stream is not None:
            return self._on_stream(opened)
        future: Future[Tensor] = Future()
        self._jobs.put((opened, future))
        return future

    def _on_stream(self, bucket: Bucket) -> Future[Tensor]:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        future: Future[Tensor] = Future(devices=[self.device])
        with self._stream:
            bucket.buffer.record_stream(self._stream)
            self._run(bucket)
            future.set_result(bucket.buffer)
        return future

    def _run(self, bucket: Bucket) -> None:
        """`reduce`, or after a failure nothing: DDP gets NaN, and the reason is raised at the end of backward."""
        if self._failure is None:
            try:
                with torch.no_grad():
                    if self.attack is not None:
                        bucket = replace(bucket, entries=self.attack(bucket.entries))
                    self.reduce(bucket)
                return
            except BaseException as error:
                self._failure = error
        bucket.buffer.fill_(torch.nan)

    def _after_backward(self) -> None:
        # DDP has queued its own end of backward before this runs; what is queued now comes after it.
        Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        first = next(iter(self.names))
        self._seen = None if first.grad is None else (weakref.ref(first.grad), first.grad._version)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            if isinstance(self._failure, CollectiveError):
                raise CollectiveError(str(self._failure)) from self._failure
            raise failure(self.rank, self.world_size, type(self).__name__, self._failure) from self._failure


def _warn_of_second_backward(hook: "GradientHook | None", p: Tensor) -> None:
    if hook is None or hook._seen is None or torch._C._current_graph_task_id() == hook._backward:
        return
    grad, version = hook._seen
    if p.grad is not None and grad() is p.grad and p.grad._version == version:
        warnings.warn(
            f"{type(hook).__name__}: backward again without zero_grad(): the last reduction is taken for a part of the "
            "gradient; call zero_grad() after step(), and accumulate gradients inside no_sync()",
            stacklevel=2,
        )


def _end(jobs: "queue.SimpleQueue[tuple[Bucket, Future[Tensor]] | None]", thread: threading.Thread) -> None:
    jobs.put(None)
    # Before the interpreter's own end, which would kill the thread on its way out, and with it the process. One that
    # waits for a dead rank is not waited for.
    if thread is not threading.current_thread():
        thread.join(timeout=1.0)


def _work(jobs: "queue.SimpleQueue[tuple[Bucket, Future[Tensor]] | None]", owner: "weakref.ref[GradientHook]") -> None:
    while (job := jobs.get()) is not None:
        bucket, future = job
        hook = owner()
        failure = None
        if hook is not None:
            hook._run(bucket)
            failure = hook._failure
        del hook
        if bucket.joined and failure is not None:  # there is no end of backward that would raise it
            future.set_exception(RuntimeError(str(failure)))  # type: ignore[arg-type]  # torch's annotation is wrong
        else:
            future.set_result(bucket.buffer)
