"""Checkpoints under other names than they are stored under: those of the model's modules.

Invariant: every stored tensor is in exactly one piece, and every tensor here is made of whole pieces; nothing is read
before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

Key = tuple[str, int | None]  # the name of a tensor here, and which of its entries along the first axis; None: all
Listing = tuple[str, tuple[int, ...], torch.dtype, Path | None]


class Store(Protocol):
    """Where the tensors of a checkpoint lie."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it reads."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report should say of them."""

    def __iter__(self) -> Iterator[Listing]: ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in its stored dtype."""

    def check(self, name: str) -> None:
        """Raise FileError where the tensor's file changed since it was opened."""

    def fingerprint(self) -> list[Any]:
        """What differs once any value does."""

    def close(self) -> None:
        """Give up what is held."""


Turn = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def as_it_is(tensors: Sequence[Tensor], _: Sequence[Tensor] = ()) -> Sequence[Tensor]:
    """The same tensors: what only has another name."""
    return tensors


@dataclass(frozen=True)
class Piece:
    """Stored tensors that together are one or several here.

    `forth` makes these of them; `back` gives, for what became of these, what is stored instead of the stored tensors,
    which it gets too. `along`: one entry along the first axis of all is made of the same entry of each.
    """

    stored: tuple[str, ...]
    here: tuple[Key, ...]
    forth: Turn = as_it_is
    back: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]] = as_it_is
    along: bool = False


@dataclass(frozen=True)
class View:
    """The tensors of a store under the names, and in the shapes, that the pieces say; `others` are further names."""

    store: Store
    pieces: tuple[Piece, ...]
    others: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _here(self) -> dict[str, dict[int | None, Piece]]:
        found: dict[str, dict[int | None, Piece]] = {}
        for piece in self.pieces:
            for name, index in piece.here:
                found.setdefault(name, {})[index] = piece
        return found

    @cached_property
    def file_of(self) -> Mapping[str, Path | None]:
        """The file of every stored tensor."""
        return {name: file for name, _, _, file in self.store}

    @cached_property
    def by_stored(self) -> Mapping[str, Piece]:
        """The piece of every stored tensor."""
        return {name: piece for piece in self.pieces for name in piece.stored}

    def also(self, others: Mapping[str, str]) -> View:
        """The same tensors with further names: from each to the name that a tensor has."""
        first = {name: self.others.get(other, other) for name, other in others.items()}
        return replace(self, others={**self.others, **first})

    def renamed(self, names: Mapping[str, str]) -> View:
        """The same tensors under other names; those that are not given stay."""
        by = lambda name: names.get(name, name)  # noqa: E731
        pieces = [replace(piece, here=tuple((by(n), k) for n, k in piece.here)) for piece in self.pieces]
        return View(self.store, tuple(pieces), {by(name): by(other) for name, other in self.others.items()})

    def names(self, name: str) -> tuple[str, ...]:
        """The names under which a tensor here is stored, or its parts are."""
        parts = self._here[self.others.get(name, name)]
        return tuple(stored for piece in parts.values() for stored in piece.stored)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """One tensor, or one of its entries along the first axis, on the CPU, in its stored dtype."""
        name = self.others.get(name, name)
        parts = self._here[name]
        if None in parts:
            if index is not None and parts[None].along:
                return self._made(name, None, slice(index, index + 1))[0]
            whole = self._made(name, None)
            return whole if index is None else whole[index]
        if index is not None:
            return self._made(name, index)
        return torch.stack([self._made(name, k) for k in range(len(parts))])

    def _made(self, name: str, index: int | None, at: slice | None = None) -> Tensor:
        piece = self._here[name][index]
        read = [self.store.read(stored) for stored in piece.stored]
        made = piece.forth(read if at is None else [tensor[at] for tensor in read])
        return made[piece.here.index((name, index))]

    def __iter__(self) -> Iterator[Listing]:
        """Name, shape, dtype and file of every tensor here, in stored order."""
        listed = {name: (shape, dtype, file) for name, shape, dtype, file in self.store}
        for name, parts in self._here.items():
            piece = parts.get(None) or parts[0]
            files = {listed[stored][2] for stored in piece.stored}
            if piece.forth is as_it_is:
                yield name, *listed[piece.stored[0]]
                continue
            blank = [torch.empty(listed[n][0], dtype=listed[n][1], device="meta") for n in piece.stored]
            made = piece.forth(blank)[piece.here.index((name, None if None in parts else 0))]
            shape = tuple(made.shape) if None in parts else (len(parts), *made.shape)
            yield name, shape, made.dtype, files.pop() if len(files) == 1 else None

    def check(self, name: str) -> None:
        """Raise FileError where a file that a tensor is of changed since it was opened."""
        for stored in self.names(name):
            self.store.check(stored)


def under(store: Store, names: Mapping[str, str]) -> View:
    """A store whose tensors have other names: stored name -> name here."""
    return View(store, tuple(Piece((stored,), ((name, None),)) for stored, name in names.items()))
