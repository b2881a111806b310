"""Folds: how an axis is cut into smaller ones. Big-endian: `out = head * head_dim + j`.

Invariant: the folds of an axis multiply out to its size, primes included (`auto` fills up with ones).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import takewhile

from tensoradapt.errors import ShapeError, SpecError
from tensoradapt.spec import MAX_PARTS, Fold

MAX_SIDE, MAX_DIGITS = 1 << 31, 12  # of a side that is cut by a rule; of a number in a fold


def fold(axis: str, size: int, how: Fold, named: Mapping[str, int]) -> dict[str, int]:
    """Names and sizes of the axes that `axis` of `size` is cut into.

    `how` is a list of sizes or names, `[12, 8, 8]` or `['head', 'head_dim']` (a name in `named`, a `name=size`, or one
    unknown, which takes the rest), `auto:k` for a balanced factorisation, `factor:f` for LyCORIS's two factors.
    Raises ShapeError where the sizes do not multiply out.
    """
    parts = _by_rule(how, size) if isinstance(how, str) else list(how)
    sizes: dict[str, int | None] = {}
    for k, part in enumerate(parts):
        name, equals, number = str(part).partition("=")
        if isinstance(part, int):
            sizes[f"{axis}_{k}"] = part
        else:
            sizes[name] = _number(number) if equals and number.isdecimal() else named.get(name)
    return _filled(axis, size, sizes)


def names_of(axis: str, how: Fold, count: int) -> tuple[str, ...]:
    """The names of the `count` axes that `axis` is cut into; none where it is not cut into so many."""
    if isinstance(how, str):
        kind, _, number = how.partition(":")
        told = count == 2 if kind == "factor" else number == str(count) or (not number and count == 3)
        return tuple(f"{axis}_{k}" for k in range(count)) if told else ()
    parts = [(k, str(part).partition("=")[0]) for k, part in enumerate(how)]
    return tuple(f"{axis}_{k}" if part.isdigit() else part for k, part in parts)


def _filled(axis: str, size: int, sizes: Mapping[str, int | None]) -> dict[str, int]:
    open_names = [name for name, value in sizes.items() if value is None]
    known = math.prod(value for value in sizes.values() if value is not None)
    if "head" in open_names:
        raise SpecError(
            f"the number of heads is not known, and {axis} is folded into heads",
            hint="pass heads=12 (and kv_heads= where keys and values have fewer)",
        )
    if len(open_names) > 1:
        raise SpecError(f"the folds {open_names} of {axis} have no size", hint="write name=size")
    if known <= 0 or size % known or (not open_names and known != size):
        raise ShapeError(
            f"the folds of {axis} do not multiply out",
            got={k: v for k, v in sizes.items() if v is not None},
            expected=f"a product of {size}",
            hint=f"use {balanced(size, max(len(sizes), 1))}, or 'auto:{len(sizes)}'" if size <= MAX_SIDE else None,
        )
    return {name: size // known if value is None else value for name, value in sizes.items()}


def _by_rule(how: str, size: int) -> list[int]:
    kind, _, number = how.partition(":")
    if kind not in ("auto", "factor") or not number.removeprefix("-").isdecimal() and number:
        raise SpecError(f"unknown fold {how!r}", expected="a list of sizes, 'auto', 'auto:3' or 'factor:4'")
    if size > MAX_SIDE:
        raise ShapeError(f"a side of {size} is not folded", expected=f"at most {MAX_SIDE}", hint="give the sizes")
    if kind == "auto":
        if not 1 <= (count := _number(number or "3")) <= MAX_PARTS:
            raise SpecError(f"unknown fold {how!r}", expected=f"1 to {MAX_PARTS} parts, as in 'auto:3'")
        return list(balanced(size, count))
    if (factor := _number(number or "-1")) < -1 or not factor:
        raise SpecError(f"unknown fold {how!r}", expected="a positive factor, as in 'factor:4', or -1 for near-square")
    return list(two_factors(size, factor))


def _number(digits: str) -> int:
    """A number in a fold. Raises SpecError on one of more digits than any size has."""
    if len(digits) > MAX_DIGITS:
        raise SpecError("a number in a fold has too many digits", got=digits, expected=f"at most {MAX_DIGITS}")
    return int(digits)


@lru_cache(maxsize=4096)
def balanced(size: int, count: int) -> tuple[int, ...]:
    """The factorisation of a size into `count` factors of least sum, descending; a prime p gives (p, 1, ..., 1)."""
    if count == 1:
        return (size,)
    best = (size, *(1 for _ in range(count - 1)))
    for first in takewhile(lambda d: d**count <= size, _divisors(size)):  # the least is at most the count-th root
        rest = balanced(size // first, count - 1)
        if rest[-1] >= first and sum(rest) + first < sum(best):
            best = (*rest, first)
    return best


@lru_cache(maxsize=4096)
def _divisors(size: int) -> tuple[int, ...]:
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return tuple(sorted({*small, *(size // d for d in small)}))


def two_factors(size: int, factor: int) -> tuple[int, int]:
    """LyCORIS's factors (small, large): `factor` where it divides, else the nearest below; -1 is near-square."""
    if factor > 0 and size % factor == 0:
        small = factor
    else:
        limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
        small = max(d for d in _divisors(size) if d <= limit)
    return min(small, size // small), max(small, size // small)
