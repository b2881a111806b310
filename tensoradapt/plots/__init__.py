"""Figures: budgets, diagrams and reports drawn for print, on paper and screen. Only positions are computed here."""

from tensoradapt.plots.budgets import plot_budget
from tensoradapt.plots.figures import FIGURES, caption, draw_figure, drawable
from tensoradapt.plots.html import render_html
from tensoradapt.plots.networks import draw_diagram
from tensoradapt.plots.reading import check_report, read_report
from tensoradapt.plots.scores import Scored, plot_scores

__all__ = [
    "FIGURES",
    "Scored",
    "caption",
    "check_report",
    "draw_diagram",
    "draw_figure",
    "drawable",
    "plot_budget",
    "plot_scores",
    "read_report",
    "render_html",
]
