"""Small text files: specs read strictly, and text written whole or not at all.

Invariant: a key given twice is an error, whatever the format; where writing fails an older file stays as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tensoradapt.errors import FileError, SpecError
from tensoradapt.paths import expand
from tensoradapt.writing.atomic import atomic

MAX_BYTES = 4_000_000


def read_plain(path: str | Path) -> Any:
    """The plain values in a YAML or JSON file. Raises FileError on an unreadable one, SpecError on a doubled key."""
    text = _text(expand(path))
    if Path(path).suffix == ".json":
        return _parse(json.loads, text, path, object_pairs_hook=_unique)
    return _parse(yaml.load, text, path, Loader=_UniqueLoader)


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
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: no JSON, a number of 5000 digits
        raise FileError(
            f"{path} cannot be read", got=str(error).replace("\n", " "), hint="mend the line it names"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    doubled = [key for key in keys if keys.count(key) > 1]
    if doubled:
        raise SpecError(f"key {doubled[0]!r} is given twice", hint="keep one of them")
    return dict(pairs)


class _UniqueLoader(yaml.SafeLoader):
    """YAML's safe loader, refusing keys given twice (the plain one keeps the last in silence), and aliases.

    Aliases of aliases write a list of billions of entries in ten lines.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise SpecError("aliases (*name) are not read", hint="write it out, or put what rules share into defaults")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        _unique([(key, None) for key in keys])
        return super().construct_mapping(node, deep)
