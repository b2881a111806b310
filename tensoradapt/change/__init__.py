"""Changes of whole adapters: gauge, ranks, sums."""

from tensoradapt.change.operations import orthogonalize, resize, truncate
from tensoradapt.change.result import Change
from tensoradapt.change.sums import combine

__all__ = ["Change", "combine", "orthogonalize", "resize", "truncate"]
