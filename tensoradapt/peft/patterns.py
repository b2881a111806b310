"""PEFT's ways of naming modules: suffix lists, expressions, and patterns that give a module a rank of its own.

Invariant: an expression from a file that could run for long, or is none, is refused before it is tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensoradapt.expressions import means

MAX_DIGITS = 9  # of a layer's number


def pattern_key(patterns: Iterable[str], path: str) -> str | None:
    """The first pattern that means a path, as PEFT decides it: a suffix of whole components, read as an expression."""
    for pattern in patterns:
        if means(pattern, path, r"(.*\.)?({})$"):
            return pattern
    return None


def valued(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """A path's own value (rank, alpha) under PEFT's patterns, or the default."""
    key = pattern_key(patterns, path)
    return default if key is None else patterns[key]


def ends(name: str, path: str) -> bool:
    """Whether a name of a list means a path: equal, or a suffix of whole components."""
    return path == name or path.endswith(f".{name}")


def named(names: str | Sequence[str], path: str) -> bool:
    """Whether names mean a path: a list by suffix, a text as an expression for the whole path."""
    if isinstance(names, str):
        return means(names, path)
    return any(ends(name, path) for name in names)


def targeted(config: Mapping[str, Any], path: str) -> bool:
    """Whether a config's targets, excludes and layers mean a path; `all-linear` means all that could be meant."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if config.get("exclude_modules") and named(config["exclude_modules"], path):
        return False
    if any(f".{name}." in f".{path}." for name in config.get("modules_to_save") or ()):
        return False
    if any(ends(name, f"{path}.weight") for name in config.get("target_parameters") or ()):
        return True
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str) or path in targets or not layers and layers != 0:
        return named(targets, path)
    return named(targets, path) and _layer(config.get("layers_pattern"), path) in (
        layers if isinstance(layers, list) else [layers]
    )


def _layer(patterns: str | Sequence[str] | None, path: str) -> int | None:
    """The number of the layer that a path lies in: behind a list that is named, or any but at the root."""
    lists = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    before = r"(.*\.)?{}" if patterns else r".*\.{}"
    parts = path.split(".")
    numbers = [k for k, part in enumerate(parts[:-1]) if k and part.isdecimal() and len(part) <= MAX_DIGITS]
    return next((int(parts[k]) for name in lists for k in numbers if means(name, ".".join(parts[:k]), before)), None)


def target_modules(paths: Sequence[str], modules: Iterable[str] | None) -> list[str] | str:
    """What selects exactly these paths among a model's modules: the shortest suffixes without a number, sorted.

    Full paths where there are no such suffixes or the model is not known; one expression where a full path is the
    suffix of another module's.
    """
    taken = {suffix for path in set(modules or ()) - set(paths) for suffix in _suffixes(path)}
    if taken & set(paths):
        return "|".join(map(re.escape, sorted(paths)))
    plain = {path: [s for s in _suffixes(path) if s not in taken and not re.search(r"\b\d+\b", s)] for path in paths}
    if modules is None or not all(plain.values()):
        return sorted(paths)
    return sorted({suffixes[0] for suffixes in plain.values()})


def _suffixes(path: str) -> list[str]:
    """The path's suffixes of whole components, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[k:]) for k in reversed(range(len(parts)))]


def keyed(values: Mapping[str, int]) -> dict[str, int]:
    """Patterns that give each path its own value and no other path any: the path, or `^` and the path escaped."""
    found = {}
    for path, value in values.items():
        plain = all(part.isidentifier() or part.isdecimal() for part in path.split("."))
        alone = plain and [other for other in values if re.match(rf"(.*\.)?({path})$", other)] == [path]
        found[path if alone else f"^{re.escape(path)}"] = value
    return found
