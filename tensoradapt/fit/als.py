"""Alternating least squares for networks that no closed algorithm fits: each node in turn, the others held.

Invariant: no sweep makes the error larger; nodes that are held fixed come back as they were given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.errors import ShapeError, SpecError
from tensoradapt.fit.frames import Frame, Seen, framed, halves
from tensoradapt.fit.places import Place
from tensoradapt.fit.policy import squares
from tensoradapt.linalg import Seed, double

SWEEPS = 60
RESTARTS = 4  # random starts that are tried
TRIAL = 8  # for so many sweeps, before the best goes on
SETTLED = 1e-4  # the relative gain of a sweep in the error below which another one is not worth its time
EXACT = 1e-7  # a relative error that is rounding
AGREED = 2e-3  # the relative difference of two starts' errors from which on a third is not worth its time
DOUBLE = 1 << 19  # entries up to which the tensor itself is multiplied in float64; sums of products are always

Factors = dict[str, Tensor]


@dataclass(frozen=True)
class Swept:
    """Where alternating least squares came to: the factors, the relative error after every sweep, and why it ended.

    `agreed` says whether two random starts came to one error, or would: one node alone has one best value.
    """

    factors: Factors
    history: tuple[float, ...]
    converged: bool
    agreed: bool = False


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
    problem = _Problem(double(tensor) if tensor.numel() <= DOUBLE else tensor, diagram, frozenset(fixed))
    begun = {n: double(t.to(tensor.device)) for n, t in (start or {}).items()}
    drawn = [n for n in diagram.nodes if n not in begun]
    tries = max(1, restarts) if drawn and len(problem.free) > 1 else 1
    size = math.sqrt(problem.total / tensor.numel())
    trials = []
    for number in range(tries):
        factors = {n: begun[n] if n in begun else _drawn(diagram, n, tensor, seed + number) for n in diagram.nodes}
        factors |= {n: factors[n] * size for n in drawn[:1]}
        trials.append(problem.swept(Swept(factors, (), False), min(TRIAL, sweeps) if tries > 1 else sweeps))
        if trials[-1].history[-1] <= EXACT or _agreed([trial.history[-1] for trial in trials]):
            break
    best = problem.swept(min(trials, key=lambda trial: trial.history[-1]), sweeps)
    even = _balanced(best.factors, problem.free)
    agreed = len(problem.free) <= 1 or (tries > 1 and _agreed([trial.history[-1] for trial in trials]))
    return Swept({n: t.to(tensor) for n, t in even.items()}, best.history, best.converged, agreed)


def _check(diagram: Diagram, given: Mapping[str, Tensor]) -> None:
    for node, tensor in given.items():
        if node not in diagram.nodes:
            raise SpecError(f"no node {node!r} in this network", expected=", ".join(diagram.nodes))
        if tuple(tensor.shape) != diagram.shape(node):
            raise ShapeError(f"node {node!r} has another shape", got=tuple(tensor.shape), expected=diagram.shape(node))


def _drawn(diagram: Diagram, node: str, like: Tensor, seed: int) -> Tensor:
    """A random start whose network has entries of about unit size."""
    noise = double(Seed(seed).noise(*diagram.shape(node), like=like, salt=1 + list(diagram.nodes).index(node)))
    return noise / math.sqrt(math.prod(diagram.sizes[i] for i in diagram.nodes[node] if i in diagram.bonds)) ** 0.5


@dataclass(frozen=True)
class _Problem:
    """A tensor, and the network that is to be close to it."""

    tensor: Tensor
    diagram: Diagram
    fixed: frozenset[str]
    lasting: dict[Frame, Seen] = field(default_factory=dict)  # what fixed nodes alone show of the tensor

    @cached_property
    def free(self) -> tuple[str, ...]:
        """The nodes that are solved for."""
        return tuple(n for n in self.diagram.nodes if n not in self.fixed)

    @cached_property
    def rounds(self) -> list[tuple[Frame, list[Place]]]:
        """The frames of a sweep, and the places that each is looked at from."""
        parts = halves(self.diagram) if not self.fixed else None
        if parts is None:
            frame = framed(self.diagram, self.fixed)
            return [(frame, [Place(frame, n) for n in self.free])]
        frames = [(Frame(self.diagram, (other,)), half) for half, other in (parts, parts[::-1])]
        return [(frame, [Place(frame, n) for n in half]) for frame, half in frames]

    @cached_property
    def total(self) -> float:
        return squares(self.tensor)

    def swept(self, begun: Swept, sweeps: int) -> Swept:
        """Up to so many sweeps in all, from where a fit has come to."""
        factors, history, settled = dict(begun.factors), list(begun.history), begun.converged
        while not settled and len(history) < sweeps:
            held: Tensor | float = 0.0
            for place, seen in self._steps(factors):
                factors[place.node], held = place.best(seen, factors)
            explained = float(held)  # an accelerator is waited for once in a sweep
            history.append(math.sqrt(max(0.0, self.total - explained) / self.total) if self.total else 0.0)
            settled = len(self.free) <= 1 or _settled(history)
        return Swept(factors, tuple(history), settled)

    def _steps(self, factors: Factors) -> Iterator[tuple[Place, Seen]]:
        """One sweep: every place that is solved next, and what it sees of the tensor."""
        for frame, places in self.rounds:
            seen = self._seen(frame, factors)
            for place in places:
                yield place, seen

    def _seen(self, frame: Frame, factors: Factors) -> Seen:
        if not self.fixed:
            return frame.seen(self.tensor, factors)
        if frame not in self.lasting:
            self.lasting[frame] = frame.seen(self.tensor, factors)
        return self.lasting[frame]


def _agreed(errors: list[float]) -> bool:
    """Whether the two best of some starts came to one error."""
    best = sorted(errors)[:2]
    return len(best) > 1 and best[1] - best[0] <= AGREED * best[1]


def _settled(history: list[float]) -> bool:
    if history[-1] <= EXACT:
        return True
    return len(history) > 1 and history[-2] - history[-1] <= SETTLED * history[-1]


def _balanced(factors: Factors, free: Iterable[str]) -> Factors:
    """The free nodes brought to one norm: half precision then holds them all."""
    nodes = list(free)
    found = [torch.linalg.vector_norm(factors[n]) for n in nodes]
    norms = dict(zip(nodes, torch.stack(found).tolist() if found else [], strict=True))
    if not all(norms.values()):
        return factors
    mean = math.exp(sum(map(math.log, norms.values())) / len(norms)) if norms else 1.0
    return {n: t * (mean / norms[n]) if n in norms else t for n, t in factors.items()}
