"""The results of `analyse_finetuning.py`: rows as a Markdown table, as CSV, and as a figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tensoradapt.plots.page import COLOURS, GREY, save

MARKERS = "osDv^"


@dataclass(frozen=True)
class Row:
    """An adapter: its budget (None for what is no adapter), what it spent of it, what it lost, how it scores."""

    format: str
    budget: int | None = None
    num_parameters: int | None = None
    relative_error: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def cells(self) -> list[str]:
        """The row as text; the metrics are left out where there is no adapter."""
        counts = ["" if count is None else f"{count:,}" for count in (self.budget, self.num_parameters)]
        error = "" if self.relative_error is None else f"{self.relative_error:.3f}"
        return [self.format, *counts, error]

    def __str__(self) -> str:
        metrics = [f"{name} {value:.4f}" for name, value in self.metrics.items()]
        return "  ".join(filter(None, [*self.cells, *metrics, self.note]))


def table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Return a Markdown table, with what could not be done in the metrics' place."""
    lines = [["format", "budget", "parameters", "relative error", *metrics], ["---"] + ["--:"] * (3 + len(metrics))]
    for row in rows:
        scores = (
            [f"{row.metrics[name]:.3f}" for name in metrics] if row.metrics else [row.note] + [""] * len(metrics[1:])
        )
        lines.append([*row.cells, *scores])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the rows with all digits."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["format", "budget", "num_parameters", "relative_error", *metrics, "note"])
        for row in rows:
            scores = [row.metrics.get(name) for name in metrics]
            writer.writerow([row.format, row.budget, row.num_parameters, row.relative_error, *scores, row.note])


def draw(rows: Sequence[Row], metrics: Sequence[str], path: Path) -> None:
    """Draw relative error and the metrics against parameters, a line per format, the rows without a budget across."""
    names = ["relative_error", *metrics]
    figure = Figure(figsize=(2.3 * len(names), 2.4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        draw_panel(axes, rows, name)
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside upper center", ncols=7, frameon=False)
    save(figure, path)


def draw_panel(axes: Axes, rows: Sequence[Row], name: str) -> None:
    """Draw one quantity against the parameters."""
    for number, label in enumerate(dict.fromkeys(row.format for row in rows if row.budget)):
        points = [(row.num_parameters, value_of(row, name)) for row in rows if row.format == label and row.metrics]
        axes.plot(*zip(*sorted(points), strict=True), f"-{MARKERS[number % 5]}", color=COLOURS[number % 7], label=label)
    for style, row in zip(("-", ":"), (row for row in rows if not row.budget), strict=False):
        axes.axhline(value_of(row, name), color=GREY, linestyle=style, linewidth=0.9, label=row.format)
    axes.set(xscale="log", xlabel="parameters", ylabel=name.replace("_", " "))


def value_of(row: Row, name: str) -> float | None:
    """Return the relative error or a metric."""
    return row.relative_error if name == "relative_error" else row.metrics[name]
