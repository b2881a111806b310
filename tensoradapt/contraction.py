"""Contractions: pairwise einsum paths over the nodes of one site's network, in names and integers.

Invariant: running the steps gives the tensor that one einsum over all operands would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import opt_einsum

TOKENS = 1024  # the number of tokens a step is planned for: contractions of factors alone are shared by so many


Indices = tuple[str, ...]


@dataclass(frozen=True)
class Contraction:
    """Pairwise einsum steps over some nodes, ending in one tensor; `flops` is their cost."""

    nodes: tuple[str, ...]
    steps: tuple[tuple[tuple[int, ...], str], ...]
    shape: tuple[int, ...]
    flops: int


@dataclass(frozen=True)
class Problem:
    """The network of one site: operands by node, the activation's axes in and out, the size of every index."""

    operands: Mapping[str, Indices]
    out: Indices
    inp: Indices
    sizes: Mapping[str, int]
    kind: str
    kernel: Indices

    def numel(self, indices: Iterable[str]) -> int:
        """The product of the sizes of some indices."""
        return math.prod(self.sizes[i] for i in indices)

    @property
    def letters(self) -> dict[str, str]:
        """One einsum letter for every index."""
        return {index: opt_einsum.get_symbol(k) for k, index in enumerate(self.sizes)}

    def contract(self, nodes: Sequence[str], result: Indices, activation: Indices = ()) -> Contraction:
        """The pairwise path that contracts some nodes (and the activation) to the indices `result`."""
        terms = ([activation] if activation else []) + [self.operands[node] for node in nodes]
        steps, flops = _path(tuple(terms), result, tuple(self.sizes.items()))
        return Contraction(tuple(nodes), steps, tuple(self.sizes[i] for i in result), flops)


@lru_cache(maxsize=4096)
def _path(
    terms: tuple[Indices, ...], result: Indices, sized: tuple[tuple[str, int], ...]
) -> tuple[tuple[tuple[tuple[int, ...], str], ...], int]:
    sizes = dict(sized)
    letters = {index: opt_einsum.get_symbol(k) for k, index in enumerate(sizes)}

    def spell(indices: Indices) -> str:
        return "".join(letters[i] for i in indices)

    equation = ",".join(map(spell, terms)) + "->" + spell(result)
    path, _ = opt_einsum.contract_path(equation, *[tuple(sizes[i] for i in t) for t in terms], shapes=True)
    left, steps, flops = list(terms), [], 0
    for k, group in enumerate(path):
        positions = tuple(sorted(group, reverse=True))
        taken = [left.pop(p) for p in positions]
        wanted = set(result).union(*left)
        last = k == len(path) - 1
        kept = result if last else tuple(i for i in dict.fromkeys(i for t in taken for i in t) if i in wanted)
        steps.append((positions, ",".join(map(spell, taken)) + "->" + spell(kept)))
        flops += (2 if len(taken) > 1 else 0) * math.prod(sizes[i] for i in set().union(*taken))
        left.append(kept)
    return tuple(steps), flops
