"""The command `signstep verify`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from signstep.lab.output.command import command_line

# Importing a file of statements registers its checks.
from signstep.lab.verify import (  # noqa: F401
    dithered_sign,
    dithered_training,
    estimators,
    gauss,
    majority,
    projection_length,
    projection_rate,
    projection_switch,
    registry,
    theorem_bounds,
    theorem_steps,
    verification_report,
)
from signstep.lab.verify.registry import CheckOutcome

_UNEXPECTED = 1


@dataclass(frozen=True)
class VerifyStatements:
    """Check what the paper and the docs state, each statement by a measurement with its error; about a minute.

    Exit code 0: every verdict is the one recorded with its check; 1: one is not.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Checks, or groups of them; none: all."""
    json: bool = False
    """Print JSON in place of tables."""
    out: Path | None = None
    """Folder to write verify.html, .md and .json to."""
    list: bool = False
    """Name the checks, and measure nothing."""

    @property
    def command(self) -> str:
        return command_line(["verify", *self.names], self, omit=("names",))

    def run(self) -> int:
        """Measure, print, write, and return the exit code.

        Raises:
            BadInput: a name that is no check's and no group's.
            OSError: `out` cannot be written.
        """
        checks = registry.select(self.names)
        console = Console()
        if self.list:
            verification_report.show_list(console, checks)
            return 0
        outcomes = _measure([each.name for each in checks])
        record = verification_report.to_dict(outcomes, command=self.command)
        if self.json:
            sys.stdout.write(verification_report.to_json(record))
        else:
            verification_report.show(console, outcomes)
        if self.out is not None:
            for path in verification_report.write(outcomes, record, self.out):
                print(f"written: {path}", file=sys.stderr if self.json else sys.stdout)
        return 0 if all(each.as_expected for each in outcomes) else _UNEXPECTED


def _measure(names: Sequence[str]) -> list[CheckOutcome]:
    """Run the checks, saying which on a terminal."""
    outcomes: list[CheckOutcome] = []
    messages = Console(stderr=True)
    threads = torch.get_num_threads()
    # Small operations: two threads are no faster, and one gives the same sums everywhere.
    torch.set_num_threads(1)
    try:
        with messages.status("") as status:
            for i, each in enumerate(registry.CHECKS[name] for name in names):
                if messages.is_terminal:
                    status.update(f"{each.name} ({i + 1} of {len(names)})")
                outcomes.extend(registry.run([each]))
    finally:
        torch.set_num_threads(threads)
    return outcomes
