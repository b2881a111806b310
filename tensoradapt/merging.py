"""Merging: deltas written into stored weights and taken out again.

Invariant: a merge that is refused changes nothing; an unmerge restores the kept original bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensoradapt.chain import Chain
from tensoradapt.errors import AdapterError
from tensoradapt.sites import Site

BLOCK = 1 << 18  # entries of float32 arithmetic at a time: a block and its copies stay in the cache
Rows = Callable[[int, int], Tensor]


@dataclass
class Merged:
    """One parameter that a merge changed: where it stands, and what stood there."""

    owner: nn.Module
    name: str
    original: Tensor | None
    untied: nn.Parameter | None = None

    def restore(self) -> None:
        """Put the original back."""
        if self.untied is not None:
            self.owner._parameters[self.name] = self.untied
        elif self.original is not None:
            with torch.no_grad():
                self.owner._parameters[self.name].copy_(self.original)  # type: ignore[union-attr]


def view(parameter: Tensor, site: Site) -> Tensor:
    """A site's part of a stored parameter, as a matrix (out, in) that shares its memory."""
    matrix = parameter if site.index is None else parameter[site.index]
    matrix = matrix.reshape(matrix.shape[0], -1) if matrix.dim() > 2 else matrix
    matrix = matrix.mT if site.layout == "in out" else matrix
    return matrix if site.rows is None else matrix[site.rows[0] : site.rows[1]]


def rows_of(chain: Chain, scale: float) -> Rows:
    """A function from a range of rows to that block of scale * delta, formed there and then where the chain allows it."""
    pair = chain.low_rank
    if pair is not None:
        return lambda a, b: (pair[0][a:b] * scale) @ pair[1]
    dense = chain.dense()
    return lambda a, b: dense[a:b] * scale


def add_rows(matrix: Tensor, rows: Rows, path: str, *, write: bool = True) -> None:
    """matrix += delta in float32, block by block; raises AdapterError at the first block that is not finite."""
    height = max(1, BLOCK // max(matrix.shape[1], 1))
    for start in range(0, matrix.shape[0], height):
        stop = min(start + height, matrix.shape[0])
        block = rows(start, stop).float().to(matrix.device) + matrix[start:stop]
        result = block.to(matrix.dtype)
        low, high = torch.aminmax(result)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise AdapterError(
                f"merging {path} would give values that are not finite",
                got=f"rows {start} to {stop}",
                hint="look for NaN in the adapter and the base, or for an overflow of the base's dtype",
            )
        if write:
            matrix[start:stop].copy_(result)


def keep_original(parameter: Tensor, keep: str | None) -> Tensor | None:
    """A copy of a parameter to restore it from: on the CPU, on its own device, or none."""
    if keep not in ("cpu", "same", None):
        raise AdapterError(f"keep={keep!r} is no place", expected="'cpu', 'same' or None")
    return None if keep is None else parameter.detach().to("cpu" if keep == "cpu" else parameter.device, copy=True)


def restore_all(merged: Sequence[Merged]) -> None:
    """Undo a merge, the last parameter first."""
    for record in reversed(merged):
        record.restore()
