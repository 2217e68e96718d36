"""The processor's work in a step over the network, which `signstep plan` adds to the time on the wire.

It is taken to be so many seconds per parameter, the same for any number of workers. Methods in which everyone decodes
what everyone has sent have more to do the more workers there are: for them it is the least.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from signstep.distributed.reductions import Gradients
from signstep.lab.bench.comm_cells import UNSHAPED
from signstep.lab.errors import BadInput

NANOSECONDS: dict[str, float] = {
    "ddp-fp32": 6.7,
    "bf16": 5.4,
    "powersgd": 10.9,
    "int8-sum": 4.1,
    "vote": 3.8,
    "vote-dithered": 4.3,
    "vote-abstain": 4.0,
    "vote-ef": 5.6,
    "dithered-sign": 22.2,
    "ef-sign": 9.3,
    "ef-sign-two-sided": 9.1,
    "one-bit-sgd": 10.5,
    "qsgd": 13.1,
    "terngrad": 12.4,
    "top-k": 7.7,
    "one-bit-adam": 9.9,
}
"""Of one core of an AMD EPYC per parameter and step, with 4 workers: results/bench-comm-latency."""


def read_record(option: str, path: Path) -> dict[str, Any]:
    """What `signstep bench comm` has written; `option` named it.

    Raises:
        BadInput: it is not such a file.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if not {"cells", "workloads"} <= record.keys():
            raise ValueError("no cells")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadInput(f"{option} {path}: not what signstep bench comm writes ({error!r})") from error
    return record


def measured_work(record: dict[str, Any], workers: int) -> dict[str, float]:
    """Processor seconds per parameter and step by method, where links are not shaped.

    Of several cells that with the nearest number of workers counts, and of those the one with the most parameters.
    """
    sizes = {key: workload_gradients(each).parameters for key, each in record["workloads"].items()}
    free = [cell for cell in record["cells"] if cell["rate"] == UNSHAPED]
    work: dict[str, float] = {}
    for cell in sorted(free, key=lambda cell: (-abs(math.log(cell["ranks"] / workers)), sizes[cell["workload"]])):
        for key, found in cell["methods"].items():
            work[key] = found["cpu_seconds"] / sizes[cell["workload"]]
    return work


def known_work(path: Path | None, workers: int) -> dict[str, float]:
    """`measured_work` of a file; None: of `NANOSECONDS`.

    Raises:
        BadInput: it is not the record of `signstep bench comm`, or has no cell at the rate none.
    """
    if path is None:
        return {key: 1e-9 * each for key, each in NANOSECONDS.items()}
    record = read_record("--measured", path)
    try:
        work = measured_work(record, workers)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--measured {path}: not what signstep bench comm writes ({error!r})") from error
    if not work:
        raise BadInput(f"--measured {path}: no cell at the rate none; measure with signstep bench comm --rates none")
    return work


def workload_gradients(workload: dict[str, Any]) -> Gradients:
    """The gradients of a workload in a record."""
    return Gradients(tuple(map(tuple, workload["shapes"])))
