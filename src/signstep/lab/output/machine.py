"""What a result was measured on."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def now() -> str:
    """Date and time of a record, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What a run ran on: versions, processor, device, threads per process, processes, and the checkout's commit."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
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
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "git": git,
    }
