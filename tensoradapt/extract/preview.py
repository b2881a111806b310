"""A look ahead: what an extraction would make, and the memory it would need, before anything is fitted.

Invariant: nothing is written, and no tensor is read, but to see which differ where a rule names no targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensoradapt.analysis.slices import CACHE
from tensoradapt.analysis.source import READING, known, open_source
from tensoradapt.extract.goals import Goal
from tensoradapt.extract.output import Output
from tensoradapt.extract.planning import planned
from tensoradapt.extract.run import OPTIONS
from tensoradapt.extract.seen import check_seen, check_targets
from tensoradapt.extract.whole import Whole, whole_change
from tensoradapt.fit.compress import basis_size
from tensoradapt.grouping import Group
from tensoradapt.linalg import SOLO, empty
from tensoradapt.linalg.krylov import OVERSAMPLE, STEPS
from tensoradapt.plan import Plan
from tensoradapt.presets import expand
from tensoradapt.spec import Spec

SINGLE = 4  # bytes of a float32 entry


@dataclass(frozen=True)
class Preview:
    """A plan, and the bytes that its extraction needs beyond the mapped files at most, with where they go."""

    plan: Plan
    memory_bytes: int
    largest_group: str
    chooses: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**self.plan.to_dict(), "memory_bytes": self.memory_bytes, "largest_group": self.largest_group}

    def __str__(self) -> str:
        memory = f"about {self.memory_bytes / 2**20:,.0f} MiB beyond the mapped files, for group {self.largest_group}"
        free = "\nnote: the ranks are the spec's; the deltas will choose others" if self.chooses else ""
        return f"{self.plan}\nmemory: {memory}{free}"


def preview(
    base: Any,
    tuned: Any,
    spec: Spec,
    out: str | Path | None = None,
    *,
    error: float | str | None = None,
    max_parameters: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Preview:
    """The plan of an extraction and the memory it will need. Raises what the extraction would raise at its door.

    `out` is looked at where it is given. Ranks that an error or a budget chooses are not known yet: the plan has the
    spec's. Options are those of `extract`.
    """
    known(options, (*OPTIONS, *READING))
    reading = {key: value for key, value in options.items() if key in READING}
    goal, output = Goal(error, max_parameters), None if out is None else Output.of(out)
    with open_source(base, tuned, **reading).on(empty(device).device) as deltas:
        free = any(not rule.targets for rule in expand(spec).rules)
        check_targets(spec, deltas.match)
        whole = whole_change(deltas) if free else Whole()
        if free:
            check_seen(whole, deltas.match)
        work = planned(deltas, whole, spec, goal, (device, options.get("seed", 0)), SOLO, reading)
        if output is not None:
            files = (*work.deltas.base.files, *work.deltas.tuned.files)
            output.check(files, overwrite=options.get("overwrite", False))
        needs = {group.name: memory_of(group) for group in work.plan.groups}
        largest = max(needs, key=lambda name: needs[name], default="")
        return Preview(work.plan, needs.get(largest, 0) + 2 * work.plan.num_bytes, largest, goal.chooses)


def memory_of(group: Group) -> int:
    """The bytes of one group's fit: a delta or all of them, the bases, the core, and a block that is compared."""
    diagram = group.diagram
    out, inp = diagram.extent("out"), diagram.extent("in") * max(1, diagram.extent("kernel"))
    slab = group.num_dense
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
