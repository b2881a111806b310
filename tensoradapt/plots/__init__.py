"""Figures: budget tables and diagrams drawn for print, on paper and screen. Nothing is computed here but positions."""

from tensoradapt.plots.budgets import plot_budget
from tensoradapt.plots.networks import draw_diagram

__all__ = ["draw_diagram", "plot_budget"]
