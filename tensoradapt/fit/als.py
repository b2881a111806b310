"""Alternating least squares for networks that no closed algorithm fits: each node in turn, the others held.

Invariant: no sweep makes the error larger; nodes that are held fixed come back as they were given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from opt_einsum import contract_expression
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.errors import ShapeError, SpecError
from tensoradapt.fit.policy import squares
from tensoradapt.linalg import BLOCK, Seed

SWEEPS = 60
RESTARTS = 4  # random starts that are tried
TRIAL = 8  # for so many sweeps, before the best goes on
SETTLED = 1e-4  # the relative gain of a sweep in the error below which another one is not worth its time
EXACT = 1e-7  # a relative error that is rounding
DIRECT = 2048  # the largest system of normal equations that is solved directly
RIDGE = 1e-10

Factors = dict[str, Tensor]


@dataclass(frozen=True)
class Swept:
    """Where alternating least squares came to: the factors, the relative error after every sweep, and why it ended."""

    factors: Factors
    history: tuple[float, ...]
    converged: bool


def als(
    tensor: Tensor,
    diagram: Diagram,
    *,
    start: Mapping[str, Tensor] | None = None,
    fixed: Iterable[str] = (),
    sweeps: int = SWEEPS,
    restarts: int = RESTARTS,
    seed: int = 0,
) -> Swept:
    """Factors of any network: for each node n in turn, min over node n of |T - network|^2.

    Each is a linear least squares problem, since the network is linear in every node. `start` gives first values, of
    which the `fixed` nodes keep theirs; others are drawn, `restarts` times, and the draw that is best after a few
    sweeps goes on.  Shape: the sizes of `diagram.open`.
    """
    _check(diagram, start or {})
    problem = _Problem(tensor.double() if tensor.numel() <= BLOCK else tensor, diagram, frozenset(fixed))
    begun = {n: t.to(tensor.device, torch.float64) for n, t in (start or {}).items()}
    drawn = [n for n in diagram.nodes if n not in begun]
    tries = max(1, restarts) if drawn and len(problem.free) > 1 else 1
    size = math.sqrt(problem.total / tensor.numel())
    trials = []
    for number in range(tries):
        factors = {n: begun[n] if n in begun else _drawn(diagram, n, tensor, seed + number) for n in diagram.nodes}
        factors |= {n: factors[n] * size for n in drawn[:1]}
        trials.append(problem.swept(Swept(factors, (), False), min(TRIAL, sweeps) if tries > 1 else sweeps))
        if trials[-1].history[-1] <= EXACT:
            break
    best = problem.swept(min(trials, key=lambda trial: trial.history[-1]), sweeps)
    even = _balanced(best.factors, problem.free)
    return Swept({n: t.to(tensor.dtype) for n, t in even.items()}, best.history, best.converged)


def _check(diagram: Diagram, given: Mapping[str, Tensor]) -> None:
    for node, tensor in given.items():
        if node not in diagram.nodes:
            raise SpecError(f"no node {node!r} in this network", expected=", ".join(diagram.nodes))
        if tuple(tensor.shape) != diagram.shape(node):
            raise ShapeError(f"node {node!r} has another shape", got=tuple(tensor.shape), expected=diagram.shape(node))


def _drawn(diagram: Diagram, node: str, like: Tensor, seed: int) -> Tensor:
    """A random start whose network has entries of about unit size."""
    noise = Seed(seed).noise(*diagram.shape(node), like=like, salt=1 + list(diagram.nodes).index(node)).double()
    return noise / math.sqrt(math.prod(diagram.sizes[i] for i in diagram.nodes[node] if i in diagram.bonds)) ** 0.5


@dataclass(frozen=True)
class _Problem:
    """A tensor, and the network that is to be close to it."""

    tensor: Tensor
    diagram: Diagram
    fixed: frozenset[str]

    @cached_property
    def free(self) -> dict[str, _Place]:
        """The nodes that are solved for."""
        return {n: _Place(self.diagram, n) for n in self.diagram.nodes if n not in self.fixed}

    @cached_property
    def total(self) -> float:
        return squares(self.tensor)

    def swept(self, begun: Swept, sweeps: int) -> Swept:
        """Up to so many sweeps in all, from where a fit has come to."""
        factors, history, settled = dict(begun.factors), list(begun.history), begun.converged
        while not settled and len(history) < sweeps:
            explained = 0.0
            for node, place in self.free.items():
                factors[node], explained = place.solved(self.tensor, factors)
            history.append(math.sqrt(max(0.0, self.total - explained) / self.total) if self.total else 0.0)
            settled = len(self.free) <= 1 or _settled(history)
        return Swept(factors, tuple(history), settled)


def _settled(history: list[float]) -> bool:
    if history[-1] <= EXACT:
        return True
    return len(history) > 1 and history[-2] - history[-1] <= SETTLED * history[-1]


@dataclass(frozen=True)
class _Place:
    """One node's least squares problem: its indices as batch (open, also on others), cols (bonds), rows (its own)."""

    diagram: Diagram
    node: str

    @cached_property
    def others(self) -> list[str]:
        return [n for n in self.diagram.nodes if n != self.node]

    @cached_property
    def parts(self) -> tuple[list[str], list[str], list[str]]:
        """Batch, cols, rows."""
        mine, opened = self.diagram.nodes[self.node], self.diagram.open
        elsewhere = {i for n in self.others for i in self.diagram.nodes[n]}
        batch = [i for i in mine if i in opened and i in elsewhere]
        rows = [i for i in mine if i in opened and i not in elsewhere]
        return batch, [i for i in mine if i not in opened], rows

    @cached_property
    def order(self) -> list[str]:
        return [i for part in self.parts for i in part]

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        batch, cols, rows = (math.prod(self.diagram.sizes[i] for i in part) for part in self.parts)
        return batch, cols, rows

    def solved(self, tensor: Tensor, factors: Factors) -> tuple[Tensor, float]:
        """The node that is best for the others, and what the network then explains of |T|^2: 2 <T, N> - |N|^2."""
        mine = self.diagram.nodes[self.node]
        others = [factors[n] for n in self.others]
        right = self.right(tensor, *[t.to(tensor.dtype) for t in others]).reshape(self.sizes).double()
        before = factors[self.node].permute([mine.index(i) for i in self.order]).reshape(self.sizes)
        if self.sizes[1] <= DIRECT:
            gram = self.gram(*[t for t in others for _ in range(2)]).reshape(*self.sizes[:2], self.sizes[1])
            found = before + _least_squares(gram, right - gram @ before)
            image = gram @ found
        else:
            found = before + _conjugate(lambda x: self.normal(x, others), right - self.normal(before, others))
            image = self.normal(found, others)
        shaped = found.reshape([self.diagram.sizes[i] for i in self.order])
        return shaped.permute([self.order.index(i) for i in mine]), float((found * (2 * right - image)).sum())

    @cached_property
    def right(self) -> Callable[..., Tensor]:
        """The tensor contracted with all other nodes."""
        nodes = self.diagram.nodes
        return self._expression([self.diagram.open, *(nodes[n] for n in self.others)], self.order)

    @cached_property
    def gram(self) -> Callable[..., Tensor]:
        """The other nodes contracted with themselves over all open axes but the batch: bonds once and once primed."""
        batch, cols, _ = self.parts
        return self._expression(self._doubled(), [*batch, *cols, *map(self._primed, cols)])

    @cached_property
    def _applied(self) -> Callable[..., Tensor]:
        primed = [self._primed(i) for i in self.order]
        return self._expression([primed, *self._doubled()], self.order)

    def normal(self, x: Tensor, others: list[Tensor]) -> Tensor:
        """The normal equations' matrix times x, without the matrix."""
        shaped = x.reshape([self.diagram.sizes[i] for i in self.order])
        return self._applied(shaped, *[t for t in others for _ in range(2)]).reshape(x.shape)

    def _doubled(self) -> list[list[str]]:
        """The other nodes' indices, each node once plain and once primed."""
        plain = [list(self.diagram.nodes[n]) for n in self.others]
        return [indices for i in plain for indices in (i, [self._primed(k) for k in i])]

    def _primed(self, index: str) -> str:
        return index if index in self.diagram.open else f"{index}'"

    def _expression(self, operands: list[Any], out: list[str]) -> Callable[..., Tensor]:
        """A contraction whose path is found once."""
        names = {i: k for k, i in enumerate(dict.fromkeys(i for indices in operands for i in indices))}
        terms: list[Any] = []
        for indices in operands:
            terms += [tuple(self.diagram.sizes[i.rstrip("'")] for i in indices), [names[i] for i in indices]]
        return contract_expression(*terms, [names[i] for i in out])  # type: ignore[no-any-return]


def _least_squares(gram: Tensor, right: Tensor) -> Tensor:
    """The solution of gram x = right, up to a ridge of 1e-10 of the mean eigenvalue: as a step from where a node was,
    it cannot make the error larger, and repeated it has no bias.
    """
    size = gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram + RIDGE * scale * eye)
    if bool(info.any()) or not bool((scale > 0).all()):
        return torch.linalg.pinv(gram, hermitian=True, rtol=RIDGE) @ right
    return torch.cholesky_solve(right, factor)


def _conjugate(matrix: Callable[[Tensor], Tensor], right: Tensor, steps: int = 200, tolerance: float = 1e-8) -> Tensor:
    """Conjugate gradients from zero."""
    x = torch.zeros_like(right)
    residual = right.clone()
    direction = residual.clone()
    size = first = float(residual.square().sum())
    for _ in range(steps):
        if size <= tolerance**2 * first or size == 0:
            break
        image = matrix(direction)
        step = size / float((direction * image).sum())
        x += step * direction
        residual -= step * image
        after = float(residual.square().sum())
        direction = residual + (after / size) * direction
        size = after
    return x


def _balanced(factors: Factors, free: Iterable[str]) -> Factors:
    """The free nodes brought to one norm: half precision then holds them all."""
    norms = {n: float(torch.linalg.vector_norm(factors[n])) for n in free}
    if not all(norms.values()):
        return factors
    mean = math.exp(sum(map(math.log, norms.values())) / len(norms)) if norms else 1.0
    return {n: t * (mean / norms[n]) if n in norms else t for n, t in factors.items()}
