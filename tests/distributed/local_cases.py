"""What the tests of local steps share: optimizers, a model, and a step of one worker on data of its own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from signstep import Lion, SignSGD

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "signsgd": lambda params: SignSGD(params, lr=1e-3),
    "lion": lambda params: Lion(params, lr=1e-3),
}


class Net(nn.Module):
    """Convolution in channels_last, batch norm, a part that has no gradient, and buffers that never change."""

    constant: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.linspace(0, 1, 101))
        self.conv = nn.Conv2d(3, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.linear = nn.Linear(5, 4)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(F.relu(self.norm(self.conv(x))).mean((2, 3)))
        return out


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def local_step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(6, 3, 6, 6, generator=generator).to(memory_format=torch.channels_last)
    y = (x.mean((1, 2, 3)) * 40).long().clamp(-2, 1) + 2
    # In float32 whatever the weights are: layers of bfloat16 do not run on every CPU.
    tensors = {
        name: t.float() for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_floating_point()
    }
    optimizer.zero_grad()
    F.cross_entropy(functional_call(model, tensors, (x,)), y).backward()
    optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(6, 4)


def small_step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1000 * rank + step))
    optimizer.zero_grad()
    (model(x) - x[:, :4].sin()).square().mean().backward()
    optimizer.step()
