"""Networks with bonds in blocks: sums of networks, wider bonds, a point plus a tangent vector.

Invariant: what is added lies in blocks of the bonds that meet the old ones in zeros only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.errors import ShapeError, SpecError
from tensoradapt.gauge.tree import Edge, Factors, Network, inward, measured, middle, require_tree


def require_connected(diagram: Diagram, what: str) -> None:
    """Raise SpecError where bonds do not join all nodes: the sum of products is no product then."""
    reached = set(list(diagram.nodes)[:1])
    for _ in diagram.nodes:
        reached |= {node for nodes in diagram.bonds.values() if reached & set(nodes) for node in nodes}
    apart = [node for node in diagram.nodes if node not in reached]
    if apart:
        raise SpecError(
            f"{what} needs bonds that join all nodes, and none joins {apart[0]!r} to {min(reached)!r}",
            got=str(diagram),
            expected="a network in one piece: the sum of two products of separate parts is no such product",
        )


def added(networks: Sequence[Network], weights: Sequence[float]) -> Network:
    """The network of sum_k weights_k T_k: every bond is as large as those of all terms together.

    All have the same nodes and axes. Raises SpecError where they have not, or where bonds do not join all nodes.
    """
    first = networks[0].diagram
    require_connected(first, "a sum")
    if any(n.diagram.nodes != first.nodes or _axes(n.diagram) != _axes(first) for n in networks):
        raise ShapeError("networks of other nodes or axes have no sum", got=[str(n.diagram) for n in networks])
    center, bonds = middle(first), first.bonds
    held: dict[str, Tensor] = {}
    for node, indices in first.nodes.items():
        parts = [n.factors[node] * (w if node == center else 1.0) for n, w in zip(networks, weights, strict=True)]
        dims = [dim for dim, index in enumerate(indices) if index in bonds]
        held[node] = _blocks(parts, dims) if dims else sum(parts[1:], parts[0])
    return measured(first, held)


def _axes(diagram: Diagram) -> list[int]:
    return [diagram.sizes[axis] for axis in diagram.open]


def _blocks(parts: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
    """The tensor with its parts on the diagonal of some dimensions, and zeros elsewhere."""
    shape = [sum(p.shape[d] for p in parts) if d in dims else n for d, n in enumerate(parts[0].shape)]
    whole = parts[0].new_zeros(shape)
    starts = [0] * len(shape)
    for part in parts:
        whole[
            tuple(slice(starts[d], starts[d] + part.shape[d]) if d in dims else slice(None) for d in range(len(shape)))
        ] = part
        starts = [start + n for start, n in zip(starts, part.shape, strict=True)]
    return whole


def widened(diagram: Diagram, factors: Factors, fill: Factors, zero: str = "") -> Network:
    """The same tensor with bonds as wide as in `fill`, whose entries the new ones are, but for zeros at one end.

    The end that gets zeros is the node `zero`, else one whose old entries are all zero, else the first of the bond.
    Sum over new values of a bond: 0 * fill. The other end can be trained from there.
    """
    held = {}
    for node, indices in diagram.nodes.items():
        new = fill[node].clone()
        for bond in (i for i in indices if i in diagram.bonds):
            if node == _zero_end(diagram, factors, bond, zero):
                new.narrow(
                    indices.index(bond), diagram.sizes[bond], new.shape[indices.index(bond)] - diagram.sizes[bond]
                ).zero_()
        new[tuple(map(slice, factors[node].shape))] = factors[node]
        held[node] = new
    return measured(diagram, held)


def _zero_end(diagram: Diagram, factors: Factors, bond: str, zero: str) -> str:
    ends = diagram.bonds[bond]
    return zero if zero in ends else next((end for end in ends if not factors[end].any()), ends[0])


def moved(diagram: Diagram, factors: Factors, directions: Factors) -> Network:
    """A tree at T + sum_u dT/du directions_u, exactly, with every bond twice as large.

    A bond's first half stands for the subtree behind it, the second half for its change.
    Source: Steinlechner 2016, SIAM J. Sci. Comput. 38(5). Raises SpecError where the diagram is no tree.
    """
    require_tree(diagram, "a step along tangent vectors")
    center = middle(diagram)
    edges = inward(diagram, center)
    up = {edge.child: edge for edge in edges}
    held = {}
    for node, indices in diagram.nodes.items():
        below = [edge for edge in edges if edge.parent == node]
        held[node] = _moved(factors[node], directions[node], indices, up.get(node), below)
    return measured(diagram, held)


def _moved(plain: Tensor, change: Tensor, indices: tuple[str, ...], up: Edge | None, below: Sequence[Edge]) -> Tensor:
    doubled: Mapping[str, int] = {edge.bond: indices.index(edge.bond) for edge in (*below, *([up] if up else []))}
    whole = plain.new_zeros([n * (2 if dim in doubled.values() else 1) for dim, n in enumerate(plain.shape)])

    def block(second: Sequence[str]) -> Tensor:
        part = whole
        for bond, dim in doubled.items():
            part = part.narrow(dim, plain.shape[dim] if bond in second else 0, plain.shape[dim])
        return part

    out = [up.bond] if up else []
    if up:
        block([]).copy_(plain)
    block(out).add_(change if up else plain + change)
    for edge in below:
        block([*out, edge.bond]).copy_(plain)
    return whole
