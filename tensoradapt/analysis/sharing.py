"""Sharing: what every member of a team does on its own, and what becomes of an error that one of them meets.

Invariant: an error of one member is raised by all, so that none waits for another that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from tensoradapt.errors import TensorAdaptError
from tensoradapt.linalg import Team
from tensoradapt.writing.folder import claimed

T = TypeVar("T")


def together(team: Team, act: Callable[[], T]) -> list[T]:
    """What `act` returns on every member, in the order of ranks. Raises the first error that any of them met."""
    found: list[T] = []
    alike(team, lambda: found.append(act()))
    return [value for values in team.gather(found) for value in values]


@contextmanager
def claimed_by(team: Team, out: Path | None) -> Iterator[None]:
    """An output, where there is one, that the first of a team has claimed for the block. Raises FileError on all."""
    with ExitStack() as stack:
        together(team, lambda: stack.enter_context(claimed(out)) if team.rank == 0 and out is not None else None)
        yield


def alike(team: Team, act: Callable[[], T]) -> T:
    """What `act` returns on this member, which stays here. Raises the first error that any of them met."""
    error: TensorAdaptError | None = None
    found: list[T] = []
    try:
        found.append(act())
    except TensorAdaptError as met:
        error = met
    errors = team.gather(error)
    first = next((rank for rank, met in enumerate(errors) if met is not None), None)
    if first is None:
        return found[0]
    raise error if first == team.rank and error is not None else _told(errors[first])


def _told(error: TensorAdaptError) -> TensorAdaptError:
    """An error that another member tells the user of: the command line prints it but once."""
    error.told = True
    return error
