"""What signstep promises a step costs, beside what `signstep bench step` measured."""

from __future__ import annotations

from signstep.lab.bench.step_timing import StepResult
from signstep.lab.bench.targets import Target

_PLAIN = ("plain-foreach", "plain-compiled", "eager-dither")
_DITHERS = {"dither": "dither", "relative": "relative dither"}


def _best_plain(result: StepResult) -> str | None:
    return min((key for key in _PLAIN if result.measured(key)), key=result.median, default=None)


def step_targets(result: StepResult, dtype: str) -> list[Target]:
    """What signstep promises of this workload, beside what was measured."""

    def below(what: str, over: str, under: str, limit: float) -> None:
        text = f"{what}, time over {result.entries[under].label}"
        found.append(Target(text, limit, False, result.ratio(over, under)))

    def faster(what: str, than: str | None, key: str, limit: float) -> None:
        name = result.entries[than].label if than else "the best plain torch dither"
        found.append(Target(f"{what}, times faster than {name}", limit, True, result.ratio(than or "", key)))

    found: list[Target] = []
    below("clean", "clean", result.peer, 1.0)
    for key, name in _DITHERS.items():
        below(name, key, result.peer, 1.15)
    below("clean", "clean", "adam-fused", 0.8)
    for key, name in _DITHERS.items():
        below(name, key, "adam-fused", 0.9)
    for key, name in _DITHERS.items():
        faster(name, _best_plain(result), key, 8)
    faster("clean", "pytorch-optimizer", "clean", 3)
    faster("clean", "lion-pytorch", "clean", 6)
    if result.workload == "50m":
        for key, name, limit in [("clean", "clean", 0.9), *((k, n, 0.8) for k, n in _DITHERS.items())]:
            found.append(Target(f"{name}, share of the copy's bytes per second", limit, True, result.share(key)))
    if dtype == "float32":
        below("all bfloat16, to the nearest", "bf16-nearest", "clean", 0.6)
        below("all bfloat16", "bf16", "bf16-nearest", 1.5)
    below("hybrid, sign phase", "hybrid", "clean", 1.05)
    return found
