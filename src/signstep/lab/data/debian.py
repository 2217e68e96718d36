"""Takes data sets out of the packages of Debian and its derivatives, without installing them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console

from signstep.lab.data.fetch import workspace
from signstep.lab.data.images import DataError

_APT = ("apt-get", "-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20")


def unpack_package(package: str, inside: str, target: Path) -> None:
    """Put the files that `package` has in its folder `inside` into `target`.

    apt checks what it downloads against the distribution's signatures. Root is not needed where apt's package lists
    exist; as root, missing lists are fetched. Raises DataError where there is no apt or it fails.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DataError(f"no Debian package {package} here (apt-get and dpkg-deb are not installed)")
    with workspace(target) as work, tempfile.TemporaryDirectory(dir=work, prefix="tmp") as unpacked:
        with Console(stderr=True).status(f"Fetching the Debian package {package}"):
            error = _run([*_APT, "download", package], unpacked)
            if error is not None and os.geteuid() == 0:
                error = _run([*_APT, "update"], unpacked) or _run([*_APT, "download", package], unpacked)
            for deb in Path(unpacked).glob("*.deb"):
                error = error or _run(["dpkg-deb", "-x", deb.name, "."], unpacked)
        if error is not None:
            raise DataError(f"the Debian package {package} could not be had ({error})")
        files = sorted((Path(unpacked) / inside).glob("*"))
        if not files:
            raise DataError(f"the Debian package {package} has no {inside}")
        for file in files:
            os.replace(file, target / file.name)


def _run(command: list[str], folder: str) -> str | None:
    """Run a command in `folder`; None if it succeeds, else what it said was wrong."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not finish in 5 minutes"
    if done.returncode == 0:
        return None
    said = [line.strip() for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.split("\n")[-1:]
    return f"{command[0]} ended with {done.returncode}: {said[0] if said else ''}"
