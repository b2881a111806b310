"""The figures of a report by name, each with its caption: the one table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensoradapt.errors import FileError, SpecError
from tensoradapt.plots.front import front_caption, plot_front
from tensoradapt.plots.heat import plot_ranks, ranks_caption
from tensoradapt.plots.modes import modes_caption, plot_modes
from tensoradapt.plots.page import checked, save
from tensoradapt.plots.reading import check_report, consistent
from tensoradapt.plots.shares import parameters_caption, plot_parameters
from tensoradapt.plots.sheet import sheet
from tensoradapt.plots.similarity import plot_similarity, similarity_caption
from tensoradapt.plots.spectra import plot_spectra, spectra_caption

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = Mapping[str, Any]
FIGURES: Mapping[str, tuple[Callable[..., Figure], Callable[..., str]]] = {
    "front": (plot_front, front_caption),
    "budget": (plot_parameters, parameters_caption),
    "ranks": (plot_ranks, ranks_caption),
    "spectra": (plot_spectra, spectra_caption),
    "modes": (plot_modes, modes_caption),
    "similarity": (plot_similarity, similarity_caption),
}


def draw_figure(
    report: Any,
    name: str,
    path: str | Path | None = None,
    *,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    labels: Mapping[str, str] | None = None,
    colors: Any = None,
    **choices: Any,
) -> Figure:
    """One of FIGURES from a report or its JSON, saved to a .png, .svg, .pdf or .pgf `path`.

    `ax` is axes to draw in, one for each panel; `figsize` a size in inches. `labels` are texts by the names that the
    figure shows (roles, groups, presets, axes); `colors` a mapping or a list of colours, or, for what is shaded, a map
    of colours. Choices: `rule` of `ranks`; `roles` of `spectra`; `groups` of `modes` and `similarity`. Raises FileError
    on what is no report and on other suffixes, SpecError on an unknown figure or choice and a report without its data.
    """
    target, data = checked(path), _data(report)
    draw, _ = _named(name, choices)
    page = sheet(ax, figsize, labels, colors)
    with consistent():
        figure = draw(data, page, **choices)
    save(figure, target)
    return figure


def caption(report: Any, name: str, **choices: Any) -> str:
    """What to read off a figure, in sentences. Raises as `draw_figure` does."""
    data = _data(report)
    say = _named(name, choices)[1]
    with consistent():
        return say(data, **choices)


def _data(report: Any) -> Report:
    """A report's JSON, checked; of a report in memory, what its JSON would be."""
    data: Report = report.to_dict() if hasattr(report, "to_dict") else report
    check_report(data)
    return data


def drawable(report: Report) -> tuple[str, ...]:
    """The names of the figures for which the report has data."""
    return tuple(name for name, (_, said) in FIGURES.items() if _works(said, report))


def _works(said: Callable[..., str], report: Report) -> bool:
    try:
        with consistent():
            said(report)
    except (SpecError, FileError):
        return False
    return True


def _named(name: str, choices: Mapping[str, Any]) -> tuple[Callable[..., Figure], Callable[..., str]]:
    if name not in FIGURES:
        raise SpecError(f"there is no figure {name!r}", expected=f"one of {', '.join(FIGURES)}")
    known = list(signature(FIGURES[name][0]).parameters)[2:]
    unknown = sorted(set(choices) - set(known))
    if unknown:
        raise SpecError(f"the figure {name!r} has no choice {unknown[0]!r}", expected=", ".join(known) or "none")
    return FIGURES[name]
