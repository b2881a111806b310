"""Diagrams: the nodes of a tensor network, the indices they carry, and the size of every index.

A diagram is a format made concrete, in names and integers, without tensors. Whatever follows from nodes and indices
(shapes, counts, bonds, tree structure, the einsum equation of the dense tensor) is derived here, once for all.
Invariant: every open axis and every bond has a size, and every open axis sits on at least one node.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from opt_einsum import get_symbol

from tensoradapt.errors import SpecError

INDICES = 49  # einsum has 52 letters, of which a site's activation and the two sides of its slots take three
WEIGHT_AXES = ("out", "in", "kernel")


@dataclass(frozen=True, eq=False)
class Diagram:
    """A tensor network T[open] = sum over bonds of prod_n node_n[indices_n].

    `nodes` maps a node's name to its indices in the order of its tensor's dimensions; `open` lists the axes of the
    tensor in order; `folds` maps `out`, `in` and `kernel` to the axes they are cut into (big-endian). Two diagrams are
    equal where all four are: nodes in one order, which is that of an equation's operands; sizes and folds in any.
    """

    sizes: Mapping[str, int]
    nodes: Mapping[str, tuple[str, ...]]
    open: tuple[str, ...]
    folds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.sizes) > INDICES:
            raise SpecError("a network has too many indices", got=len(self.sizes), expected=f"at most {INDICES}")
        carried = {index for indices in self.nodes.values() for index in indices}
        for index in sorted(carried | set(self.open)):
            if index not in self.sizes:
                raise SpecError(f"index {index!r} has no size", expected=f"one of {sorted(self.sizes)}")
        for axis in self.open:
            if axis not in carried:
                raise SpecError(f"axis {axis!r} sits on no node", got=dict(self.nodes), hint="add it to a node")

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        """What makes two diagrams equal."""
        nodes, folds = ({name: tuple(i) for name, i in of.items()} for of in (self.nodes, self.folds))
        return frozenset(self.sizes.items()), tuple(nodes.items()), tuple(self.open), frozenset(folds.items())

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Diagram) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    def shape(self, node: str) -> tuple[int, ...]:
        """The shape of a node's tensor."""
        return self._shapes[node]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {node: tuple(self.sizes[index] for index in indices) for node, indices in self.nodes.items()}

    @cached_property
    def measures(self) -> dict[str, int]:
        """The size of every index, and of the sides that are cut into folds."""
        return {**self.sizes, **{axis: self.extent(axis) for axis in WEIGHT_AXES if self.fold(axis)}}

    def numel(self, node: str) -> int:
        """The number of entries of a node's tensor."""
        return math.prod(self.shape(node))

    @property
    def num_parameters(self) -> int:
        """The number of entries of all nodes together."""
        return sum(map(self.numel, self.nodes))

    @cached_property
    def bonds(self) -> dict[str, tuple[str, ...]]:
        """Every bond with the nodes that it joins, in the order of the nodes."""
        joined: dict[str, list[str]] = {}
        for node, indices in self.nodes.items():
            for index in indices:
                if index not in self.open:
                    joined.setdefault(index, []).append(node)
        return {bond: tuple(nodes) for bond, nodes in joined.items()}

    def fold(self, axis: str) -> tuple[str, ...]:
        """The axes that `out`, `in` or `kernel` is cut into; itself where it is not cut, none where it is absent."""
        if axis in self.folds:
            return self.folds[axis]
        return (axis,) if axis in self.open else ()

    def extent(self, axis: str) -> int:
        """The full size of `out`, `in` or `kernel`: the product of its folds."""
        return math.prod(self.sizes[part] for part in self.fold(axis))

    @cached_property
    def coordinates(self) -> tuple[str, ...]:
        """The open axes that pick a site: all but the folds of `out`, `in` and `kernel`."""
        weight = {part for axis in WEIGHT_AXES for part in self.fold(axis)}
        return tuple(axis for axis in self.open if axis not in weight)

    @cached_property
    def batch(self) -> tuple[str, ...]:
        """The open axes that sit on every node: each of their values is a network of its own."""
        return tuple(axis for axis in self.open if all(axis in indices for indices in self.nodes.values()))

    @property
    def is_tree(self) -> bool:
        """Whether every bond joins two nodes, every axis sits on one (or on all: a batch), and no cycle is closed."""
        batch = set(self.batch)
        once = all(sum(axis in i for i in self.nodes.values()) == 1 for axis in self.open if axis not in batch)
        pairs = [nodes for nodes in self.bonds.values()]
        if not once or any(len(pair) != 2 for pair in pairs) or len(set(pairs)) != len(self.nodes) - 1:
            return False
        return len(pairs) == len(set(pairs)) and self._connected(pairs)

    def _connected(self, pairs: list[tuple[str, ...]]) -> bool:
        reached = set(list(self.nodes)[:1])
        for _ in pairs:
            reached |= {node for pair in pairs if reached & set(pair) for node in pair}
        return reached == set(self.nodes)

    @property
    def letters(self) -> dict[str, str]:
        """One einsum letter for every index."""
        return {index: get_symbol(position) for position, index in enumerate(self.sizes)}

    @property
    def equation(self) -> str:
        """The einsum equation of the dense tensor, operands in the order of `nodes`, result in the order of `open`."""
        letters = self.letters
        spell = ["".join(letters[i] for i in indices) for indices in (*self.nodes.values(), self.open)]
        return ",".join(spell[:-1]) + "->" + spell[-1]

    def __str__(self) -> str:
        nodes = ", ".join(f"{name}[{' '.join(i)}]" for name, i in self.nodes.items())
        sizes = ", ".join(f"{index}={self.sizes[index]}" for index in (*self.open, *self.bonds))
        return f"{nodes} -> [{' '.join(self.open)}] with {sizes}"

    def to_dict(self) -> dict[str, Any]:
        """The diagram as plain JSON values."""
        return {
            "sizes": dict(self.sizes),
            "nodes": {node: list(indices) for node, indices in self.nodes.items()},
            "open": list(self.open),
            "folds": {axis: list(parts) for axis, parts in self.folds.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Diagram:
        """The inverse of `to_dict`."""
        return cls(
            sizes={str(k): int(v) for k, v in data["sizes"].items()},
            nodes={str(k): tuple(v) for k, v in data["nodes"].items()},
            open=tuple(data["open"]),
            folds={str(k): tuple(v) for k, v in data["folds"].items()},
        )
