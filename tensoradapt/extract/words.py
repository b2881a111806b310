"""What extraction and verification say alike: shares, counts, and the tensors that are in none of their numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tensoradapt import tables
from tensoradapt.plots.unmatched import advice, unmatched

LITTLE = 0.9  # a relative error from which on a result holds next to nothing
FEW = 3  # names that are written out


def percent(share: float) -> str:
    """A share in per cent, with the digits that tell it from nothing and from all."""
    if share >= 1 or share == 0.0:
        return f"{100 * share:.0f} %"
    digits = next((k for k in range(1, 5) if 0.0 < float(f"{100 * share:.{k}f}") < 100.0), 5)
    return f"{100 * share:.{digits}f} %"


def counted(number: int, noun: str) -> str:
    """`1 tensor`, `39 tensors`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def little(error: float, *, chosen: bool = True) -> Iterator[str]:
    """One line where factors hold next to nothing of a change; `chosen` where other ranks can be chosen for them."""
    if LITTLE <= error < math.inf:
        held = percent(max(0.0, 1 - error**2))
        yield f"these factors hold {held} of the squared change, next to nothing" + (
            ": choose ranks for an error (--error 0.1), or another preset; analyze says which rank the change has"
            if chosen
            else ""
        )


def few(names: Sequence[str]) -> str:
    """The names where they are few: `: classifier.bias, classifier.weight`."""
    return f": {', '.join(names)}" if len(names) <= FEW else ""


def apart(only_base: Sequence[str], only_tuned: Sequence[str], unmeasured: Mapping[str, str]) -> Iterator[str]:
    """The tensors that are in no error."""
    yield from (f"not compared: {line}" for line in unmatched(only_base, only_tuned))
    yield from advice(only_base, only_tuned)
    yield from (f"not compared: {name}, {reason}" for name, reason in unmeasured.items())


def wrapped(lines: Iterable[str]) -> Iterator[str]:
    """The lines in the width of a terminal, names and paths whole."""
    for line in lines:
        yield from tables.wrapped(line)
