"""A look ahead: what an extraction would make, and the memory it would need, before anything is fitted.

Invariant: nothing is written, and no tensor is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tensoradapt.analysis.slices import CACHE
from tensoradapt.extract.goals import Goal
from tensoradapt.extract.work import prepared
from tensoradapt.fit.compress import basis_size
from tensoradapt.grouping import Group
from tensoradapt.linalg import SOLO
from tensoradapt.linalg.krylov import OVERSAMPLE, STEPS
from tensoradapt.plan import Plan
from tensoradapt.spec import Spec

SINGLE = 4  # bytes of a float32 entry


@dataclass(frozen=True)
class Preview:
    """A plan, and the bytes that its extraction needs beyond the mapped files at most, with where they go."""

    plan: Plan
    memory_bytes: int
    largest_group: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**self.plan.to_dict(), "memory_bytes": self.memory_bytes, "largest_group": self.largest_group}

    def __str__(self) -> str:
        memory = f"about {self.memory_bytes / 2**20:,.0f} MiB beyond the mapped files, for group {self.largest_group}"
        return f"{self.plan}\nmemory: {memory}"


def preview(
    base: Any,
    tuned: Any,
    spec: Spec,
    *,
    error: float | str | None = None,
    max_parameters: int | None = None,
    seed: int = 0,
    **source: Any,
) -> Preview:
    """The plan of an extraction and the memory it will need. Raises what the extraction would raise at its door."""
    work = prepared(base, tuned, spec, Goal(error, max_parameters), (None, seed), SOLO, source)
    with work.deltas:
        needs = {group.name: memory_of(group) for group in work.plan.groups}
        largest = max(needs, key=lambda name: needs[name])
        return Preview(work.plan, needs[largest] + 2 * work.plan.num_bytes, largest)


def memory_of(group: Group) -> int:
    """The bytes of one group's fit: a delta or all of them, the bases, the core, and a block that is compared."""
    diagram = group.diagram
    out, inp = diagram.extent("out"), diagram.extent("in") * max(1, diagram.extent("kernel"))
    slab = sum(p.site.numel for p in group.placements)
    delta = max(p.site.numel for p in group.placements)
    held = slab if slab * SINGLE <= CACHE else delta
    count = math.prod(diagram.sizes[axis] for axis in diagram.coordinates)
    sides = [_side(diagram, axis, size) for axis, size in (("out", out), ("in", inp))]
    bases = sum(STEPS * (size + 2 * k) * k for (size, k) in ((out, sides[0]), (inp, sides[1])) if k < size)
    core = count * sides[0] * sides[1] if len(group.placements) > 1 else 0
    return SINGLE * (held + delta + 2 * bases + 3 * core)


def _side(diagram: Any, axis: str, size: int) -> int:
    """What a side of the core measures: its basis, or the side itself."""
    if diagram.fold(axis) != (axis,):
        return size
    rank = basis_size(diagram, axis)
    return size if rank is None else min(size, STEPS * (rank + OVERSAMPLE))
