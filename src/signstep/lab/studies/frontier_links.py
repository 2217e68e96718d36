"""How long a step of each way takes over links of a given rate and latency: a few steps or rounds, really trained."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from signstep.distributed.plan import Link
from signstep.lab.bench import delayed
from signstep.lab.bench.train import train_over
from signstep.lab.errors import BadInput
from signstep.lab.output.files import read_json, write_json
from signstep.lab.output.machine import now
from signstep.lab.studies.frontier_ways import FAMILIES, WAYS, Workload
from signstep.lab.training.records import read_run

_STEPS, _ROUNDS = 8, 2
"""So many are timed, of a way that talks in every step and of one that does not."""


def file_of(out: Path, link: str) -> Path:
    """Where the times over a link are kept."""
    return out / "links" / f"{link.replace('/', '-')}.json"


def timed(out: Path) -> tuple[str, ...]:
    """The links that have been timed."""
    return tuple(sorted(read_json(path)["link"] for path in (out / "links").glob("*.json")))


def time_ways(link: str, workload: Workload, ways: tuple[str, ...], out: Path, data: Path | None) -> None:
    """Time the ways that have not been timed over a link, one after the other, and keep what was measured.

    Raises:
        BadInput: no such link.
        NetworkError: there can be no namespaces here.
        BenchError: a run fails.
    """
    try:
        shaped = Link.of(link)
    except ValueError as error:
        raise BadInput(f"--links {error}") from error
    path = file_of(out, link)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = read_json(path)["ways"] if path.exists() else {}
    missing = [key for key in ways if key not in kept]
    if not missing:
        return
    with (
        delayed.network(workload.workers, latency=shaped.latency > 0) as network,
        tempfile.TemporaryDirectory(prefix="signstep-") as folder,
    ):
        network.shape(shaped)
        for key in missing:
            way = WAYS[key]
            steps = _STEPS if way.every is None else _ROUNDS * way.every
            config = dataclasses.replace(
                workload.final(key, FAMILIES[way.family].trials[0], seed=0), epochs=1, subset=workload.bytes_of(steps)
            )
            sent = train_over(network, config, Path(folder), data, minutes=20)
            run = read_run(Path(folder) / f"{config.hash}.jsonl")
            seconds = config.batch_size / run.epochs[-1]["timing"]["sequences_per_second"]
            kept[key] = {
                "seconds_per_step": seconds,
                "steps": run.epochs[-1]["step"],
                "bytes_per_rank": sent,
                "environment": run.start["environment"],
                "date": now(),
            }
            print(f"{link}, {way.label}: {1e3 * seconds:.0f} ms per step", flush=True)
            write_json(path, {"link": link, "ways": kept})
