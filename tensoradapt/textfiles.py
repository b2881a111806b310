"""Small text files: specs read strictly, and text written whole or not at all.

Invariant: a key given twice is an error, whatever the format; where writing fails an older file stays as it was.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tensoradapt.errors import FileError, SpecError
from tensoradapt.paths import expand
from tensoradapt.writing.atomic import atomic

MAX_BYTES, MAX_VALUES, MAX_DIGITS = 4_000_000, 100_000, 40
SEPARATORS = (",", "\n", ": ", "[", "{", "- ")  # one of them stands before every value but the first
BOOLS = ("yes", "no", "true", "false", "on", "off")
PLAIN = {
    **{f"tag:yaml.org,2002:{name}": "scalar" for name in ("str", "int", "float", "bool", "null")},
    **{"tag:yaml.org,2002:seq": "sequence", "tag:yaml.org,2002:map": "mapping"},
}


def read_plain(path: str | Path) -> Any:
    """The plain values in a YAML or JSON file. Raises FileError on an unreadable one, SpecError on a doubled key."""
    text = _text(expand(path))
    if (values := sum(map(text.count, SEPARATORS))) > MAX_VALUES:
        raise FileError(
            f"{path} has too many values for a spec",
            got=f"{values:,} of {', '.join(map(repr, SEPARATORS))}",
            expected=f"at most {MAX_VALUES:,}",
            hint="write globs or 're:' expressions where targets are listed one by one",
        )
    if Path(path).suffix == ".json":
        return _parse(json.loads, text, path, object_pairs_hook=_unique, parse_int=_whole)
    return _parse(yaml.load, text, path, Loader=_PlainLoader)


def write_plain(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write plain values as YAML, or as JSON where the path ends in .json. Raises FileError."""
    as_json = expand(path).suffix == ".json"
    write_beside(path, json.dumps(data, indent=2) if as_json else yaml.safe_dump(data, sort_keys=False))


def write_beside(path: str | Path, text: str) -> None:
    """Write a text file into a folder that is there. Raises FileError."""
    if not expand(path).parent.exists():  # a name that is mistyped, rather than a folder to make
        raise FileError(f"{path} cannot be written", got="there is no such folder", hint="choose another folder")
    write_text(path, text)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, and the folders above it; an older file stays where that fails. Raises FileError."""
    with atomic(expand(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileError(f"no spec file at {path}", hint="give the path of a .yaml or .json file")
    if path.stat().st_size > MAX_BYTES:
        raise FileError(
            f"{path} is too large for a spec",
            got=f"{path.stat().st_size:,} bytes",
            expected=f"at most {MAX_BYTES:,}",
            hint="is it a weight file?",
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8", got=str(error), hint="save it as UTF-8") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read", got=error.strerror, hint="look at its permissions") from None


def _parse(parser: Any, text: str, path: str | Path, **options: Any) -> Any:
    try:
        return parser(text, **options)
    except SpecError:
        raise
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise FileError(
            f"{path} cannot be read", got=str(error).replace("\n", " "), hint="mend the line it names"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        doubled = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise SpecError(f"key {doubled!r} is given twice", hint="keep one of them")
    return found


def _whole(digits: str) -> int:
    """An integer. Raises SpecError on one of more digits than any size has: many are read and written slowly."""
    if len(digits) > MAX_DIGITS:
        raise SpecError("a number has too many digits", got=digits, expected=f"at most {MAX_DIGITS}")
    return int(digits)


class _PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's safe loader, with no more than JSON can say: texts, numbers, true, false, null, lists and mappings.

    It refuses keys given twice (the plain one keeps the last in silence), aliases (of aliases, they write a list of
    billions of entries in ten lines), and tags (`!!set`, a date) whose values no field takes.
    """

    def get_single_node(self) -> yaml.Node | None:
        """The nodes of the one document. Raises SpecError on aliases, and on tags."""
        root: yaml.Node | None = super().get_single_node()
        waiting, seen = [root] if root is not None else [], set()
        while waiting:
            node = waiting.pop()
            if id(node) in seen:
                raise SpecError(
                    "aliases (*name) are not read", hint="write it out, or put what rules share into defaults"
                )
            seen.add(id(node))
            waiting += _inside(node)
        return root


def _inside(node: Any) -> list[yaml.Node]:
    """The nodes of a list or a mapping. Raises SpecError where the node is nothing that JSON has."""
    kind = PLAIN.get(node.tag)
    if kind != node.id or (node.tag == "tag:yaml.org,2002:bool" and node.value.lower() not in BOOLS):
        raise SpecError(
            f"{str(node.value)[:40]!r} is read as {node.tag.rpartition(':')[2]!r}, which is no value of a spec",
            expected="text, a number, true, false, null, a list or a mapping",
            hint="write text in quotes, and nothing after '!'",
        )
    if kind == "mapping":
        _unique([(str(key.value), None) for key, _ in node.value])
        return [part for pair in node.value for part in pair]
    if node.tag == "tag:yaml.org,2002:int":
        _whole(node.value)
    return list(node.value) if kind == "sequence" else []
