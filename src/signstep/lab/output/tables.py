"""Markdown tables. Written here in a few lines: tabulate does not escape `|`, and pads every cell to one width."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """The lines of a Markdown table.

    Args:
        head: the titles of the columns.
        rows: the cells, as many in a row as there are titles.
        left: numbers of the columns that are aligned left; the others hold numbers and are aligned right.

    Returns:
        Two lines for the head and one for every row.

    Example:
        >>> print("\\n".join(markdown_table(["method", "accuracy"], [["sgd", "93.1"]])))
        | method | accuracy |
        | --- | ---: |
        | sgd | 93.1 |
    """
    rule = ["---" if column in left else "---:" for column in range(len(head))]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    return ["| " + " | ".join(line) + " |" for line in (escaped[0], rule, *escaped[1:])]
