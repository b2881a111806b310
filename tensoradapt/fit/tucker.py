"""Tucker: higher-order orthogonal iteration with truncated SVDs.

TensorLy's `partial_tucker` computes full SVDs in its sweeps, whatever SVD it is given; it is the oracle of the tests.
Invariant: no sweep makes the error larger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.fit.policy import squares
from tensoradapt.linalg import double, energy, truncated_svd
from tensoradapt.linalg.lapack import eigh, qr
from tensoradapt.linalg.parts import gram_matrix
from tensoradapt.linalg.svd import choose

SWEEPS = 10
GAIN = 2e-5  # the share of the squared error that a sweep has to gain for another one


def hooi(
    tensor: Tensor,
    diagram: Diagram,
    core: str,
    factors: Mapping[str, Tensor],
    *,
    sweeps: int = SWEEPS,
    held: float = 0.0,
) -> tuple[dict[str, Tensor], float]:
    """Sweeps of higher-order orthogonal iteration from the factors of a Tucker network: its nodes, the squared error.

    U_k = the leading left singular vectors of T times all other factors, unfolded along k. `held` is what is known of
    the squared norm that the factors hold.
    Source: De Lathauwer, De Moor and Vandewalle 2000, SIAM J. Matrix Anal. Appl. 21(4).
    """
    total = squares(tensor)
    leaves = {n: axis_of(diagram, n) for n in diagram.nodes if n != core}
    dims = {n: diagram.open.index(axis) for n, (axis, _) in leaves.items()}
    upright = {n: factors[n] if diagram.nodes[n][0] == leaves[n][0] else factors[n].mT for n in leaves}
    bases = {n: qr(t)[0] for n, t in upright.items()}
    middle = tensor
    for _ in range(sweeps):
        for n, dim in dims.items():
            middle = _projected(tensor, {dims[other]: bases[other] for other in bases if other != n})
            bases[n] = _leading(middle.movedim(dim, 0).flatten(1), bases[n].shape[1])
        middle = _times(middle, dim, bases[n])
        before, held = held, squares(middle)
        if held - before <= GAIN * (total - held):
            break
    made = {n: (t if diagram.nodes[n][0] == leaves[n][0] else t.mT).contiguous() for n, t in bases.items()}
    bonds = dict(leaves.values())
    order = [bonds.get(axis, axis) for axis in diagram.open]
    made[core] = middle.permute([order.index(i) for i in diagram.nodes[core]]).contiguous()
    return {n: made[n] for n in diagram.nodes}, max(0.0, total - held)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """An orthonormal basis of the leading left singular vectors: of many of a wide matrix by A A^T."""
    height, width = matrix.shape
    if height > width or choose((height, width), rank) == "krylov":
        u = truncated_svd(matrix, rank).u
    else:
        u = eigh(gram_matrix(matrix))[1].flip(-1)[:, :rank]
    return torch.linalg.qr(double(u))[0].to(matrix)  # else the core's norm is not what it holds


def _projected(tensor: Tensor, bases: Mapping[int, Tensor]) -> Tensor:
    """The tensor times the transposes of some factors, the largest saving first."""
    for dim in sorted(bases, key=lambda k: (-bases[k].shape[0] / bases[k].shape[1], -k)):
        tensor = _times(tensor, dim, bases[dim])
    return tensor


def _times(tensor: Tensor, dim: int, basis: Tensor) -> Tensor:
    """One axis contracted with the rows of a basis, without a copy of a contiguous tensor."""
    if dim == tensor.dim() - 1:
        return tensor @ basis
    return (basis.mT @ tensor.flatten(dim + 1)).unflatten(-1, tensor.shape[dim + 1 :])


def tucker_core(diagram: Diagram) -> str | None:
    """The core of a Tucker network: one node whose every neighbour is a factor (axis, bond); None elsewhere."""
    for core, indices in diagram.nodes.items():
        others = {n: i for n, i in diagram.nodes.items() if n != core}
        shaped = all(len(i) == 2 and sum(a in diagram.open for a in i) == 1 for i in others.values())
        joined = all(any(b in indices for b in i if b in diagram.bonds) for i in others.values())
        if others and shaped and joined and len(diagram.bonds) == len(others) and not diagram.batch:
            if all(diagram.sizes[b] <= diagram.sizes[a] for a, b in (axis_of(diagram, n) for n in others)):
                return core
    return None


def axis_of(diagram: Diagram, node: str) -> tuple[str, str]:
    """The axis and the bond of a Tucker factor."""
    one, two = diagram.nodes[node]
    return (one, two) if one in diagram.open else (two, one)


def evened(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Orthonormal Tucker factors and their core, scaled to one norm per node."""
    found = torch.stack([energy(tensor) for tensor in factors.values()]).tolist()
    norms = {n: math.sqrt(max(square, 1e-300)) for n, square in zip(factors, found, strict=True)}
    target = math.exp(sum(map(math.log, norms.values())) / len(factors))
    return {n: t * (target / norms[n]) for n, t in factors.items()}
