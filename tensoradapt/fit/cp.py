"""CP and Tucker by TensorLy's algorithms, on a core that is small.

Invariant: TensorLy's global backend and default dtype are as they were.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.fit.policy import squares
from tensoradapt.linalg import truncated_svd

CP_SWEEPS = 100
TUCKER_SWEEPS = 10


def svd_for_tensorly(matrix: Tensor, n_eigenvecs: int | None = None, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The truncated SVD as TensorLy's `svd=` calls it: U, S, V with V (r, n)."""
    found = truncated_svd(matrix, n_eigenvecs)
    return found.u, found.s, found.v.mT


def is_cp(diagram: Diagram) -> bool:
    """Whether a network is CP: one bond on every node, one open axis on each, and none twice."""
    opens = [[i for i in indices if i in diagram.open] for indices in diagram.nodes.values()]
    once = sorted(i for axes in opens for i in axes) == sorted(diagram.open)
    return len(diagram.bonds) == 1 and once and all(len(axes) == 1 for axes in opens)


def fit_cp(
    tensor: Tensor, diagram: Diagram, *, sweeps: int = CP_SWEEPS, seed: int = 0
) -> tuple[dict[str, Tensor], Any]:
    """T[a1..an] ~ sum_r prod_k A_k[ak, r] by TensorLy's `parafac`; the factors, and the relative error per sweep."""
    (rank,) = (diagram.sizes[b] for b in diagram.bonds)
    options = {"init": "svd", "svd": svd_for_tensorly, "random_state": np.random.RandomState(seed)}
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        found, errors = parafac(tensor, rank, n_iter_max=sweeps, tol=1e-7, return_errors=True, **options)
    weights, factors = found
    scale = weights.abs().clamp(min=0) ** (1 / len(factors))
    by_axis = dict(zip(diagram.open, [f * scale for f in factors], strict=True))
    first = diagram.open[0]
    by_axis[first] = by_axis[first] * weights.sign()
    named = {next(i for i in indices if i in diagram.open): node for node, indices in diagram.nodes.items()}
    made = {named[axis]: _as_node(factor, diagram, named[axis]) for axis, factor in _even(by_axis).items()}
    return {node: made[node] for node in diagram.nodes}, tuple(float(e) for e in errors)


def _even(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every term's norm shared evenly by its factors."""
    norms = torch.stack([torch.linalg.vector_norm(f, dim=0) for f in factors.values()])
    mean = norms.clamp(min=1e-30).log().mean(0).exp()
    by = torch.where(norms > 0, mean / norms.clamp(min=1e-30), torch.ones_like(norms))
    return {axis: factor * by[k] for k, (axis, factor) in enumerate(factors.items())}


def _as_node(factor: Tensor, diagram: Diagram, node: str) -> Tensor:
    return (factor if diagram.nodes[node][0] in diagram.open else factor.mT).contiguous()


def fit_tucker(
    tensor: Tensor, diagram: Diagram, core: str, start: dict[str, Tensor], *, sweeps: int = TUCKER_SWEEPS
) -> dict[str, Tensor]:
    """A Tucker fit improved by the sweeps of TensorLy's `partial_tucker` (HOOI), from orthonormal factors."""
    factors = {n: i for n, i in diagram.nodes.items() if n != core}
    axes = [next(a for a in indices if a in diagram.open) for indices in factors.values()]
    modes = [diagram.open.index(axis) for axis in axes]
    begun = [
        torch.linalg.qr(start[n] if factors[n][0] == a else start[n].mT)[0] for n, a in zip(factors, axes, strict=True)
    ]
    middle = tensor
    for mode, factor in zip(modes, begun, strict=True):
        middle = torch.movedim(torch.tensordot(middle, factor, dims=([mode], [0])), -1, mode)
    ranks = [f.shape[1] for f in begun]
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (middle, found), _ = partial_tucker(
            tensor, ranks, modes=modes, n_iter_max=sweeps, init=(middle, begun), svd=svd_for_tensorly, tol=1e-5
        )
    made = {n: (f if factors[n][0] == a else f.mT).contiguous() for n, a, f in zip(factors, axes, found, strict=True)}
    have = [factors[n][1] if factors[n][0] == a else factors[n][0] for n, a in zip(factors, axes, strict=True)]
    order = list(diagram.open)
    for axis, bond in zip(axes, have, strict=True):
        order[order.index(axis)] = bond
    made[core] = middle.permute(*[order.index(i) for i in diagram.nodes[core]]).contiguous()
    return made


def tucker_core(diagram: Diagram) -> str | None:
    """The core of a Tucker network: one node whose every neighbour is a factor (axis, bond); None elsewhere."""
    for core, indices in diagram.nodes.items():
        others = {n: i for n, i in diagram.nodes.items() if n != core}
        shaped = all(len(i) == 2 and sum(a in diagram.open for a in i) == 1 for i in others.values())
        joined = all(any(b in indices for b in i if b in diagram.bonds) for i in others.values())
        if others and shaped and joined and len(diagram.bonds) == len(others) and not diagram.batch:
            if all(diagram.sizes[b] <= diagram.sizes[a] for i in others.values() for a, b in [_split(diagram, i)]):
                return core
    return None


def _split(diagram: Diagram, indices: tuple[str, ...]) -> tuple[str, str]:
    return indices if indices[0] in diagram.open else (indices[1], indices[0])  # type: ignore[return-value]


def evened(factors: dict[str, Tensor], diagram: Diagram, core: str) -> dict[str, Tensor]:
    """Orthonormal Tucker factors and their core, scaled to one norm per node."""
    size = math.sqrt(max(squares(factors[core]), 1e-300))
    count = len(factors)
    norms = {n: math.sqrt(max(squares(t), 1e-300)) for n, t in factors.items()}
    target = math.exp((math.log(size) + sum(math.log(v) for n, v in norms.items() if n != core)) / count)
    return {n: t * (target / norms[n]) for n, t in factors.items()}
