"""Words of other libraries, and what they are called here."""

from __future__ import annotations

from typing import Any

from tensoradapt.errors import SpecError

# What PEFT calls the fields of a rule, and what to write here.
PEFT_WORDS = {
    **dict.fromkeys(("r", "lora_r", "lora_rank", "lora_dim"), "rank"),
    **dict.fromkeys(("lora_alpha", "lora_scaling"), "alpha"),
    **dict.fromkeys(("target_modules", "target_parameters", "target_names"), "targets"),
    **{"exclude_modules": "exclude", "lora_dropout": "dropout", "modules_to_save": "train", "rank_pattern": "ranks"},
    **{"use_rslora": "scale='alpha/sqrt(rank)'", "alpha_pattern": "rules of their own, with +"},
    **dict.fromkeys(("layers_to_transform", "layers_pattern"), "targets=['*.layers.0.*', '*.layers.1.*']"),
    **dict.fromkeys(("init_lora_weights", "init_weights"), "init, or ta.initialize(adapter, 'pissa')"),
    **dict.fromkeys(("bias", "lora_bias"), "nothing: biases are not adapted"),
    **{
        "fan_in_fan_out": "nothing: a weight's layout is told by its module",
        "task_type": "nothing",
        "peft_type": "preset",
    },
    **{"use_dora": "a preset: DoRA is not among them", "base_model_name_or_path": "nothing"},
}


def peft_word(word: str, value: Any) -> SpecError:
    """The error on a word of PEFT's: what it is called here."""
    return SpecError(
        f"{word!r} is PEFT's word: you mean {PEFT_WORDS[word]}",
        got=f"{word}={value!r}",
        hint="r, lora_alpha, target_modules, lora_dropout, modules_to_save: rank, alpha, targets, dropout, train",
    )
