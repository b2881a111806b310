"""Gauge: forms, spectra, truncation and tangent geometry of a diagram's factors. Nothing dense is formed."""

from tensoradapt.gauge.batch import stacked, unstacked
from tensoradapt.gauge.blocks import added, moved, widened
from tensoradapt.gauge.canonical import FORMS, orthogonalized
from tensoradapt.gauge.carry import carried
from tensoradapt.gauge.spectra import norms, overlap, spectra
from tensoradapt.gauge.tree import Network, measured, precise
from tensoradapt.gauge.truncate import Ladder, ladder, require_truncatable, squeezed, truncatable, truncated

__all__ = [
    "FORMS",
    "Ladder",
    "Network",
    "added",
    "carried",
    "ladder",
    "measured",
    "moved",
    "norms",
    "orthogonalized",
    "overlap",
    "precise",
    "require_truncatable",
    "spectra",
    "squeezed",
    "stacked",
    "truncatable",
    "truncated",
    "unstacked",
    "widened",
]
