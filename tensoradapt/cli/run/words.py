"""What the library says in Python's words, in those of the command line: `targets=['query']` as `--target query`.

Invariant: only arguments that the library has are translated; paths and what the user wrote stay as they are.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from typing import Any

from tensoradapt.presets import PRESETS
from tensoradapt.spec import Rule

# Arguments that are options of their own; other fields of a rule and parameters of presets are given by --set.
OPTIONS = {
    **{"targets": "--target", "rank": "--rank", "ranks": "--ranks", "max_parameters": "--max-parameters"},
    **{"error": "--error", "tolerance": "--tolerance", "rows": "--rows", "nonfinite": "--nonfinite"},
    **{"values": "--values", "seed": "--seed", "device": "--device", "model": "--model", "overwrite": "--overwrite"},
    **{"layout": "--layout", "dtype": "--dtype", "consumer": "--for", "base_name": "--base-name"},
    **{
        "task_type": "--task-type",
        "extras": "--extras",
        "tied": "--tied",
        "untie": "--tied",
        "prefix": "--prefix",
        "candidates": "--candidates",
    },
}
SETTINGS = {*Rule.model_fields, *(key for row in PRESETS.values() for key in row.parameters)} - set(OPTIONS)
# What only Python can be given.
SOURCES = (
    "a module, a mapping {path: (out, in)}, ",
    ", a mapping, a module, or pairs of a name and a tensor",
    "an Adapter, a Saved, or ",
)
# A value as Python writes it: a list, a mapping, a tuple, a string, a word or a number; or nothing.
_VALUE = r"""(?P<value>\[(?:[^\[\]]|\[[^\]]*\])*\]|\{[^}]*\}|\([^)]*\)|'[^']*'|"[^"]*"|\w[\w.,:@-]*\w|\w|)"""
_NAMES = "|".join(sorted({*OPTIONS, *SETTINGS}, key=len, reverse=True))
_ARGUMENT = re.compile(rf"(?<![\w./=\[\]-])(?<!\w\()(?P<name>{_NAMES})={_VALUE}(?![\w/=])")
_BARE = re.compile(rf"(?<![\w./=-])(?P<name>{'|'.join(n for n in OPTIONS if '_' in n)})(?![\w./=])")
_PRESET = re.compile(r"ta\.preset\((?P<quote>['\"])(?P<name>\w+)(?P=quote)(?:, (?P<rest>.*?\]|[^)]*))?\)")
# `overwrite=True (--overwrite)`: both forms are there already
_BOTH = re.compile(r"(?<![\w./-])\w+=\S+ \((?P<option>--[a-z][^)]*)\)")
_SET = re.compile(r"--set \S+")


def in_options(text: str) -> str:
    """A message with the options to give in the place of arguments to pass."""
    for source in SOURCES:
        text = text.replace(source, "")
    text = _BOTH.sub(lambda found: found["option"], text)
    text = _PRESET.sub(_preset, text)
    kept = [*_SET.finditer(text), None]
    parts, start = [], 0
    for found in kept:
        parts.append(_arguments(text[start : found.start() if found else None]))
        parts.append(found[0] if found else "")
        start = found.end() if found else start
    return "".join(parts)


def _arguments(text: str) -> str:
    return _BARE.sub(lambda found: OPTIONS[found["name"]], _ARGUMENT.sub(_argument, text))


def _preset(found: re.Match[str]) -> str:
    return f"--preset {found['name']} {(found['rest'] or '').replace('], ', '] ')}".rstrip()


def _argument(found: re.Match[str]) -> str:
    name, value = found["name"], _read(found["value"])
    if name in OPTIONS:
        return _option(OPTIONS[name], value)
    return f"--set {name}={_yaml(value)}" if found["value"] else f"--set {name}=..."


def _read(text: str) -> Any:
    """The value that Python would have; the text itself where it is a word."""
    if re.fullmatch(r"[\d_,]+", text):  # 30,000 is no pair
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _option(option: str, value: Any) -> str:
    write: Callable[[Any], str] = _WRITE.get(type(value), lambda v: f"{option} {v}".rstrip())
    return write(value).replace(_HERE, option)


_HERE = "\0"  # the place of the option in what is written
_WRITE: dict[type, Callable[[Any], str]] = {
    bool: lambda value: _HERE if value else f"no {_HERE}",
    list: lambda value: " ".join(f"{_HERE} {shlex.quote(str(one))}" for one in value),
    tuple: lambda value: " ".join(f"{_HERE} {shlex.quote(str(one))}" for one in value),
    dict: lambda value: f"--spec with {value}",
}


def _yaml(value: Any) -> str:
    """A value as `--set` reads it, quoted for the shell where that is needed."""
    one = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    flat = re.sub(r"['\"]", "", str(list(one) if isinstance(one, tuple) else one))
    return f"'{flat}'" if " " in flat else flat
