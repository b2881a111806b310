"""The work of `tensoradapt presets`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from tensoradapt.cli.run.printing import emit, emit_json
from tensoradapt.diagram import Diagram
from tensoradapt.plan import make_plan
from tensoradapt.presets import PRESETS, preset
from tensoradapt.sites import from_mapping
from tensoradapt.spec import Rule
from tensoradapt.tables import columns, wrapped

# Two layers of a small model: enough to see which factors a preset shares, and which start at zero.
ROLES = (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))
CONVOLUTIONS: dict[str, tuple[int, ...]] = {f"blocks.{k}.conv": (16, 16, 3, 3) for k in range(2)}
SHAPES = {f"layers.{k}.{role}": (16, 16) for k in range(2) for role in ROLES}
OUTWARD = ("out", "in", "head", "head_dim", "kernel")  # axes of one weight; the others are of a stack of weights
LABEL = 12  # the width of the labels of one preset's lines


def run(name: str | None, *, wide: bool, as_json: bool) -> None:
    """Print the table, or one preset."""
    if name is not None:
        rule = preset(name).rules[0]  # an unknown name is an error that lists the names
        return emit_json(row(name) | {"shares": _shared(name)}) if as_json else emit("\n".join(_whole(name, rule)))
    rows = [row(one) for one in PRESETS]
    if as_json:
        return emit_json({"presets": rows})
    head = ("preset", "parameters", "start", "source", "delta of a site")
    cells = [(r["name"], _own(r["defaults"]), r["start"], _short(r["cite"]), r["formula"]) for r in rows]
    lines = columns(head, cells, text=head, drop=() if wide else head[:-2:-1])
    emit("\n".join([*lines, "", "tensoradapt presets NAME shows one whole; --wide the formulas."]))


def row(name: str) -> dict[str, Any]:
    """What there is to know of one preset."""
    found = PRESETS[name]
    rule = found.rules[0]
    return {
        **{"name": name, "formula": found.formula, "cite": found.cite, "parameters": list(found.parameters)},
        **{"defaults": _defaults(name), "targets": rule.default},
        **{"start": rule.start, "scale": rule.scale, "alpha": rule.alpha, "init": rule.init, "note": found.note},
        **{key: getattr(found, key) for key in ("rate", "use") if getattr(found, key, None)},
    }


def _defaults(name: str) -> dict[str, Any]:
    parameters = inspect.signature(PRESETS[name].build).parameters
    return {key: parameter.default for key, parameter in parameters.items()}


def _own(defaults: Mapping[str, Any]) -> str:
    """The parameters that a user chooses; the model knows its heads."""
    return " ".join(key for key, value in defaults.items() if value is not None)


def _short(cite: str) -> str:
    return cite.removeprefix("github.com/")


def _whole(name: str, rule: Rule) -> Iterator[str]:
    """One preset in lines: what it is, what it shares, how it is used."""
    known = row(name)
    yield from wrapped(f"{name}: {known['formula']}")
    yield ""
    facts: dict[str, Any] = {
        "use": known.get("use"),
        "rate": known.get("rate") and f"{known['rate']} is a learning rate to begin with",
        "shares": "; ".join(_shared(name)) or "nothing: every weight has factors of its own",
        "parameters": ", ".join(f"{key}={_said(value)}" for key, value in known["defaults"].items())
        or "none of its own",
        "start": _start(rule),
        "scale": f"{rule.scale}, alpha = {rule.alpha:g}" if str(rule.scale).startswith("alpha") else rule.scale,
        "targets": f"{rule.default}, where --target is not given",
        "source": known["cite"],
        "note": known["note"],
    }
    for label, text in facts.items():
        if text not in (None, ""):
            yield from wrapped(f"  {label.ljust(LABEL)}{text}", " " * (LABEL + 2))
    yield ""
    yield from _examples(name, known["defaults"])


def _start(rule: Rule) -> str:
    words = {
        "zero": "zero: a fresh adapter changes nothing",
        "nonzero": "not zero: a fresh adapter already changes the model's outputs",
        "difference": "its first values are subtracted: a fresh adapter changes nothing",
    }
    return words[rule.start]


def _said(value: Any) -> str:
    return "from the model" if value is None else str(value)


def _examples(name: str, defaults: Mapping[str, Any]) -> Iterator[str]:
    """A command and a call that plan the preset."""
    rank = {"rank": defaults["rank"]} if type(defaults.get("rank")) is int else {}
    yield f"  tensoradapt plan --model MODEL --preset {name}" + "".join(f" --rank {value}" for value in rank.values())
    yield f'  spec = ta.preset("{name}"' + "".join(f", rank={value}" for value in rank.values()) + ")"


def _shared(name: str) -> list[str]:
    """Which factors several weights share, by the axes that they lack."""
    heads = {"heads": 4} if "heads" in PRESETS[name].parameters else {}
    made = preset(name, **heads)
    group = make_plan(made, from_mapping({**SHAPES, **CONVOLUTIONS})).groups[0]
    banks = [node for node, key in group.store.items() if key != f"{group.name}.{node}"]
    stack = [axis for axis in group.diagram.open if not axis.startswith(OUTWARD)]
    found: dict[str, list[str]] = {}
    for node in group.diagram.nodes:
        lacking = _lacking(group.diagram, node, stack) or (["site"] if node in banks else [])
        if lacking:
            found.setdefault(_listed([_PLURAL.get(axis, f"{axis}s") for axis in lacking]), []).append(node)
    return [f"{_listed(nodes)} by all {axes}" for axes, nodes in found.items()]


_PLURAL = {"site": "weights"}


def _lacking(diagram: Diagram, node: str, stack: list[str]) -> list[str]:
    return [axis for axis in stack if axis not in diagram.nodes[node]]


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
