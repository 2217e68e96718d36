"""Docstrings are written for `help()`, in PyTorch's style: here their equations and examples become Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_MATH = re.compile(r"^( *)\.\. math::\n((?:(?:\1 +.*)?\n)*(?:\1 +.*\n?))", re.MULTILINE)
_CODE = re.compile(r"^( *)\.\. code-block:: (\w+)\n\n?((?:(?:\1 +.*)?\n)*(?:\1 +.*\n?))", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """What of a docstring is reStructuredText, as Markdown."""
    text = _MATH.sub(_equation, text)
    text = _CODE.sub(_block, text)
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    return re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)


def _equation(match: re.Match[str]) -> str:
    body = textwrap.dedent(match[2]).strip()
    if "&" in body and r"\begin" not in body:
        body = rf"\begin{{aligned}}{body}\end{{aligned}}"
    return textwrap.indent(f"\n$$\n{body}\n$$\n\n", match[1])


def _block(match: re.Match[str]) -> str:
    return textwrap.indent(f"```{match[2]}\n{textwrap.dedent(match[3]).strip()}\n```\n", match[1])
