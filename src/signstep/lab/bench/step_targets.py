"""What signstep promises a step costs, beside what `signstep bench step` measured."""

from __future__ import annotations

from signstep.lab.bench.step_timing import StepResult
from signstep.lab.bench.targets import Target

_PLAIN = ("plain-foreach", "plain-compiled", "eager-dither")
_DITHERS = {"dither": "dither", "relative": "relative dither"}


def _best_plain(result: StepResult) -> str | None:
    return min((key for key in _PLAIN if result.measured(key)), key=result.median, default=None)


def step_targets(result: StepResult) -> list[Target]:
    """What signstep promises of this workload, of the rows that there are, beside what was measured."""
    entries = result.entries

    def below(what: str, over: str, under: str, limit: float) -> None:
        if over in entries and under in entries:
            text = f"{what}, time over {entries[under].label}"
            found.append(Target(text, limit, False, result.ratio(over, under)))

    def faster(what: str, than: str | None, key: str, limit: float) -> None:
        if key in entries and (than is None or than in entries):
            name = entries[than].label if than else "the best plain torch dither"
            found.append(Target(f"{what}, times faster than {name}", limit, True, result.ratio(than or "", key)))

    found: list[Target] = []
    peer = result.peer
    below("clean", "clean", peer, 1.0)
    for key, name in _DITHERS.items():
        below(name, key, peer, 1.1)
    below("hybrid, sign phase", "hybrid", peer, 1.05)
    below("momentum 0", "momentum-0", peer, 0.62)
    below("8-bit momentum", "state-int8", peer, 0.8)
    below("bf16 momentum", "state-bf16", peer, 0.9)
    below("all bfloat16, to the nearest", "bf16-nearest", peer, 0.55)
    below("all bfloat16", "bf16", "bf16-nearest", 1.5)
    below("clean, plain torch", "eager", peer, 1.7)
    below("dither, plain torch", "eager-dither", peer, 15)
    below("clean", "clean", "adam-fused", 0.8)
    for key, name in _DITHERS.items():
        below(name, key, "adam-fused", 0.9)
    for key, name in _DITHERS.items():
        if any(each in entries for each in _PLAIN):
            faster(name, _best_plain(result), key, 8)
    faster("clean", "pytorch-optimizer", "clean", 3)
    faster("clean", "lion-pytorch", "clean", 6)
    if result.workload == "50m":
        for key, name, limit in [("clean", "clean", 0.9), *((k, n, 0.8) for k, n in _DITHERS.items())]:
            if key in entries:
                found.append(Target(f"{name}, share of the limit's bytes per second", limit, True, result.share(key)))
    return found
