"""Mode spectra of grouped deltas: the singular values of every unfolding, a panel per group, a line per axis.

Invariant: every point is a singular value of the report; of a long spectrum fewer are drawn, none is altered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensoradapt.errors import SpecError
from tensoradapt.plots.labels import extent
from tensoradapt.plots.page import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, ink, stroke
from tensoradapt.plots.panels import (
    MOST,
    capacity,
    falling,
    grid,
    key,
    largest_groups,
    name_axes,
    panel_width,
    ruled,
    thinned,
)
from tensoradapt.plots.sheet import Sheet, literal
from tensoradapt.plots.words import brief_name, figures, fitted, percent, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Look = tuple[str, str, Any]  # colour, marker, dashes
LOOKS: Mapping[str, Look] = {
    "out": (BLUE, "o", "-"),
    "in": (VERMILION, "s", (0, (4, 1.5))),
    "layer": (GREEN, "^", "-"),
    "role": (PURPLE, "D", (0, (1, 1.2))),
    "task": (ORANGE, "v", "-"),
    "expert": (SKY, "P", (0, (4, 1.2, 1, 1.2))),
    "site": (INK, "X", "-"),
}
REST: Sequence[Look] = ((GREY, "<", (0, (4, 1.5))), (INK, ">", (0, (1, 1.2))))


def plot_modes(report: Mapping[str, Any], page: Sheet, groups: Sequence[str] | None = None) -> Figure:
    """sigma_i of every unfolding against i: the twelve largest groups, or `groups`. Raises SpecError where none is."""
    names = largest_groups(report, groups, capacity(page))
    found = [report["groups"][name] for name in names]
    looks = _looks(page, found)
    if not looks:
        raise SpecError("the report has no mode spectra to draw")
    page.known(report["groups"], looks)
    figure, panels = grid(page, len(names), height=48.0)
    width, size = panel_width(page, len(names)) - 3.0, page.letters.title
    spectra = [values for group in found for values in group["mode_spectra"].values()]
    edges = [edge or 0.0 for group in found for edge in group["noise_edges"].values()]
    values = [value for values in spectra for value in values]
    for panel, name, group in zip(panels, names, found, strict=True):
        _draw(panel, group, looks, page.letters.label)
        title = f"{page.said(name, width, size)}\n{literal(fitted(_sizes(group, width, size), width, size))}"
        panel.set_title(title, loc="left", pad=3, linespacing=1.1, fontsize=size)
        falling(panel, max(map(len, spectra)), values, edges, wide=width > 33 * page.letters.scale)
        ruled(panel)
    name_axes(page, panels, "index of the singular value", "singular value\n(units of the weights)")
    key(page, panels, _handles(page, looks, any(edges)))
    return figure


def _sizes(group: Mapping[str, Any], width: float, points: float) -> str:
    """The axes of a group with their sizes; the sizes alone where that is too wide."""
    sizes = [str(group["sizes"].get(axis, "?")) for axis in group["axes"]]
    full = " × ".join(f"{plain(axis)} {size}" for axis, size in zip(group["axes"], sizes, strict=True))
    return full if extent(full, points)[0] <= width else " × ".join(sizes)


def modes_caption(report: Mapping[str, Any], groups: Sequence[str] | None = None) -> str:
    """What to read off the modes: along which axes few values suffice, so that a shared factor is cheap."""
    names = largest_groups(report, groups, MOST)
    said = [
        "Singular values of every group's tensor, unfolded along each of its axes: where a line falls fast, few "
        "directions of that axis suffice; a flat one cannot be compressed."
    ]
    for name in names[:3]:
        said += _read(name, report["groups"][name])
    noisy = any(edge for name in names for edge in report["groups"][name]["noise_edges"].values())
    if noisy:
        said += ["Strokes beside a panel: where the rounding noise of that axis ends."]
    parts = [report["groups"][name]["captured"] for name in names]
    least = min((share for share in parts if share is not None), default=1.0)
    if least < 0.9995:
        said += [f"The numbers come from compressed tensors that hold at least {percent(least)} of the energy."]
    if len(names) < len(report["groups"]) and not groups:
        said += [f"The {len(names)} groups that changed most of {len(report['groups']):,} are drawn."]
    return " ".join(said)


def _read(name: str, group: Mapping[str, Any]) -> list[str]:
    """One group's multilinear rank in words."""
    if group["norm"] == 0:
        return [f"{brief_name(name)} did not change."]
    rules, label = group["multilinear_rank"], brief_name(name)
    noisy = any(group["noise_edges"].values())
    rule = "noise" if noisy and "noise" in rules else next((r for r in ("energy_0.95", *rules) if r in rules), None)
    if rule is None:
        return []
    ranks = [
        f"{'more than ' * (rank is None)}{figures(len(group['mode_spectra'].get(axis, ())) if rank is None else rank)}"
        f" of {figures(group['sizes'].get(axis))} along {axis}"
        for axis, rank in rules[rule].items()
    ]
    what = (
        "above the noise"
        if rule == "noise"
        else f"to hold {percent(float(rule.removeprefix('energy_')))} of the energy"
    )
    return [f"{label}: {', '.join(ranks)} {'are ' if rule == 'noise' else 'suffice '}{what}."]


def _looks(page: Sheet, groups: Sequence[Mapping[str, Any]]) -> dict[str, Look]:
    """The look of every axis that occurs; a fold looks like any other. Colours are the caller's, if there are any."""
    axes = list(dict.fromkeys(axis for group in groups for axis in group["mode_spectra"]))
    others = [axis for axis in axes if axis not in LOOKS]
    rest = {axis: REST[k % len(REST)] for k, axis in enumerate(others)}
    looks = {axis: LOOKS.get(axis) or rest[axis] for axis in axes}
    given = page.colours(axes) if page.colors is not None else {}
    named = page.colors if isinstance(page.colors, Mapping) else given
    return {axis: (given[axis] if axis in named else look[0], *look[1:]) for axis, look in looks.items()}


def _draw(axes: Axes, group: Mapping[str, Any], looks: Mapping[str, Look], size: float) -> None:
    """One group: a line per axis, and a stroke at the right for its noise."""
    drawn = False
    for axis, values in group["mode_spectra"].items():
        colour, marker, dashes = looks[axis]
        edge = group["noise_edges"].get(axis)
        if edge:
            axes.plot([1.01, 1.07], [edge, edge], transform=axes.get_yaxis_transform(), color=colour,
                      linewidth=stroke(0.9), linestyle=dashes, clip_on=False, label=f"noise {axis}")  # fmt: skip
        if any(values):
            kept = thinned(len(values))
            every = [k for k in range(len(kept)) if kept[k] < 4 or k % 4 == 0]
            axes.plot([k + 1 for k in kept], [values[k] for k in kept], color=colour, linestyle=dashes,
                      linewidth=stroke(1.0), markevery=every, label=axis, **_marked(axis, marker))  # fmt: skip
            drawn = True
    if not drawn:
        axes.text(0.5, 0.85, "no change", transform=axes.transAxes, ha="center", va="center", fontsize=size)


def _marked(axis: str, marker: str) -> dict[str, Any]:
    """A marker; that of `out` is large and empty, as its line lies on that of `in` where there is one weight."""
    return {"marker": marker} | (
        {"markersize": 4.4, "markerfacecolor": "none"} if axis == "out" else {"markersize": 2.6}
    )


def _handles(page: Sheet, looks: Mapping[str, Look], noisy: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=c, linestyle=d, linewidth=stroke(1.0), label=page.said(axis), **_marked(axis, marker))
        for axis, (c, marker, d) in looks.items()
    ]
    return handles + (
        [Line2D([], [], color=ink(), linewidth=stroke(0.9), label="beside a panel: noise")] if noisy else []
    )
