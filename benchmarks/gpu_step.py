"""The Triton engine on a GPU: is every step what plain torch says, and what does it cost beside torch and a copy?

    python benchmarks/gpu_step.py              # results/bench-gpu/<device>.json and <device>.md, to commit
    python benchmarks/gpu_step.py --interpret  # the script itself, on a CPU, in Triton's interpreter, on tiny sizes
    python benchmarks/gpu_step.py --sanitize   # the comparison alone, under compute-sanitizer, in a process per tool

First the self-check runs that decides whether the engine is the default here. The comparison does the same at length:
it steps the same tensors on the device and, in plain torch, on the CPU. Timing runs signstep's and torch's
contestants of `signstep bench step` once a round, in a shuffled order: some steps in a row between two events, so that
the host does not wait after each. Ratios are taken within a round. Exit code 1: the self-check or a comparison failed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402

from signstep.kernels import fused, momentum, self_check  # noqa: E402
from signstep.kernels import triton as engine  # noqa: E402
from signstep.kernels.engine import Direction, Measured, Options, Tensors  # noqa: E402
from signstep.kernels.plain import multi_tensor_step  # noqa: E402
from signstep.lab.bench import step_timing as bench  # noqa: E402
from signstep.lab.bench.step_contestants import COPY, groups, peer_for  # noqa: E402
from signstep.lab.bench.targets import TARGETS_HEAD, Target  # noqa: E402
from signstep.lab.bench.workloads import gpt2_shapes  # noqa: E402
from signstep.lab.output.files import write_all  # noqa: E402
from signstep.lab.output.tables import markdown_table  # noqa: E402

STEPS = 3
DTYPES = {x: getattr(torch, x) for x in ("float32", "bfloat16", "float16", "float64")}
STATE_DTYPES: list[torch.dtype | None] = [None, torch.float32, torch.bfloat16, torch.int8]
POSITIONS = ("clean", "pre", "post", "relative", "gradient", "uniform", "uniform post", "expected")
PEERS = ("sgd-fused", "adamw-fused")
OURS = {"clean": "clean", "dither": "dither", "relative": "relative dither"}
SHARE, OVER_ADAMW = 0.9, 0.75


# --- comparison ------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """What one combination of options gave after `STEPS` steps."""

    name: str
    elements: int
    params: int = 0
    """Elements that differ from the reference's."""
    states: int = 0
    largest: float = 0.0
    """Difference of a parameter, relative to the larger of 1 and its value."""
    exact: bool = True
    """The reference's bits are expected, but for one decision in 10^6; else a difference of 1e-5, 1e-2 in 16 bits."""
    failed: bool = False


def combinations(dtypes: Sequence[str]) -> Iterator[tuple[str, torch.dtype, torch.dtype | None, str, dict[str, Any]]]:
    """Every state_dtype and position; what else there is, in turn."""
    others: list[dict[str, Any]] = [
        {},
        {"decay": 0.99, "sums": True},
        {"coupled_weight_decay": 0.1, "maximize": True, "momentum": 0.3},
        {"on_device": True, "sums": True, "measured": Measured.EXPECTED_SIGN},
        {"sums": True, "measured": Measured.MOMENTUM},
        {"offset": 16 * 2**31 - 5, "misaligned": True},
        {"interpolation": 0.8, "momentum": 0.99, "decay": 0.99},
    ]
    for i, (name, state, position) in enumerate(itertools.product(dtypes, STATE_DTYPES, POSITIONS)):
        other = others[i % len(others)]
        yield " ".join([name, f"state={state}", position, *other]), DTYPES[name], state, position, other


def tensors_for(
    sizes: Sequence[int], dtype: torch.dtype, state: torch.dtype | None, position: str, other: dict[str, Any]
) -> Tensors:
    """Parameters, gradients and state on the CPU."""
    generator = torch.Generator().manual_seed(len(sizes))

    def make(size: int) -> Tensor:
        whole = torch.randn(size + 1, generator=generator).mul_(0.1).to(dtype)
        return whole[1:] if "misaligned" in other else whole[:-1]

    params, grads = [make(n) for n in sizes], [make(n) for n in sizes]
    for g in grads:
        g[::9] = 0
    states = [momentum.new_momentum(p, state) for p in params]
    squares = [torch.tensor(0.01) for _ in sizes] if position == "relative" else []
    return Tensors(
        params,
        grads,
        [s["exp_avg"] for s in states],
        [s["exp_avg_scale"] for s in states if "exp_avg_scale" in s],
        squares,
        list(range(7, 7 + len(sizes))),
        [other.get("offset", 0)] * len(sizes),
    )


_DIRECTIONS = {
    "clean": Direction.SIGN,
    "pre": Direction.PRE,
    "relative": Direction.PRE,
    "post": Direction.POST,
    "uniform": Direction.PRE,
    "uniform post": Direction.POST,
    "expected": Direction.EXPECTED,
    "gradient": Direction.MOMENTUM,
}


def options_for(step: int, state: torch.dtype | None, position: str, other: dict[str, Any], sums: Tensor) -> Options:
    """The request for one step."""
    sigma = torch.tensor(1.0 if position == "relative" else 0.05)
    direction = _DIRECTIONS[position]
    dithered = direction not in (Direction.SIGN, Direction.MOMENTUM)
    return Options(
        step=torch.tensor(step),
        rate=0.013,
        decay=other.get("decay", 1.0),
        coupled_weight_decay=other.get("coupled_weight_decay", 0.0),
        momentum=other.get("momentum", 0.9),
        state_dtype=state,
        direction=direction,
        sigma=sigma if dithered else None,
        seed=2**64 - 12345,
        maximize=other.get("maximize", False),
        sums=sums if "sums" in other and position != "gradient" else None,
        measured=other.get("measured", Measured.SIGN),
        interpolation=other.get("interpolation"),
        law="uniform" if position.startswith("uniform") else "gaussian",
    )


def moved(tensors: Tensors, device: torch.device) -> Tensors:
    """Copies on the device, at addresses like those of `tensors`."""

    def copy(x: Tensor) -> Tensor:
        first = x.storage_offset()
        return torch.empty(x.numel() + first, dtype=x.dtype, device=device)[first:].view(x.shape).copy_(x)

    return Tensors(*([copy(x) for x in column] for column in tensors[:5]), tensors.ordinals, tensors.offsets)


def compare(name: str, device: torch.device, sizes: Sequence[int], *kind: Any) -> Comparison:
    """Step the same tensors on the device and in plain torch on the CPU."""
    dtype, state, position, other = kind
    expected = tensors_for(sizes, dtype, state, position, other)
    actual = moved(expected, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = [torch.zeros(len(sizes), 2, dtype=wide), torch.zeros(len(sizes), 2, dtype=wide, device=device)]
    for step in range(STEPS):
        options = options_for(step + 2**31, state, position, other, sums[0])
        multi_tensor_step(expected, options)
        options = options._replace(sums=None if options.sums is None else sums[1])
        if "on_device" in other:
            sigma = None if options.sigma is None else options.sigma.to(device)
            rate = torch.tensor(options.rate, dtype=wide, device=device)
            options = options._replace(step=options.step.to(device), rate=rate, sigma=sigma)
        engine.step(actual, options)
    elements = sum(sizes)
    result = Comparison(name, elements, exact=position in ("clean", "pre", "relative", "uniform"))
    for x, y in zip(actual.params, expected.params, strict=True):
        result.params += int((x.cpu() != y).sum())
        result.largest = max(result.largest, _largest(x.cpu(), y))
    states = [*zip(actual.exp_avgs, expected.exp_avgs, strict=True), *zip(actual.scales, expected.scales, strict=True)]
    result.states = sum(int((x.cpu() != y).sum()) for x, y in states)
    summed = zip([sums[1], *actual.mean_squares], [sums[0], *expected.mean_squares], strict=True)
    result.failed = not all(torch.allclose(x.cpu(), y, rtol=1e-5, atol=1e-6) for x, y in summed)
    if result.exact:
        # Weight decay carries a parameter's difference into the momentum.
        carried = "coupled_weight_decay" in other
        result.failed |= result.params > max(1, STEPS * elements // 10**6) or (result.states > 0 and not carried)
    else:
        result.failed |= result.largest > (1e-2 if dtype.itemsize == 2 else 1e-5)
    return result


def _largest(x: Tensor, y: Tensor) -> float:
    if x.numel() == 0:
        return 0.0
    difference = (x.double() - y.double()).abs() / y.double().abs().clamp(min=1)
    return float(difference.nan_to_num(float("inf")).max())


def compare_all(device: torch.device, sizes: Sequence[int], say: Callable[[str], None]) -> list[Comparison]:
    """Every combination of options."""
    results = []
    # Rounding to bfloat16, the interpreter truncates.
    for name, *kind in combinations([x for x in DTYPES if device.type == "cuda" or x != "bfloat16"]):
        result = compare(name, device, sizes, *kind)
        results.append(result)
        if result.failed:
            say(f"FAILED {result}")
    say(summary(results))
    return results


def summary(results: Sequence[Comparison]) -> str:
    """One sentence on all comparisons."""
    exact = [r for r in results if r.exact]
    return (
        f"{len(results)} combinations of options, {sum(r.failed for r in results)} failed; after "
        f"{STEPS * sum(r.elements for r in exact)} decisions {sum(r.params for r in exact)} parameters differ, and "
        f"{sum(r.states for r in exact)} momenta"
    )


def run_self_check(device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """What the self-check finds, and what it costs: first with the compilation of its kernels, then without."""
    costs = []
    for _ in range(2):
        started = time.perf_counter()
        differs = self_check.difference(engine, device)
        costs.append(time.perf_counter() - started)
    say(f"self-check: {differs or 'passed'}, {costs[0]:.1f} s with compilation, {costs[1]:.3f} s without")
    return {"passed": differs is None, "difference": differs, "first_seconds": costs[0], "seconds": costs[1]}


# --- timing ----------------------------------------------------------------------------------------------------------


def seconds(runner: bench.StepRunner, device: torch.device, steps: int) -> float:
    """Mean time of some steps in a row, of which the host does not wait for any but the last."""
    step = runner.stepper.step
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - started) / steps
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / steps


def measure(
    title: str,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    steps: int,
    say: Callable[[str], None],
) -> bench.StepResult:
    """Times of signstep's and torch's contestants."""
    params, grads = bench.make_parameters(shapes, dtype, device)
    peer = peer_for(dtype, device)
    result = bench.StepResult(title, title, len(params), sum(p.numel() for p in params), peer)
    for name in ("signstep", "torch"):
        say(f"{title}, {dtype}: {name}")
        runners, entries = bench.set_up(groups(dtype, peer)[name], params, grads)
        for key, entry in entries.items():
            result.entries.setdefault(key, entry)
        shuffle = random.Random(name)
        for _ in range(rounds):
            order = list(runners)
            shuffle.shuffle(order)
            result.rounds.append(bench.StepRound(name, {key: seconds(runners[key], device, steps) for key in order}))
        del runners
        gc.collect()
    return result


def bandwidth(result: bench.StepResult) -> float:
    """Bytes per second of the copies."""
    return result.entries[COPY].bytes_per_parameter * result.parameters / result.median(COPY)


def targets(result: bench.StepResult) -> Iterator[Target]:
    """What is wanted of a step, beside what was measured."""
    for key, label in OURS.items():
        yield Target(f"{label}, share of the copy's bytes per second", SHARE, True, result.share(key))
        ratio = result.ratio(key, "adamw-fused")
        yield Target(f"{label}, time over torch AdamW(fused)", OVER_ADAMW, False, ratio)


# --- report ----------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """What this ran on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter",
        "driver": self_check.driver(),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def timing_record(result: bench.StepResult, dtype: str) -> dict[str, Any]:
    """A workload's numbers, every time included."""
    contestants = {}
    for key, entry in result.entries.items():
        contestants[key] = asdict(entry)
        if (share := result.share(key)) is not None:
            contestants[key] |= {"median_seconds": result.median(key), "share_of_copy": asdict(share)}
            ratios = {peer: result.ratio(key, peer) for peer in PEERS}
            contestants[key]["ratios"] = {peer: None if r is None else asdict(r) for peer, r in ratios.items()}
    return {
        "title": result.title,
        "dtype": dtype,
        "tensors": result.tensors,
        "parameters": result.parameters,
        "copy_bytes_per_second": bandwidth(result),
        "contestants": contestants,
        "targets": [target.to_dict() for target in targets(result)],
        "rounds": [asdict(r) for r in result.rounds],
    }


def markdown(record: dict[str, Any]) -> str:
    """The record for people."""
    made = record["machine"]
    lines = [
        f"# The Triton engine on {made['device']}",
        "",
        f"`{record['command']}`",
        "",
        f"torch {made['torch']}, Triton {made['triton']}, CUDA {made['cuda']}, HIP {made['hip']}, "
        f"driver {made['driver']}, {made['platform']}",
        "",
        f"Self-check: {record['self_check']['difference'] or 'passed'}.",
        "",
        f"Against plain torch on the CPU: {record['summary']}.",
    ]
    for timing in record["timings"]:
        size = f"{timing['parameters'] / 1e6:.2f} M parameters in {timing['tensors']} tensors"
        lines += ["", f"## {timing['title']}, {timing['dtype']}: {size}", ""]
        lines += [f"Copy: {timing['copy_bytes_per_second'] / 1e9:.0f} GB/s", ""]
        rows = []
        for entry in timing["contestants"].values():
            row = [entry["label"], entry["missing"] or "", "", "", "", ""]
            if entry["missing"] is None:
                row[1:3] = f"{entry['median_seconds'] * 1e3:.4f}", f"{entry['bytes_per_parameter']:g}"
                row[3] = f"{entry['share_of_copy']['median']:.2f}"
                row[4:] = (f"{r['median']:.2f}" if (r := entry["ratios"][peer]) else "" for peer in PEERS)
            rows.append(row)
        lines += markdown_table(
            ["optimizer", "ms", "bytes", "share of the copy", "over SGD, fused", "over AdamW, fused"], rows
        )
        rows = []
        for target in timing["targets"]:
            value = "" if target["measured"] is None else f"{target['measured']['median']:.2f}"
            limit = f"{'≥' if target['at_least'] else '≤'} {target['limit']}"
            rows.append([target["target"], limit, value, target["verdict"]])
        lines += ["", *markdown_table(TARGETS_HEAD, rows)]
    return "\n".join(lines) + "\n"


def sanitize() -> int:
    """The comparison under compute-sanitizer: memory, and races in shared memory."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not on the PATH")
        return 1
    # Else torch's pool hides an access beyond a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    worst = 0
    for check in ("memcheck", "racecheck"):
        command = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "3",
            sys.executable,
            __file__,
            "--only-compare",
            "--sizes",
            "5000,257,0,1",
        ]
        print(shlex.join(command), flush=True)
        worst = max(worst, subprocess.run(command, env=environment, check=False).returncode)
    return worst


def main() -> int:
    """Compare, time and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--only-compare", action="store_true")
    parser.add_argument("--sizes", help="of the tensors that are compared, with commas between")
    parser.add_argument("--millions", type=float, help="parameters that are timed, in millions")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="in a row, per contestant and round")
    parser.add_argument("--out", type=Path, help="folder, results/bench-gpu if not given")
    arguments = parser.parse_args()
    if arguments.sanitize:
        return sanitize()
    if not (arguments.interpret or torch.cuda.is_available()):
        parser.error("there is no GPU here; --interpret runs the script on the CPU")
    device = torch.device("cpu") if arguments.interpret else torch.device("cuda", 0)
    sizes, millions = "200003,65536,257,1,0,1024", 100.0
    if arguments.interpret:
        fused._ENGINES["cpu"] = engine.__name__
        self_check.FOUND[device] = None
        sizes, millions = "300,16,0", 0.002
        arguments.rounds, arguments.steps = 2, 1
    sizes, millions = arguments.sizes or sizes, arguments.millions or millions

    def say(line: str) -> None:
        print(line, flush=True)

    checked = run_self_check(device, say)
    comparisons = compare_all(device, [int(n) for n in sizes.split(",")], say)
    # Rounding to bfloat16, the interpreter truncates, which the self-check finds.
    failed = int(not (checked["passed"] or arguments.interpret) or any(c.failed for c in comparisons))
    if arguments.only_compare:
        return failed
    timings = []
    equal = (f"{millions:g} M in equal tensors", [(int(millions * 1e6 / 5),)] * 5)
    gpt2 = ("GPT-2", list(gpt2_shapes(0, 8, 20, 8) if arguments.interpret else gpt2_shapes()))
    for dtype, (title, shapes) in itertools.product(("float32", "bfloat16"), (equal, gpt2)):
        result = measure(title, shapes, DTYPES[dtype], device, arguments.rounds, arguments.steps, say)
        timings.append(timing_record(result, dtype))
        for target in timings[-1]["targets"]:
            value = target["measured"] and round(target["measured"]["median"], 3)
            say(f"  {target['target']}: {value} ({target['verdict']})")
    record = {
        "command": shlex.join(["python", "benchmarks/gpu_step.py", *sys.argv[1:]]),
        "machine": machine(device),
        "self_check": checked,
        "summary": summary(comparisons),
        "comparisons": [asdict(c) for c in comparisons],
        "timings": timings,
    }
    folder = Path(tempfile.mkdtemp()) if arguments.interpret else ROOT / "results" / "bench-gpu"
    name = record["machine"]["device"].replace(" ", "-")
    written = write_all(arguments.out or folder, {f"{name}.json": record, f"{name}.md": markdown(record)})
    say(f"written: {', '.join(map(str, written))}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
