"""The error that a change makes, over the sites of a group: values at coordinates that no site has count for nothing.

relative_error = sqrt(sum_sites ||D - D'||^2 / sum_sites ||D||^2), from the factors as stored, before and after.
Invariant: nothing dense is formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tensoradapt.change.install import Turn
from tensoradapt.gauge import Network, added, norms, precise
from tensoradapt.grouping import Group


def squared_norm(group: Group, network: Network) -> float:
    """The squared Frobenius norm of the deltas of all of a group's sites."""
    axes = network.diagram.coordinates
    found = norms(network.diagram, network.factors, axes).square()
    covered = torch.zeros([network.diagram.sizes[axis] for axis in axes], dtype=torch.bool, device=found.device)
    for placement in group.placements:
        covered[tuple(slice(*_span(axis, placement.index[axis], placement.slots)) for axis in axes)] = True
    return float(found[covered].sum()) * group.scale**2


def _span(axis: str, first: int, slots: tuple[int, int]) -> tuple[int, int]:
    return first, first + (slots[0] * slots[1] if axis in ("slot", "site") else 1)


def squared_error(turn: Turn) -> float:
    """The squared Frobenius norm of what changed in the deltas of a group's sites."""
    if turn.middle is turn.before:  # wider bonds add zeros
        return 0.0
    before, after = (
        Network(network.diagram, precise(network.diagram, network.factors)) for network in (turn.before, turn.after)
    )
    return squared_norm(turn.group, added([before, after], [1.0, -1.0]))


def relative_error(turns: Sequence[Turn]) -> float:
    """The relative error over the sites of all groups; zero where nothing was lost, or nothing was there."""
    lost = sum(squared_error(turn) for turn in turns)
    norm = sum(squared_norm(turn.group, turn.before) for turn in turns) if lost else 0.0
    return math.sqrt(lost / norm) if norm else 0.0
