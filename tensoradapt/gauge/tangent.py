"""Tangent geometry: from the gradients of factors to the gradient of the tensor, projected onto the tangent space.

A network is a multilinear map T(theta) with Jacobian J. Autograd's factor gradients are J^T g, with g the gradient of
the tensor, which nobody forms. The direction d = (J^T J)^+ J^T g = J^+ g is the shortest one whose effect J d on the
tensor is the projection J J^+ g of g: LoRA-Pro for every format (arXiv:2407.18242). With damping it is
(J^T J + delta)^-1 J^T g, delta = damping * tr(J^T J) / entries: relative to the network's own size, and the same for
all of its nodes, so that a node whose neighbours are still near zero takes no huge step.
Invariant: all functions but `implied` work in the factors' space, and keep no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.gauge.closed import pseudo_inverse_lora, pseudo_inverse_lotr
from tensoradapt.gauge.spectra import overlap
from tensoradapt.gauge.tree import Factors, Names, fold, middle, product, unfold
from tensoradapt.linalg import has_float64
from tensoradapt.lower import dense

LOOK = 32  # iterations between two questions to an accelerator whether conjugate gradients are done
LARGEST = 40  # the rank above which the closed form's dense system costs more than conjugate gradients


@dataclass(frozen=True)
class Direction:
    """A direction in the factors' space, what is left of its normal equations, and the iterations it took.

    `left` holds the squared norms of what is left and of what there was, `steps` the iterations, where they were
    computed: nobody who does not ask waits for them.
    """

    factors: dict[str, Tensor]
    left: tuple[Tensor, Tensor] | None = None
    steps: Tensor | None = None

    @property
    def residual(self) -> float:
        """The relative residual of the normal equations; zero for closed forms."""
        left, whole = self.left or (0.0, 0.0)
        return math.sqrt(float(left) / float(whole)) if float(whole) else 0.0

    @property
    def iterations(self) -> int:
        """The iterations of conjugate gradients; zero for closed forms."""
        return 0 if self.steps is None else int(self.steps)


def implied(diagram: Diagram, factors: Factors, directions: Factors) -> Tensor:
    """The change of the dense tensor along a direction, to first order: J d = sum_u T(theta with d_u in u's place).

    Over the nodes that `directions` moves.  Shape: the sizes of `diagram.open`. This forms the tensor: it is for tests,
    small networks, and moments that are dense.
    """
    terms = [dense(diagram, {**factors, node: directions[node]}) for node in diagram.nodes if node in directions]
    return sum(terms[1:], terms[0])


def normal(
    diagram: Diagram, factors: Factors, nodes: Sequence[str] | None = None
) -> Callable[[Factors], dict[str, Tensor]]:
    """J^T J as a function of directions, without J: contracted in the factors' space, made once for many directions.

    Of all nodes, or of the `nodes` that move.

    With c(u, v) = <T(u), T(v)>, grad_u c at u = theta is J^T T(v), whose Jacobian in v is J^T J: symmetric, so that one
    more backward pass applies it.
    """
    moving = [n for n in diagram.nodes if nodes is None or n in nodes]
    bra, ket = ({n: factors[n].detach().requires_grad_(n in moving) for n in diagram.nodes} for _ in range(2))
    with torch.enable_grad():
        image = torch.autograd.grad(overlap(diagram, bra, ket), [bra[n] for n in moving], create_graph=True)

    def apply(directions: Factors) -> dict[str, Tensor]:
        moves = [directions[node] for node in moving]
        found = torch.autograd.grad(image, [ket[n] for n in moving], moves, retain_graph=True)
        return dict(zip(moving, found, strict=True))

    return apply


def damping_of(diagram: Diagram, factors: Factors, damping: float, nodes: Sequence[str] | None = None) -> Tensor:
    """The shift damping * tr(J^T J) / entries, for every value of the batch, of all nodes or those that move.

    Shape: the sizes of `diagram.batch`.
    """
    batch, moving = diagram.batch, [n for n in diagram.nodes if nodes is None or n in nodes]
    sizes = [diagram.sizes[axis] for axis in batch]
    like = factors[next(iter(diagram.nodes))]
    if not damping:
        return like.new_zeros(sizes)
    entries = sum(map(diagram.numel, moving)) / math.prod(sizes)
    return torch.stack([_trace(diagram, factors, node) for node in moving]).sum(0) * (damping / entries)


def _trace(diagram: Diagram, factors: Factors, node: str) -> Tensor:
    """The trace of a node's block of J^T J: the squared norm of all else, its bonds to the node held fixed."""
    indices, bonds = diagram.nodes[node], diagram.bonds
    others = [n for n in diagram.nodes if n != node]
    private = [i for i in indices if not any(i in diagram.nodes[n] for n in others)]

    def ket(names: Names) -> Names:
        return tuple(f"{i} ket" if i in bonds and i not in indices else i for i in names)

    operands = [(factors[n].detach(), diagram.nodes[n]) for n in others]
    operands += [(factors[n].detach(), ket(diagram.nodes[n])) for n in others]
    size = math.prod(diagram.sizes[i] for i in private)
    return product(operands, diagram.batch) * size if others else factors[node].new_tensor(float(size))


def pseudo_inverse(
    diagram: Diagram, factors: Factors, grads: Factors, damping: float = 0.0, scale: float = 1.0, **iterations: Any
) -> Direction:
    """The direction J^+ g (or its damped form) from the gradients of the factors: in closed form where there is one.

    The delta is `scale` times the network, and `grads` are the gradients of the loss in the factors. Two nodes (LoRA)
    and lines of three (LoTR, trains of three cores) up to rank 40 have closed forms; the rest, and networks of which
    only some nodes have gradients and move, is solved by `pseudo_inverse_cg`, which `iterations` are handed to.
    Shapes: those of the factors.
    """
    closed = _closed_form(diagram) if all(node in grads for node in diagram.nodes) else None
    if closed is None:
        return pseudo_inverse_cg(diagram, factors, grads, damping, scale=scale, **iterations)
    held = {node: factors[node].detach() for node in diagram.nodes}
    delta = damping_of(diagram, held, damping)
    found = closed(diagram, held, {node: grads[node].detach() for node in diagram.nodes}, delta)
    return Direction({node: tensor / scale**2 for node, tensor in found.items()})


_Closed = Callable[[Diagram, Factors, Factors, Tensor], dict[str, Tensor]]


def _closed_form(diagram: Diagram) -> _Closed | None:
    if not diagram.is_tree or len(diagram.bonds) not in (1, 2):
        return None
    if len(diagram.bonds) == 1:
        return _two_nodes
    return _three_nodes if max(diagram.sizes[bond] for bond in diagram.bonds) <= LARGEST else None


def _two_nodes(diagram: Diagram, factors: Factors, grads: Factors, delta: Tensor) -> dict[str, Tensor]:
    (bond,) = diagram.bonds
    outer, inner = diagram.nodes
    b, a, gb, ga = (
        unfold(held[node], diagram.nodes[node], diagram.batch, bond)
        for held in (factors, grads)
        for node in (outer, inner)
    )
    db, da = pseudo_inverse_lora(b, a.mT, gb, ga.mT, delta)
    made = {outer: db, inner: da.mT}
    return {n: fold(t, factors[n], diagram.nodes[n], diagram.batch, bond) for n, t in made.items()}


def _three_nodes(diagram: Diagram, factors: Factors, grads: Factors, delta: Tensor) -> dict[str, Tensor]:
    core = middle(diagram)
    ends = {bond: next(n for n in nodes if n != core) for bond, nodes in diagram.bonds.items()}
    (one, left), (two, right) = ends.items()
    batch, indices = diagram.batch, diagram.nodes[core]
    order = (*batch, *(i for i in indices if i not in (*batch, one, two)), one, two)
    sizes = [diagram.sizes[i] for i in order]

    def matrices(held: Factors) -> tuple[Tensor, Tensor, Tensor]:
        cores = held[core].permute([indices.index(i) for i in order])
        cores = cores.reshape(*sizes[: len(batch)], -1, *sizes[-2:])
        u, v = (unfold(held[n], diagram.nodes[n], batch, b) for b, n in ends.items())
        return u, cores, v

    du, dg, dv = pseudo_inverse_lotr(*matrices(factors), *matrices(grads), delta)
    return {
        left: fold(du, factors[left], diagram.nodes[left], batch, one),
        core: dg.reshape(sizes).permute([order.index(i) for i in indices]),
        right: fold(dv, factors[right], diagram.nodes[right], batch, two),
    }


def pseudo_inverse_cg(
    diagram: Diagram,
    factors: Factors,
    grads: Factors,
    damping: float = 0.0,
    tolerance: float = 1e-12,
    max_iterations: int = 1000,
    *,
    scale: float = 1.0,
) -> Direction:
    """The same for any network, by conjugate gradients on J^T J + delta from zero, which gives the shortest solution.

    Until the residual is `tolerance` of the gradient. Rounding sets a floor: eps * cond(J)^2. On a CPU every iteration
    asks whether it is the last; an accelerator, which has to be waited for, is asked after some of them, and what is
    done already stays as it is.
    """
    held = {node: factors[node].detach() for node in diagram.nodes}
    moving = [node for node in diagram.nodes if node in grads]
    delta = damping_of(diagram, held, damping, moving)
    shifts = {node: _spread(diagram, node, delta) for node in moving}

    operator = normal(diagram, held, moving)
    left = {node: grads[node].detach().clone() for node in moving}
    found = {node: 0.0 * left[node] for node in moving}  # what is not finite stays to be seen
    along, start = dict(left), _dot(left, left)
    size, floor = start, tolerance**2 * start
    going, done = size > floor, torch.zeros_like(size)
    every = 1 if size.device.type == "cpu" else LOOK
    for k in range(max_iterations):
        if k % every == 0 and not bool(going):
            break
        image = {node: seen + shifts[node] * along[node] for node, seen in operator(along).items()}
        curve = _dot(along, image)
        going = going & (curve > 0)  # else what is left is rounding, or no gradient of a function of the tensor
        step = torch.where(going, size / curve, 0.0)
        found = {n: torch.where(going, found[n] + step * along[n], found[n]) for n in found}
        left = {n: left[n] - step * image[n] for n in left}
        size, before = torch.where(going, _dot(left, left), size), size
        turn = torch.where(going, size / before, 0.0)
        along = {n: left[n] + turn * along[n] for n in left}
        done, going = done + going, going & (size > floor)
    return Direction({node: tensor / scale**2 for node, tensor in found.items()}, (size, start), done)


def _dot(one: Factors, two: Factors) -> Tensor:
    """The inner product, in float64 where its device has it."""
    found = torch.stack([(one[node] * two[node]).sum() for node in one]).sum()
    return found.double() if has_float64(found.device) else found


def _spread(diagram: Diagram, node: str, delta: Tensor) -> Tensor:
    """Values for each batch, broadcast over a node's other indices."""
    indices, batch = diagram.nodes[node], diagram.batch
    ordered = delta.permute([batch.index(i) for i in indices if i in batch])
    return ordered.reshape([diagram.sizes[i] if i in batch else 1 for i in indices])
