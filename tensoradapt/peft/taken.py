"""Modules whose names PEFT takes for those of experts: they are adapted by their weight, as `target_parameters`.

On mixtures whose experts are one tensor in transformers 5, PEFT reads `gate_proj`, `up_proj` and `down_proj` in
`target_modules` as the experts' tensors, and drops the factors of dense and shared modules of these names.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def taken_for_experts(paths: Iterable[str], model: nn.Module | None) -> list[str]:
    """Those of the modules that PEFT would not adapt by `target_modules` on a model; none where it is not known."""
    if model is None:
        return []
    return [path for path in paths if _moves(path.rpartition(".")[2], model)]


def _moves(name: str, model: nn.Module) -> bool:
    """Whether PEFT makes something else of a module's name, given as a target by itself."""
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except (ImportError, ValueError):  # no PEFT, or one that leaves targets as they are
        return False
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # a name that PEFT takes together with another one alone
        return True
    return name not in (config.target_modules or ())
