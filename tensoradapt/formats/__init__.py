"""Formats: functions from axes, sizes and ranks to a diagram, and the one table that names them."""

from tensoradapt.formats.build import Builder
from tensoradapt.formats.cp import cp
from tensoradapt.formats.tt import tt
from tensoradapt.formats.ttm import ttm
from tensoradapt.formats.tucker import tucker

FORMATS: dict[str, Builder] = {"tt": tt, "tucker": tucker, "cp": cp, "ttm": ttm}

__all__ = ["FORMATS", "Builder", "cp", "tt", "ttm", "tucker"]
