"""The door of all functions that take a spec: what a user may write in its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensoradapt.errors import SpecError
from tensoradapt.presets.table import PRESETS, Preset, preset
from tensoradapt.spec import Rule, Spec

SpecLike = Spec | Rule | Preset | str | Path | Mapping[str, Any]
FILES = (".yaml", ".yml", ".json")


def as_spec(given: Any, call: str = "ta.plan(spec, model)") -> Spec:
    """The spec that is meant: a Spec, a Rule, a preset or its name, a spec file, a mapping, or several in a list.

    `call` shows the order of the arguments where something else was given. Raises SpecError, FileError.
    """
    match given:
        case Spec():
            return given
        case Rule():
            return Spec(rules=(given,))
        case Preset():
            return preset(given)
        case str() | Path():
            return _by_name(given, call)
        case Mapping() if not given or set(given) & {"rules", *Rule.model_fields}:
            return Spec.from_dict(given if "rules" in given else {"rules": [_row(given)]})
        case list() | tuple() if given:
            return Spec(rules=tuple(rule for one in given for rule in as_spec(one, call).rules))
    raise _no_spec(given, call)


def _no_spec(given: Any, call: str) -> SpecError:
    return SpecError(
        "this is no spec",
        got=type(given).__name__,
        expected="a preset's name, ta.preset(...), a ta.Rule, a spec's dictionary or file",
        hint=f"the order is {call}",
    )


def _by_name(given: str | Path, call: str) -> Spec:
    """The preset of a name, or the spec in a file."""
    if Path(given).suffix in FILES:
        return Spec.load(given)
    if isinstance(given, Path) or (given not in PRESETS and "/" in given):
        raise _no_spec(given, call)
    return preset(given)


def _row(given: Mapping[str, Any]) -> dict[str, Any]:
    """A rule's row, with what a preset calls its own among the options."""
    row = dict(given)
    known = PRESETS.get(str(row.get("preset")))
    own = [key for key in row if known and key in known.parameters and key not in Rule.model_fields]
    options = row.get("options") or {}
    return row | ({"options": {**options, **{key: row.pop(key) for key in own}}} if own else {})


def as_specs(given: Any, call: str) -> Any:
    """One spec, a list, or a mapping from label to spec, with every spec as `as_spec` has it. Raises SpecError."""
    if isinstance(given, Mapping) and given and not set(given) & {"rules", "preset", "format"}:
        return {str(label): as_spec(one, call) for label, one in given.items()}
    if isinstance(given, list | tuple) and given:
        return [as_spec(one, call) for one in given]
    return as_spec(given, call)
