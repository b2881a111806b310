"""A group's deltas as a stream: every site's delta, or its slots, at its place on the group's coordinate axes.

Invariant: one delta is in memory at a time, unless all of a group are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from tensoradapt.fit.stream import Stream, axes_of, count_of
from tensoradapt.grouping import Group
from tensoradapt.linalg import SOLO, Dense, Product, Slice, Stack, Team, level_of
from tensoradapt.placing import Placement
from tensoradapt.sites import Site

CACHE = 1 << 28  # bytes of a group's deltas that are kept from one pass to the next
Fetch = Callable[[Site], Slice]


@dataclass
class Slices:
    """The slices of one group, as one member of a team reads them: a share of the sites, pass after pass."""

    group: Group
    fetch: Fetch
    like: Tensor
    team: Team = SOLO
    kept: dict[str, Slice] = field(default_factory=dict)
    tell: Callable[[str], None] = lambda _: None  # called with a site's path whenever its delta is read

    @property
    def mine(self) -> list[Placement]:
        """The sites that this member reads: every n-th of them."""
        return list(self.group.placements)[self.team.rank :: self.team.size]

    def stream(self, seed: int, norm: float = 0.0) -> Stream:
        """The stream that a fit reads, its slices near 1 where the norm of them all is known."""
        lead, rows, cols = axes_of(self.group.diagram)
        shape = (count_of(rows), count_of(cols))
        reads = [partial(self._read, placement) for placement in self.mine]
        stack = Stack(self._pass, count_of(lead), shape, self.like, reads).at(level_of(norm, self.like.dtype))
        return Stream(stack, lead, rows, cols, self.team, seed)

    def slice(self, placement: Placement) -> Slice:
        """One site's delta, kept for the next pass where the group is small."""
        path = placement.site.path
        self.tell(path)
        if path in self.kept:
            return self.kept[path]
        found = self.fetch(placement.site)
        if sum(p.site.numel for p in self.mine) * self.like.element_size() <= CACHE or len(self.mine) == 1:
            self.kept[path] = found
        return found

    def _pass(self) -> Iterator[tuple[int, Slice]]:
        for placement in self.mine:
            yield from self._read(placement)

    def _read(self, placement: Placement) -> Iterator[tuple[int, Slice]]:
        found = self.slice(placement)
        parts = [found] if placement.slots == (1, 1) else _slotted(found, placement.slots)
        return zip(positions_of(self.group, placement), parts, strict=True)


def positions_of(group: Group, placement: Placement) -> range:
    """A site's place on the flattened coordinate axes; of a site in slots the place of every slot."""
    position, step, count = 0, 1, placement.slots[0] * placement.slots[1]
    for axis in group.diagram.coordinates:
        position = position * group.diagram.sizes[axis] + placement.index[axis]
        step = 1 if axis in ("slot", "site") else step * group.diagram.sizes[axis]
    return range(position, position + count * step, step)


def _slotted(found: Slice, slots: tuple[int, int]) -> Iterator[Slice]:
    """The slots of a delta, by rows."""
    height, width = found.shape[0] // slots[0], found.shape[1] // slots[1]
    for row in range(slots[0]):
        for col in range(slots[1]):
            yield _part(found, slice(row * height, (row + 1) * height), slice(col * width, (col + 1) * width))


def _part(found: Slice, rows: slice, cols: slice) -> Slice:
    if isinstance(found, Product):
        return Product(found.outer[rows], found.inner[:, cols])
    return Dense(found.dense()[rows, cols].contiguous())


def flat(delta: Tensor) -> Tensor:
    """A delta with its kernel flattened into `in`.  Shape: (out, in, ..) -> (out, in ..)."""
    return delta.flatten(1)
