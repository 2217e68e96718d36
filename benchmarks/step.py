"""What a step costs beside torch.optim.SGD and Adam, in one run: medians, and ratios pair by pair.

    python benchmarks/step.py [millions of parameters, default 5]

Every round times each optimizer once, in turn, on the same tensors; a ratio is the median over rounds of its time over
SGD's of the same round, with the 10th and 90th percentile. An absolute time means little on a shared machine.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from signstep import HybridSignSGD, SignSGD

ROUNDS = 15


def optimizers(params: list[torch.nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
    """The contestants; SGD with momentum, the peer, comes first."""
    relative = {"dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative"}
    return {
        "SGD(momentum=0.9, foreach)": torch.optim.SGD(params, lr=1e-6, momentum=0.9, foreach=True),
        "SGD(momentum=0.9, fused)": torch.optim.SGD(params, lr=1e-6, momentum=0.9, fused=True),
        "Adam(fused)": torch.optim.Adam(params, lr=1e-6, fused=True),
        "SignSGD": SignSGD(params, lr=1e-6),
        "SignSGD(momentum=0)": SignSGD(params, lr=1e-6, momentum=0.0),
        "SignSGD, dither": SignSGD(params, lr=1e-6, dither=1e-4),
        "SignSGD, relative dither": SignSGD(params, lr=1e-6, **relative),  # type: ignore[arg-type]
        "HybridSignSGD, sign phase": HybridSignSGD(params, lr=1e-6),
    }


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main(millions: float) -> None:
    """Print the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [int(millions * 1e6 / 5)] * 5
    params = [torch.nn.Parameter(torch.randn(n, device=device)) for n in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    contestants = optimizers(params)
    for optimizer in contestants.values():
        optimizer.step()
    rounds = [{name: seconds(o.step, device) for name, o in contestants.items()} for _ in range(ROUNDS)]
    peer = next(iter(contestants))
    print(
        f"{sum(sizes) / 1e6:g} M fp32 parameters in {len(sizes)} tensors, {device}, {torch.get_num_threads()} threads"
    )
    print(f"{'optimizer':28} {'ns/parameter':>12} {'ratio to the first':>19}   10 % to 90 %")
    for name in contestants:
        ratios = [r[name] / r[peer] for r in rounds]
        deciles = statistics.quantiles(ratios, n=10)
        nanoseconds = statistics.median(r[name] for r in rounds) / sum(sizes) * 1e9
        print(
            f"{name:28} {nanoseconds:12.2f} {statistics.median(ratios):19.2f}   {deciles[0]:.2f} to {deciles[-1]:.2f}"
        )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0)
