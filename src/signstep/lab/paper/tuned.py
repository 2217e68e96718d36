"""The learning rates that a sweep has chosen: `tuned.json`, and the rate that a row's runs have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from signstep.lab.errors import BadInput
from signstep.lab.output.files import write_json
from signstep.lab.paper.experiments import Row

Choices = Mapping[str, Mapping[str, Any]]
"""By data set, then by row: the chosen `lr`, its `accuracy` in percent or `bits_per_byte`, and the `trials`."""

_NAME = "tuned.json"


def read_tuned(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The choices in `<folder>/tuned.json`; none where there is no such file.

    Raises:
        BadInput: the file is not what a sweep writes.
    """
    path = folder / _NAME
    if not path.exists():
        return {}
    try:
        choices: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))["choices"]
        for rows in choices.values():
            for choice in rows.values():
                float(choice["lr"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"{path}: not a file that sweep writes ({error!r}); delete it and run the sweep again"
        ) from error
    return choices


def write_tuned(folder: Path, about: Mapping[str, Any], choices: Choices) -> None:
    """Write the choices to `<folder>/tuned.json`, after what there is to say `about` the sweep. What the file says
    about another one stays.
    """
    ordered = {dataset: dict(sorted(choices[dataset].items())) for dataset in sorted(choices)}
    said = json.loads((folder / _NAME).read_text(encoding="utf-8")) if (folder / _NAME).exists() else {}
    write_json(folder / _NAME, {**said, **about, "choices": ordered})


def learning_rate(row: Row, dataset: str, tuned: Choices) -> float:
    """The tuned learning rate of a row on a data set, or the preset's where it was not tuned."""
    choice = tuned.get(dataset, {}).get(row.tuned_key)
    return row.lr if choice is None else float(choice["lr"])
