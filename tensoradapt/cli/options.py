"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer


def complete_presets(incomplete: str) -> list[str]:
    """The presets' names for the shell's completion."""
    from tensoradapt.cli.run.names import preset_names

    return preset_names(incomplete)


# What targets may be, where they are given several times.
_WEIGHTS = (
    "Which weights: the end of a path such as q_proj, a glob, 're:...', or a set: query-value, attention, qkv, "
    "feed-forward, block, convolutions, all-linear. May be given several times. Left out: "
)
CHECKPOINT = "a folder, a safetensors file, or a cached hub id[@revision]."

BaseArgument = Annotated[str, typer.Argument(metavar="BASE", help=f"The base: {CHECKPOINT}")]
TunedArgument = Annotated[str, typer.Argument(metavar="TUNED", help="The fine-tuned model, likewise.")]
AdapterArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="An adapter's folder or file, or a PEFT folder.")
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="A config.json, a model folder, a safetensors file, or a cached hub id[@revision].",
    ),
]
TellingOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="A config.json or model folder that tells how weights are stored."),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="A preset's name; `tensoradapt presets` lists them.",
        autocompletion=complete_presets,
    ),
]
PresetsOption = Annotated[
    list[str],
    typer.Option(
        "--preset",
        metavar="NAME",
        help="A preset's name; may be given several times.",
        autocompletion=complete_presets,
    ),
]
RankOption = Annotated[int | None, typer.Option("--rank", metavar="N", help="The preset's rank.")]
PlannedOption = Annotated[
    list[str] | None,
    typer.Option("--target", metavar="WEIGHTS", help=f"{_WEIGHTS}by architecture; the plan says which."),
]
AnalysedOption = Annotated[list[str] | None, typer.Option("--target", metavar="WEIGHTS", help=f"{_WEIGHTS}all.")]
ExtractedOption = Annotated[
    list[str] | None,
    typer.Option("--target", metavar="WEIGHTS", help=f"{_WEIGHTS}all that differ and that the format can hold."),
]
ConvertedOption = Annotated[
    list[str] | None, typer.Option("--target", metavar="WEIGHTS", help=f"{_WEIGHTS}all of the adapter's.")
]
SpecOption = Annotated[
    Path | None, typer.Option("--spec", metavar="FILE", help="A spec file, YAML or JSON, in the preset's place.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A further parameter of the preset: heads=12, factor=4."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="Where to compute: cpu (the default), cuda, cuda:1, mps."),
]
RowsOption = Annotated[
    str,
    typer.Option(
        "--rows", metavar="CHOICE", help="Matrices outside the layers whose rows differ: error, truncate or pad."
    ),
]
NonfiniteOption = Annotated[
    str,
    typer.Option("--nonfinite", metavar="CHOICE", help="Weights with NaN or infinite entries: error, or skip them."),
]
PrefixOption = Annotated[
    str,
    typer.Option(
        "--prefix",
        metavar="TEXT",
        help="What one side's names have in front of the other's, such as `bert.`; or auto.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the random sketches.")]
WideOption = Annotated[bool, typer.Option("--wide", help="Every column and every row, whatever the width.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


class Choice(NamedTuple):
    """What the options say of a spec: a preset with its parameters, or a file."""

    preset: str | None
    rank: int | None
    targets: list[str] | None
    file: Path | None
    pairs: list[str] | None
