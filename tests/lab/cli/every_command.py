"""Every command of the command line, those of a choice of commands too."""

import importlib

from signstep.lab.cli import COMMANDS
from signstep.lab.cli.commands import Commands


def commands(of: Commands) -> list[tuple[str, str, str]]:
    """Every command's words, place and line of help; those of a choice of commands too."""
    found = []
    for name, (place, line) in of.entries.items():
        found.append((f"{of.prog} {name}", place, line))
        target = target_of(place)
        found += commands(target) if isinstance(target, Commands) else []
    return found


def target_of(place: str) -> object:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


ALL = commands(COMMANDS)
