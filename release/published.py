"""The metadata that an index shows: the project's addresses, and a README whose links work away from the repository.

scikit-build-core calls `dynamic_metadata` whenever it builds, see pyproject.toml. It runs before anything is installed,
so it uses the standard library alone.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

_LINK = re.compile(r"(!?)(\[[^\]]*\])\((?![a-z]+:|#)([^)\s]+)\)")


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, Any]:
    """What pyproject.toml declares as dynamic."""
    where = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["signstep"]
    repository = where["repository"].rstrip("/")
    text = (ROOT / "README.md").read_text("utf-8")
    return {
        "readme": {"content-type": "text/markdown", "text": absolute(text, repository, f"v{project['version']}")},
        "urls": {
            "Documentation": where["documentation"],
            "Repository": repository,
            "Issues": f"{repository}/issues",
            "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        },
    }


def absolute(text: str, repository: str, tag: str) -> str:
    """Lead relative links and pictures of a Markdown text to the files of a tag."""

    def led(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        return f"{picture}{words}({repository}/{'raw' if picture else 'blob'}/{tag}/{target})"

    return _LINK.sub(led, text)
