"""Truncation: smaller bonds, the error known from the singular values before anything is cut.

In the form of `schmidt` every bond is a basis of singular vectors, and all bonds are cut at once: with t_b the values
that bond b discards, max_b |t_b| <= ||T - T'|| <= sqrt(sum_b |t_b|^2), an equality for one bond. A CP has no such form:
its components are fitted again. Invariant: no bond is left above what its ends can use.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tensoradapt.diagram import Diagram
from tensoradapt.errors import RankError
from tensoradapt.gauge.canonical import schmidt
from tensoradapt.gauge.cp import Columns, eliminated, is_cp, shrunk
from tensoradapt.gauge.tree import Factors, Network, measured, require_tree


def truncatable(diagram: Diagram) -> bool:
    """Whether a diagram is a tree or a CP."""
    return is_cp(diagram) or diagram.is_tree


def require_truncatable(diagram: Diagram) -> None:
    """Raise SpecError, with the reason, on networks that are neither trees nor CP."""
    if not is_cp(diagram):
        require_tree(diagram, "truncation")


def truncated(diagram: Diagram, factors: Factors, ranks: Mapping[str, int]) -> Network:
    """The network with bonds of at most these sizes; a bond that is not named is only cut to what it can use.

    The factors come in the symmetric form, a CP's as they are fitted. Raises SpecError on networks that are neither
    trees nor CP, RankError on sizes below 1 and on bonds that do not exist.
    Source: Grasedyck 2010, SIAM J. Matrix Anal. 31(4), for the bound.
    """
    require_truncatable(diagram)
    for bond, rank in ranks.items():
        if bond not in diagram.bonds:
            raise RankError(f"{bond!r} is no bond", expected=", ".join(diagram.bonds))
        if rank < 1:
            raise RankError(f"bond {bond!r} cannot be cut to rank {rank}", got=rank, expected="at least 1")
    if is_cp(diagram):
        return shrunk(diagram, factors, min([*ranks.values(), *(diagram.sizes[b] for b in diagram.bonds)]))
    cut = schmidt(diagram, factors).cut(ranks)
    again = schmidt(cut.diagram, cut.factors)  # cutting one bond may leave another with values that are zero now
    return measured(diagram, again.cut(_usable(again.diagram)).balanced(), factors)


def _usable(diagram: Diagram) -> dict[str, int]:
    """The size that each bond of a tree can use: that of the other indices of either end, batches apart."""
    sizes = dict(diagram.sizes)
    before: dict[str, int] = {}
    while sizes != before:
        before = dict(sizes)
        for bond, ends in diagram.bonds.items():
            rest = ([i for i in diagram.nodes[end] if i != bond and i not in diagram.batch] for end in ends)
            sizes[bond] = min(sizes[bond], *(math.prod(sizes[i] for i in indices) for indices in rest))
    return {bond: sizes[bond] for bond in diagram.bonds}


# -- which bond next ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ladder:
    """A network's bonds, and for each the squared error that losing its last value adds, by the values left."""

    diagram: Diagram
    costs: Mapping[str, Sequence[float]]


def ladder(diagram: Diagram, factors: Factors, scale: float = 1.0) -> Ladder:
    """The squared errors of dropping values: sigma^2 of every bond, times the squared scale of the network.

    For a CP they are those of `eliminated`, which bound the error of `truncated`. Raises SpecError on other networks.
    """
    require_truncatable(diagram)
    if is_cp(diagram):
        steps = eliminated(Columns.of(diagram, factors)).costs
        found = {bond: steps for bond in diagram.bonds}
    else:
        form = schmidt(diagram, factors)
        found = {bond: v.square().reshape(-1, v.shape[-1]).sum(0) for bond, v in form.values.items()}
        diagram = form.diagram
    return Ladder(diagram, {bond: (steps * scale**2).tolist() for bond, steps in found.items()})


def squeezed(
    ladders: Sequence[Ladder], squared_error: float = math.inf, max_parameters: int = 0
) -> list[dict[str, int]]:
    """The ranks of networks after dropping values, always of the bond that costs least per entry saved.

    Until no value can go without the sum of squared errors passing `squared_error`, or until at most `max_parameters`
    entries are left. Raises RankError where rank 1 on all bonds has more entries.
    """
    sizes = [dict(rung.diagram.sizes) for rung in ladders]
    total = sum(rung.diagram.num_parameters for rung in ladders)
    queue = [(*_price(rung, sizes[k], bond), k, bond) for k, rung in enumerate(ladders) for bond in rung.costs]
    heapq.heapify(queue)
    spent = 0.0
    while queue and total > max_parameters:
        price, saved, k, bond = heapq.heappop(queue)
        rung, now = ladders[k], sizes[k]
        if now[bond] == 1 or spent + rung.costs[bond][now[bond] - 1] > squared_error:
            continue
        if (price, saved) != _price(rung, now, bond):  # a neighbour has shrunk since: the bond saves less now
            heapq.heappush(queue, (*_price(rung, now, bond), k, bond))
            continue
        spent += rung.costs[bond][now[bond] - 1]
        now[bond] -= 1
        total += saved
        heapq.heappush(queue, (*_price(rung, now, bond), k, bond))
    if total > max_parameters > 0:
        raise RankError(
            "the budget is below rank 1 on every bond",
            got=f"max_parameters={max_parameters:,}",
            expected=f"at least {total:,}",
        )
    return [{bond: now[bond] for bond in rung.costs} for rung, now in zip(ladders, sizes, strict=True)]


def _price(rung: Ladder, sizes: Mapping[str, int], bond: str) -> tuple[float, int]:
    """The squared error of the next value of a bond per entry saved, and the entries saved, negative."""
    nodes = [indices for indices in rung.diagram.nodes.values() if bond in indices]
    saved = sum(math.prod(sizes[i] for i in indices if i != bond) for indices in nodes)
    return rung.costs[bond][sizes[bond] - 1] / saved, -saved
