"""The command `signstep`: finds the command that is asked for, runs it, and turns its end into an exit code.

Each command has its file here, with its options beside its `run`; those of `bench`, `study`, `verify` and `inspect`
are beside the code that they drive. Nothing heavy is imported before the command is known.
"""

from __future__ import annotations

import errno
import io
import sys
import warnings
from collections.abc import Sequence

from signstep.lab.cli.commands import Commands
from signstep.lab.errors import UserError

EXTRA = frozenset(
    {
        "PIL",
        "filelock",
        "jinja2",
        "markupsafe",
        "matplotlib",
        "numpy",
        "platformdirs",
        "pooch",
        "requests",
        "rich",
        "scipy",
        "sklearn",
        "tensorboard",
        "tyro",
    }
)
"""The packages of the extra `lab`, as they are imported."""

_BAD_INPUT = 2
_INTERRUPTED = 130

_DESCRIPTION = """One-bit optimizers, and the experiments that prove or refute what is said of them.

    signstep data get cifar10
    signstep train --dataset cifar10 --optimizer signsgd --lr 1e-3
    signstep runs
    signstep sweep table1 --scale cpu
    signstep reproduce all --scale cpu --seeds 3 --max-minutes 60

Exit code 0: done, or stopped by --max-minutes (the last line says what is left); 1: `train` diverged, or `verify` came
to another verdict than the recorded one; 2: bad input, one sentence on stderr; 130: stopped by Ctrl-C or SIGTERM.
`signstep COMMAND --help` has a command's options."""

COMMANDS = Commands(
    "signstep",
    _DESCRIPTION,
    {
        "data": ("signstep.lab.cli.data:Data", "List the data sets and where each was found, or get one."),
        "train": ("signstep.lab.cli.train:main", "Train one run; the same command again goes on with it."),
        "find-lr": (
            "signstep.lab.cli.find_lr:main",
            "Suggest a learning rate: train for some steps while it rises, and see where the loss falls.",
        ),
        "runs": ("signstep.lab.cli.runs:Runs", "List the runs of a folder: what they are, how good, and how far."),
        "sweep": (
            "signstep.lab.cli.sweep:Sweep",
            "Tune every method's learning rate with the same grid of trials on held-out training images.",
        ),
        "reproduce": (
            "signstep.lab.cli.reproduce:Reproduce",
            "Train what the table or figures still lack, then write them with a report.",
        ),
        "report": (
            "signstep.lab.cli.report:main",
            "Write tables, figures and report from the runs there are, the verdicts on claims, and the docs' numbers.",
        ),
        "compare": (
            "signstep.lab.cli.compare:Compare",
            "Compare optimizers on your own model and data: tuned alike, with seeds, intervals and a report.",
        ),
        "demo": (
            "signstep.lab.cli.demo:Demo",
            "Train sign steps, their peers and the remedies on Fashion-MNIST in minutes, and say what to take from it.",
        ),
        "bench": (
            "signstep.lab.cli.bench:BENCHMARKS",
            "Measure what a step costs in computation and communication, a training over links, and a Monitor.",
        ),
        "plan": (
            "signstep.lab.cli.plan:Plan",
            "Predict bytes and time of a step over the network with every method, and what a vote is worth.",
        ),
        "study": (
            "signstep.lab.cli.study:STUDIES",
            "Measure what a vote is worth, and how far signs can be trusted in the paper's trainings.",
        ),
        "verify": (
            "signstep.lab.verify.verification:VerifyStatements",
            "Check what the paper and the docs state, each statement by a measurement.",
        ),
        "inspect": (
            "signstep.lab.studies.inspect_run:InspectRun",
            "Say what a monitor's records show, or measure a checkpoint of signstep train.",
        ),
    },
    version=True,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: the words after `signstep`; None: those of this process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Labels have Greek letters and arrows; a pipe is to see every line when it is printed.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        with warnings.catch_warnings():
            # `train` says it in its own words; sweeps and statements take such steps on purpose.
            warnings.filterwarnings("ignore", message=".*moves every weight by", category=UserWarning)
            code = COMMANDS(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        code = _INTERRUPTED
    except ModuleNotFoundError as error:
        # Only a package of the extra that is not there: anything else is a mistake of ours, or of that package.
        if error.name not in EXTRA:
            raise
        print(f'signstep: the package {error.name} is not installed; pip install "signstep[lab]"', file=sys.stderr)
        code = _BAD_INPUT
    except UserError as error:
        print(f"signstep: {error}", file=sys.stderr)
        code = _BAD_INPUT
    except OSError as error:
        what = str(error)
        if error.errno == errno.ENOSPC:
            place = error.filename or "standard output, or a file,"
            what = f"{place} cannot be written: {error.strerror}; free some space"
        elif error.filename is not None:
            what = f"{error.filename}: {error.strerror}; see whether it is there, and whether you may read and write it"
        print(f"signstep: {what}", file=sys.stderr)
        code = _BAD_INPUT
    sys.exit(code)
