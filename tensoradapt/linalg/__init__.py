"""Truncated SVDs of matrices and of streams of them, each with the norm of what it leaves out."""

from tensoradapt.linalg.home import double, has_float64, home_of, moved, settled
from tensoradapt.linalg.krylov import krylov
from tensoradapt.linalg.level import energy, level_of, norm_of, norms
from tensoradapt.linalg.parts import (
    BLOCK,
    LARGE,
    LowRank,
    Seed,
    as_tensor,
    empty,
    first_not_finite,
    orthonormal,
    square,
)
from tensoradapt.linalg.pool import each, mapped, pooled
from tensoradapt.linalg.ranges import Range, Ranges, Stack, find_ranges, range_of
from tensoradapt.linalg.slices import Dense, Product, Slice, Strips
from tensoradapt.linalg.svd import METHODS, Values, choose, singular_values, slice_values, truncated_svd
from tensoradapt.linalg.team import SOLO, Team

__all__ = [
    "BLOCK",
    "LARGE",
    "METHODS",
    "SOLO",
    "Dense",
    "LowRank",
    "Product",
    "Range",
    "Ranges",
    "Seed",
    "Slice",
    "Stack",
    "Strips",
    "Team",
    "Values",
    "as_tensor",
    "choose",
    "double",
    "each",
    "empty",
    "energy",
    "find_ranges",
    "first_not_finite",
    "has_float64",
    "home_of",
    "krylov",
    "level_of",
    "mapped",
    "moved",
    "norm_of",
    "norms",
    "orthonormal",
    "pooled",
    "range_of",
    "settled",
    "singular_values",
    "slice_values",
    "square",
    "truncated_svd",
]
