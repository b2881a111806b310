"""From options to specs: presets with their parameters, spec files, ranges of ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tensoradapt.cli.options import Choice
from tensoradapt.errors import RankError, SpecError
from tensoradapt.presets import PRESETS, preset
from tensoradapt.spec import Spec


def make_spec(choice: Choice) -> Spec:
    """The spec of a command's options: a preset with its parameters, or a file. Raises SpecError on both or none."""
    name, rank, targets, file, pairs = choice
    if (name is None) == (file is None):
        raise SpecError(
            "give a preset or a spec file, one of the two",
            hint="--preset lora --rank 8, or --spec spec.yaml; tensoradapt presets lists them",
        )
    if file is not None:
        if rank is not None or targets or pairs:
            raise SpecError("--rank, --target and --set belong to --preset", hint=f"write them into {file}")
        return Spec.load(file)
    return preset(str(name), **parameters(rank, targets, pairs))


def parameters(rank: int | None, targets: Sequence[str] | None, pairs: Sequence[str] | None) -> dict[str, Any]:
    """A preset's parameters from the options."""
    found: dict[str, Any] = {} if rank is None else {"rank": rank}
    found |= {"targets": list(targets)} if targets else {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise SpecError(
                f"--set {pair!r} is no assignment", expected="name=value", hint="for example --set heads=12"
            )
        found[key.strip()] = yaml.safe_load(value)
    return found


def rank_note(choice: Choice, goals: Mapping[str, Any]) -> str:
    """What to say of ranks that no option chooses, or that one option chooses against another; empty otherwise.

    `goals` has the values of the options that choose ranks by what is lost, by their names.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in goals.items() if value is not None]
    if given and choice.rank is not None:
        return f"note: --rank {choice.rank} is not used: {given[0]} chooses the ranks"
    name, pairs = str(choice.preset), parameters(choice.rank, None, choice.pairs)
    if given or "rank" in pairs or name not in PRESETS or "rank" not in PRESETS[name].parameters:
        return ""
    own = preset(name, **pairs).rules[0].rank
    return f"note: rank {own}, the preset's own: --rank, --error or --max-parameters choose another"


def parse_ranks(text: str) -> list[int]:
    """Ranks from `1:64` (inclusive), `1:64:4` (in steps) or `1,2,4`. Raises RankError."""
    if re.fullmatch(r"\d+:\d+(:\d+)?", text):
        start, stop, *step = map(int, text.split(":"))
        found = list(range(start, stop + 1, *[max(1, s) for s in step]))
    else:
        found = (
            [int(part) for part in text.split(",") if part.strip().isdigit()] if re.fullmatch(r"[\d,\s]+", text) else []
        )
    if not found or min(found) < 1:
        raise RankError(
            f"--ranks {text!r} names no ranks", expected="1:64 (inclusive), 1:64:4, or 1,2,4", hint="ranks begin at 1"
        )
    return found
