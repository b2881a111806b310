"""Measuring: what factors leave of the deltas that they are for.

Invariant: an error is that of the factors as they are given, against the deltas themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tensoradapt.errors import ShapeError
from tensoradapt.grouping import Group
from tensoradapt.linalg import Product, Slice, energy
from tensoradapt.lower import lower
from tensoradapt.placing import Placement

STRIP = 1 << 22  # entries of a delta that are compared at a time
Row = Mapping[str, Any]


def site_row(lost: float, total: float) -> dict[str, float | None]:
    """A site's norm, and its error: absolute, and relative (None where the delta is zero and the error is not)."""
    relative = math.sqrt(lost / total) if total else (None if lost else 0.0)
    return {"norm": math.sqrt(total), "error": math.sqrt(lost), "relative_error": relative}


def overall(rows: Iterable[Row]) -> tuple[float, float]:
    """The norm of all deltas, and sqrt(sum_s |D_s - D^_s|^2 / sum_s |D_s|^2), 0 where they are all zero."""
    kept = list(rows)
    total = math.fsum(row["norm"] ** 2 for row in kept)
    lost = math.fsum(row["error"] ** 2 for row in kept)
    return math.sqrt(total), math.sqrt(lost / total) if total else 0.0


def worst_of(rows: Mapping[str, Row]) -> dict[str, Any] | None:
    """The site with the largest relative error; None where there is no site."""
    known = {path: row["relative_error"] for path, row in rows.items() if row["relative_error"] is not None}
    path = max(known, key=lambda p: known[p], default=None)
    return None if path is None else {"path": path, "relative_error": known[path]}


def compared(
    group: Group, placement: Placement, factors: Mapping[str, Tensor], found: Slice
) -> dict[str, float | None]:
    """The error of one site's delta, a strip of rows at a time where the chain allows."""
    chain = lower(group, placement, factors)
    pair, lost = chain.low_rank, []
    if pair is not None and isinstance(found, Product):  # through the factors alone: [B, -B^] [A; A^]
        left = Product(torch.cat([found.outer, -pair[0] * group.scale], 1), torch.cat([found.inner, pair[1]]))
        return site_row(left.square, found.square)
    delta = found.dense()
    if pair is None:
        lost.append(energy(delta - chain.dense().reshape(delta.shape) * group.scale))
    else:
        outer = pair[0] * group.scale
        height = max(1, STRIP // max(1, delta.shape[1]))
        for start in range(0, len(delta), height):
            rows = delta[start : start + height]
            lost.append(energy(torch.addmm(rows, outer[start : start + height], pair[1], alpha=-1)))
    left, total = torch.stack([torch.stack(lost).sum(), found.energy]).tolist()  # a device is waited for once
    if not math.isfinite(left):
        raise ShapeError(
            f"the fitted delta of {placement.site.path} has entries beyond {str(delta.dtype).removeprefix('torch.')}",
            got=f"a delta of norm {math.sqrt(total):.3g}",
            hint="leave this weight out (exclude), or fit it with a higher rank",
        )
    return site_row(left, total)
