"""What the commands share: options that make a spec, and how results and errors are printed.

Invariant: with `--json` one JSON object goes to stdout and nothing else; progress goes to stderr.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from tensoradapt.errors import RankError, SpecError
from tensoradapt.presets import preset
from tensoradapt.spec import Spec

ModelOption = Annotated[
    str, typer.Option("--model", help="A config.json, a model folder, or a safetensors file or folder.")
]
PresetOption = Annotated[
    str | None, typer.Option("--preset", help="A preset's name; `tensoradapt presets` lists them.")
]
RankOption = Annotated[int | None, typer.Option("--rank", help="The preset's rank.")]
TargetOption = Annotated[
    list[str] | None, typer.Option("--target", help="A path, a suffix, a glob or 're:...'; may be given several times.")
]
SpecOption = Annotated[Path | None, typer.Option("--spec", help="A spec file, YAML or JSON, in the preset's place.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="A further parameter of the preset, as name=value: heads=12, factor=4."),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Where to compute: cpu (the default), cuda, cuda:1, mps.")
]
RowsOption = Annotated[
    str, typer.Option("--rows", help="Matrices outside the layers whose rows differ: error, truncate or pad.")
]
NonfiniteOption = Annotated[
    str, typer.Option("--nonfinite", help="Weights with NaN or infinite entries: error, or skip them.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the random sketches.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def progress_console() -> Console:
    """The console for progress: stderr."""
    return Console(stderr=True)


def emit(text: str) -> None:
    """Print a result on stdout."""
    sys.stdout.write(text.rstrip("\n") + "\n")


def make_spec(
    name: str | None, rank: int | None, targets: Sequence[str] | None, file: Path | None, pairs: Sequence[str] | None
) -> Spec:
    """The spec of a command's options: a preset with its parameters, or a file. Raises SpecError on both or none."""
    if (name is None) == (file is None):
        raise SpecError(
            "give a preset or a spec file, one of the two",
            hint="--preset lotr --rank 8 --target query, or --spec spec.yaml",
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
