"""README's table of what a step costs, from the results of `signstep bench step`; `signstep report docs` writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from signstep.lab.bench.spread import number
from signstep.lab.errors import BadInput
from signstep.lab.output.machine import machine_kind, processor_name
from signstep.lab.output.tables import markdown_table

_ROWS = {
    "sgd-fused": "SGD, momentum 0.9, fused",
    "adam-fused": "Adam, fused",
    "clean": "SignSGD",
    "dither": "SignSGD, dithered",
    "relative": "SignSGD, relative dither",
    "hybrid": "HybridSignSGD, sign phase",
    "hybrid-sgd": "HybridSignSGD, SGD phase",
    "lion": "Lion",
    "momentum-0": "SignSGD without momentum",
    "state-int8": "SignSGD, 8-bit momentum",
    "state-bf16": "SignSGD, bf16 momentum",
    "bf16-nearest": "SignSGD, bf16 parameters and momentum, to the nearest",
    "eager": "SignSGD without the native library",
    "eager-dither": "SignSGD without the native library, dithered",
    "plain-foreach": "dithered sign step in plain torch (foreach, randn_like)",
    "pytorch-optimizer": "pytorch_optimizer SignSGD",
    "lion-pytorch": "lion-pytorch Lion",
    "heavyball": "heavyball SignLaProp",
}
_WORKLOADS = {"50m": "50 M", "resnet18": "ResNet-18"}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, of float32 on processors, in the order of their kinds of machine.

    Raises:
        BadInput: there is none, or a file is not what `signstep bench step` writes.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("bench-step-*.json")):
        try:
            record = json.loads(path.read_text())
            if record["dtype"] == "float32" and record["machine"]["device"] == "cpu":
                found[machine_kind(record["machine"])] = record
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}: not what signstep bench step writes ({error!r})") from error
    if not found:
        raise BadInput(f"{folder}: no result of a CPU; measure one with signstep bench step --out {folder}")
    return [found[kind] for kind in sorted(found, reverse=True)]


def _contestants(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """By key; before bfloat16 parameters were rounded at random, the row bf16 was that to the nearest."""
    return found if "bf16-nearest" in found or "bf16" not in found else {**found, "bf16-nearest": found["bf16"]}


def step_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of the table: for every kind of machine and workload the median of time over fused SGD's."""
    columns = []
    for record in records:
        made = record["machine"]
        isa = made["isa"] or "no library" if "isa" in made else made["cpu_capability"]
        name = f"{processor_name(made['cpu'])}, {isa.upper()}"
        columns += [
            (f"{name}: {title}", _contestants(record["workloads"][key]["contestants"]))
            for key, title in _WORKLOADS.items()
            if key in record["workloads"]
        ]
    rows = []
    for key, label in _ROWS.items():
        there = [contestants.get(key, {}) for _, contestants in columns]
        known = next((each for each in there if "median_seconds" in each), None)
        if known is None:
            continue
        ratios = [number(each["over_peer"]["median"]) if "over_peer" in each else "" for each in there]
        per_parameter = (known["bytes_per_parameter"], known["state_bytes_per_parameter"])
        rows.append((label, *ratios, *(f"{each:.2f}".removesuffix(".00") for each in per_parameter)))
    return markdown_table(("step", *(title for title, _ in columns), "bytes moved", "state"), rows)
