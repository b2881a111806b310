"""Gauge: forms, spectra, truncation and tangent geometry of a diagram's factors. Nothing dense is formed."""

from tensoradapt.gauge.blocks import added, moved, widened
from tensoradapt.gauge.canonical import FORMS, orthogonalized
from tensoradapt.gauge.spectra import norms, overlap, spectra
from tensoradapt.gauge.tree import Network
from tensoradapt.gauge.truncate import Ladder, ladder, squeezed, truncated

__all__ = [
    "FORMS",
    "Ladder",
    "Network",
    "added",
    "ladder",
    "moved",
    "norms",
    "orthogonalized",
    "overlap",
    "spectra",
    "squeezed",
    "truncated",
    "widened",
]
