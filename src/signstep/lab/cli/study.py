"""`signstep study`: the studies there are, a line for each. A study's options are in its own file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from signstep.lab.arguments import check_folder, check_minutes, parse_shard
from signstep.lab.cli.commands import Commands, parse

__all__ = ["STUDIES"]

STUDIES = Commands(
    "signstep study",
    "Measure what a vote is worth, against Byzantine workers (byzantine) and by dither (vote-curve), and how far\n"
    "signs can be trusted in the paper's trainings (monitor).",
    {
        "byzantine": (
            "signstep.lab.cli.study:byzantine",
            "Measure accuracy against the share of Byzantine workers, for majority vote and for the mean.",
        ),
        "monitor": (
            "signstep.lab.cli.study:monitor",
            "Train the paper's methods at the cpu scale under the monitor, and draw what it saw.",
        ),
        "vote-curve": (
            "signstep.lab.cli.study:vote_curve",
            "Measure the expected vote against m / sigma through the kernels, beside the formula.",
        ),
    },
)


def byzantine(arguments: Sequence[str]) -> int:
    from signstep.lab.studies import byzantine as study

    options = parse(study.Options, arguments, prog="signstep study byzantine")
    check_minutes(options.max_minutes)
    check_folder(options.data)
    study.run(options, command=study.command_of(options))
    print(f"written: {options.out}")
    return 0


def monitor(arguments: Sequence[str]) -> int:
    from signstep.lab.studies import monitored as study

    options = parse(study.Options, arguments, prog="signstep study monitor")
    check_folder(options.data)
    study.run(options, shard=parse_shard(options.shard), command=study.command_of(options))
    print(f"written: {options.out}")
    return 0


def vote_curve(arguments: Sequence[str]) -> int:
    from signstep.lab.studies import vote_curve as study

    options = parse(study.Options, arguments, prog="signstep study vote-curve")
    study.run(options, command=shlex.join(["signstep", "study", "vote-curve", *arguments]))
    print(f"written: {options.out}")
    return 0
