"""Tucker: a core and a factor for every compressed axis."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.formats.build import Ranks, Shape, limited, per_bond


def tucker(shape: Shape, rank: Ranks, excess: str) -> Diagram:
    """Tucker: T[a1..an] = sum core[r_a1..r_an] prod_k factor_ak[ak, r_ak]; axes not in `compress` stay on the core.

    Ranks by axis. A bond's limit is the smaller of its axis and the product of the core's other indices.
    Source: Tucker 1966, Psychometrika 31.
    """
    unknown = [axis for axis in shape.compress if axis not in shape.axes]
    if unknown:
        raise SpecError(
            f"compress names the axis {unknown[0]!r}, which the tensor lacks",
            expected=", ".join(shape.axes),
            hint="an axis that is cut is named by its folds",
        )
    named = tuple(axis for axis in rank if axis in shape.axes) if isinstance(rank, Mapping) else shape.axes
    axes = shape.compress or named
    asked = per_bond(rank, axes)
    sizes = {axis: min(asked.get(axis, size), size) for axis, size in ((a, shape.sizes[a]) for a in shape.axes)}
    bonds: dict[str, int] = {}
    for axis in axes:
        others = math.prod(size for other, size in sizes.items() if other != axis)
        bonds[f"r_{axis}"] = limited(asked[axis], min(shape.sizes[axis], others), excess, axis)
    core = tuple(f"r_{axis}" if axis in axes else axis for axis in shape.axes)
    factors = {f"factor_{axis}": (axis, f"r_{axis}") for axis in shape.axes if axis in axes}
    return shape.diagram({"core": core, **factors}, bonds)
