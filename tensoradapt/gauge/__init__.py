"""Gauge: forms, spectra, truncation and tangent geometry of a diagram's factors. Nothing dense is formed."""

from tensoradapt.gauge.batch import stacked, unstacked
from tensoradapt.gauge.blocks import added, moved, widened
from tensoradapt.gauge.canonical import FORMS, orthogonalized
from tensoradapt.gauge.carry import Carry
from tensoradapt.gauge.retract import retract_polar, retract_qr, retract_truncated, stiefel_tangent
from tensoradapt.gauge.spectra import norms, overlap, spectra
from tensoradapt.gauge.tangent import Direction, damping_of, implied, normal, pseudo_inverse, pseudo_inverse_cg
from tensoradapt.gauge.tree import Network, measured, precise
from tensoradapt.gauge.truncate import Ladder, ladder, require_truncatable, squeezed, truncatable, truncated

__all__ = [
    "FORMS",
    "Carry",
    "Direction",
    "Ladder",
    "Network",
    "added",
    "damping_of",
    "implied",
    "ladder",
    "measured",
    "moved",
    "normal",
    "norms",
    "orthogonalized",
    "overlap",
    "precise",
    "pseudo_inverse",
    "pseudo_inverse_cg",
    "require_truncatable",
    "retract_polar",
    "retract_qr",
    "retract_truncated",
    "spectra",
    "squeezed",
    "stacked",
    "stiefel_tangent",
    "truncatable",
    "truncated",
    "unstacked",
    "widened",
]
