"""The frontier's results: a CSV ledger with one row per finished run, and the table and figure drawn from it alone."""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensoradapt.plots.page import BLUE, save
from tensoradapt.plots.panels import grid, key, name_axes, ruled
from tensoradapt.plots.sheet import sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = (
    *("task", "method", "rate", "seed", "split", "epochs", "train_rows", "judged_rows", "max_length", "batch"),
    *("precision", "initialisation", "optimiser", "head_rate"),
)
FOUND = ("parameters", "metric", "value", "seconds", "cpu_seconds", "versions")
FIELDS = (*KEY, *FOUND)
OF_TASK = ("epochs", "train_rows", "judged_rows", "max_length", "batch", "precision", "head_rate")
OF_METHOD = ("rate", "initialisation", "optimiser")
TASKS = ("mrpc", "cola", "rte")
LORA_ALL, LORA_QV = "LoRA r=8 all", "LoRA r=8 qv"
LEVELS: Mapping[str, Any] = {"full": (0, (1, 1)), LORA_ALL: (0, (6, 2)), LORA_QV: (0, (3, 2))}
SCORE = "mean of MRPC F1, CoLA Matthews,\nRTE accuracy, in points (%)"
WIDTH = 4.6  # inches: on a telephone's screen the letters are still legible
GREY, PALE = "#666666", "#C8C8C8"


class Ledger:
    """The finished runs by their settings; one more is one more line, on the disk before the next begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    if None not in row.values() and None not in row:  # a line torn by an interruption is run again
                        self.rows[tuple(row[name] for name in KEY)] = row

    def find(self, settings: Mapping[str, Any]) -> dict[str, str] | None:
        """The row of these settings, if they were run."""
        return self.rows.get(tuple(str(settings[name]) for name in KEY))

    def add(self, settings: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
        """Append a finished run."""
        row = {name: str({**settings, **found}[name]) for name in FIELDS}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_bytes() if self.path.exists() else b""
        with self.path.open("a", newline="") as file:
            file.write("\n" if text and not text.endswith(b"\n") else "")
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if not text:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())
        self.rows[tuple(row[name] for name in KEY)] = row
        return row


@dataclass(frozen=True)
class Summary:
    """One method over its validation runs: `scores[task][seed]` in points; `means` of the seeds with every task."""

    method: str
    parameters: int
    rate: str
    start: str
    scores: dict[str, dict[str, float]]
    seconds: float

    @property
    def means(self) -> list[float]:
        seeds = set.intersection(*({*self.scores.get(task, {})} for task in TASKS))
        return [statistics.fmean(self.scores[task][seed] for task in TASKS) for seed in sorted(seeds)]


def summaries(rows: Iterable[Mapping[str, str]]) -> list[Summary]:
    """The methods in the order of their first validation run; a diverged run's score is NaN."""
    grouped: dict[str, list[Mapping[str, str]]] = {}
    for row in comparable(rows):
        grouped.setdefault(row["method"], []).append(row)
    return [summary(method, runs) for method, runs in grouped.items()]


def comparable(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The validation runs made as the last of their task were, at the rate and start that their method had last."""
    found = [row for row in rows if row["split"] == "validation"]
    last_task = {row["task"]: tuple(row[name] for name in OF_TASK) for row in found}
    kept = [row for row in found if tuple(row[name] for name in OF_TASK) == last_task[row["task"]]]
    last = {row["method"]: tuple(row[name] for name in OF_METHOD) for row in kept}
    return [row for row in kept if tuple(row[name] for name in OF_METHOD) == last[row["method"]]]


def summary(method: str, runs: Sequence[Mapping[str, str]]) -> Summary:
    scores: dict[str, dict[str, float]] = {}
    for run in runs:
        scores.setdefault(run["task"], {})[run["seed"]] = 100 * float(run["value"])
    start = f"{runs[0]['initialisation'].replace(',', ', ')}; {runs[0]['optimiser']}"
    seconds = statistics.fmean(float(run["cpu_seconds"]) for run in runs)
    rate = f"{float(runs[0]['rate']):g}"
    return Summary(method, int(runs[0]["parameters"]), rate, start, scores, seconds)


def spread(values: Sequence[float]) -> str:
    """The mean and the sample's standard deviation, in points."""
    if not values:
        return ""
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def of_lora(parameters: int, reference: int) -> str:
    """How many times fewer or more parameters than the reference."""
    return f"1/{reference / parameters:.1f}" if parameters <= reference else f"{parameters / reference:.0f} times"


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """The Markdown table, most parameters first: validation scores in points, mean and deviation over the seeds."""
    found = sorted(summaries(rows), key=lambda each: -each.parameters)
    counts = {each.method: each.parameters for each in found}
    names = [
        "method",
        "parameters",
        "of LoRA r=8 all",
        "rate",
        *TASKS,
        "mean",
        "seeds",
        "CPU s per run",
        "start; optimiser",
    ]
    lines = [names, ["---" if name in ("method", "start; optimiser") else "--:" for name in names]]
    for each in found:
        share = of_lora(each.parameters, counts[LORA_ALL]) if LORA_ALL in counts else ""
        cells = [spread([*each.scores.get(task, {}).values()]) for task in TASKS]
        tail = [spread(each.means), str(len(each.means)), f"{each.seconds:.0f}"]
        lines.append([each.method, f"{each.parameters:,}", share, each.rate, *cells, *tail, each.start])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def goals(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """What was reached of the goal: within 0.5 points of LoRA on all roles at a tenth; above LoRA q, v at a fifth."""
    found = {each.method: each for each in summaries(rows) if each.means and not math.isnan(sum(each.means))}
    lines = []
    for reference, factor, least in ((LORA_ALL, 10, -0.5), (LORA_QV, 5, 0.0)):
        if reference not in found:
            continue
        limit, level = found[reference].parameters / factor, statistics.fmean(found[reference].means)
        ours = [x for x in found.values() if x.parameters <= limit and not x.method.startswith(("LoRA ", "full"))]
        if ours:
            best = max(ours, key=lambda each: statistics.fmean(each.means))
            gap = statistics.fmean(best.means) - level
            verdict = "reached" if gap >= least and (least or gap > 0) else "missed"
            lines.append(f"at 1/{factor} of {reference}: best {best.method}, {gap:+.1f} points: goal {verdict}")
    return lines


def series_of(method: str) -> str:
    """The line that a point belongs to: its method without rank or budget."""
    return " ".join(word for word in method.replace(" of qv", "").split() if not word.startswith(("r=", "1/")))


def figure(rows: Iterable[Mapping[str, str]]) -> Figure:
    """Adapter parameters against the mean score over the tasks, a panel per method over all the others in grey."""
    from matplotlib import rc_context

    found = [each for each in summaries(rows) if each.means and not math.isnan(sum(each.means))]
    series: dict[str, list[Summary]] = {}
    for each in sorted(found, key=lambda each: each.parameters):
        if each.method != "full":
            series.setdefault(series_of(each.method), []).append(each)
    names = sorted(series, key=lambda name: -max(statistics.fmean(each.means) for each in series[name]))
    levels = {each.method: statistics.fmean(each.means) for each in found if each.method in LEVELS}
    with rc_context({"font.size": 9, "axes.titlesize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8}):
        page = sheet(figsize=(WIDTH, 0.9 + 1.2 * -(-len(names) // 2)))
        result, panels = grid(page, len(names))
        for panel, name in zip(panels, names, strict=True):
            for other in series:
                means = [statistics.fmean(each.means) for each in series[other]]
                panel.plot([each.parameters for each in series[other]], means, color=PALE, linewidth=0.8, zorder=1)
            _line(panel, series[name])
            for method, level in levels.items():
                panel.axhline(level, color=GREY, linewidth=0.8, linestyle=LEVELS[method], zorder=1)
            panel.set_title(name, loc="left", pad=3, fontsize=9)
        _axes(panels, series)
        name_axes(page, panels, "trainable adapter parameters, head apart", SCORE)
        key(page, panels, _handles({each.method: each for each in found}))
    return result


def _axes(panels: Sequence[Any], series: Mapping[str, Sequence[Summary]]) -> None:
    sizes = [each.parameters for points in series.values() for each in points]
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xlim(min(sizes) / 1.3, max(sizes) * 1.3)
        panel.set_xticks([1e4, 3e4, 1e5, 3e5], ["10k", "30k", "100k", "300k"])
        panel.set_xticks([], minor=True)
        ruled(panel)


def _line(panel: Any, points: Sequence[Summary]) -> None:
    """One method with the sample's standard deviation over its seeds."""
    means = [statistics.fmean(each.means) for each in points]
    bars = [statistics.stdev(each.means) if len(each.means) > 1 else 0.0 for each in points]
    look = {"color": BLUE, "marker": "o", "markersize": 3.5, "linewidth": 1.2, "elinewidth": 0.8, "capsize": 2}
    panel.errorbar([each.parameters for each in points], means, bars, **look, zorder=3)


def _handles(found: Mapping[str, Summary]) -> list[Any]:
    """The key: the method of a panel, all the others, and the levels, the largest first."""
    from matplotlib.lines import Line2D

    own = {"color": BLUE, "marker": "o", "markersize": 3.5, "linewidth": 1.2}
    handles = [Line2D([], [], **own, label="mean, deviation"), Line2D([], [], color=PALE, label="the others")]
    for method, dashes in LEVELS.items():
        if method in found:
            size = f", {found[method].parameters / 1e6:.1f} M" if method == "full" else ""
            handles.append(Line2D([], [], color=GREY, linewidth=0.8, linestyle=dashes, label=f"{method}{size}"))
    return handles


def draw(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Write the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure(rows), path)
