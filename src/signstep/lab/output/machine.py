"""What a result was measured on."""

from __future__ import annotations

import datetime
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from signstep.kernels import native

_CPUINFO, _CACHES = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu/cpu0/cache")
_LETTERS = {"Data": "d", "Instruction": "i", "Unified": ""}


def now() -> str:
    """Date and time of a record, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _processor() -> tuple[str, str | None]:
    """Its name, and the numbers that tell apart what goes by the same name."""
    fields: dict[str, str] = {}
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().partition("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    numbers = [f"{name} {fields[key]}" for name in ("family", "model", "stepping")
               if (key := "cpu family" if name == "family" else name) in fields]  # fmt: skip
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, " ".join([fields.get("vendor_id", ""), *numbers]).strip() or None


def caches(folder: Path = _CACHES) -> str | None:
    """The caches that the first core uses, as "L1d 32K, L1i 32K, L2 1024K, L3 32768K"; None where Linux does not say.

    Args:
        folder: with a folder ``index<n>`` for every cache, in which are the files level, type and size.
    """
    found = []
    for each in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((each / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:  # a machine that is virtual may not give all of them
            continue
        found.append(f"L{level}{_LETTERS.get(kind, '')} {size}")
    return ", ".join(found) or None


def _instruction_sets() -> tuple[str | None, str | None]:
    """The one that the native library steps with, which SIGNSTEP_ISA may force, and the best of this machine."""
    if native.unavailable() is not None:
        return None, None
    return native.best_isa(), native.machine_isa()


def processor_name(cpu: str) -> str:
    """A processor's name without what says nothing of it.

    >>> processor_name("Intel(R) Xeon(R) Processor @ 2.10GHz"), processor_name("AMD EPYC 7763 64-Core Processor")
    ('Intel Xeon', 'AMD EPYC 7763')
    """
    return " ".join(re.sub(r"\(\w+\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", cpu).split())


def machine_kind(environment: Mapping[str, Any]) -> str:
    """The processor and its instruction set, or the GPU, as part of a file's name.

    Args:
        environment: what `environment` gave, or a record of before with its "cpu_capability" instead of the "isa".

    Example:
        >>> machine_kind({"cpu": "Intel(R) Xeon(R) Processor @ 2.10GHz", "isa": "avx512", "device": "cpu"})
        'intel-xeon-avx512'
    """
    if environment["device"] != "cpu":
        return _as_file_name(environment["device"])
    isa = environment["isa"] if "isa" in environment else environment["cpu_capability"]
    return _as_file_name(f"{processor_name(environment['cpu'])} {isa or 'no library'}")


def _as_file_name(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What a run ran on: versions, processor, device, threads per process, processes, and the checkout's commit."""
    cpu, model = _processor()
    isa, best = _instruction_sets()
    checkout = Path(__file__).parents[4]
    git = None
    if (checkout / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
        git = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {
        "signstep": metadata.version("signstep"),
        "torch": str(torch.__version__),  # torch's own class of strings is refused by torch.load(weights_only=True)
        "python": platform.python_version(),
        "cpu": cpu,
        "cpu_model": model,
        "isa": isa,
        "isa_best": best,
        "caches": caches(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "git": git,
    }
