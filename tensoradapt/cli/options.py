"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer


def complete_presets(incomplete: str) -> list[str]:
    """The presets' names for the shell's completion."""
    from tensoradapt.cli.run.names import preset_names

    return preset_names(incomplete)


ModelOption = Annotated[
    str,
    typer.Option("--model", help="A config.json, a model folder, a safetensors file, or a cached hub id[@revision]."),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset", help="A preset's name; `tensoradapt presets` lists them.", autocompletion=complete_presets
    ),
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
PrefixOption = Annotated[
    str,
    typer.Option("--prefix", help="What one side's names have in front of the other's, such as `bert.`; or auto."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the random sketches.")]
WideOption = Annotated[bool, typer.Option("--wide", help="Every column and every row, whatever the width.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
PresetsOption = Annotated[
    list[str],
    typer.Option("--preset", help="A preset's name; may be given several times.", autocompletion=complete_presets),
]


class Choice(NamedTuple):
    """What the options say of a spec: a preset with its parameters, or a file."""

    preset: str | None
    rank: int | None
    targets: list[str] | None
    file: Path | None
    pairs: list[str] | None
