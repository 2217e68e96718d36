"""How a command is found and its options are parsed, for `signstep`, `signstep bench` and `signstep study`.

A command is a dataclass of options with a method `run`; it lives in a file of its own, which is imported when the
command has been chosen. What there is to choose from is a `Commands`, one line for each command.
"""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from signstep import __version__


class Runnable(Protocol):
    """A dataclass of options."""

    def run(self) -> int:
        """Do what the options say, and return the exit code."""
        ...


OptionsT = TypeVar("OptionsT")


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
    if default is None:
        return tyro.cli(options, args=arguments, prog=prog, config=config)
    return tyro.cli(options, args=arguments, prog=prog, config=config, default=default)


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
        if words and words[0].startswith("-") and words[0] not in ("-h", "--help", *(["--version"] * self.version)):
            parser.error(f"unrecognized option: {words[0]}; a command comes first")
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
    return parse(options, arguments, prog=prog).run()
