"""The command line that runs a dataclass of options: for the record of a result, and for processes to start."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection
from typing import Any


def option_words(options: Any, *, omit: Collection[str] = (), everything: bool = False) -> list[str]:
    """The words of a command line that give a dataclass of options its values.

    Args:
        options: a dataclass instance. A tuple becomes several words, a flag ``--name`` or ``--no-name``, a float its
            shortest form; an option that is None, or an empty tuple by default, is left out.
        omit: names of fields to leave out.
        everything: spell options that have their default too.

    Example:
        >>> @dataclasses.dataclass
        ... class Options:
        ...     workers: tuple[int, ...] = (2, 4)
        ...     step_ms: float = 80.0
        >>> option_words(Options(workers=(8, 16)))
        ['--workers', '8', '16']
        >>> option_words(Options(), everything=True)
        ['--workers', '2', '4', '--step-ms', '80']
    """
    words = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in omit or value is None or (value == default and not (everything and value != ())):
            continue
        option = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{option}", *(repr(v).removesuffix(".0") if isinstance(v, float) else str(v) for v in values)]
    return words


def by_torchrun(command: str, processes: int) -> str:
    """A command line of the lab in so many processes; in one it stays as it is.

    >>> by_torchrun("signstep study byzantine", 4)
    'torchrun --nproc-per-node 4 -m signstep study byzantine'
    """
    return command if processes == 1 else f"torchrun --nproc-per-node {processes} -m {command}"


def command_line(
    command: Collection[str], options: Any, *, omit: Collection[str] = (), everything: bool = False
) -> str:
    """`signstep <command> <options>` for a shell; arguments as of `option_words`.

    Example:
        >>> @dataclasses.dataclass
        ... class Options:
        ...     out: str = "results"
        >>> command_line(["study", "byzantine"], Options("my results"))
        "signstep study byzantine --out 'my results'"
    """
    return shlex.join(["signstep", *command, *option_words(options, omit=omit, everything=everything)])
