"""`Sampler`: which coordinates it looks at."""

import torch
from torch import nn

from signstep.monitor.sampling import Sampler


def test_sample_is_spread_over_layers_and_stays() -> None:
    named = {
        "big": nn.Parameter(torch.zeros(500, 500)),
        "small": nn.Parameter(torch.zeros(7)),
        "c": nn.Parameter(torch.zeros(40, dtype=torch.complex64)),
    }
    one, two = Sampler(named, 200, 3, None), Sampler(named, 200, 3, None)
    assert one.width <= 200
    by_name = {c.name: c for c in one.columns}
    assert by_name["small"].sampled == 7
    assert by_name["c"].numel == 80
    assert abs(by_name["big"].sampled - 113) <= 1
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(one.columns, two.columns, strict=True))
    grad = torch.arange(250_000.0).reshape(500, 500).t()  # not contiguous
    assert torch.equal(one._taken(0, grad), grad.reshape(-1)[by_name["big"].indices])
