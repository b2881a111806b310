"""`tensoradapt plan`: what a spec costs on a model, before any tensor exists."""

from __future__ import annotations

import json

from tensoradapt.cli.options import (
    JsonOption,
    ModelOption,
    PresetOption,
    RankOption,
    SetOption,
    SpecOption,
    TargetOption,
    emit,
    make_spec,
)
from tensoradapt.scan import plan as make_plan


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
    made = make_plan(make_spec(preset, rank, target, spec, set_), model)
    emit(json.dumps(made.to_dict()) if as_json else str(made))
