"""What all figures share: sizes, letters and colours, the user's settings before the library's, and saving.

Invariant: no figure goes through pyplot, and none is drawn by changing matplotlib's settings: threads share these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from tensoradapt.errors import FileError
from tensoradapt.paths import expand
from tensoradapt.plots.pgf import write_pgf
from tensoradapt.writing.atomic import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
STROKE = 1.2  # the width of a line of data, in points
# Settings by which a user says what letters should be like: one of them, and all sizes are taken from the settings.
LETTERS = (
    *("font.family", "font.serif", "font.sans-serif", "font.size", "axes.labelsize", "axes.titlesize"),
    *("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "text.usetex"),
)
WRITTEN = {"svg.fonttype": "none", "svg.hashsalt": "tensoradapt", "pdf.fonttype": 42}
# The dates are left out, so that one figure gives one file.
METADATA: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".pgf": {}}
SAVING = Lock()
Layout = Literal["constrained"] | None


@dataclass(frozen=True)
class Letters:
    """Sizes in points: names of axes, numbers at ticks, keys, titles of panels, and notes within them."""

    label: float = 7.0
    tick: float = 6.5
    key: float = 6.5
    title: float = 7.0
    note: float = 6.0

    @property
    def scale(self) -> float:
        """How much larger they are than the library's own: sizes on the page grow with them."""
        return self.key / 6.5


def letters(*, settings: bool = False) -> Letters:
    """The library's small letters for print; those of the `settings` if asked, or where the user has touched one."""
    from matplotlib.font_manager import FontProperties

    if not settings and all(untouched(name) for name in LETTERS):
        return Letters()
    points = lambda name: FontProperties(size=all_settings()[name]).get_size_in_points()  # noqa: E731
    key = points("legend.fontsize")
    return Letters(points("axes.labelsize"), points("xtick.labelsize"), key, points("axes.titlesize"), 0.92 * key)


def untouched(name: str) -> bool:
    """Whether a setting is as matplotlib has it by default."""
    from matplotlib import rcParamsDefault

    default: Any = rcParamsDefault
    return bool(all_settings()[name] == default[name])


def all_settings() -> Any:
    """Matplotlib's settings, by names that need not be literal."""
    from matplotlib import rcParams

    return rcParams


def setting(name: str, ours: Any) -> Any:
    """A setting of the user's; `ours` where it is untouched."""
    return ours if untouched(name) else all_settings()[name]


def ink() -> str:
    """The colour of words and of what is drawn like them: the user's, else nearly black."""
    found: str = setting("text.color", INK)
    return found


def stroke(width: float) -> float:
    """A line's width in points, in proportion to the user's."""
    found: float = width * setting("lines.linewidth", STROKE) / STROKE
    return found


def new_figure(width: float, height: float, layout: Layout = "constrained") -> Figure:
    """An empty figure of a size in millimetres, which a notebook shows even where pyplot was never imported."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / INCH, height / INCH), layout=layout)
    setattr(figure, "_repr_png_", partial(_as_png, figure))  # noqa: B010  matplotlib's own class has no such method
    return figure


def _as_png(figure: Figure) -> bytes:
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=max(200, figure.dpi))
    return stream.getvalue()


def dress(axes: Axes, sizes: Letters) -> Axes:
    """The library's look for axes of its own, in what the user has not set: two spines, thin, and these letters."""
    for side, spine in axes.spines.items():
        spine.set_linewidth(setting("axes.linewidth", 0.6))
        if side in ("top", "right"):
            spine.set_visible(setting(f"axes.spines.{side}", False))
    axes.tick_params(labelsize=sizes.tick)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(sizes.label)
    return axes


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
    with atomic(path) as temporary:
        if suffix == ".pgf":
            return write_pgf(figure, temporary)
        with writing(WRITTEN):
            dpi = setting("savefig.dpi", DPI)
            figure.savefig(temporary, format=suffix[1:], dpi=dpi, metadata=METADATA[suffix])


@contextmanager
def writing(settings: Mapping[str, Any]) -> Iterator[None]:
    """Settings that matplotlib's writers read from its global ones: these alone, one thread at a time, and put back."""
    with SAVING:
        before = {name: all_settings()[name] for name in settings}
        all_settings().update(settings)
        try:
            yield
        finally:
            all_settings().update(before)
