"""Names of one model's tensors in two places, one of which has a prefix: `bert.encoder...` and `encoder...`.

Invariant: a prefix is only found where it brings most of the smaller side together, and more than the plain names do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from tensoradapt.errors import FileError

ENOUGH = 0.8  # the share of the smaller side's names that a prefix must bring together
SAMPLES = 64  # names that prefixes are looked for with


@dataclass(frozen=True)
class Shift:
    """From one side's names to the other's: a prefix taken off, or put before."""

    prefix: str = ""
    strip: bool = False

    def __call__(self, name: str) -> str:
        """The other side's name; an empty one where the prefix is to be taken off and not there."""
        if not self.strip:
            return self.prefix + name
        return name.removeprefix(self.prefix) if name.startswith(self.prefix) else ""


def shift(names: Collection[str], others: Collection[str], prefix: str = "auto") -> Shift:
    """How names become the others' names. Raises FileError on a given prefix that neither side has."""
    if prefix == "auto":
        return _found(names, others)
    prefix = f"{prefix.rstrip('.')}." if prefix else ""
    found = [Shift(prefix, strip=True), Shift(prefix)]
    if prefix and not any(_matched(by, names, others) for by in found):
        raise FileError(f"no name is the other side's with {prefix!r} before it", hint='prefix="auto" looks for one')
    return max(found, key=lambda by: _matched(by, names, others)) if prefix else Shift()


def _found(names: Collection[str], others: Collection[str]) -> Shift:
    candidates = [Shift(prefix, strip=True) for prefix in _prefixes(names, others)]
    candidates += [Shift(prefix) for prefix in _prefixes(others, names)]
    best = max(candidates, key=lambda by: _matched(by, names, others), default=Shift())
    enough = max(_matched(Shift(), names, others) + 1, ENOUGH * min(len(names), len(others)))
    return best if _matched(best, names, others) >= enough else Shift()


def sole(names: Collection[str], others: Collection[str]) -> Shift | None:
    """The one prefix, or none at all, with which every name is among the others; None where there is no such, or two.

    Two towers of one model have the same names behind their own prefixes: which of them is meant nobody can say.
    """
    if all(name in others for name in names):
        return Shift()
    longer = sorted(names, key=len)[-1:]
    put = {other.removesuffix(name) for name in longer for other in others if other.endswith(f".{name}")}
    taken = {name.removesuffix(other) for name in longer for other in others if other and name.endswith(f".{other}")}
    candidates = [*map(Shift, put), *(Shift(prefix, strip=True) for prefix in taken)]
    found = [by for by in candidates if all(by(name) in others for name in names)]
    return found[0] if len(found) == 1 else None


def _matched(by: Shift, names: Collection[str], others: Collection[str]) -> int:
    return sum(by(name) in others for name in names)


def _prefixes(longer: Collection[str], shorter: Collection[str]) -> Iterator[str]:
    """What most often stands before one of the shorter names among the longer ones."""
    sample = list(shorter)[:: max(1, len(shorter) // SAMPLES)]
    counts = Counter(
        name.removesuffix(part) for part in sample for name in longer if part and name.endswith(f".{part}")
    )
    return (prefix for prefix, _ in counts.most_common(4))
