"""Groups as TensorLy's tensor classes, detached, and back: what TensorLy can hold, it gets as it is; arrays as factors.

Invariant: the dense tensor of what is returned equals the group's own, without the scale.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import tensorly
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.tt_matrix import TTMatrix
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.errors import ShapeError, SpecError
from tensoradapt.formats import cp, tt, ttm, tucker
from tensoradapt.formats.build import Shape
from tensoradapt.grouping import Group
from tensoradapt.linalg import as_tensor, double


def to_tensorly(group: Group, factors: Mapping[str, Tensor]) -> Any:
    """A group as a TuckerTensor, TTTensor, CPTensor or TTMatrix over the axes of its diagram, in their order.

    Uncompressed modes of a Tucker tensor get an identity. Raises SpecError on networks that TensorLy has no class for.
    """
    return from_diagram(group.diagram, factors, group.rule.format)


def from_diagram(diagram: Diagram, factors: Mapping[str, Tensor], format: str) -> Any:
    """The factors of a diagram of a format as TensorLy's tensor. Raises SpecError where there is no class for it."""
    held = {node: tensor.detach() for node, tensor in factors.items()}
    joined = [nodes for nodes in diagram.bonds.values()] == [tuple(diagram.nodes)]  # all of them by one bond
    cp_like = joined and all(len(indices) <= 2 for indices in diagram.nodes.values())
    name = format
    if format == "network":
        name = "cp" if cp_like else "tt"
    unfit = (name == "ttm" and diagram.coordinates) or (name == "tt" and _train(diagram) is None)
    if name not in _MAKERS or unfit:
        raise SpecError(
            "TensorLy has no class for this network",
            got=str(diagram),
            hint="use the factors, or dense(); a train has its axes in the order of its cores",
        )
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return _MAKERS[name](diagram, held)


def _train(diagram: Diagram) -> list[tuple[str, list[str]]] | None:
    """The nodes of a tensor train in the order of the tensor's axes, each with the bond before, its axis and the bond
    behind; None where the diagram is no train, or its cores stand in another order than the axes."""
    nodes = [next(node for node, indices in diagram.nodes.items() if axis in indices) for axis in diagram.open]
    joined = {frozenset(ends): bond for bond, ends in diagram.bonds.items()}
    bonds = [joined.get(frozenset(pair), "") for pair in pairwise(nodes)]
    turned = [[*bonds[max(k - 1, 0) : k], axis, *bonds[k : k + 1]] for k, axis in enumerate(diagram.open)]
    whole = len(set(nodes)) == len(diagram.nodes) and "" not in bonds
    if whole and all(sorted(diagram.nodes[n]) == sorted(t) for n, t in zip(nodes, turned, strict=True)):
        return list(zip(nodes, turned, strict=True))
    return None


def _tt(diagram: Diagram, held: Mapping[str, Tensor]) -> Any:
    cores = [
        held[node].permute([diagram.nodes[node].index(i) for i in turned]) for node, turned in _train(diagram) or ()
    ]
    if len(cores) == 1:
        return TTTensor([cores[0][None, ..., None]])
    return TTTensor([cores[0][None], *cores[1:-1], cores[-1][..., None]])


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


def from_tensorly(tensor: Any, axes: Sequence[str] = ()) -> tuple[Diagram, dict[str, Tensor]]:
    """A TuckerTensor, TTTensor, CPTensor or TTMatrix as a diagram and its factors; the inverse of `from_diagram`.

    `axes` names the tensor's dimensions, of a TT-matrix all rows and then all columns. A Tucker factor that is an
    identity is left out, CP weights that are not all one become a node. Raises ShapeError, SpecError.
    """
    if type(tensor) not in _READERS:
        raise SpecError(
            "no tensor of TensorLy's that a diagram can hold",
            got=type(tensor).__name__,
            expected=", ".join(kind.__name__ for kind in _READERS),
        )
    shape = _whole_shape(tensor)
    named = tuple(axes) or tuple(f"axis_{k}" for k in range(len(shape)))
    if len(named) != len(shape) or len(set(named)) < len(named):
        raise ShapeError("axes name the tensor's dimensions, each once", got=named, expected=f"{len(shape)} names")
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return _READERS[type(tensor)](tensor, Shape(named, dict(zip(named, shape, strict=True)), {}))


def _whole_shape(tensor: Any) -> tuple[int, ...]:
    """The sizes of all dimensions, of a TT-matrix those of the rows first."""
    if type(tensor) is TTMatrix:
        cores = tensor.factors
        return (*(core.shape[1] for core in cores), *(core.shape[2] for core in cores))
    return tuple(tensor.shape)


def _read_tt(tensor: Any, shape: Shape) -> tuple[Diagram, dict[str, Tensor]]:
    cores = list(tensor.factors)
    if cores[0].shape[0] != 1 or cores[-1].shape[-1] != 1:
        raise ShapeError("a tensor train begins and ends with rank 1", got=[tuple(core.shape) for core in cores])
    diagram = tt(shape, [core.shape[-1] for core in cores[:-1]], "keep")
    return _filled(diagram, [core.reshape(diagram.shape(n)) for n, core in zip(diagram.nodes, cores, strict=True)])


def _read_ttm(tensor: Any, shape: Shape) -> tuple[Diagram, dict[str, Tensor]]:
    cores = list(tensor.factors)
    half = len(cores)
    folded = Shape(shape.axes, shape.sizes, {"out": shape.axes[:half], "in": shape.axes[half:]})
    diagram = ttm(folded, [core.shape[-1] for core in cores[:-1]], "keep")
    return _filled(diagram, [core.reshape(diagram.shape(n)) for n, core in zip(diagram.nodes, cores, strict=True)])


def _read_tucker(tensor: Any, shape: Shape) -> tuple[Diagram, dict[str, Tensor]]:
    held = dict(zip(shape.axes, tensor.factors, strict=True))
    compressed = {a: f for a, f in held.items() if not _is_identity(f)}
    if not compressed:
        return _filled(Diagram(shape.sizes, {"core": shape.axes}, shape.axes), [tensor.core])
    ranks = {axis: factor.shape[1] for axis, factor in compressed.items()}
    return _filled(tucker(shape, ranks, "keep"), [tensor.core, *compressed.values()])


def _is_identity(factor: Tensor) -> bool:
    eye = torch.eye(*factor.shape, dtype=factor.dtype, device=factor.device)
    return factor.shape[0] == factor.shape[1] and bool((factor == eye).all())


def _read_cp(tensor: Any, shape: Shape) -> tuple[Diagram, dict[str, Tensor]]:
    diagram = cp(shape, tensor.rank, "keep")
    weights = tensor.weights
    if weights is None or bool((weights == 1).all()):
        return _filled(diagram, tensor.factors)
    (bond,) = diagram.bonds
    weighted = replace(diagram, nodes={"weights": (bond,), **diagram.nodes})
    return _filled(weighted, [weights, *tensor.factors])


def _filled(diagram: Diagram, tensors: Sequence[Tensor]) -> tuple[Diagram, dict[str, Tensor]]:
    return diagram, dict(zip(diagram.nodes, tensors, strict=True))


_Reader = Callable[[Any, Shape], tuple[Diagram, dict[str, Tensor]]]
_READERS: dict[type, _Reader] = {
    TuckerTensor: _read_tucker,
    TTTensor: _read_tt,
    CPTensor: _read_cp,
    TTMatrix: _read_ttm,
}


def subtracted(group: Group) -> tuple[str, ...]:
    """The nodes of which a group has a frozen copy that is subtracted. Raises SpecError where it has none."""
    if group.rule.start != "difference":
        raise SpecError(
            f"group {group.name!r} has no frozen start",
            got=f"start: {group.rule.start}",
            hint="write start: difference in its rule, or begin with ta.initialize(adapter, 'pissa')",
        )
    return group.trainable


def values_for(group: str, held: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors or arrays given for nodes of a group, in the dtypes of those held; warns where that rounds them.

    Raises SpecError, ShapeError where one does not fit.
    """
    if not isinstance(given, Mapping):
        raise SpecError("factors come as a mapping from node to tensor", got=type(given).__name__)
    values = {node: as_tensor(tensor, f"node {node!r}") for node, tensor in given.items()}
    for node, tensor in values.items():
        if node not in held:
            raise SpecError(f"group {group!r} has no node {node!r}", expected=", ".join(held))
        if tensor.shape != held[node].shape:
            raise ShapeError(
                f"node {node!r} of group {group!r} has another shape",
                got=tuple(tensor.shape),
                expected=tuple(held[node].shape),
            )
    made = {node: _fitted(f"node {node!r} of group {group!r}", t.detach(), held[node]) for node, t in values.items()}
    lost = {node: loss for node, t in values.items() if (loss := _rounding(t.detach(), made[node]))}
    if lost:
        worst = max(lost, key=lambda node: lost[node])
        dtypes = f"{values[worst].dtype} to {made[worst].dtype}".replace("torch.", "")
        warnings.warn(
            f"values for {', '.join(lost)} of group {group!r} are rounded from {dtypes}, by up to {lost[worst]:.1g} of "
            "the largest: attach a rule with dtype=... to keep more digits, or round them first",
            stacklevel=4,
        )
    return made


def rounded(held: Mapping[str, Tensor], computed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values that were computed in more digits, as those held are: there is nothing to warn of."""
    return {node: tensor.to(held[node]) for node, tensor in computed.items()}


def _fitted(what: str, tensor: Tensor, held: Tensor) -> Tensor:
    """A tensor in the dtype and on the device of another. Raises ShapeError where that cannot hold its numbers."""
    if tensor.is_complex():
        raise ShapeError(f"{what} is a real tensor", got=str(tensor.dtype), hint="give its real part: x.real")
    made = tensor.to(held.device, held.dtype)
    if bool((tensor.isfinite() & ~made.isfinite().to(tensor.device)).any()):
        raise ShapeError(
            f"{what} is {str(held.dtype).removeprefix('torch.')}, which cannot hold these numbers",
            got=f"entries up to {float(double(tensor).abs().max()):.3g}",
            expected=f"at most {torch.finfo(held.dtype).max:.3g}",
            hint="give the group's scale a part of them, or attach a rule with a wider dtype",
        )
    return made


def _rounding(given: Tensor, made: Tensor) -> float:
    """How much a change of dtype took from the values, as a share of the largest; 0 where it took nothing."""
    if given.dtype == made.dtype or not given.numel():
        return 0.0
    exact = double(given)
    largest = float(exact.abs().max())
    return float((double(made.to(exact.device)) - exact).abs().max()) / largest if largest > 0 else 0.0
