"""Frames: some nodes of a network held, and what they show of the tensor to the others.

With E the network of the held nodes, all that the others' least squares problems need is M = <T, E> and G = <E, E>:
the tensor itself, the one large operand, is multiplied once for many steps. Invariant: an axis that only held nodes
carry is summed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any

from opt_einsum import contract_expression
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.linalg import double

SMALLER = 4  # a half is held only where what it shows is so many times smaller than the tensor
SEARCHED = 6  # operands of which the cheapest path is searched for among all
MOST = 8  # nodes of a network whose halves are looked for

Nodes = tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """The tensor contracted with the held nodes, M, and every held part's Gram matrix, G."""

    image: Tensor
    grams: tuple[Tensor, ...]


@dataclass(frozen=True)
class Frame:
    """Parts of a network that are held, each contracted on its own.

    A part's network E has the open axes it shares with other nodes (batch), those that it alone carries (private), and
    the bonds to other nodes (cut).
    """

    diagram: Diagram
    parts: tuple[Nodes, ...] = ()

    @cached_property
    def held(self) -> frozenset[str]:
        """All held nodes."""
        return frozenset(node for part in self.parts for node in part)

    @cached_property
    def axes(self) -> list[str]:
        """The indices of M: the open axes that other nodes carry, and the cut bonds."""
        left = {i for n, indices in self.diagram.nodes.items() if n not in self.held for i in indices}
        cuts = [bond for part in self.parts for bond in cut(self.diagram, part)]
        return [*(a for a in self.diagram.open if a in left), *dict.fromkeys(cuts)]

    @cached_property
    def doubled(self) -> list[list[str]]:
        """The indices of every G: batch, cut, and cut primed."""
        return [
            [*batch(self.diagram, part), *cut(self.diagram, part), *map(primed, cut(self.diagram, part))]
            for part in self.parts
        ]

    def seen(self, tensor: Tensor, factors: Mapping[str, Tensor]) -> Seen:
        """M and all G of the held nodes as they are, in float64 but for the product with the tensor."""
        if not self.parts:
            return Seen(tensor, ())
        shown = [make(*[factors[n] for n in part]) for make, part in zip(self._made, self.parts, strict=True)]
        grams = tuple(gram(e, e) for gram, e in zip(self._grams, shown, strict=True))
        return Seen(double(self._image(tensor, *[e.to(tensor) for e in shown])), grams)

    @cached_property
    def _made(self) -> list[Callable[..., Tensor]]:
        """The network of every part."""
        nodes = self.diagram.nodes
        return [self.expression([nodes[n] for n in part], shown(self.diagram, part)) for part in self.parts]

    @cached_property
    def _image(self) -> Callable[..., Tensor]:
        return self.expression([self.diagram.open, *(shown(self.diagram, part) for part in self.parts)], self.axes)

    @cached_property
    def _grams(self) -> list[Callable[..., Tensor]]:
        found = []
        for part, out in zip(self.parts, self.doubled, strict=True):
            one = shown(self.diagram, part)
            bonds = cut(self.diagram, part)
            found.append(self.expression([one, [primed(i) if i in bonds else i for i in one]], out))
        return found

    def expression(self, operands: list[Any], out: list[str]) -> Callable[..., Tensor]:
        """A contraction whose path is found once; indices may be primed."""
        names = {i: k for k, i in enumerate(dict.fromkeys(i for indices in operands for i in indices))}
        terms: list[Any] = []
        for indices in operands:
            terms += [tuple(self.diagram.sizes[i.rstrip("'")] for i in indices), [names[i] for i in indices]]
        path = "optimal" if len(operands) <= SEARCHED else "auto"
        return contract_expression(*terms, [names[i] for i in out], optimize=path)  # type: ignore[no-any-return]


def primed(index: str) -> str:
    """The second copy of a bond."""
    return f"{index}'"


def _elsewhere(diagram: Diagram, part: Collection[str]) -> set[str]:
    return {i for n, indices in diagram.nodes.items() if n not in part for i in indices}


def _mine(diagram: Diagram, part: Collection[str]) -> list[str]:
    return list(dict.fromkeys(i for n in part for i in diagram.nodes[n]))


def cut(diagram: Diagram, part: Collection[str]) -> list[str]:
    """The bonds between a part and the other nodes."""
    others = _elsewhere(diagram, part)
    return [i for i in _mine(diagram, part) if i not in diagram.open and i in others]


def batch(diagram: Diagram, part: Collection[str]) -> list[str]:
    """The open axes that a part shares with other nodes."""
    others = _elsewhere(diagram, part)
    return [i for i in _mine(diagram, part) if i in diagram.open and i in others]


def private(diagram: Diagram, part: Collection[str]) -> list[str]:
    """The open axes that a part alone carries."""
    others = _elsewhere(diagram, part)
    return [i for i in _mine(diagram, part) if i in diagram.open and i not in others]


def shown(diagram: Diagram, part: Collection[str]) -> list[str]:
    """The indices of a part's network."""
    return [*batch(diagram, part), *private(diagram, part), *cut(diagram, part)]


def framed(diagram: Diagram, fixed: Collection[str]) -> Frame:
    """The frame of the fixed nodes that carry an axis of their own: each is contracted with the tensor for good."""
    return Frame(diagram, tuple((node,) for node in diagram.nodes if node in fixed and private(diagram, (node,))))


@lru_cache(maxsize=256)
def halves(diagram: Diagram) -> tuple[Nodes, Nodes] | None:
    """Two halves of a network, each of which shows the other a much smaller tensor; None where there are none.

    The pair with the smallest M in both ways.
    """
    found = [pair for pair in _pairs(diagram) if max(_sizes(diagram, *pair)) * SMALLER <= _numel(diagram, diagram.open)]
    return min(found, key=lambda pair: sum(_sizes(diagram, *pair)), default=None)


def _pairs(diagram: Diagram) -> Iterator[tuple[Nodes, Nodes]]:
    first, *others = diagram.nodes
    if len(others) >= MOST:
        return
    for count in range(len(others)):
        for chosen in combinations(others, count):
            yield (first, *chosen), tuple(n for n in others if n not in chosen)


def _sizes(diagram: Diagram, one: Nodes, two: Nodes) -> tuple[int, ...]:
    """The entries of what each half shows, and of each half's own network."""
    images = (_numel(diagram, Frame(diagram, (part,)).axes) for part in (one, two))
    return (*images, *(_numel(diagram, shown(diagram, part)) for part in (one, two)))


def _numel(diagram: Diagram, indices: Collection[str]) -> int:
    return math.prod(diagram.sizes[i] for i in indices)
