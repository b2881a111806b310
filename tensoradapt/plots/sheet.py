"""What the caller of a figure decides: axes of their own or a size, texts and colours in place of the library's.

Invariant: a name from a table or a report is shown as it stands; only texts that the caller gives are markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensoradapt.errors import SpecError
from tensoradapt.plots.labels import extent
from tensoradapt.plots.page import COLOURS, INCH, Layout, Letters, dress, ink, letters, new_figure, setting, untouched
from tensoradapt.plots.pgf import tex
from tensoradapt.plots.words import fitted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

LEAST, MOST = 0.5, 100.0  # inches


@dataclass(frozen=True)
class Sheet:
    """The caller's axes or size, texts and colours; and the sizes of letters that follow from them."""

    ax: tuple[Any, ...] = ()
    figsize: tuple[float, float] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    colors: Any = None
    letters: Letters = field(default_factory=Letters)

    @property
    def size(self) -> tuple[float | None, float | None]:
        """The width and the height in millimetres that the caller asks for; of the settings the width alone."""
        if self.ax:
            extents = [axes.get_window_extent() for axes in self.ax]
            dpi = root(self.ax[0]).dpi
            return sum(box.width for box in extents) / dpi * INCH, max(box.height for box in extents) / dpi * INCH
        if self.figsize:
            return self.figsize[0] * INCH, self.figsize[1] * INCH
        width = setting("figure.figsize", (None,))[0]
        return (None if width is None else width * INCH), None

    def width(self, natural: float) -> float:
        """The width to draw in: the one asked for, else the natural one in proportion to the letters."""
        return self.size[0] or natural * self.letters.scale

    def height(self, natural: float) -> float:
        """The height to draw in: the one asked for, else the natural one, which the caller of this has computed."""
        return self.size[1] or natural

    def figure(self, width: float, height: float, layout: Layout = "constrained") -> Figure:
        """A figure of a size in millimetres; the one of the caller's axes where there are any."""
        if self.ax:
            return root(self.ax[0])
        figure = new_figure(width, height, layout)
        if self.figsize:
            figure.set_size_inches(*self.figsize)  # to the last digit
        return figure

    def given(self, count: int, panels: str) -> tuple[Axes, ...]:
        """The caller's axes, as many as there are panels; none where none were given. Raises SpecError."""
        if self.ax and len(self.ax) != count:
            raise SpecError(
                f"the figure has {panels}",
                got=f"{len(self.ax)} axes",
                expected=f"ax=one axes{'' if count == 1 else f' for each of {count} panels, as subplots gives them'}",
                hint="choose what is drawn, or leave ax out",
            )
        return self.ax

    def dressed(self, axes: Iterable[Axes]) -> list[Axes]:
        """Axes of the library's own, in its look."""
        return [dress(each, self.letters) for each in axes]

    def said(self, name: object, width: float = math.inf, size: float | None = None) -> str:
        """A name as it is drawn: the caller's text for it, else the name itself, cut to a width in millimetres."""
        return self.labels.get(str(name)) or literal(fitted(name, width, size or self.letters.key))

    def along(self, words: str, length: float) -> str:
        """Words of the library's along an axis; in two lines, after a comma, where they are longer than it."""
        first, comma, rest = words.rpartition(", ")
        long = comma and extent(words, self.letters.label)[0] > length
        return literal(f"{first},\n{rest}" if long else words)

    def colours(self, names: Sequence[str]) -> dict[str, Any]:
        """A colour for every name: the caller's, by name or in order; else the settings' cycle, else the library's."""
        given = self.colors if isinstance(self.colors, Mapping) else {}
        cycle = self._cycle(len(names))
        return {name: given.get(name, cycle[k % len(cycle)]) for k, name in enumerate(names)}

    def _cycle(self, count: int) -> Sequence[Any]:
        if isinstance(self.colors, list):
            return self.colors
        if self.colors is not None and not isinstance(self.colors, Mapping):
            return [self.ramp("cividis")(k / max(1, count - 1)) for k in range(max(1, count))]
        if untouched("axes.prop_cycle"):
            return (*COLOURS[:-1], ink())
        found: list[Any] = setting("axes.prop_cycle", None).by_key().get("color", COLOURS)
        return found

    def ramp(self, default: str) -> Colormap:
        """Colours for numbers: the caller's map, by its name or itself, or through the caller's colours in order."""
        from matplotlib import colormaps
        from matplotlib.colors import LinearSegmentedColormap

        if self.colors is None or isinstance(self.colors, Mapping):
            return colormaps[default]
        if isinstance(self.colors, list):
            return LinearSegmentedColormap.from_list("given", self.colors * (2 if len(self.colors) == 1 else 1))
        return colormaps.get_cmap(self.colors)

    def known(self, *names: Iterable[object]) -> None:
        """Raise SpecError on a text or a colour for a name that the figure does not have."""
        all_of = dict.fromkeys(str(name) for group in names for name in group)
        keyed = {"labels": self.labels, "colors": self.colors if isinstance(self.colors, Mapping) else {}}
        for option, given in keyed.items():
            lost = [name for name in given if name not in all_of]
            if lost:
                raise SpecError(
                    f"{option} names {lost[0]!r}, which the figure does not show",
                    expected=f"one of {', '.join(list(all_of)[:20])}",
                )


def sheet(ax: Any = None, figsize: Any = None, labels: Any = None, colors: Any = None) -> Sheet:
    """The caller's choices, checked. Raises SpecError, which says what each may be."""
    axes = _axes(ax)
    if axes and figsize is not None:
        raise SpecError("ax and figsize were both given", expected="one of them: axes have the size of their figure")
    _has_latex()
    sizes = letters(settings=bool(axes))
    return Sheet(axes, _figsize(figsize), _labels(labels), _colors(colors), sizes)


def root(axes: Any) -> Figure:
    """The figure that axes stand in, through subfigures."""
    found = axes.figure
    while found is not found.figure:
        found = found.figure
    return found


def literal(text: str) -> str:
    """A text that matplotlib, or the LaTeX that it calls, shows as it stands."""
    from matplotlib import rcParams

    return tex(text) if rcParams["text.usetex"] else text.replace("$", r"\$")


def _has_latex() -> None:
    """Refuse to have LaTeX set words where it cannot: its own error is a page long."""
    from matplotlib import rcParams
    from matplotlib.texmanager import TexManager

    if not rcParams["text.usetex"]:
        return
    try:
        TexManager().get_text_width_height_descent("lp", 10.0)
    except (RuntimeError, OSError) as error:
        complaints = [line for line in str(error).splitlines() if line.startswith("!")]
        raise SpecError(
            "text.usetex is set, and LaTeX fails",
            got=complaints[0] if complaints else str(error).splitlines()[0],
            hint="install what it misses, switch text.usetex off, or write a .pgf file, which needs no LaTeX here",
        ) from None


def _axes(ax: Any) -> tuple[Any, ...]:
    if ax is None:
        return ()
    found = tuple(ax.ravel()) if hasattr(ax, "ravel") else tuple(ax) if isinstance(ax, Sequence) else (ax,)
    wrong = [each for each in found if not hasattr(each, "get_xaxis")]
    if wrong or not found:
        raise SpecError(
            "ax is no axes",
            got=f"{type(wrong[0]).__name__}" if wrong else "none",
            expected="matplotlib axes, or several: fig, ax = plt.subplots()",
        )
    return found


def _figsize(figsize: Any) -> tuple[float, float] | None:
    if figsize is None:
        return None
    try:
        width, height = (float(number) for number in figsize)
        good = LEAST <= width <= MOST and LEAST <= height <= MOST
    except (TypeError, ValueError):
        good = False
    if not good:
        raise SpecError(
            "figsize is no size in inches",
            got=repr(figsize),
            expected=f"(width, height), each from {LEAST:g} to {MOST:g}, as in figsize=(3.25, 2.5)",
        )
    return width, height


def _labels(labels: Any) -> Mapping[str, str]:
    if labels is None:
        return {}
    if not isinstance(labels, Mapping) or not all(isinstance(text, str) for text in labels.values()):
        raise SpecError(
            "labels are no texts by name", got=repr(labels)[:80], expected='a mapping, as in labels={"lora": "LoRA"}'
        )
    for text in labels.values():
        _parsed(text)
    return {str(name): text for name, text in labels.items()}


def _parsed(text: str) -> None:
    """Refuse markup that matplotlib would fail on while it draws."""
    from matplotlib import rcParams
    from matplotlib.cbook import is_math_text
    from matplotlib.mathtext import MathTextParser

    if rcParams["text.usetex"] or not is_math_text(text):
        return
    try:
        MathTextParser("path").parse(text)
    except ValueError as error:
        raise SpecError(
            f"the label {text!r} is no mathematics that matplotlib reads",
            got=str(error).strip().splitlines()[-1],
            hint=r"write a dollar that is none as \$",
        ) from None


def _colors(colors: Any) -> Any:
    """Colours by name, in order, or a map of colours."""
    from matplotlib import colormaps
    from matplotlib.colors import is_color_like

    if colors is None or callable(colors) or (isinstance(colors, str) and colors in colormaps):
        return colors
    found = list(colors.values() if isinstance(colors, Mapping) else [] if isinstance(colors, str) else colors)
    wrong = [colour for colour in found if not is_color_like(colour)]
    if wrong or not found:
        raise SpecError(
            "colors are no colours that matplotlib knows",
            got=repr(wrong[0] if wrong else colors),
            expected='a mapping or a list of colours, as in colors={"lora": "black"}, or the name of a colour map',
        )
    return colors if isinstance(colors, Mapping) else found
