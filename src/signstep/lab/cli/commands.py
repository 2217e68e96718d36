"""How a command is found and its options are parsed, for `signstep`, `signstep bench` and `signstep study`.

A command is a dataclass of options with a method `run`; it lives in a file of its own, which is imported when the
command has been chosen. What there is to choose from is a `Commands`, one line for each command.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from signstep import __version__


class Runnable(Protocol):
    """A dataclass of options."""

    def run(self) -> int:
        """Do what the options say, and return the exit code."""
        ...


OptionsT = TypeVar("OptionsT")

_ELSEWHERE = {
    "learning-rate": "lr",
    "wd": "weight-decay",
    "decay": "weight-decay",
    "bs": "batch-size",
    "bsz": "batch-size",
    "arch": "model",
    "net": "model",
    "opt": "optimizer",
    "beta": "momentum",
    "gpu": "device",
    "data-dir": "data",
    "data-path": "data",
    "output": "out",
    "output-dir": "out",
    "out-dir": "out",
    "log-dir": "out",
}
"""What other programs call an option, where the name is too unlike ours for tyro to find."""


def parse(options: type[OptionsT], arguments: Sequence[str], *, prog: str, default: OptionsT | None = None) -> OptionsT:
    """Options from the words of a command line; on bad ones the process exits with code 2.

    Args:
        options: a dataclass. The docstrings of its fields are their help.
        arguments: the words after the command's name.
        prog: the command's name, for the help.
        default: what the options are without arguments, if not the fields' own defaults.
    """
    import tyro

    # Comments that group a dataclass's fields are not their help.
    config = (tyro.conf.HelptextFromCommentsOff,)
    try:
        if default is None:
            return tyro.cli(options, args=arguments, prog=prog, config=config)
        return tyro.cli(options, args=arguments, prog=prog, config=config, default=default)
    except SystemExit as ended:
        if ended.code:
            names = set(_option_names(options if default is None else default))
            for word in arguments:
                known = _ELSEWHERE.get(word.partition("=")[0].removeprefix("--").replace("_", "-"))
                if word.startswith("--") and known in names:
                    print(f"{word.partition('=')[0]}: did you mean --{known}?", file=sys.stderr)
        raise


def _option_names(options: Any) -> Iterator[str]:
    """The options of a dataclass, or of an instance with those of the dataclasses in it."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name, None)
        if dataclasses.is_dataclass(value):
            yield from _option_names(value)
        else:
            yield field.name.replace("_", "-")


def _did_you_mean(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"did you mean {near[0]}?" if near else ""


class Commands:
    """Commands to choose from.

    Args:
        prog: what stands before a command's name.
        description: for the help.
        entries: by a command's name, where it is and a line of help. The place is ``module:name``; the name is that of
            a dataclass of options (`Runnable`), or of a function that takes the remaining words and returns the exit
            code.
        default: the command where there are no words at all; None: there has to be one.
        version: have an option ``--version``.
    """

    def __init__(
        self,
        prog: str,
        description: str,
        entries: Mapping[str, tuple[str, str]],
        *,
        default: str | None = None,
        version: bool = False,
    ) -> None:
        self.prog, self.description, self.entries, self.default = prog, description, entries, default
        self.version = version

    def __call__(self, arguments: Sequence[str]) -> int:
        """Run the command that the first word names, with the others as its options; returns the exit code."""
        words = list(arguments)
        if not words and self.default is not None:
            words = [self.default]
        parser = self._parser()
        options = ["-h", "--help", *(["--version"] * self.version)]
        if words and words[0].startswith("-") and words[0] not in options:
            meant = _did_you_mean(words[0], options) or "a command comes first"
            parser.error(f"unrecognized option: {words[0]}; {meant}")
        if words and words[0] not in (*self.entries, *options):
            meant = _did_you_mean(words[0], self.entries) or f"the commands are {', '.join(self.entries)}"
            parser.error(f"there is no command {words[0]}: {meant}")
        name: str = parser.parse_args(words[:1]).command
        module, _, attribute = self.entries[name][0].partition(":")
        target = getattr(importlib.import_module(module), attribute)
        if isinstance(target, type):
            target = functools.partial(_run, target, prog=f"{self.prog} {name}")
        code: int = target(words[1:])
        return code

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            prog=self.prog,
            description=self.description,
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=16),
            allow_abbrev=False,
        )
        if self.version:
            parser.add_argument("--version", action="version", version=f"signstep {__version__}")
        title = "commands" if self.default is None else f"commands, of which {self.default} is the default"
        names = parser.add_subparsers(dest="command", metavar="COMMAND", title=title, required=True)
        for name, (_, line) in self.entries.items():
            names.add_parser(name, help=line, add_help=False)
        return parser


def _run(options: type[Runnable], arguments: Sequence[str], *, prog: str) -> int:
    return run(parse(options, arguments, prog=prog))


def run(command: Runnable) -> int:
    """Run a command, whose results, if they go to a folder ``--out``, are seen to have a place before any work."""
    from signstep.lab.output.files import output_folder

    with output_folder(getattr(command, "folder", command.out) if hasattr(command, "out") else None):
        return command.run()
