"""Floors: where the rounding noise of a group's deltas ends, in any unfolding of their tensor.

Invariant: noise of uneven rows, columns and sites is never underrated: an edge is that of the noisiest row and the
noisiest column of the unfolding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tensoradapt.analysis.noise import EPS, Noise, uneven_edge
from tensoradapt.analysis.slices import positions_of
from tensoradapt.fit.stream import axes_of
from tensoradapt.grouping import Group
from tensoradapt.linalg import SOLO, Team
from tensoradapt.placing import Placement
from tensoradapt.sites import Site


@dataclass(frozen=True)
class Floors:
    """The rounding noise of every site of a group; the variance of an entry is rows[i] cols[j] / mean at its site."""

    group: Group
    noises: Mapping[str, Noise]

    @property
    def whole(self) -> Floors:
        """The same with the rounding of float32 in it."""
        return Floors(self.group, {path: noise.whole for path, noise in self.noises.items()})

    def at(self, level: float) -> Floors:
        """The noise of deltas that are multiplied by a level."""
        return Floors(self.group, {path: noise.at(level) for path, noise in self.noises.items()})

    def edge(self, rows: Collection[str], batch: Collection[str] = ()) -> float:
        """The end of the noise's spectrum in the unfolding (`rows`, all other axes), for any entry of the `batch`."""
        sizes = {axis: self.group.diagram.sizes[axis] for axis in self.group.diagram.open if axis not in batch}
        cols = [axis for axis in sizes if axis not in rows]
        height, width = (math.prod(sizes[axis] for axis in side) for side in (rows, cols))
        row = math.sqrt(self._largest({*rows, *batch}) / width)
        col = math.sqrt(self._largest({*cols, *batch}) / height)
        return uneven_edge(row, col, row, height, width)

    def _largest(self, kept: Collection[str]) -> float:
        """The largest sum of the variances over all axes that are not `kept`."""
        lead, out, inp = axes_of(self.group.diagram)
        grid = torch.zeros(math.prod(lead.values()), dtype=torch.float64)
        for placement in self.group.placements:
            noise = self.noises[placement.site.path]
            places = positions_of(self.group, placement)
            for place, (rows, cols) in zip(places, _slots(noise, placement), strict=True):
                sides = _largest_sum(rows, out, kept), _largest_sum(cols, inp, kept)
                grid[place] = sides[0] * sides[1] / noise.variance if noise.variance else 0.0
        return _largest_sum(grid, lead, kept)


def floors_of(group: Group, noise: Callable[[Site], Noise], team: Team = SOLO) -> Floors:
    """The noise of a group's sites, each member of a team reading a share of them."""
    mine = {p.site.path: noise(p.site) for p in group.placements[team.rank :: team.size]}
    return Floors(group, {path: found for part in team.gather(mine) for path, found in part.items()})


def short_of(sizes: Mapping[str, int], rows: Collection[str]) -> float:
    """The share of the largest singular value of an unfolding below which values are rounding of float32 sums."""
    whole = math.prod(sizes.values())
    height = math.prod(sizes[axis] for axis in rows)
    return EPS * max(8, min(height, whole // max(1, height)))


def _slots(noise: Noise, placement: Placement) -> Iterator[tuple[Tensor, Tensor]]:
    """The variances of the rows and columns of every slot, in the order of slots."""
    sides = [side.chunk(count) for side, count in zip((noise.rows, noise.cols), placement.slots, strict=True)]
    return ((rows, cols) for rows in sides[0] for cols in sides[1])


def _largest_sum(values: Tensor, axes: Mapping[str, int], kept: Collection[str]) -> float:
    """The largest sum over the axes that are not kept."""
    if not axes:
        return float(values.sum())
    rest = [k for k, axis in enumerate(axes) if axis not in kept]
    found = values.reshape(list(axes.values()))
    return float((found.sum(rest) if rest else found).max())
