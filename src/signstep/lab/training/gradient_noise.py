"""SGD with the annealed gradient noise of Neelakantan et al. (2015)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from signstep.lab.training.seeds import derived_seed


class NoisySGD(Optimizer):
    r"""SGD with momentum on gradients to which Gaussian noise is added, less of it at every step.

    .. math::
        v_t = \mu v_{t-1} + g_t + \mathcal N(0, \sigma_t^2) + \text{weight\_decay} \cdot w_t, \qquad
        \sigma_t^2 = \frac{\eta}{(1 + t)^\gamma}, \qquad w_{t+1} = w_t - \text{lr} \cdot v_t,

    t from 0: "Adding Gradient Noise Improves Learning for Very Deep Networks", https://arxiv.org/abs/1511.06807, which
    has gamma = 0.55 and chooses eta from 0.01, 0.3 and 1.0. Without noise it takes the steps of torch.optim.SGD. The
    noise is a function of (seed, step, parameter), so that a resumed run and every worker draw the same.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        momentum: mu.
        gradient_noise: eta, the variance at the first step.
        noise_decay: gamma.
        seed: of the noise, >= 0.
        weight_decay: added to the gradient.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = NoisySGD([w], lr=0.5, gradient_noise=0.0)
        >>> w.grad = torch.ones(3)
        >>> optimizer.step()
        >>> w.tolist()
        [0.5, 0.5, 0.5]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        momentum: float = 0.0,
        *,
        gradient_noise: float = 0.01,
        noise_decay: float = 0.55,
        seed: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "gradient_noise": gradient_noise}
        options |= {"noise_decay": noise_decay, "weight_decay": weight_decay}
        for name, value in options.items():
            if not value >= 0:
                raise ValueError(f"{name}={value!r}: expected a value >= 0")
        super().__init__(params, options | {"seed": seed, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; gradients stay as they are. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ordinal = -1
        for group in self.param_groups:
            sigma = (group["gradient_noise"] * (1 + group["step"]) ** -group["noise_decay"]) ** 0.5
            for p in group["params"]:
                ordinal += 1
                if p.grad is None:
                    continue
                g = p.grad.add(p, alpha=group["weight_decay"])
                if sigma > 0:
                    g.add_(noise(group["seed"], group["step"], ordinal, p), alpha=sigma)
                if group["momentum"] > 0:
                    v = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    g = v.mul_(group["momentum"]).add_(g)
                p.add_(g, alpha=-group["lr"])
            group["step"] += 1
        return loss


def noise(seed: int, step: int, ordinal: int, like: Tensor) -> Tensor:
    """Standard normals for the parameter of this ordinal over all groups, of the shape, dtype and device of `like`.

    >>> torch.equal(noise(0, 5, 1, torch.zeros(2)), noise(0, 5, 1, torch.ones(2)))
    True
    """
    generator = torch.Generator(like.device).manual_seed(derived_seed("gradient noise", seed, step, ordinal))
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
