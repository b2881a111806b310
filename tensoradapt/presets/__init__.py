"""Presets: a paper is a row. Functions from their declared parameters to rules, and one table of them."""

from tensoradapt.presets.table import PRESETS, Preset, expand, preset

__all__ = ["PRESETS", "Preset", "expand", "preset"]
