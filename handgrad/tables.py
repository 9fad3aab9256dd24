"""What people read: tables of text cells, on a terminal or in a notebook, and numbers in the unit that suits them."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

Rows: TypeAlias = Sequence[Sequence[str]]
"""The head, and then the body: rows of the same number of cells."""

Units: TypeAlias = Sequence[tuple[str, float]]
"""Names of units, the smallest first, and what one of each is."""

WIDTH = 100  # columns of a terminal that a table takes at most
NARROW = 8  # columns that a cell of text keeps in any case
SECONDS: Units = (("us", 1e-6), ("ms", 1e-3), ("s", 1))
BYTES: Units = (("B", 1), ("KB", 1 << 10), ("MB", 1 << 20), ("GB", 1 << 30))


class Table(NamedTuple):
    """Rows, and for each column l(eft) or r(ight): texts go to the left, numbers to the right."""

    rows: Rows
    align: str


class Shown:
    """What a terminal shows as text and a notebook as HTML. A subclass says what there is to show."""

    def parts(self) -> list[str | Table]:
        """The lines and tables to show, in order."""
        raise NotImplementedError(f"{type(self).__name__} must define parts")

    def __repr__(self) -> str:
        return "\n".join(part if isinstance(part, str) else text_table(*part) for part in self.parts())

    def _repr_html_(self) -> str:
        return "".join(
            f"<p>{html.escape(part)}</p>" if isinstance(part, str) else html_table(*part)
            for part in self.parts()
            if part
        )


def text_table(rows: Rows, align: str) -> str:
    """The rows in columns two spaces apart, each aligned l(eft) or r(ight).

    A table wider than 100 columns has its longest texts, those of columns to the left, in several lines.

    >>> print(text_table([["layer", "rows"], ["Tanh", "5"], ["Linear", "12"]], "lr"))
    layer   rows
    Tanh       5
    Linear    12
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(align))]
    texts = [i for i, side in enumerate(align) if side == "l"]
    while texts and sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        longest = max(texts, key=widths.__getitem__)
        if widths[longest] <= NARROW:
            break
        widths[longest] -= 1
    lines = []
    for row in rows:
        cells = [
            [cell] if len(cell) <= w else textwrap.wrap(cell, w, break_on_hyphens=False) for cell, w in zip(row, widths)
        ]
        for i in range(max(map(len, cells))):
            line = [cell[i] if i < len(cell) else "" for cell in cells]
            sides = [t.ljust(w) if a == "l" else t.rjust(w) for t, w, a in zip(line, widths, align)]
            lines.append("  ".join(sides).rstrip())
    return "\n".join(lines)


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


def unit_of(value: float, units: Units) -> tuple[str, float]:
    """The unit in which a value is below 1000; the largest, where it is in none.

    >>> unit_of(0.0123, SECONDS)
    ('ms', 0.001)
    """
    return next((unit for unit in units if value < 999.95 * unit[1]), units[-1])


def seconds_text(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> seconds_text(2.5e-6), seconds_text(0.0123), seconds_text(3)
    ('2.5 us', '12.3 ms', '3.0 s')
    """
    name, size = unit_of(seconds, SECONDS)
    return f"{seconds / size:.1f} {name}"


def bytes_text(count: int | None) -> str:
    """A number of bytes in the unit that suits it; a KB is 1024 of them. None is a number that nobody knows.

    >>> bytes_text(512), bytes_text(4 << 20), bytes_text(None)
    ('512 B', '4.0 MB', '-')
    """
    if count is None:
        return "-"
    name, size = unit_of(count, BYTES)
    return f"{count / size:.{0 if size == 1 else 1}f} {name}"
