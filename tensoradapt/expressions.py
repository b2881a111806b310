"""Regular expressions that users and files give, in a number of steps that is known before a path is tried.

Where Python's engine has few ways to try an expression, it is asked. Else the places where a match may go on are kept
as a set, a bit for each, which takes no longer whatever the path is. Invariant: what neither does soon, is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from tensoradapt.errors import SpecError

MAX_PATTERN = 20_000  # characters
MAX_STEPS = 100_000  # of one path: about a millisecond
SET_STEPS, QUICK = 20, 500  # what a step on a set takes of the engine's, and its beginning
WIDE = 256  # characters in a range, from which ignoring their case takes long
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)
_SINGLE = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN)
_PLAIN = (*_SINGLE, codes.AT)
_KINDS: Mapping[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    codes.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    codes.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    codes.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


@dataclass(frozen=True)
class Expression:
    """An expression as it was read: by the engine, and as the tree of its parts."""

    engine: re.Pattern[str]
    tree: Any

    def fits(self, path: str) -> bool:
        """Whether the whole of a path is meant. Raises ValueError where it would take long to find out."""
        few, steps = self.steps(len(path)), self.cost(len(path))
        if steps > MAX_STEPS:
            raise ValueError("it may take very long to match")
        if few <= steps:
            return self.engine.fullmatch(path) is not None
        return bool(_ends(self.tree, 1, _Text.of(path)) >> len(path))

    def cost(self, longest: int) -> float:
        """The engine's steps that a path may take, or as many as those on sets take the time of."""
        few = self.steps(longest)
        if few <= QUICK or self.engine.flags != re.UNICODE:
            return few
        return min(few, QUICK + SET_STEPS * _work(self.tree, longest))

    def steps(self, longest: int) -> float:
        """The ways in which the engine may try a path, n^k / k! for k repeats; no end where a repeat is in a repeat."""
        repeats, choices = _ways(self.tree)
        return math.comb(longest + int(repeats), int(repeats)) * choices if repeats < math.inf else math.inf


def means(pattern: str, path: str, wrap: str = "{}") -> bool:
    """Whether an expression means the whole of a path. Raises SpecError where it is none, or could run for long."""
    try:
        return read(wrap.format(pattern)).fits(path)
    except (re.error, ValueError, OverflowError, RecursionError, FutureWarning) as error:
        raise _unfit(pattern, error) from None


def cost(pattern: str, longest: int, wrap: str = "{}") -> float:
    """The steps that an expression takes at most on a path of some length. Raises SpecError as `means` does."""
    try:
        steps = read(wrap.format(pattern)).cost(longest)
        if steps > MAX_STEPS:
            raise ValueError("it may take very long to match")
        return steps
    except (re.error, ValueError, OverflowError, RecursionError, FutureWarning) as error:
        raise _unfit(pattern, error) from None


def _unfit(pattern: str, error: Exception) -> SpecError:
    return SpecError(
        f"'re:{pattern[:80]}' is no regular expression that can be used",
        got=str(error)[:200],
        expected="one that repeats single characters (.*, \\d+), or short groups of them",
        hint="write paths, or globs such as '*.q_proj'",
    )


@lru_cache(maxsize=4096)
def read(text: str) -> Expression:
    """An expression, read. Raises re.error or ValueError on what is none, too long, or refers back."""
    if len(text) > MAX_PATTERN:
        raise ValueError(f"{len(text)} characters, more than {MAX_PATTERN}")
    tree = parser.parse(text)
    _check(tree, ignoring=bool(tree.state.flags & re.IGNORECASE))
    return Expression(re.compile(text), tree)


def _check(tree: Any, *, ignoring: bool) -> None:
    """Refuse references to groups, and ranges whose case takes long to ignore."""
    for code, argument in tree:
        if code not in (*_PLAIN, *_REPEATS, codes.BRANCH, codes.SUBPATTERN, codes.ASSERT, codes.ASSERT_NOT):
            raise ValueError(f"{str(code).lower()} is not read")
        here = ignoring or (code is codes.SUBPATTERN and bool(argument[1] & re.IGNORECASE))
        wide = code is codes.IN and any(c is codes.RANGE and a[1] - a[0] > WIDE for c, a in argument)
        if here and wide:
            raise ValueError("the case of a wide range of characters is not ignored")
        for part in _parts(code, argument):
            _check(part, ignoring=here)


def _parts(code: Any, argument: Any) -> list[Any]:
    """The expressions within a part of one."""
    if code is codes.BRANCH:
        return list(argument[1])
    return [] if code in _PLAIN else [argument[-1]]


# -- how long it may take ---------------------------------------------------------------------------------------------


def _ways(tree: Any) -> tuple[float, int]:
    """The number of repeats, infinite where one repeats more than a character, and of ways to choose."""
    repeats, choices = 0.0, 1
    for code, argument in tree:
        inner, factor = 0.0, 1
        if code in _REPEATS:
            inner, factor = _repeated(*argument)
        elif code not in _PLAIN:
            counted = [_ways(part) for part in _parts(code, argument)]
            inner, factor = max(r for r, _ in counted), sum(c for _, c in counted)
        repeats, choices = repeats + inner, choices * factor
    return repeats, choices


def _repeated(low: int, high: Any, body: Any) -> tuple[float, int]:
    if high == 1:
        inner, factor = _ways(body)
        return inner, 1 + factor
    if len(body) != 1 or body[0][0] not in _PLAIN:
        return math.inf, 1
    return (0.0, 1) if low == high else (1.0, 1)


def _work(tree: Any, length: int) -> float:
    """The steps on sets for a text of some length."""
    return sum(_work_of(code, argument, length) for code, argument in tree)


def _work_of(code: Any, argument: Any, length: int) -> float:
    if code in _PLAIN:
        return 1
    if code is codes.POSSESSIVE_REPEAT:
        return math.inf
    inner = sum(_work(part, length) for part in _parts(code, argument)) + 1
    if code in _REPEATS:
        low, high, body = argument
        many = length.bit_length() if _is_run(low, high, body) else min(high - low, length + 1)
        return (low + many) * inner
    return inner * (length + 1) if code in _LOOKS else inner


_LOOKS = (codes.ASSERT, codes.ASSERT_NOT)


def _is_run(low: int, high: Any, body: Any) -> bool:
    """Whether a repeat is of single characters, and as many as there are."""
    return high is codes.MAXREPEAT and len(body) == 1 and body[0][0] in _SINGLE


# -- where a match may go on ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """A text as sets of places: bit i of `masks[c]` says that the character at i is c."""

    length: int
    masks: Mapping[str, int]

    @classmethod
    def of(cls, text: str) -> _Text:
        masks: dict[str, int] = {}
        for place, character in enumerate(text):
            masks[character] = masks.get(character, 0) | 1 << place
        return cls(len(text), masks)

    def where(self, code: Any, argument: Any) -> int:
        """The places whose character is one that a single-character expression means."""
        return sum(mask for character, mask in self.masks.items() if _is_one(code, argument, character))

    def at(self, where: Any) -> int:
        """The places, between characters, of an anchor."""
        if where in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
            return 1
        if where in (codes.AT_END, codes.AT_END_STRING):
            return 1 << self.length
        word = self.where(codes.IN, [(codes.CATEGORY, codes.CATEGORY_WORD)])
        edges = word ^ word << 1
        return edges if where is codes.AT_BOUNDARY else ~edges & (2 << self.length) - 1


def _is_one(code: Any, argument: Any, character: str) -> bool:
    """Whether a character is meant by a literal, a dot or a class."""
    if code is codes.LITERAL:
        return ord(character) == argument
    if code is codes.NOT_LITERAL:
        return ord(character) != argument
    if code is codes.ANY:
        return character != "\n"
    negated = argument[0][0] is codes.NEGATE
    return negated != any(_is_in(c, a, character) for c, a in argument[negated:])


def _is_in(code: Any, argument: Any, character: str) -> bool:
    if code is codes.CATEGORY:
        return _KINDS[argument](character)
    low, high = argument if code is codes.RANGE else (argument, argument)
    return bool(low <= ord(character) <= high)


def _ends(tree: Any, starts: int, text: _Text) -> int:
    """The places where an expression may end that begins at one of some places."""
    for code, argument in tree:
        if not starts:
            return 0
        if code in _SINGLE:
            starts = (starts & text.where(code, argument)) << 1
        elif code is codes.AT:
            starts &= text.at(argument)
        elif code in _REPEATS:
            starts = _repeat(argument, starts, text)
        elif code in _LOOKS:
            seen = _union(at for at in _each(starts) if _sees(argument, at, text))
            starts = seen if code is codes.ASSERT else starts & ~seen
        else:
            starts = _union(_ends(part, starts, text) for part in _parts(code, argument))
    return starts


def _sees(argument: Any, at: int, text: _Text) -> bool:
    """Whether an expression begins at a place; or ends there, all of whose texts are of one length."""
    direction, body = argument
    if direction > 0:
        return bool(_ends(body, at, text))
    return bool(_ends(body, at >> body.getwidth()[0], text) & at)


def _union(sets: Iterator[int]) -> int:
    found = 0
    for one in sets:
        found |= one
    return found


def _each(places: int) -> Iterator[int]:
    while places:
        last = places & -places
        yield last
        places ^= last


def _repeat(argument: Any, starts: int, text: _Text) -> int:
    low, high, body = argument
    for _ in range(low):
        starts = _ends(body, starts, text)
    if _is_run(low, high, body):
        return _run(starts, text.where(*body[0]), text.length)
    reached = new = starts
    for _ in range(min(high - low, text.length + 1)):
        new = _ends(body, new, text) & ~reached
        reached |= new
    return reached


def _run(starts: int, allowed: int, length: int) -> int:
    """The places that are reached over allowed characters alone: over 1, 2, 4, ... more at a time."""
    by = 1
    while by <= length:
        starts |= (starts & allowed) << by
        allowed &= allowed >> by
        by *= 2
    return starts
