"""`signstep verify`: what the paper and the docs state, measured."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from signstep.lab.cli.commands import parse


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit code."""
    from signstep.lab.verify import command

    options = parse(command.Options, arguments, prog="signstep verify")
    return command.run(options, command=shlex.join(["signstep", "verify", *arguments]))
