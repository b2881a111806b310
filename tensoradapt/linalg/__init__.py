"""Truncated SVDs of matrices and of streams of them, each with the norm of what it leaves out."""

from tensoradapt.linalg.krylov import krylov
from tensoradapt.linalg.parts import BLOCK, LowRank, Seed, orthonormal, square
from tensoradapt.linalg.ranges import Range, Ranges, Stack, find_ranges, range_of
from tensoradapt.linalg.slices import Dense, Product, Slice
from tensoradapt.linalg.svd import METHODS, choose, singular_values, truncated_svd
from tensoradapt.linalg.team import SOLO, Team

__all__ = [
    "BLOCK",
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
    "Team",
    "choose",
    "find_ranges",
    "krylov",
    "orthonormal",
    "range_of",
    "singular_values",
    "square",
    "truncated_svd",
]
