"""Tables as text: one line a row, names whole, 80 columns unless they are wanted wide."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 80


def first_of(names: Sequence[str], limit: int) -> str:
    """Names in a line, the first of many: `a, b and 3 more`."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def columns(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[str] = (), drop: Sequence[str] = ()
) -> list[str]:
    """The lines of a table; columns named in `text` begin at the left, numbers end at the right.

    Where it is wider than 80 columns, those named in `drop` are left out, the first of them first, until it fits.
    """
    gone = dropped(head, rows, drop)
    places = [k for k, name in enumerate(head) if name not in gone]
    sizes = [max(len(row[k]) for row in (head, *rows)) for k in places]
    left = [head[k] in text for k in places]
    return [
        "  ".join(
            row[k].ljust(n) if at else row[k].rjust(n) for k, n, at in zip(places, sizes, left, strict=True)
        ).rstrip()
        for row in (head, *rows)
    ]


def dropped(head: Sequence[str], rows: Sequence[Sequence[str]], drop: Sequence[str]) -> list[str]:
    """The columns that are left out of a table, of those named in `drop`, for it to fit 80 columns."""
    for count in range(len(drop) + 1):
        if _width([head, *rows], [k for k, name in enumerate(head) if name not in drop[:count]]) <= WIDTH:
            return list(drop[:count])
    return list(drop)


def _width(rows: Sequence[Sequence[str]], places: Sequence[int]) -> int:
    return sum(max(len(row[k]) for row in rows) + 2 for k in places) - 2


def wrapped(text: str, indent: str = "  ") -> list[str]:
    """A sentence in lines of at most 80 columns, those after the first indented; words and paths stay whole."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
