"""Byzantine workers (Lamport, Shostak and Pease 1982), for tests and studies: what one does to its own gradients.

With real processes an attack belongs to the hook of the rank that misbehaves, and acts before anything is sent:

    vote = MajorityVote(model, optimizer)
    if vote.rank == 3:
        vote.attack = SignFlip()

In `signstep.distributed.simulation` attacks are given by rank. Each attacker needs an object of its own.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from signstep.distributed.hooks import Entry

__all__ = ["Attack", "Collude", "NotANumber", "Random", "SignFlip", "Silent", "Stale"]


class Attack(ABC):
    """Replaces gradients, in place, before they enter the worker's momentum.

    Subclass and implement `corrupt`; parameters that the worker abstains from are left alone.
    """

    def __call__(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """What the worker sends in place of these entries; their gradients are overwritten."""
        for entry in entries:
            if entry.present:
                self.corrupt(entry.name, entry.flat)
        return entries

    @abstractmethod
    def corrupt(self, name: str, gradient: Tensor) -> None:
        """Overwrite a parameter's gradient, 1-D in the order of the parameter's memory."""


class SignFlip(Attack):
    """Sends -scale g: the worst blind multiplicative adversary of Bernstein et al. 2019 (arXiv 1810.05291).

    Such an adversary multiplies its gradient by any number, chosen before it has seen the others' gradients. Majority
    vote converges while fewer than half of the workers are such. Only the sign counts in a vote; the mean multiplies
    the attacker's weight by the scale.

    Example:
        >>> g = torch.tensor([1.0, -2.0])
        >>> SignFlip(scale=10).corrupt("weight", g)
        >>> g
        tensor([-10.,  20.])
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def corrupt(self, name: str, gradient: Tensor) -> None:
        """Multiply by -scale."""
        gradient.mul_(-self.scale)


class Random(Attack):
    """Sends Gaussian noise of scale times the gradient's rms (Blanchard et al. 2017, arXiv 1703.02757).

    Args:
        scale: standard deviation over the rms of each parameter's gradient.
        seed: of the noise, another one for each attacker.
    """

    def __init__(self, scale: float = 1.0, seed: int = 0) -> None:
        self.scale, self.seed = scale, seed
        self._generators: dict[str, torch.Generator] = {}

    def corrupt(self, name: str, gradient: Tensor) -> None:
        """Draw anew."""
        # One generator for each parameter, so that the order of the buckets does not matter.
        if name not in self._generators:
            self._generators[name] = _generator(self.seed, name, gradient.device)
        rms = gradient.square().mean().sqrt()
        gradient.normal_(generator=self._generators[name]).mul_(self.scale * rms)


class Collude(Attack):
    """All attackers push the same way.

    In a simulation, which knows everybody's gradients, that is -scale times the mean of the honest workers' gradients
    (Xie, Koyejo and Gupta 2019, arXiv 1903.03936): the attackers' votes agree where the honest ones', each with the
    noise of its own batch, do not. Across processes, which cannot know it, it is one random direction of signs for the
    whole training, of scale times the rms of the attacker's own gradient.

    Args:
        scale: see above.
        seed: of the random direction, the same for all who collude.
        blind: in a simulation, too, know nothing of the others.

    Attributes:
        honest: mean over the honest workers by parameter name, 1-D in the order of memory, as simulations set it
            before every step; None: not known.
    """

    honest: Mapping[str, Tensor] | None = None

    def __init__(self, scale: float = 1.0, seed: int = 0, *, blind: bool = False) -> None:
        self.scale, self.seed, self.blind = scale, seed, blind

    def corrupt(self, name: str, gradient: Tensor) -> None:
        """Send what all attackers send."""
        if self.honest is not None:
            gradient.copy_(self.honest[name]).mul_(-self.scale)
            return
        rms = gradient.square().mean().sqrt()
        generator = _generator(self.seed, name, gradient.device)
        up = torch.randint(2, gradient.shape, generator=generator, device=gradient.device)
        gradient.copy_(2 * up - 1).mul_(self.scale * rms)


class Silent(Attack):
    """Abstains from every vote, and adds 0 to every mean."""

    def __call__(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """The same entries, absent."""
        for entry in entries:
            self.corrupt(entry.name, entry.flat)
        return [entry._replace(present=False) for entry in entries]

    def corrupt(self, name: str, gradient: Tensor) -> None:
        """Send 0."""
        gradient.zero_()


class NotANumber(Attack):
    """Sends NaN: a vote raises on all ranks, or the worker abstains (``nonfinite="abstain"``); a mean becomes NaN."""

    def corrupt(self, name: str, gradient: Tensor) -> None:
        """Send NaN."""
        gradient.fill_(torch.nan)


class Stale(Attack):
    """Sends the gradient of `steps` steps ago, as a worker that lags does; in the first steps, its first one.

    Keeps that many copies of the gradients.

    Example:
        >>> attack = Stale(2)
        >>> sent = []
        >>> for k in range(5):
        ...     g = torch.tensor([float(k)])
        ...     attack.corrupt("weight", g)
        ...     sent.append(int(g))
        >>> sent
        [0, 0, 0, 1, 2]
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"Invalid steps: {steps!r}, expected an integer >= 1")
        self.steps = steps
        self._kept: dict[str, deque[Tensor]] = {}

    def corrupt(self, name: str, gradient: Tensor) -> None:
        """Replace the gradient by an older one."""
        kept = self._kept.setdefault(name, deque(maxlen=self.steps + 1))
        kept.append(gradient.clone())
        gradient.copy_(kept[0])


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key[:8], "little") >> 1)
