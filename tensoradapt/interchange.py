"""Groups as TensorLy's tensor classes, detached: what TensorLy can hold, it gets as it is.

Invariant: the dense tensor of what is returned equals the group's own, without the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorly
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.tt_matrix import TTMatrix
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.grouping import Group


def to_tensorly(group: Group, factors: Mapping[str, Tensor]) -> Any:
    """A group as a TuckerTensor, TTTensor, CPTensor or TTMatrix over the axes of its diagram, in their order.

    Uncompressed modes of a Tucker tensor get an identity. Raises SpecError on networks that TensorLy has no class for.
    """
    return from_diagram(group.diagram, factors, group.rule.format)


def from_diagram(diagram: Diagram, factors: Mapping[str, Tensor], format: str) -> Any:
    """The factors of a diagram of a format as TensorLy's tensor. Raises SpecError where there is no class for it."""
    held = {node: tensor.detach() for node, tensor in factors.items()}
    cp_like = all(len(indices) <= 2 for indices in diagram.nodes.values()) and len(diagram.bonds) == 1
    name = "cp" if format == "network" and cp_like else format
    if name not in _MAKERS or (name == "ttm" and diagram.coordinates):
        raise SpecError(
            "TensorLy has no class for this network",
            got=str(diagram),
            hint="use the factors, or lower.dense(diagram, factors)",
        )
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return _MAKERS[name](diagram, held)


def _tt(diagram: Diagram, held: Mapping[str, Tensor]) -> Any:
    cores = [held[f"core_{axis}"] for axis in diagram.open]
    if len(cores) > 1:
        cores = [cores[0][None], *cores[1:-1], cores[-1][..., None]]
    return TTTensor(cores)


def _tucker(diagram: Diagram, held: Mapping[str, Tensor]) -> Any:
    core = held["core"]
    eyes = [torch.eye(diagram.sizes[axis], dtype=core.dtype, device=core.device) for axis in diagram.open]
    factors = [held.get(f"factor_{axis}", eye) for axis, eye in zip(diagram.open, eyes, strict=True)]
    return TuckerTensor((core, factors))


def _cp(diagram: Diagram, held: Mapping[str, Tensor]) -> Any:
    weights = [held[node] for node, indices in diagram.nodes.items() if len(indices) == 1]
    by_axis = {i: held[node] for node, indices in diagram.nodes.items() for i in indices if i in diagram.open}
    return CPTensor((weights[0] if weights else None, [by_axis[axis] for axis in diagram.open]))


def _ttm(diagram: Diagram, held: Mapping[str, Tensor]) -> Any:
    cores = [held[node] for node in diagram.nodes]
    if len(cores) == 1:
        return TTMatrix([cores[0][None, ..., None]])
    return TTMatrix([cores[0][None], *cores[1:-1], cores[-1][..., None]])


_Maker = Callable[[Diagram, Mapping[str, Tensor]], Any]
_MAKERS: dict[str, _Maker] = {"tt": _tt, "tucker": _tucker, "cp": _cp, "ttm": _ttm}
