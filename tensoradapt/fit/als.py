"""Alternating least squares for networks that no closed algorithm fits: each node in turn, the others held.

Invariant: no sweep makes the error larger; nodes that are held fixed come back as they were given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from opt_einsum import contract
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.fit.policy import squares
from tensoradapt.linalg import BLOCK, Seed

SWEEPS = 60
SETTLED = 1e-4  # the relative gain of a sweep in the error below which another one is not worth its time
DIRECT = 2048  # the largest system of normal equations that is solved directly
RIDGE = 1e-10


@dataclass(frozen=True)
class Swept:
    """Where alternating least squares came to: the factors, the relative error after every sweep, and why it ended."""

    factors: dict[str, Tensor]
    history: tuple[float, ...]
    converged: bool


def als(
    tensor: Tensor,
    diagram: Diagram,
    *,
    start: Mapping[str, Tensor] | None = None,
    fixed: Iterable[str] = (),
    sweeps: int = SWEEPS,
    seed: int = 0,
) -> Swept:
    """Factors of any network: for each node n in turn, min over node n of |T - network|^2.

    Each is a linear least squares problem, since the network is linear in every node. `start` gives first values, of
    which the `fixed` nodes keep theirs; others are drawn.  Shape: the sizes of `diagram.open`.
    """
    total = squares(tensor)
    factors = {n: start[n] if start and n in start else _drawn(diagram, n, tensor, seed) for n in diagram.nodes}
    factors = {n: t.double() for n, t in factors.items()}
    held = set(fixed)
    free = [n for n in diagram.nodes if n not in held]
    target = tensor.double() if tensor.numel() <= BLOCK else tensor
    history: list[float] = []
    settled = False
    for _ in range(sweeps if len(free) > 1 else 1):
        explained = 0.0
        for node in free:
            factors[node], explained = _solve(target, diagram, factors, node)
        history.append(math.sqrt(max(0.0, total - explained) / total) if total else 0.0)
        settled = len(free) == 1 or _settled(history)
        if settled:
            break
    return Swept({n: t.to(tensor.dtype) for n, t in _balanced(factors, free).items()}, tuple(history), settled)


def _drawn(diagram: Diagram, node: str, like: Tensor, seed: int) -> Tensor:
    """A random start whose network has entries of about unit size."""
    noise = Seed(seed).noise(*diagram.shape(node), like=like, salt=1 + list(diagram.nodes).index(node))
    return noise / math.sqrt(math.prod(diagram.sizes[i] for i in diagram.nodes[node] if i in diagram.bonds)) ** 0.5


def _settled(history: list[float]) -> bool:
    if history[-1] < 1e-7:
        return True
    return len(history) > 1 and history[-2] - history[-1] <= SETTLED * history[-1]


def _solve(tensor: Tensor, diagram: Diagram, factors: Mapping[str, Tensor], node: str) -> tuple[Tensor, float]:
    """The node that is best for the others: batch (open, also on others), rows (open, its own), cols (bonds).

    And what the network then explains of the tensor's squared norm, 2 <T, N> - |N|^2.
    """
    mine = diagram.nodes[node]
    others = {n: i for n, i in diagram.nodes.items() if n != node}
    elsewhere = {i for indices in others.values() for i in indices}
    batch = [i for i in mine if i in diagram.open and i in elsewhere]
    rows = [i for i in mine if i in diagram.open and i not in elsewhere]
    cols = [i for i in mine if i not in diagram.open]
    right = _right(tensor, diagram, factors, others, (*batch, *cols, *rows))
    sizes = diagram.sizes
    b, c, r = (math.prod(sizes[i] for i in part) for part in (batch, cols, rows))
    right = right.reshape(b, c, r).double()
    if c <= DIRECT:
        gram = _gram(diagram, factors, others, batch, cols).reshape(b, c, c)
        found = _least_squares(gram, right)
        image = gram @ found
    else:
        normal = lambda x: _normal(diagram, factors, others, batch, cols, rows, x)  # noqa: E731
        found = _conjugate(normal, right)
        image = normal(found)
    have = (*batch, *cols, *rows)
    node_tensor = found.reshape([sizes[i] for i in have]).permute([have.index(i) for i in mine])
    return node_tensor, float((found * (2 * right - image)).sum())


def _right(
    tensor: Tensor,
    diagram: Diagram,
    factors: Mapping[str, Tensor],
    others: Mapping[str, tuple[str, ...]],
    out: tuple[str, ...],
) -> Tensor:
    """The tensor contracted with all other nodes."""
    letters = diagram.letters
    operands: list[object] = [tensor, [letters[i] for i in diagram.open]]
    for name, indices in others.items():
        operands += [factors[name].to(tensor.dtype), [letters[i] for i in indices]]
    return contract(*operands, [letters[i] for i in out])  # type: ignore[no-any-return]


def _gram(
    diagram: Diagram,
    factors: Mapping[str, Tensor],
    others: Mapping[str, tuple[str, ...]],
    batch: list[str],
    cols: list[str],
) -> Tensor:
    """The other nodes contracted with themselves over all open axes but the batch: bonds once and once primed."""
    spell = _primed(diagram)
    operands: list[object] = []
    for name, indices in others.items():
        operands += [factors[name], [spell[i][0] for i in indices]]
        operands += [factors[name], [spell[i][1] for i in indices]]
    missing = [i for i in diagram.open if not any(i in indices for indices in others.values())]
    assert not [i for i in missing if i in batch]
    out = [spell[i][0] for i in batch] + [spell[i][0] for i in cols] + [spell[i][1] for i in cols]
    return contract(*operands, out)  # type: ignore[no-any-return]


def _primed(diagram: Diagram) -> dict[str, tuple[int, int]]:
    """Two numbers for every bond, one for every open axis."""
    numbers = {index: number for number, index in enumerate(diagram.sizes)}
    return {i: (n, n if i in diagram.open else n + len(numbers)) for i, n in numbers.items()}


def _normal(
    diagram: Diagram,
    factors: Mapping[str, Tensor],
    others: Mapping[str, tuple[str, ...]],
    batch: list[str],
    cols: list[str],
    rows: list[str],
    x: Tensor,
) -> Tensor:
    """The normal equations' matrix times x, without the matrix."""
    spell = _primed(diagram)
    shaped = x.reshape([diagram.sizes[i] for i in (*batch, *cols, *rows)])
    operands: list[object] = [shaped, [spell[i][1] for i in (*batch, *cols, *rows)]]
    for name, indices in others.items():
        operands += [factors[name], [spell[i][0] for i in indices], factors[name], [spell[i][1] for i in indices]]
    out = [spell[i][0] for i in (*batch, *cols, *rows)]
    return contract(*operands, out).reshape(x.shape)  # type: ignore[no-any-return]


def _least_squares(gram: Tensor, right: Tensor) -> Tensor:
    """The least squares solution of least norm of gram x = right, up to a ridge of 1e-10 of the mean eigenvalue."""
    size = gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram + RIDGE * scale * eye)
    if bool(info.any()) or not bool((scale > 0).all()):
        return torch.linalg.pinv(gram, hermitian=True, rtol=RIDGE) @ right
    return torch.cholesky_solve(right, factor)


def _conjugate(matrix: object, right: Tensor, steps: int = 200, tolerance: float = 1e-8) -> Tensor:
    """Conjugate gradients from zero."""
    x = torch.zeros_like(right)
    residual = right.clone()
    direction = residual.clone()
    size = first = float(residual.square().sum())
    for _ in range(steps):
        if size <= tolerance**2 * first or size == 0:
            break
        image = matrix(direction)  # type: ignore[operator]
        step = size / float((direction * image).sum())
        x += step * direction
        residual -= step * image
        after = float(residual.square().sum())
        direction = residual + (after / size) * direction
        size = after
    return x


def _balanced(factors: dict[str, Tensor], free: list[str]) -> dict[str, Tensor]:
    """The free nodes brought to one norm: half precision then holds them all."""
    norms = {n: float(torch.linalg.vector_norm(factors[n])) for n in free}
    if not all(norms.values()):
        return factors
    mean = math.exp(sum(map(math.log, norms.values())) / len(norms))
    return {n: t * (mean / norms[n]) if n in norms else t for n, t in factors.items()}
