"""Tables for people: rows of text cells in aligned columns, on a terminal or in a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]
"""The head, and then the body: rows of the same number of cells."""


def text_table(rows: Rows, align: str) -> str:
    """The rows in columns two spaces apart, each aligned l(eft) or r(ight).

    >>> print(text_table([["layer", "rows"], ["Tanh", "5"], ["Linear", "12"]], "lr"))
    layer   rows
    Tanh       5
    Linear    12
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(align))]
    return "\n".join(
        "  ".join(c.ljust(w) if a == "l" else c.rjust(w) for c, w, a in zip(row, widths, align)).rstrip()
        for row in rows
    )


def html_table(rows: Rows, align: str) -> str:
    """The rows as an HTML table: what `_repr_html_` returns.

    >>> html_table([["layer", "rows"], ["a<b", "5"]], "lr").count("a&lt;b")
    1
    """
    sides = ["left" if a == "l" else "right" for a in align]

    def line(row: Sequence[str], tag: str) -> str:
        cells = "".join(f'<{tag} style="text-align: {s}">{html.escape(c)}</{tag}>' for c, s in zip(row, sides))
        return f"<tr>{cells}</tr>"

    return "<table>" + line(rows[0], "th") + "".join(line(row, "td") for row in rows[1:]) + "</table>"
