"""Shares: bars of 100 % cut by group or role, and the parameter budget of a report's candidates drawn with them.

Invariant: every part is a count of the table or the report, or the sum of some; parts differ in hatching too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tensoradapt.errors import SpecError
from tensoradapt.plots.labels import extent
from tensoradapt.plots.page import GREY, INCH, setting
from tensoradapt.plots.sheet import Sheet, literal, root
from tensoradapt.plots.words import brief_name, listed, percent, plain, proposed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = 7  # as many named parts of a bar as there are colours
OTHERS, BANK = "others", "shared by groups"
HATCHES = ("", "////", "....", r"\\\\", "xxxx", "----", "++++")
LABEL = 26  # the longest label, in letters
BAR, FEET = 6.0, 10.0  # the height of a bar, and of what is below the bars, in millimetres
ENTRY, HANDLE = 3.4, 9.0  # the height of a line of a key, and what an entry needs beside its label
BARS, WIDTH = 12, 120.0  # bars of a report's budget at most, and the width of the figure


@dataclass(frozen=True)
class Bar:
    """One bar: its name, counts by part, all that is counted, and what is said before and behind the name."""

    name: str
    shares: Mapping[str, int]
    total: int
    behind: str = ""
    before: str = ""


@dataclass(frozen=True)
class Shares:
    """Bars, each cut into the same parts."""

    bars: Sequence[Bar]

    @cached_property
    def cut(self) -> list[dict[str, int]]:
        """Every bar's counts by part."""
        return parts(self.bars)

    @cached_property
    def names(self) -> list[str]:
        """The names of all parts, what is gathered at the end."""
        found = dict.fromkeys(name for shares in self.cut for name in shares)
        return [*(n for n in found if n not in (OTHERS, BANK)), *(n for n in (BANK, OTHERS) if n in found)]


def plot_parameters(report: Mapping[str, Any], page: Sheet) -> Figure:
    """Parameters of the front's candidates and the chosen one, cut by group. Raises SpecError where there are none."""
    width = page.width(WIDTH)
    for most in range(BARS, 0, -1):
        shares = Shares([_bar(c, proposed(report)) for c in _drawn(report, most)])
        if page.size[1] is None or shares_height(page, shares, width) <= page.size[1]:
            break
    page.known(shares.names, (bar.name for bar in shares.bars))
    figure = page.figure(width, page.height(shares_height(page, shares, width)))
    (axes,) = page.given(1, "one panel") or page.dressed([figure.add_subplot()])
    draw_shares(page, axes, shares)
    axes.set_xlabel(literal("share of the adapter's parameters, %"))
    return figure


def parameters_caption(report: Mapping[str, Any]) -> str:
    """What to read off the bars: where the parameters go."""
    shown = _drawn(report, BARS)
    choice = proposed(report)
    chosen = next((c for c in shown if choice and c["label"] == choice["label"]), None)
    said = [
        f"Where the parameters go: the candidates of the front{' and the chosen one' * bool(chosen)}, cut by group."
    ]
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


def _drawn(report: Mapping[str, Any], most: int) -> list[Mapping[str, Any]]:
    """The chosen candidate and those of the front, evenly thinned to as many as a figure holds, by size."""
    if not report["candidates"]:
        raise SpecError("the report has no candidates to draw", hint="analyse with candidates")
    choice = proposed(report)
    label = choice["label"] if choice else None
    front = sorted((c for c in report["candidates"] if c["front"]), key=lambda c: c["num_parameters"])
    step = -(-len(front) // max(1, most - 1))
    kept = [*front[::step], *(c for c in report["candidates"] if c["label"] == label)][-most:]
    found = {c["label"]: c for c in kept or report["candidates"][:most]}
    return sorted(found.values(), key=lambda c: c["num_parameters"])


def _bar(candidate: Mapping[str, Any], choice: Mapping[str, Any] | None) -> Bar:
    chosen = "chosen: " if choice and candidate["label"] == choice["label"] else ""
    return Bar(candidate["label"], candidate["by_group"], candidate["num_parameters"], before=chosen)


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


def shares_height(page: Sheet, shares: Shares, width: float) -> float:
    """The height that bars, with their key and axis, take in a figure of a width, in millimetres."""
    lines = -(-len(shares.names) // _columns(page, shares.names, width - shares_room(page, shares)))
    return (FEET + BAR * len(shares.bars) + ENTRY * lines + 2.0) * page.letters.scale


def draw_shares(page: Sheet, axes: Axes, shares: Shares) -> None:
    """One bar of 100 % for every name, cut into parts."""
    looks = _looks(page, shares.names)
    left = [0.0 for _ in shares.bars]
    for name in shares.names:
        widths = [100 * counts.get(name, 0) / max(sum(counts.values()), 1) for counts in shares.cut]
        bars = axes.barh(range(len(widths)), widths, left=left, height=0.7, edgecolor="white", linewidth=0.6,
                         label=shortened(page, name), **looks[name])  # fmt: skip
        for bar in bars:
            bar.set_hatch_linewidth(setting("hatch.linewidth", 0.5))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(left)), [_label(page, bar) for bar in shares.bars], linespacing=1.05)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    key_above(page, axes, shares_room(page, shares))


def _looks(page: Sheet, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The colour and the hatching of every part; what is gathered has neither."""
    own = [name for name in names if name not in (OTHERS, BANK)]
    colours = page.colours(own)
    looks = {name: {"color": colours[name], "hatch": HATCHES[k % len(HATCHES)]} for k, name in enumerate(own)}
    return looks | {OTHERS: {"color": GREY}, BANK: {"color": "#DDDDDD"}}


def _label(page: Sheet, bar: Bar) -> str:
    """A bar's name and its count."""
    return f"{bar.before}{shortened(page, bar.name)}{bar.behind}\n{bar.total:,}"


def shares_room(page: Sheet, shares: Shares) -> float:
    """The width of the labels beside the bars."""
    lines = [line for bar in shares.bars for line in _label(page, bar).splitlines()]
    return max(extent(line, page.letters.tick, markup=True)[0] for line in lines) + 2.0


def _columns(page: Sheet, names: Sequence[str], width: float) -> int:
    """The number of columns in which the entries of a key fit side by side."""
    longest = max((extent(shortened(page, name), page.letters.key, markup=True)[0] for name in names), default=1.0)
    return max(1, int(width / (longest + HANDLE * page.letters.scale)))


def key_above(page: Sheet, axes: Axes, beside: float = 12.0) -> None:
    """The key above a panel that has something `beside` it."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    longest = max(extent(label, page.letters.key, markup=True)[0] for label in labels) + HANDLE * page.letters.scale
    width = root(axes).get_figwidth() * INCH
    if page.ax:
        root(axes).draw_without_rendering()  # what stands beside the bars has taken its room
        width = axes.get_window_extent().width / root(axes).dpi * INCH + beside
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=max(1, int((width - beside - 2.0) / longest)),
        fontsize=page.letters.key,
        frameon=False,
        handlelength=2.2,
        columnspacing=1.2,
        handletextpad=0.5,
        labelspacing=0.3,
        borderaxespad=0.2,
    )


def shortened(page: Sheet, name: str) -> str:
    """A name that fits a key: of many joined by + the first and a number, of a long one the two ends."""
    return page.labels.get(name) or literal(_shortened(name))


def _shortened(name: str) -> str:
    text = plain(name)
    first, *more = text.split("+")
    if len(text) > LABEL and more:
        return f"{_shortened(first)} + {len(more)} more"
    return text if len(text) <= LABEL else f"{text[: LABEL - 12]}…{text[-11:]}"


def short(value: float, position: float | None = None) -> str:
    """A count on an axis (at whatever position): 300, 20k, 1.5M, 2B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
