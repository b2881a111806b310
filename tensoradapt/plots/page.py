"""What all figures share: the size of a printed column, colours that colour-blind readers can tell apart, and saving.

Invariant: no figure goes through pyplot, and matplotlib's settings are as they were once a figure is drawn or saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensoradapt.errors import FileError
from tensoradapt.io.atomic import atomic
from tensoradapt.paths import expand

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN = 80.0  # the width of a printed column, in millimetres
INCH = 25.4
POINT = INCH / 72
DPI = 300
# Okabe and Ito, 2008: Color Universal Design. The yellow is left out: it does not show on white.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, GREY = "#222222", "#999999"
# The same, darker: thin letters need more contrast than lines.
DARKER = {BLUE: "#006BA8", VERMILION: "#B84F00", GREEN: "#008060", PURPLE: "#A8508A"}
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK)
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 7,
    **{
        "axes.titlesize": 7,
        "axes.labelsize": 7,
        "xtick.labelsize": 6.5,
        "ytick.labelsize": 6.5,
        "legend.fontsize": 6.5,
    },
    **{"axes.linewidth": 0.6, "axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False},
    **{"text.color": INK, "text.usetex": False, "text.parse_math": False, "hatch.linewidth": 0.5},
    **{"figure.facecolor": "white", "savefig.facecolor": "auto", "savefig.bbox": None},
    **{"svg.fonttype": "none", "svg.hashsalt": "tensoradapt", "pdf.fonttype": 42},
}
# The dates are left out, so that one figure gives one file.
METADATA: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


@contextmanager
def styled() -> Iterator[None]:
    """The settings of the library's figures, for as long as the block runs."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        yield


def checked(path: str | Path | None) -> Path | None:
    """The path to save to. Raises FileError on a suffix that no figure can be written as."""
    if path is None:
        return None
    path = expand(path)
    if path.suffix.lower() not in METADATA:
        raise FileError(
            f"no figure can be written to {path.name!r}",
            got=path.suffix or "no suffix",
            expected=f"one of {', '.join(METADATA)}",
            hint=f"write {path.with_suffix('.png').name if path.stem else 'figure.png'}",
        )
    return path


def save(figure: Figure, path: Path | None) -> None:
    """Write a figure in the format of its path's suffix, whole or not at all. Raises FileError."""
    if path is None:
        return
    suffix = path.suffix.lower()
    with styled(), atomic(path) as temporary:
        figure.savefig(temporary, format=suffix[1:], dpi=DPI, metadata=METADATA[suffix])
