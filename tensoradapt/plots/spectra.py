"""Singular spectra of every weight's delta, a panel per role, over the floor that rounding alone would leave.

Invariant: every point is a singular value of the report; of a long spectrum fewer are drawn, none is altered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensoradapt.errors import SpecError
from tensoradapt.plots.page import VERMILION, Letters, ink, stroke
from tensoradapt.plots.panels import MOST, capacity, falling, grid, key, name_axes, panel_width, ruled, shades, thinned
from tensoradapt.plots.places import Table, tabulated
from tensoradapt.plots.sheet import Sheet, literal
from tensoradapt.plots.words import at_most, brief_name, fitted, has_noise, plain, rule_words, some

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Sites = Mapping[str, Mapping[str, Any]]
NOISE, DASHED = "#ECECEC", (0, (4, 1.6))
MANY = 24  # lines of a panel from which they are thin
CLEAR = {"edgecolor": "none", "alpha": 0.8, "pad": 0.8}


def plot_spectra(report: Mapping[str, Any], page: Sheet, roles: Sequence[str] | None = None) -> Figure:
    """sigma_i against i, a line per site, a panel per role (the twelve largest, or `roles`). Raises SpecError."""
    sites = report["sites"]
    table = tabulated(sites)
    shown = _shown(sites, table, roles, capacity(page))
    page.known(table.rows)
    shade = dict(zip(table.columns, shades(page, len(table.columns)), strict=True))
    colours = {path: shade[column] for (_, column), path in table.at.items()}
    figure, panels = grid(page, len(shown))
    width = panel_width(page, len(shown))
    for panel, role in zip(panels, shown, strict=True):
        own = {path: sites[path] for (row, _), path in table.at.items() if row == role}
        _draw(panel, own, colours)
        _note(panel, own, page.letters, width)
        panel.set_title(page.said(role, width, page.letters.title), loc="left", pad=3, fontsize=page.letters.title)
    drawn = [sites[table.at[cell]] for cell in table.at if cell[0] in shown]
    values = [value for site in drawn for value in site["singular_values"]]
    floors = [site["noise"]["edge"] or 0.0 for site in drawn]
    longest = max(len(site["singular_values"]) for site in drawn)
    for panel in panels:
        falling(panel, longest, values, floors, wide=width > 36 * page.letters.scale)
        ruled(panel)
    name_axes(page, panels, "index of the singular value", "singular value\n(units of the weights)")
    key(page, panels, _handles(table, shade, any(floors)))
    return figure


def spectra_caption(report: Mapping[str, Any], roles: Sequence[str] | None = None) -> str:
    """What to read off the spectra: how many values stand out of the noise, in how many weights."""
    sites, noisy = report["sites"], has_noise(report)
    table = tabulated(sites)
    shown = _shown(sites, table, roles, MOST)
    lines = f", a line per {' and '.join(table.names)}, dark for the first" if table.names else ""
    said = [f"Singular values of every weight's change: a panel per role{lines}."]
    if noisy:
        said += ["What lies in the grey, rounding to the stored dtype alone would leave: it carries nothing."]
    said += [_counted(sites, "noise" if noisy else "energy_0.95", noisy)]
    scaled = sum(site["noise"]["scaled"] for site in sites.values())
    if scaled and noisy:
        said += [
            f"In {some(scaled, 'weight')} the noise is uneven: values were counted after scaling rows and columns,"
        ]
        said += ["and the edge drawn is that of the mean."]
    if len(shown) < len(table.rows):
        said += [f"The {len(shown)} roles that changed most of {len(table.rows)} are drawn."]
    cut = sum(not site["complete"] for site in sites.values())
    if cut:
        said += [f"Only the leading values were computed of {cut:,} of {some(len(sites), 'weight')}."]
    return " ".join(filter(None, said))


def _counted(sites: Sites, rule: str, noisy: bool) -> str:
    """The rank that most weights stay within, and the largest."""
    ranks = {path: site["ranks"][rule] for path, site in sites.items() if site["ranks"].get(rule) is not None}
    found = at_most(list(ranks.values()))
    if found is None:
        return "" if noisy else "These dtypes have no rounding noise."
    top = max(ranks, key=lambda path: ranks[path])
    of = f"{found[1]:,} of {some(len(sites), 'weight')}"
    most = f"; the most is {ranks[top]:,}, in {brief_name(top)}." if ranks[top] > found[0] else "."
    if not noisy:
        return f"These dtypes have no rounding noise. In {of} the {rule_words(rule)} is at most {found[0]:,}{most}"
    if not ranks[top]:
        return f"In {of} nothing stands out of the rounding noise."
    have = "has" if len(sites) == 1 else "have"
    return f"{of} {have} at most {some(found[0], 'singular value')} above the rounding noise{most}"


def _shown(sites: Sites, table: Table, wanted: Sequence[str] | None, most: int) -> list[str]:
    """The roles that get a panel, in the order of the table. Raises SpecError where there are none."""
    unknown = [role for role in wanted or () if role not in table.rows]
    if unknown or not table.rows:
        raise SpecError(
            f"the report has no role {unknown[0]!r}" if unknown else "the report has no weights to draw",
            expected=", ".join(map(plain, table.rows[:20])) or None,
        )
    energy = dict.fromkeys(table.rows, 0.0)
    for (row, _), path in table.at.items():
        energy[row] += sites[path]["norm"] ** 2
    kept = set(wanted or sorted(table.rows, key=lambda row: -energy[row])[:most])
    return [row for row in table.rows if row in kept]


def _draw(axes: Axes, sites: Mapping[Any, Mapping[str, Any]], colours: Mapping[Any, Any]) -> None:
    """One panel: the noise as a grey ground with a dashed edge, and the lines."""
    edges = [site["noise"]["edge"] for site in sites.values() if site["noise"]["edge"]]
    if edges:
        axes.axhspan(0, max(edges), facecolor=NOISE, zorder=0)
        for edge in dict.fromkeys((min(edges), max(edges))):
            axes.axhline(edge, color=VERMILION, linewidth=stroke(0.9), linestyle=DASHED, zorder=1, label="noise")
    for path, site in sites.items():
        values = site["singular_values"]
        if any(values):
            kept = thinned(len(values))
            xs, ys = [k + 1 for k in kept], [values[k] for k in kept]
            width = stroke(0.8 if len(sites) <= MANY else 0.4)
            mark: dict[str, Any] = {"marker": "o", "markersize": 3} if len(xs) == 1 else {}
            mark |= {"alpha": 0.6} if len(sites) > MANY else {}
            axes.plot(xs, ys, color=colours[path], linewidth=width, label=path, zorder=2, **mark)


def _note(axes: Axes, sites: Mapping[Any, Mapping[str, Any]], sizes: Letters, width: float) -> None:
    """What is in a panel in words: no change, or how many values stand out of the noise."""
    if not any(any(site["singular_values"]) for site in sites.values()):
        axes.text(0.5, 0.85, "no change", transform=axes.transAxes, ha="center", va="center", fontsize=sizes.label)
        return
    ranks = [site["ranks"].get("noise") for site in sites.values()] if any(map(_edge, sites.values())) else []
    known = sorted(rank for rank in ranks if rank is not None)
    if not known:
        return
    span = f"{known[0]:,}" if known[0] == known[-1] else f"{known[0]:,} to {known[-1]:,}"
    more = ", or more than computed" if len(known) < len(ranks) else ""
    text = literal(fitted(f"{span} above the noise{more}", 0.92 * width, sizes.note))
    ground = {**CLEAR, "facecolor": axes.get_facecolor()}
    axes.text(0.97, 0.96, text, transform=axes.transAxes, ha="right", va="top", fontsize=sizes.note, bbox=ground,
              in_layout=False)  # fmt: skip


def _edge(site: Mapping[str, Any]) -> float:
    return site["noise"]["edge"] or 0.0


def _handles(table: Table, colours: Mapping[Any, Any], noisy: bool) -> list[Any]:
    """The first, the middle and the last line, and the noise."""
    from matplotlib.lines import Line2D

    numbered = [column for column in table.columns if None not in column] or table.columns
    last = len(numbered) - 1
    shown = [numbered[k] for k in sorted({0, last // 2, last})] if table.names else []
    handles = [Line2D([], [], color=colours[c], linewidth=stroke(1.2), label=_named(table, c)) for c in shown]
    if noisy:
        label = "rounding noise"
        handles += [Line2D([], [], color=VERMILION, linewidth=stroke(0.9), linestyle=DASHED, label=label)]
    return handles or [Line2D([], [], color=ink(), linewidth=stroke(1.2), label="singular values")]


def _named(table: Table, column: Sequence[Any]) -> str:
    """`layer 3`; of several coordinates each with its name."""
    pairs = [f"{name} {value}" for name, value in zip(table.names, column, strict=True) if value is not None]
    return literal(fitted(", ".join(pairs) or "none", 40, 6.5))
