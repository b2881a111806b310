"""CP by TensorLy's `parafac`, on a core that is small.

Invariant: TensorLy's global backend and default dtype are as they were.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorly
import torch
from tensorly.decomposition import parafac
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.fit.policy import squares
from tensoradapt.linalg import home_of, truncated_svd

CP_SWEEPS = 100
RIDGE = 1e-6


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
    tensor = tensor.to(home_of(tensor.device))
    options: dict[str, Any] = {"init": "svd", "svd": svd_for_tensorly, "random_state": np.random.RandomState(seed)}
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        try:
            found, errors = parafac(tensor, rank, n_iter_max=sweeps, tol=1e-7, return_errors=True, **options)
        except torch.linalg.LinAlgError:  # more terms than the tensor is made of: their Gram matrices are singular
            options["l2_reg"] = RIDGE * squares(tensor) ** (1 - 1 / tensor.dim())
            found, errors = parafac(tensor, rank, n_iter_max=sweeps, tol=1e-7, return_errors=True, **options)
    weights, factors = found
    by_axis = dict(zip(diagram.open, [factors[0] * weights, *factors[1:]], strict=True))
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
