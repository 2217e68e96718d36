"""Pages from the templates beside this file, HTML for a browser and Markdown, with the filters that they share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

import jinja2
from jinja2.bccache import Bucket
from markupsafe import Markup

from signstep.lab.output import figures, stats


class _Compiled(jinja2.BytecodeCache):
    """The templates as this process has compiled them, which takes longer than to fill them in."""

    def __init__(self) -> None:
        self._code: dict[tuple[str, str], CodeType] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        """Give the bucket the code of its template, if there is any; its checksum is that of the source."""
        bucket.code = self._code.get((bucket.key, bucket.checksum))

    def dump_bytecode(self, bucket: Bucket) -> None:
        """Keep the code of the bucket's template."""
        assert bucket.code is not None
        self._code[bucket.key, bucket.checksum] = bucket.code


_COMPILED = _Compiled()


def render(template: str, context: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]] | None = None) -> str:
    """The text of a page.

    Args:
        template: name of a file in `templates`; in one that ends in `.html`, values are escaped unless they are Markup.
        context: the template's variables by name. `palette`, the CSS of the figures' colours, is added.
        filters: the template's own filters by name, beside number, signed, shortsigned, interval, paper,
            probability, unbroken, md.

    Raises:
        jinja2.UndefinedError: the template uses a variable that is not there.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("signstep.lab.output"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        bytecode_cache=_COMPILED,
    )
    environment.filters |= {
        "number": stats.number,
        "signed": stats.signed,
        "shortsigned": lambda value: stats.signed(value, 0 if abs(value - round(value)) < 1e-9 else 2),
        "interval": stats.with_interval,
        "paper": stats.paper_number,
        "probability": stats.probability,
        "unbroken": _unbroken,
        "md": lambda text: str(text).translate({ord(c): f"\\{c}" for c in "\\|*_`[]<>"}),
        **(filters or {}),
    }
    return environment.get_template(template).render(palette=Markup(figures.palette_css(":root")), **context)


def _unbroken(text: str) -> Markup:
    """Text whose hyphenated words, short sums, intervals and bracketed remarks stay on one line."""
    glued = re.sub(r" ± | %|(?<!\S)\w{1,5} \+ (?=\w)", lambda m: m[0].replace(" ", "\xa0"), text)
    glued = re.sub(r"\([^()]{1,12}\)", lambda m: m[0].replace(" ", "\xa0"), glued)
    words = (
        Markup('<span class="whole">{}</span>').format(w) if "-" in w else Markup.escape(w) for w in glued.split(" ")
    )
    return Markup(" ").join(words)
