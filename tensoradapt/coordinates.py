"""Coordinates: where in a model a weight lies, told by the paths and the shapes of all of them.

A path may hold several numbers: a module's place in a container, a tower, a stage and its block, a layer, a part of it.
The layer is the number that runs through the layers: over modules of the same parts and shapes. Invariant: the number
that is taken depends on what stands before it in the path, and is the same for all weights that have that before them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Coordinates = Mapping[str, int | str]
Shapes = Mapping[str, Sequence[int]]
LAYER = re.compile(r"layer|block|^h$")  # names of lists of layers
INSIDE = re.compile(r"attn|attention(?!_layers)|mlp|ffn|feed_?forward|^moe$|expert")  # names of parts of one layer
ALIKE = 0.5  # the share of a run's parts that have to be of one shape somewhere in it


@dataclass(frozen=True)
class _Path:
    """A path without the number of an expert, and where its other numbers stand."""

    parts: tuple[str, ...]
    expert: int | None

    @classmethod
    def of(cls, path: str) -> _Path:
        parts = path.split(".")
        for k in reversed(range(1, len(parts))):
            if parts[k].isdecimal() and "expert" in parts[k - 1]:
                return cls((*parts[:k], *parts[k + 1 :]), int(parts[k]))
        return cls(tuple(parts), None)

    @cached_property
    def numbers(self) -> list[int]:
        """The positions of the numbers."""
        return [k for k, part in enumerate(self.parts) if part.isdecimal()]

    @cached_property
    def pattern(self) -> tuple[str, ...]:
        """The path with its numbers left open."""
        return tuple("*" if part.isdecimal() else part for part in self.parts)

    def before(self, k: int) -> tuple[str, ...]:
        """What stands before a number, other numbers left open."""
        return self.pattern[:k]

    def name(self, k: int) -> str:
        """The last name before a number."""
        return next((part.lower() for part in reversed(self.parts[:k]) if not part.isdecimal()), "")


@dataclass
class _Run:
    """A number that paths differ in while all else is equal: its values, and how many parts are alike over some."""

    values: set[str] = field(default_factory=set)
    parts: int = 0
    alike: int = 0

    @property
    def even(self) -> bool:
        """Whether it runs over modules of the same shapes."""
        return self.alike >= ALIKE * self.parts


@dataclass(frozen=True)
class _Runs:
    """The runs of a model by what stands before their number, and whether any number is under a name of layers."""

    of: Mapping[tuple[str, ...], _Run]
    named: bool

    def on(self, one: _Path, k: int) -> _Run | None:
        """The run of a path's number."""
        return self.of.get(one.before(k))

    @property
    def layered(self) -> bool:
        """Whether there are layers behind a name: a number before all names is a place in a container then."""
        return self.named or any(part != "*" for before in self.of for part in before)


def locate(paths: Sequence[str] | Shapes) -> dict[str, Coordinates]:
    """Coordinates of paths: layer, stack, role and expert; with their shapes where those are known.

    `layer` is the number that runs through the layers: of the numbers in which alone paths differ the one over modules
    of the same shapes, under the name of a list of layers, with the most values, the first. `stack` is what precedes
    it, `expert` a number under a name that contains expert, `role` the shortest suffix of the rest that is unique
    within the layer, and outside the layers in the model (the whole rest where none is).
    """
    shapes = paths if isinstance(paths, Mapping) else dict.fromkeys(paths, ())
    known = {path: _Path.of(path) for path in shapes}
    runs = _runs(known, shapes)
    kinds = {one.pattern: one for one in known.values()}
    layers = {pattern: _layer(one, runs) for pattern, one in kinds.items()}
    split = {path: _split(one, layers[one.pattern]) for path, one in known.items()}
    rests: dict[tuple[Any, Any], set[str]] = {}
    for coords, rest in split.values():
        rests.setdefault((coords.get("stack"), coords.get("layer")), set()).add(rest)
    owners = {key: _suffix_owners(group) for key, group in rests.items()}
    owners[None, None] = _suffix_owners({rest for _, rest in split.values()})
    return {
        path: {**c, "role": _shortest(rest, owners[c.get("stack"), c.get("layer")])}
        for path, (c, rest) in split.items()
    }


def _runs(known: Mapping[str, _Path], shapes: Shapes) -> _Runs:
    """The runs of all paths."""
    places: dict[tuple[Any, ...], list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
    for path, one in known.items():
        for k in one.numbers:
            around = (one.parts[:k], one.parts[k + 1 :], one.expert, one.before(k))
            places[around].append((one.parts[k], tuple(shapes[path])))
    found: dict[tuple[str, ...], _Run] = defaultdict(_Run)
    for (*_, before), members in places.items():
        if len(members) > 1:
            run = found[before]
            run.values.update(number for number, _ in members)
            run.parts += 1
            run.alike += len({shape for _, shape in members}) < len(members)
    kinds = {one.pattern: one for one in known.values()}
    named = any(LAYER.search(one.name(k)) for one in kinds.values() for k in one.numbers)
    return _Runs(dict(found), named)


def _layer(one: _Path, runs: _Runs) -> int | None:
    """The position of the number that is the layer; None where there is none."""
    found = _possible(one, runs)
    if not found:
        return None
    values = {k: len(run.values) if (run := runs.on(one, k)) else 0 for k in found}
    return max(found, key=lambda k: (values[k], -k))


def _possible(one: _Path, runs: _Runs) -> list[int]:
    """The numbers that may be the layer, by all that is known but their counts."""
    numbers = one.numbers
    inside = next((k for k, part in enumerate(one.parts) if INSIDE.search(part.lower())), len(one.parts))
    found = [k for k in numbers if k < inside] or numbers
    running = [k for k in found if runs.on(one, k)]
    if not running and runs.layered:
        found = [k for k in found if one.name(k)]
    found = running or found
    found = [k for k in running if (run := runs.on(one, k)) and run.even] or found
    return [k for k in found if LAYER.search(one.name(k))] or found


def unsure(paths: Sequence[str] | Shapes, of: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Where several numbers of paths `of` may be the layer: the path with numbers left open, and what each follows."""
    shapes = paths if isinstance(paths, Mapping) else dict.fromkeys(paths, ())
    several = [path for path in of if len(_Path.of(path).numbers) > 1]
    if not several:
        return {}
    runs = _runs({path: _Path.of(path) for path in shapes}, shapes)
    found: dict[str, tuple[str, ...]] = {}
    for one in map(_Path.of, several):
        possible = _possible(one, runs)
        if len(possible) > 1:
            found[".".join(one.pattern)] = tuple(".".join(one.before(k)) for k in possible)
    return found


def _split(one: _Path, layer: int | None) -> tuple[dict[str, int | str], str]:
    """A path's numbers as coordinates, and what is left for the role."""
    parts = one.parts
    coords: dict[str, int | str] = {} if one.expert is None else {"expert": one.expert}
    if layer is not None:
        coords |= {"stack": ".".join(parts[:layer]), "layer": int(parts[layer])}
        parts = parts[layer + 1 :]
    return coords, ".".join(parts)


def _suffix_owners(rests: Iterable[str]) -> Mapping[str, int]:
    split = [rest.split(".") for rest in rests]
    return Counter(".".join(parts[k:]) for parts in split for k in range(len(parts)))


def _shortest(rest: str, owners: Mapping[str, int]) -> str:
    parts = rest.split(".")
    suffixes = (".".join(parts[k:]) for k in reversed(range(len(parts))))
    return next((suffix for suffix in suffixes if owners[suffix] == 1), rest)
