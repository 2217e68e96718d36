"""What a worker that trains by itself keeps of its own: its weights, its optimizer's state, and its part in rounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from signstep.distributed.rounds import LocalSteps


class OwnState:
    """All of it, as one thing that a checkpoint saves of each worker."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, local: LocalSteps) -> None:
        self._parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "local": local}

    def state_dict(self) -> dict[str, Any]:
        """Of this worker."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take over what `state_dict` of the same worker gave."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
