"""The gradients of micro-batches at sampled coordinates, taken by hooks where a backward pass adds to p.grad.

A hook on a parameter's AccumulateGrad node is called once per backward pass with the gradient that the pass adds to
p.grad. For a tied parameter that is the sum over its uses; under DDP it is the gradient of this rank, before anything
is reduced. `torch.autograd.grad` does not call the hook. So a loop that accumulates gradients needs no change: each of
its backward passes is a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable


@dataclass(frozen=True)
class Columns:
    """Which columns of the matrix of rows belong to a parameter."""

    name: str
    where: slice
    numel: int
    """Coordinates of the parameter; a complex one has two for each element."""
    indices: Tensor
    """The coordinates that the columns are, int64 on the CPU, rising."""

    @property
    def sampled(self) -> int:
        """Number of columns."""
        return len(self.indices)


class Sampler:
    """Collects rows, one per micro-batch, while it is open.

    Args:
        named: parameters by name. Entries of a parameter that does not require a gradient, now or later, are 0.
        coordinates: the most columns there may be. Every parameter has the same number of them, or all its coordinates
            if they are fewer. They are drawn once, so that rows of different steps can be compared.
        seed: seed of that draw.
        scale: returns the factor by which a GradScaler has multiplied the gradients; it is called once per row. None:
            there is no GradScaler. With one, a step may be skipped, and its rows stay here; they are dropped when a
            pass finds all gradients 0 or None again.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], coordinates: int, seed: int, scale: Callable[[], float] | None
    ) -> None:
        self._params = list(named.values())
        sizes = [p.numel() * (2 if p.is_complex() else 1) for p in self._params]
        each = _largest_quota(sizes, coordinates)
        generator = torch.Generator().manual_seed(seed)
        self.columns: list[Columns] = []
        begin = 0
        for name, size in zip(named, sizes, strict=True):
            count = min(size, each)
            indices = torch.arange(size, device="cpu")
            if count < size:
                # With replacement first: a permutation of a large tensor would be as large as the tensor.
                drawn = torch.unique(torch.randint(size, (2 * count,), generator=generator, device="cpu"))
                indices = drawn[torch.randperm(len(drawn), generator=generator, device="cpu")[:count]].sort().values
                count = len(indices)
            self.columns.append(Columns(name, slice(begin, begin + count), size, indices))
            begin += count
        self.width = begin
        self.rows: list[Tensor] = []
        """The rows of this step so far, float32 on the device of the first parameter."""
        self._on_device: list[Tensor | None] = [None] * len(self._params)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._nodes: list[Any] = []  # kept, because a parameter does not keep its own
        self._row: Tensor | None = None
        self._pass = -1
        self._inside = False
        self._scale = scale

    def open(self) -> None:
        """Begin to collect."""
        if self._hooks:
            return
        for i, p in enumerate(self._params):
            if p.requires_grad:
                with torch.enable_grad():
                    node = p.view_as(p).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
                self._nodes.append(node)
                self._hooks.append(node.register_prehook(self._hook(i)))  # type: ignore[union-attr]

    def close(self) -> None:
        """Collect no more, and forget the rows."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._nodes, self.rows, self._row = [], [], [], None

    @contextmanager
    def one_row(self) -> Iterator[None]:
        """All backward passes inside are one micro-batch."""
        if self._inside:
            raise RuntimeError(
                "microbatch() inside microbatch(): a micro-batch has no parts; leave the first one first"
            )
        self._inside, self._row = True, None
        try:
            yield
            self._end_row()
        finally:
            self._inside, self._row = False, None

    def _hook(self, index: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        columns = self.columns[index]

        def hook(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[0]
            if grad is None:
                return
            with torch.no_grad():
                current = torch._C._current_graph_task_id()
                # A pass that has raised leaves its row behind.
                if self._row is None or (current != self._pass and not self._inside):
                    self._begin_row()
                self._pass = current
                self._row[columns.where] += self._taken(index, grad)  # type: ignore[index]

        return hook

    def _taken(self, index: int, grad: Tensor) -> Tensor:
        columns = self.columns[index]
        grad = grad.to_dense() if grad.is_sparse else grad
        real = torch.view_as_real(grad) if grad.is_complex() else grad
        if columns.sampled == columns.numel:
            return real.reshape(-1).to(self._params[0].device, torch.float32)
        chosen = self._on_device[index]
        if chosen is None or chosen.device != real.device:
            chosen = self._on_device[index] = columns.indices.to(real.device)
        return real.take(chosen).to(self._params[0].device, torch.float32)

    def _begin_row(self) -> None:
        if self.rows and self._scale is not None and all(p.grad is None or not p.grad.any() for p in self._params):
            self.rows = []
        self._row = torch.zeros(self.width, dtype=torch.float32, device=self._params[0].device)
        if not self._inside:
            Variable._execution_engine.queue_callback(self._end_row)

    def _end_row(self) -> None:
        if self._row is not None:
            self.rows.append(self._row if self._scale is None else self._row / self._scale())
            self._row = None


def _largest_quota(sizes: list[int], total: int) -> int:
    """The largest c with sum(min(size, c)) <= total, at least 1."""
    low, high = 1, max(sizes, default=1)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(size, middle) for size in sizes) <= total:
            low = middle
        else:
            high = middle - 1
    return low
