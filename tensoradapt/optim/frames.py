"""Frames: which factors of a network can be kept orthonormal, and how they become so while no delta changes.

U[.., b] W[b, ..] = sum_c Q[.., c] (R W)[c, ..] with U = Q R: the neighbour across the factor's one bond takes up R.
Invariant: Q has orthonormal columns whatever the rank of U, the zero factor included.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tensoradapt.adapter import Adapter
from tensoradapt.change.targets import named, network_of, require_own
from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.gauge import precise
from tensoradapt.gauge.cp import is_cp
from tensoradapt.gauge.tree import Edge, act, batch_of, fold, positive_qr, require_tree, unfold
from tensoradapt.grouping import Group
from tensoradapt.init import draw
from tensoradapt.linalg import double

ROUNDING = 1e-12  # what a retraction in float64 itself leaves


@dataclass(frozen=True)
class Frame:
    """A factor that is kept orthonormal: its group, and its one bond, directed to the neighbour that takes up R."""

    group: str
    edge: Edge

    def matrix(self, diagram: Diagram, tensor: Tensor) -> Tensor:
        """The factor as matrices in float64, one for each value of a batch axis.  Shape: (batch.., rows, bond)."""
        return double(self.rows(diagram, tensor))

    def rows(self, diagram: Diagram, tensor: Tensor) -> Tensor:
        """The same in the factor's dtype."""
        indices = diagram.nodes[self.edge.child]
        return unfold(tensor.detach(), indices, batch_of(diagram, self.edge), self.edge.bond)

    def tensor(self, diagram: Diagram, matrix: Tensor, like: Tensor) -> Tensor:
        """The factor of such matrices, in the dtype and on the device of `like`."""
        found = fold(matrix, like, diagram.nodes[self.edge.child], batch_of(diagram, self.edge), self.edge.bond)
        return found.to(like).contiguous()


def frames_of(adapter: Adapter, nodes: str | Iterable[str] | None, held: Collection[Tensor]) -> tuple[Frame, ...]:
    """The factors that are kept orthonormal: the named nodes, by default all that can be, among those `held`.

    Raises SpecError where a node does not exist or cannot be orthonormal, and where a group has none that can.
    """
    wanted = None if nodes is None else (nodes,) if isinstance(nodes, str) else tuple(nodes)
    known = list(dict.fromkeys(node for group in adapter.plan.groups for node in group.diagram.nodes))
    unknown = [node for node in wanted or () if node not in known]
    if unknown or wanted == ():
        raise SpecError(
            f"no group has a node {unknown[0]!r}" if unknown else "nodes names no factor to keep orthonormal",
            expected=", ".join(known),
        )
    found: list[Frame] = []
    for group in adapter.plan.groups:
        factors = adapter.factors(group.name)
        asked = wanted if wanted is None else [node for node in wanted if node in factors]
        if (asked is None or asked) and any(tensor in held for tensor in factors.values()):
            with named(group):
                found += [frame for frame in _frames(group, asked) if factors[frame.edge.child] in held]
    if not found:
        raise SpecError("the optimiser holds no factor that is to be orthonormal", got=wanted, hint="check params")
    return tuple(found)


def _frames(group: Group, wanted: Sequence[str] | None) -> list[Frame]:
    """The frames of one group. Raises SpecError, with the reason, where there are none."""
    diagram = group.diagram
    if is_cp(diagram):
        raise SpecError(
            f"a CP has no orthonormal factors: one bond joins all of its {len(diagram.nodes)} nodes, and what makes "
            "the columns of one orthonormal cannot be taken up by the others",
            got=str(diagram),
            hint="use polar, lotr or another tree",
        )
    require_own(group, "there are no orthonormal factors of")
    require_tree(diagram, "an orthonormal factor")
    found: list[Frame] = []
    reasons: dict[str, str] = {}
    for node in _by_default(diagram) if wanted is None else wanted:
        reason = _obstacle(group, node, {frame.edge.child for frame in found})
        if not reason:
            found.append(Frame(group.name, _edge(diagram, node)))
        elif wanted is not None:
            raise SpecError(f"node {node!r} cannot be orthonormal: {reason}", got=str(diagram))
        reasons[node] = reason
    if not found:
        raise SpecError(
            "no factor can be orthonormal",
            got="; ".join(f"{node}: {reason}" for node, reason in reasons.items()),
            hint="use polar or lotr",
        )
    return found


def _by_default(diagram: Diagram) -> list[str]:
    """All nodes, that on `out` first: of two factors and no core it is the one that is made orthonormal."""
    outs = set(diagram.fold("out"))
    return sorted(diagram.nodes, key=lambda node: not outs & set(diagram.nodes[node]))


def _edge(diagram: Diagram, node: str) -> Edge:
    (bond,) = (i for i in diagram.nodes[node] if i in diagram.bonds)
    (parent,) = (other for other in diagram.bonds[bond] if other != node)
    return Edge(node, parent, bond)


def _obstacle(group: Group, node: str, chosen: Collection[str]) -> str:
    """Why a node cannot be kept orthonormal; empty where it can."""
    diagram = group.diagram
    bonds = [i for i in diagram.nodes[node] if i in diagram.bonds]
    if len(bonds) != 1:
        return f"it has {len(bonds)} bonds, and a factor with one is needed"
    edge = _edge(diagram, node)
    rows = diagram.numel(node) // diagram.sizes[edge.bond]
    for axis in batch_of(diagram, edge):
        rows //= diagram.sizes[axis]
    if node in group.rule.frozen:
        return "it is frozen"
    if rows < diagram.sizes[edge.bond]:
        return f"it has {rows} rows for the {diagram.sizes[edge.bond]} values of its bond; use a rank of {rows} at most"
    if edge.parent in group.rule.frozen:
        return f"{edge.parent!r} across its bond is frozen, and cannot take up its scale"
    if edge.parent in chosen:
        return f"{edge.parent!r} across its bond is, and without a core between them the delta could not grow"
    return ""


def alike(frames: Sequence[Frame], factors: Mapping[Frame, Tensor], diagrams: Mapping[str, Diagram]) -> list[Alike]:
    """Frames whose matrices have one shape, dtype and device, together."""
    found: dict[Any, list[Frame]] = {}
    for frame in frames:
        factor, diagram = factors[frame], diagrams[frame.group]
        batch = tuple(diagram.sizes[axis] for axis in batch_of(diagram, frame.edge))
        key = (batch, factor.numel(), diagram.sizes[frame.edge.bond], factor.dtype, factor.device)
        found.setdefault(key, []).append(frame)
    return [Alike([(frame, diagrams[frame.group]) for frame in lot]) for lot in found.values()]


@dataclass(frozen=True)
class Alike:
    """Frames of equal matrices, each with its group's diagram: what is done to all of them is done at once."""

    frames: Sequence[tuple[Frame, Diagram]]

    def matrices(self, tensors: Mapping[Frame, Tensor]) -> Tensor:
        """A tensor of every frame as matrices in float64.  Shape: (frame, batch.., rows, bond)."""
        return double(torch.stack([frame.rows(diagram, tensors[frame]) for frame, diagram in self.frames]))

    def tensors(self, matrices: Tensor, like: Mapping[Frame, Tensor]) -> Iterator[tuple[Frame, Tensor]]:
        """Every frame with the factor of its matrices, in the dtype and on the device of another."""
        back = matrices.to(like[self.frames[0][0]])
        for (frame, diagram), matrix in zip(self.frames, back.unbind(), strict=True):
            yield frame, frame.tensor(diagram, matrix, like[frame])


# -- becoming orthonormal -----------------------------------------------------------------------------------------


def orthonormal(adapter: Adapter, frames: Sequence[Frame], seed: int) -> dict[str, dict[str, Tensor]]:
    """The factors of every group that change so that all frames are orthonormal and no delta changes.

    Directions that a factor of lower rank lacks are drawn from the seed. Raises SpecError where a group's delta is a
    difference and a frame is not orthonormal yet.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for group in adapter.plan.groups:
        own = [frame for frame in frames if frame.group == group.name]
        changed = _straightened(adapter, group, own, seed) if own else {}
        if changed and group.rule.start == "difference":
            raise SpecError(
                f"group {group.name!r}: its delta is a difference from a frozen copy of the factors, which has to have "
                "their gauge, and they are not orthonormal",
                got=", ".join(changed),
                hint="start with orthonormal factors (olora), or with a zero delta",
            )
        found[group.name] = changed
    return found


def _straightened(adapter: Adapter, group: Group, frames: Sequence[Frame], seed: int) -> dict[str, Tensor]:
    network = network_of(adapter, group)
    diagram, held = group.diagram, precise(network.diagram, network.factors)
    changed: set[str] = set()
    for frame in frames:
        node, parent, bond = frame.edge.child, frame.edge.parent, frame.edge.bond
        x = frame.matrix(diagram, held[node])
        if is_orthonormal(x, network.factors[node].dtype):
            continue
        factor = replace(adapter.plan.factors[group.store[node]], law="normal(1)")
        q = completed(x, frame.matrix(diagram, draw(factor, seed)).to(x))
        held[node] = frame.tensor(diagram, q, held[node])
        held[parent] = act(held[parent], diagram.nodes[parent], batch_of(diagram, frame.edge), bond, x.mT @ q)
        changed |= {node, parent}
    return {node: held[node] for node in diagram.nodes if node in changed}


def is_orthonormal(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether X^T X = 1 within the rounding of a dtype; so are columns that are not finite, which nothing can help."""
    off = (x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).abs().max()
    return not bool(off > max(8 * torch.finfo(dtype).eps, ROUNDING))


def completed(x: Tensor, noise: Tensor) -> Tensor:
    """The orthonormal columns nearest to X, with Q Q^T X = X: what X spans, then directions of the noise.

    With X = U S V^T it is [U_k, W] V^T, W an orthonormal basis of the noise beyond the k columns whose singular value
    is not zero.  Shapes: (batch.., rows, r).
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = (s > s[..., :1] * x.shape[-2] * torch.finfo(x.dtype).eps)[..., None, :]
    return positive_qr(torch.where(kept, u, noise))[0] @ vh  # orthonormal columns that come first are left by a QR
