"""How alike the sites' leading subspaces are: per group, `out` and `in` as heat maps, and what sharing would keep.

Invariant: a cell is the report's mean squared cosine of principal angles, on one scale from 0 to 1 for all maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tensoradapt.errors import SpecError
from tensoradapt.plots.page import BLUE, VERMILION, stroke
from tensoradapt.plots.panels import PAGE, blues, largest_groups, letters_on, ruled
from tensoradapt.plots.places import tabulated
from tensoradapt.plots.sheet import Sheet, literal
from tensoradapt.plots.words import brief_name, figures, fitted, percent, plain, some

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST, HEIGHT = 4, 52.0  # groups, and the height of one in millimetres
ABREAST = 130.0  # the width from which a group's curves stand beside its maps, not below them
LOW, BOTH, FOOT = 32.0, 66.0, 14.0  # the least heights of a map, of one above curves, and of what is below all
LABELS = 12  # labels beside a map
CELLS = 7  # so few sites that the numbers have room
SIDES = ("out", "in")


def plot_similarity(report: Mapping[str, Any], page: Sheet, groups: Sequence[str] | None = None) -> Figure:
    """Mean squared cosines between the subspaces of a group's sites: the four largest groups, or `groups`."""
    names = _shown(report, groups, _capacity(page))
    page.known(report["groups"])
    figure, rows = _panels(page, names)
    room = min(44.0 * page.letters.scale, page.width(PAGE) / 2 - 16 * page.letters.scale)
    for name, row in zip(names, rows, strict=True):
        group = report["groups"][name]
        for side, axes in zip(SIDES, row, strict=False):
            _map(page, axes, group["similarity"].get(side), side, report["sites"])
        title = f"{page.said(name, room, page.letters.title)}\n{row[0].get_title(loc='left')}"
        row[0].set_title(title, loc="left", pad=3, fontsize=page.letters.title)
        for axes in row[2:]:
            _curves(page, axes, group.get("shared_energy"))
    maps = [axes for row in rows for axes in row[:2]]
    mesh = next(c for axes in maps for c in axes.collections)
    wide = {"shrink": 0.5, "aspect": 36} if page.width(PAGE) > ABREAST * page.letters.scale else {"aspect": 30}
    bar = figure.colorbar(mesh, ax=maps, orientation="horizontal", pad=0.02, **wide)
    bar.set_label("mean squared cosine of the principal angles\n(1: the same subspace)", fontsize=page.letters.label)
    bar.ax.tick_params(length=2, width=0.5, labelsize=page.letters.tick)
    bar.outline.set_visible(False)
    return figure


def _capacity(page: Sheet) -> int:
    """How many groups there is room for."""
    if page.ax:
        return max(1, len(page.ax) // 3)
    if page.size[1] is None:
        return MOST
    height = LOW if page.width(PAGE) > ABREAST * page.letters.scale else BOTH
    return max(1, min(MOST, int((page.size[1] / page.letters.scale - FOOT) / height)))


def _panels(page: Sheet, names: Sequence[str]) -> tuple[Figure, list[tuple[Axes, ...]]]:
    """Panels for every group: its maps, and beside or below them its curves, which a small figure leaves out."""
    if page.ax:
        found = page.given(3 * len(names), f"3 panels for each of {some(len(names), 'group')}")
        return page.figure(0, 0), [tuple(found[k : k + 3]) for k in range(0, len(found), 3)]
    width, scale = page.width(PAGE), page.letters.scale
    if width > ABREAST * scale:
        figure = page.figure(width, page.height((HEIGHT * len(names) + 4) * scale))
        rows = figure.subplots(len(names), 3, squeeze=False, width_ratios=(1, 1, 0.9))
        return figure, [tuple(page.dressed(row)) for row in rows]
    height = page.height((1.75 * HEIGHT * len(names) + 12) * scale)
    figure = page.figure(width, height)
    if height < (BOTH * len(names) + FOOT) * scale:
        return figure, [tuple(page.dressed(row)) for row in figure.subplots(len(names), 2, squeeze=False)]
    cells = figure.add_gridspec(2 * len(names), 2, height_ratios=(1, 0.85) * len(names))
    spots = [(cells[2 * k, 0], cells[2 * k, 1], cells[2 * k + 1, :]) for k in range(len(names))]
    return figure, [tuple(page.dressed(figure.add_subplot(spot) for spot in row)) for row in spots]


def similarity_caption(report: Mapping[str, Any], groups: Sequence[str] | None = None) -> str:
    """What to read off the maps: which sites share directions, and more than chance would have it."""
    names = _shown(report, groups, MOST)
    said = ["How alike the leading subspaces of a group's weights are, columns in the order of the rows: dark off the"]
    said += ["diagonal means shared directions."]
    for name in names[:2]:
        group = report["groups"][name]
        pairs = [_pair(side, group, report["sites"]) for side in SIDES if group["similarity"].get(side)]
        parts = [*filter(None, pairs), *_sharing(group)]
        said += [f"{brief_name(name)}: {'; '.join(parts)}."] if parts else []
    if len(names) < len(report["groups"]) and not groups:
        said += [f"{len(names)} of {some(len(report['groups']), 'group')} are drawn."]
    return " ".join(said)


def _shown(report: Mapping[str, Any], groups: Sequence[str] | None, most: int) -> list[str]:
    """The groups that have a map, the largest first. Raises SpecError where there are none."""
    names = largest_groups(report, groups, len(report["groups"]))
    found = [n for n in names if any(len(s["labels"]) > 1 for s in report["groups"][n]["similarity"].values())]
    if not found:
        raise SpecError("the report has no group of several weights to compare")
    return found if groups else found[:most]


def _pair(side: str, group: Mapping[str, Any], sites: Mapping[str, Any]) -> str:
    """The two most similar weights, beside what unrelated subspaces would show."""
    found = group["similarity"][side]
    pairs = [
        (value, i, j) for i, row in enumerate(found["matrix"]) for j, value in enumerate(row[:i]) if value is not None
    ]
    if not pairs:
        return ""
    value, i, j = max(pairs)
    labels, names = named(found["labels"], sites)
    size = group["sizes"].get(side)
    chance = f" (unrelated ones: {found['rank'] / size:.2g})" if size else ""
    a, b = (f"({labels[k]})" if "," in names else brief_name(labels[k]) for k in (j, i))
    return f"most alike along {side} are {f'{names} {a} and {b}'.strip()}, at {value:.2g}{chance}"


def _sharing(group: Mapping[str, Any]) -> list[str]:
    """What one subspace for all holds, at the middle of the ranks."""
    energy = group.get("shared_energy")
    if not energy or not energy.get("rank") or not group["norm"]:
        return []
    k = len(energy["rank"]) // 2
    shared, private = energy["shared"][k], energy["private"][k]
    if shared is None or private is None:
        return []
    held = f"at least {percent(shared)} of the energy, each weight's own {percent(private)}"
    return [f"at rank {energy['rank'][k]} one pair of subspaces for all holds {held}"]


def _map(page: Sheet, axes: Axes, found: Mapping[str, Any] | None, side: str, sites: Mapping[str, Any]) -> None:
    """One map, columns as rows, so that only the rows have labels; these thinned to those that have room."""
    if not found or not found["labels"]:
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"no {side}", transform=axes.transAxes, ha="center", va="center")
        return
    labels, names = named(found["labels"], sites)
    values = np.array([[np.nan if v is None else v for v in row] for row in found["matrix"]], dtype=float)
    edges = np.arange(len(labels) + 1) - 0.5
    axes.set(facecolor="#EEEEEE", aspect="equal")
    mesh: Any = axes.pcolormesh(edges, edges, values, cmap=blues(page), vmin=0, vmax=1, rasterized=values.size > 4000)
    axes.invert_yaxis()
    sizes, tall = page.letters, page.size[1] is None and page.width(PAGE) > ABREAST * page.letters.scale
    step = -(-len(labels) // (LABELS if tall else LABELS // 2))
    kept = range(0, len(labels), step)
    short = [literal(fitted(labels[k], (19 if tall else 12) * sizes.scale, sizes.note)) for k in kept]
    axes.set_yticks(list(kept), short, fontsize=sizes.note)
    axes.set_ylabel(literal(names) if side == "out" else "")
    axes.set_xticks([])
    axes.tick_params(length=1.5, width=0.4, pad=1)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{side}, rank {found['rank']}", loc="left", pad=3, fontsize=sizes.title)
    if len(labels) <= (CELLS if tall else 4):
        for (i, j), value in np.ndenumerate(values):
            said = "–" if np.isnan(value) else f"{value:.2f}".lstrip("0") if value < 0.995 else "1"
            ink = letters_on(mesh.cmap(mesh.norm(0 if np.isnan(value) else value)))
            axes.text(j, i, literal(said), ha="center", va="center", fontsize=sizes.note, color=ink)


def named(labels: Sequence[str], sites: Mapping[str, Any]) -> tuple[list[str], str]:
    """Labels that are paths as the coordinates in which they differ, and the names of these; others made brief."""
    if not all(label in sites for label in labels):
        return brief(labels), ""
    table = tabulated({label: sites[label] for label in labels})
    cells = {path: cell for cell, path in table.at.items()}
    roles = dict(zip(table.rows, brief(table.rows) if len(table.rows) > 1 else [""], strict=True))
    found = [
        ", ".join(filter(None, (*(str(v) for v in cells[p][1] if v is not None), roles[cells[p][0]]))) for p in labels
    ]
    names = ", ".join((*table.names, *(["role"] if len(table.rows) > 1 else [])))
    return [text or plain(label) for text, label in zip(found, labels, strict=True)], names


def brief(labels: Sequence[str]) -> list[str]:
    """Labels without the parts, between dots, that all of them begin or end with."""
    parts = [str(label).split(".") for label in labels]
    if len(set(map(tuple, parts))) < 2:
        return list(map(str, labels))
    begin = next(k for k in range(len(min(parts, key=len)) + 1) if len({tuple(p[: k + 1]) for p in parts}) > 1)
    parts = [part[begin:] for part in parts]
    end = next(k for k in range(len(min(parts, key=len)) + 1) if len({tuple(p[len(p) - k - 1 :]) for p in parts}) > 1)
    return [".".join(part[: len(part) - end]) or label for part, label in zip(parts, labels, strict=True)]


def _curves(page: Sheet, axes: Axes, energy: Mapping[str, Any] | None) -> None:
    """The share of the energy that one subspace for all holds, and that own ones hold, against the rank."""
    if not energy or not energy.get("rank"):
        axes.set_axis_off()
        return
    for name, colour, marker, dashes in (("private", BLUE, "o", "-"), ("shared", VERMILION, "s", (0, (4, 1.5)))):
        ys = [np.nan if share is None else 100 * share for share in energy[name]]
        said = "each weight its own" if name == "private" else "one for all"
        look = {"markersize": 4.4, "markerfacecolor": "none"} if name == "private" else {"markersize": 2.6}
        axes.plot(energy["rank"], ys, color=colour, marker=marker, linewidth=stroke(1.0), linestyle=dashes,
                  label=said, **look)  # fmt: skip
    axes.set(xlabel="rank of the subspaces", ylabel=literal("share of the energy, %"), ylim=(0, 105))
    if energy["rank"][-1] >= 8 * energy["rank"][0]:
        axes.set_xscale("log", base=2)
    kept = energy["rank"][:: -(-len(energy["rank"]) // 6)]
    axes.set_xticks(kept, [figures(rank) for rank in kept])
    axes.set_xticks([], minor=True)
    look = {"frameon": False, "fontsize": page.letters.key, "borderaxespad": 0.2, "labelspacing": 0.2}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), **look)
    ruled(axes)
