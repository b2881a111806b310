"""Finished groups as a journal has them: believed only where they are what this work would have written.

Invariant: a part whose record or factors are not those of its group is done again, as a damaged one is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.grouping import Group


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class _Network(_Strict):
    sizes: dict[str, int]
    nodes: dict[str, list[str]]
    open: list[str]
    folds: dict[str, list[str]]


class _Row(_Strict):
    norm: float
    error: float
    relative_error: float | None


class _Record(_Strict):
    """What is known of a finished group: `work` writes it."""

    diagram: _Network
    sites: dict[str, _Row]
    fitted_error: float
    bound: float | None
    method: str
    converged: bool


def is_of(group: Group, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> bool:
    """Whether factors and a record are those of a finished group: its network, of any ranks, and its sites."""
    try:
        found = _Record.model_validate(record)
    except ValidationError:
        return False
    return set(found.sites) == set(group.paths) and _fits(group.diagram, found.diagram, tensors)


def _fits(wanted: Diagram, found: _Network, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is the same network, at whatever ranks, and the factors have its shapes."""
    named = {node: tuple(indices) for node, indices in found.nodes.items()}
    same = named == {node: tuple(i) for node, i in wanted.nodes.items()} and set(found.sizes) == set(wanted.sizes)
    folds = {axis: tuple(parts) for axis, parts in found.folds.items()} == {
        a: tuple(p) for a, p in wanted.folds.items()
    }
    if not same or not folds or tuple(found.open) != tuple(wanted.open) or min(found.sizes.values()) < 1:
        return False
    if any(found.sizes[axis] != wanted.sizes[axis] for axis in wanted.open):
        return False
    shapes = {node: tuple(found.sizes[index] for index in indices) for node, indices in found.nodes.items()}
    return not tensors or {node: tuple(tensor.shape) for node, tensor in tensors.items()} == shapes
