"""Shares: bars of 100 % cut by group or role, and the parameter budget of a report's candidates drawn with them.

Invariant: every part is a count of the table or the report, or the sum of some; parts differ in hatching too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensoradapt.errors import SpecError
from tensoradapt.plots.labels import extent
from tensoradapt.plots.page import COLOURS, GREY, INCH
from tensoradapt.plots.words import brief_name, listed, percent, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = 7  # as many named parts of a bar as there are colours
OTHERS, BANK = "others", "shared by groups"
HATCHES = ("", "////", "....", r"\\\\", "xxxx", "----", "++++")
LABEL = 26  # the longest label, in letters
BAR = 6.0  # the height of a bar in millimetres
ENTRY = 3.4  # the height of a line of a key
KEY, KEY_WIDTH, HANDLE = 6.5, 66.0, 9.0  # its letters in points, its width, and what an entry needs beside its label
BARS, WIDTH = 12, 120.0  # bars of a report's budget at most, and the width of the figure


@dataclass(frozen=True)
class Bar:
    """One bar: its label, counts by part, and all that is counted."""

    label: str
    shares: Mapping[str, int]
    total: int


def plot_parameters(report: Mapping[str, Any]) -> Figure:
    """Parameters of the front's candidates and the chosen one, cut by group. Raises SpecError where there are none."""
    from matplotlib.figure import Figure

    bars = [Bar(_label(c, report["choice"]), c["by_group"], c["num_parameters"]) for c in _drawn(report)]
    cut = parts(bars)
    names = named(cut)
    columns = columns_of(names, WIDTH - 20)
    height = 12.0 + (BAR + 0.8) * len(bars) + ENTRY * -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH / INCH, height / INCH), layout="constrained")
    axes = figure.add_subplot()
    draw_shares(axes, [bar.label for bar in bars], cut, names)
    axes.set_xlabel("share of the adapter's parameters, %")
    key_above(axes, columns)
    return figure


def parameters_caption(report: Mapping[str, Any]) -> str:
    """What to read off the bars: where the parameters go."""
    shown = _drawn(report)
    said = ["Where the parameters go: the candidates of the front and the chosen one, cut by group."]
    chosen = next((c for c in shown if report["choice"] and c["label"] == report["choice"]["label"]), None)
    if chosen and len(chosen["by_group"]) > 1 and chosen["num_parameters"]:
        largest = sorted(chosen["by_group"].items(), key=lambda pair: -pair[1])
        spent = [f"{brief_name(name)} ({percent(count / chosen['num_parameters'])})" for name, count in largest]
        said += [f"The chosen one spends its {chosen['num_parameters']:,} on {listed(spent, 3)}."]
    groups = {name for c in shown for name in c["by_group"]}
    if len(groups) > PARTS:
        said += [f"The {PARTS - 1} largest of {len(groups)} groups are drawn apart."]
    front = sum(c["front"] for c in report["candidates"])
    if len(shown) < front:
        said += [f"{len(shown)} of the front's {front} are drawn."]
    return " ".join(said)


def _drawn(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The chosen candidate and those of the front, evenly thinned to as many as a figure holds, by size."""
    if not report["candidates"]:
        raise SpecError("the report has no candidates to draw", hint="analyse with candidates")
    label = report["choice"]["label"] if report["choice"] else None
    front = sorted((c for c in report["candidates"] if c["front"]), key=lambda c: c["num_parameters"])
    step = -(-len(front) // (BARS - 1))
    kept = [*front[::step], *(c for c in report["candidates"] if c["label"] == label)]
    found = {c["label"]: c for c in kept or report["candidates"][:BARS]}
    return sorted(found.values(), key=lambda c: c["num_parameters"])


def _label(candidate: Mapping[str, Any], choice: Mapping[str, Any] | None) -> str:
    chosen = "chosen: " if choice and candidate["label"] == choice["label"] else ""
    return f"{chosen}{shortened(candidate['label'])}\n{candidate['num_parameters']:,}"


def parts(bars: Sequence[Bar]) -> list[dict[str, int]]:
    """Every bar's parts: the largest over all bars, what no part owns, and the others together."""
    totals: dict[str, float] = {}
    for bar in bars:
        for name, count in bar.shares.items():
            totals[name] = totals.get(name, 0.0) + count / max(bar.total, 1)
    largest = sorted(totals, key=lambda name: -totals[name])
    kept = [name for name in totals if name in largest[: PARTS if len(largest) <= PARTS else PARTS - 1]]
    result = []
    for bar in bars:
        found = {name: bar.shares[name] for name in kept if bar.shares.get(name)}
        rest = sum(count for name, count in bar.shares.items() if name not in kept)
        bank = bar.total - sum(bar.shares.values())
        result.append(found | ({BANK: bank} if bank > 0 else {}) | ({OTHERS: rest} if rest else {}))
    return result


def named(cut: Sequence[Mapping[str, int]]) -> list[str]:
    """The names of all parts, what is gathered at the end."""
    found = dict.fromkeys(name for shares in cut for name in shares)
    return [*(n for n in found if n not in (OTHERS, BANK)), *(n for n in (BANK, OTHERS) if n in found)]


def draw_shares(axes: Axes, labels: Sequence[str], cut: Sequence[Mapping[str, int]], names: Sequence[str]) -> None:
    """One bar of 100 % for every label, cut into parts."""
    own = [name for name in names if name not in (OTHERS, BANK)]
    looks = {name: (COLOURS[k % len(COLOURS)], HATCHES[k % len(HATCHES)]) for k, name in enumerate(own)}
    looks |= {OTHERS: (GREY, ""), BANK: ("#DDDDDD", "")}
    left = [0.0 for _ in labels]
    for name in names:
        widths = [100 * shares.get(name, 0) / max(sum(shares.values()), 1) for shares in cut]
        axes.barh(
            range(len(labels)),
            widths,
            left=left,
            height=0.7,
            color=looks[name][0],
            hatch=looks[name][1],
            edgecolor="white",
            linewidth=0.6,
            label=shortened(name),
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(labels)), labels, linespacing=1.05)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def columns_of(labels: Sequence[str], width: float = KEY_WIDTH) -> int:
    """The number of columns in which labels fit side by side in a key."""
    longest = max((extent(shortened(label), KEY)[0] for label in labels), default=1.0)
    return max(1, int(width / (longest + HANDLE)))


def key_above(axes: Axes, columns: int) -> None:
    """The key above a panel."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        frameon=False,
        handlelength=2.2,
        columnspacing=1.2,
        handletextpad=0.5,
        labelspacing=0.3,
        borderaxespad=0.2,
    )


def shortened(label: str) -> str:
    """A label that fits a key: of many joined by + the first and a number, of a long one the two ends."""
    text = plain(label)
    first, *more = text.split("+")
    if len(text) > LABEL and more:
        return f"{shortened(first)} + {len(more)} more"
    return text if len(text) <= LABEL else f"{text[: LABEL - 12]}…{text[-11:]}"


def short(value: float) -> str:
    """A count on an axis: 300, 20k, 1.5M, 2B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
