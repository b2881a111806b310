"""Closed forms of the shortest direction (J^T J + delta)^-1 J^T g: two factors, and a core between two factors.

Where the gradients are those of a function of the tensor, damping moves no direction out of the range of J^T, so that
every gauge direction is orthogonal to the solution: B^T dB = dA A^T for two factors, and for a core
U^T dU = sum_l dG_l G_l^T, V^T dV = sum_l dG_l^T G_l. These equations close the system.
Invariant: singular values that are zero give zeros, as the pseudo-inverse does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensoradapt.linalg import double

_TINY = 1e-100


def pseudo_inverse_lora(b: Tensor, a: Tensor, grad_b: Tensor, grad_a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The shortest (dB, dA) for the delta B A, from the gradients of B and A.

    With N = B^T B and M = A A^T: (N X + X M + delta X) = grad_A A^T, dB = (grad_B - B X) (M + delta)^-1,
    dA = (N + delta)^-1 (grad_A - X A).  Shapes: b (.., m, r), a (.., r, n), delta (..). Source: arXiv:2407.18242.
    """
    n, p = _eigen(b.mT @ b)
    m, q = _eigen(a @ a.mT)
    shift = delta[..., None]
    middle = p @ (_inverse(n[..., :, None] + m[..., None, :] + shift[..., None]) * (p.mT @ grad_a @ a.mT @ q)) @ q.mT
    db = (grad_b - b @ middle) @ _power(q, _inverse(m + shift))
    da = _power(p, _inverse(n + shift)) @ (grad_a - middle @ a)
    return db, da


def pseudo_inverse_lotr(
    u: Tensor, core: Tensor, v: Tensor, grad_u: Tensor, grad_core: Tensor, grad_v: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The shortest (dU, dG, dV) for the deltas U G_l V^T of all l, from the gradients of U, G and V.

    In the eigenbases of U^T U (values n) and V^T V (values m), with w = 1 / (n m + delta):
    dG_l = w * (grad_G_l - X G_l m - n G_l Y^T), X = sum_l dG_l G_l^T = U^T dU, Y = sum_l dG_l^T G_l = V^T dV, a system
    of p^2 + q^2 unknowns; then dU = (grad_U - U sum_l (dG_l m + G_l Y^T) G_l^T) (S_U + delta)^-1 with
    S_U = sum_l G_l m G_l^T, and dV alike.  Shapes: u (.., o, p), core (.., l, p, q), v (.., i, q), delta (..).
    """
    n, pu = _eigen(u.mT @ u)
    m, pv = _eigen(v.mT @ v)
    u, v, grad_u, grad_v = u @ pu, v @ pv, grad_u @ pu, grad_v @ pv
    core, grad_core = (pu.mT[..., None, :, :] @ g @ pv[..., None, :, :] for g in (core, grad_core))
    w = _inverse(n[..., :, None] * m[..., None, :] + delta[..., None, None])
    x, y = _gauge(core, grad_core, n, m, w)
    bent = x[..., None, :, :] @ core * m[..., None, None, :] + n[..., None, :, None] * (core @ y.mT[..., None, :, :])
    dg = w[..., None, :, :] * (grad_core - bent)
    left = ((dg * m[..., None, None, :] + core @ y.mT[..., None, :, :]) @ core.mT).sum(-3)
    right = ((dg * n[..., None, :, None] + x[..., None, :, :] @ core).mT @ core).sum(-3)
    s_u = (core * m[..., None, None, :] @ core.mT).sum(-3)
    s_v = ((core * n[..., None, :, None]).mT @ core).sum(-3)
    du = (grad_u - u @ left) @ _damped_inverse(s_u, delta)
    dv = (grad_v - v @ right) @ _damped_inverse(s_v, delta)
    return du @ pu.mT, pu[..., None, :, :] @ dg @ pv.mT[..., None, :, :], dv @ pv.mT


def _gauge(core: Tensor, grad_core: Tensor, n: Tensor, m: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """X and Y: their linear system written out and solved, in float64.

    In X / n and Y / m it is a positive diagonal plus a Gram matrix, which alone is singular: a core far larger than its
    sides leaves the diagonal little to say. What is rounding is added to it, so that no system is singular.
    """
    like, (p, q) = core, core.shape[-2:]
    core, grad_core, n, m, w = (double(each) for each in (core, grad_core, n, m, w))
    n, m = n.clamp(min=_TINY), m.clamp(min=_TINY)
    triangle = torch.linalg.cholesky_ex(_system(core, n, m, w)).L
    bent = w[..., None, :, :] * grad_core
    targets = torch.cat([(bent @ core.mT).sum(-3).flatten(-2), (bent.mT @ core).sum(-3).flatten(-2)], -1)
    x, y = torch.cholesky_solve(targets[..., None], triangle)[..., 0].split([p * p, q * q], -1)
    return (n[..., None] * x.unflatten(-1, (p, p))).to(like), (m[..., None] * y.unflatten(-1, (q, q))).to(like)


def _system(core: Tensor, n: Tensor, m: Tensor, w: Tensor) -> Tensor:
    """The symmetric matrix of X / n and Y / m, its lower triangle.  Shape: (.., p^2 + q^2, p^2 + q^2)."""
    p, q = core.shape[-2:]
    pairs = torch.einsum("...lac,...lbd->...acbd", core, core)
    weights = n[..., :, None] * m[..., None, :] * w
    made = core.new_zeros(*core.shape[:-3], p * p + q * q, p * p + q * q)
    xx = made[..., : p * p, : p * p].unflatten(-1, (p, p)).unflatten(-3, (p, p)).diagonal(dim1=-4, dim2=-2)
    yy = made[..., p * p :, p * p :].unflatten(-1, (q, q)).unflatten(-3, (q, q)).diagonal(dim1=-4, dim2=-2)
    xx.copy_(torch.einsum("...ic,...kcjc->...jki", weights, pairs))
    yy.copy_(torch.einsum("...ic,...ieid->...dec", weights, pairs))
    yx = made[..., p * p :, : p * p].unflatten(-1, (p, p)).unflatten(-3, (q, q))
    yx.copy_(torch.einsum("...ic,...idjc->...cdij", weights, pairs))
    own = torch.cat([n.repeat_interleave(p, -1), m.repeat_interleave(q, -1)], -1)
    made.diagonal(dim1=-2, dim2=-1).add_(own).mul_(1 + made.shape[-1] * torch.finfo(made.dtype).eps)
    return made


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors; all NaN, and no error, where a matrix is not finite: a factor is NaN already."""
    try:
        found = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:
        if bool(gram.isfinite().all()):
            raise
        nan = torch.full_like(gram, torch.nan)
        return nan[..., 0], nan
    return found.eigenvalues, found.eigenvectors


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of a Gram matrix, in float64; what is rounding alone is zero."""
    values, vectors = eigh(double(gram))
    floor = values[..., -1:] * values.shape[-1] * torch.finfo(gram.dtype).eps
    return torch.where(values > floor, values, 0.0).to(gram), vectors.to(gram)


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1 / torch.where(values > 0, values, 1.0), 0.0)


def _power(vectors: Tensor, values: Tensor) -> Tensor:
    return vectors * values[..., None, :] @ vectors.mT


def _damped_inverse(gram: Tensor, delta: Tensor) -> Tensor:
    values, vectors = _eigen(gram)
    return _power(vectors, _inverse(values + delta[..., None]))
