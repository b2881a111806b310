"""Fits: a tensor, or a stream of slices, to the factors of a diagram."""

from tensoradapt.fit.api import fit
from tensoradapt.fit.compress import Compressed, compress
from tensoradapt.fit.policy import Above, Given, Policy, Within, relative, squares
from tensoradapt.fit.result import Fit
from tensoradapt.fit.solve import fit_diagram

__all__ = [
    "Above",
    "Compressed",
    "Fit",
    "Given",
    "Policy",
    "Within",
    "compress",
    "fit",
    "fit_diagram",
    "relative",
    "squares",
]
