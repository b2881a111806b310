"""`tensoradapt plan`: what a spec costs on a model, before any tensor exists."""

from __future__ import annotations

from tensoradapt.cli.options import (
    Choice,
    JsonOption,
    ModelOption,
    PresetOption,
    RankOption,
    SetOption,
    SpecOption,
    TargetOption,
)


def plan(
    model: ModelOption,
    preset: PresetOption = None,
    rank: RankOption = None,
    target: TargetOption = None,
    spec: SpecOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show groups, parameters, bytes and FLOP per token of a spec on a model.

    Example: tensoradapt plan --model config.json --preset lotr --rank 8 --target query --target value
    """
    from tensoradapt.cli.run.plan import run

    run(model, Choice(preset, rank, target, spec, set_), as_json=as_json)
