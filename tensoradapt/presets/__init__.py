"""Presets: a paper is a row. Functions from their declared parameters to rules, one table of them, and the door."""

from tensoradapt.presets.door import SpecLike, as_spec, as_specs
from tensoradapt.presets.table import PRESETS, Preset, expand, preset

__all__ = ["PRESETS", "Preset", "SpecLike", "as_spec", "as_specs", "expand", "preset"]
