"""`signstep inspect`: what a monitor saw of a run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from signstep.lab.arguments import check_folder
from signstep.lab.cli.commands import parse


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit code."""
    from signstep.lab.studies import inspect_run

    options = parse(inspect_run.Options, arguments, prog="signstep inspect")
    check_folder(options.data)
    inspect_run.run(options, command=shlex.join(["signstep", "inspect", *arguments]))
    return 0
