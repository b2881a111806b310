"""What the named sets of weights are in well-known architectures: read off models without weights."""

import torch
import transformers

import tensoradapt as ta

MODELS = (
    "bert",
    "roberta",
    "distilbert",
    "deberta-v2",
    "modernbert",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
)
MODELS += (
    "qwen3",
    "gemma",
    "phi3",
    "falcon",
    "bloom",
    "mixtral",
    "t5",
    "bart",
    "whisper",
    "clip",
    "vit",
    "mamba",
)
SETS = ("query-value", "attention", "feed-forward")


def targets_table() -> str:
    """One row a model type: the names that each set stands for."""
    rows = [
        "| `model_type` | " + " | ".join(f"`{name}`" for name in SETS) + " |",
        "| --- |" + " --- |" * len(SETS),
    ]
    for kind in MODELS:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(
                transformers.AutoConfig.for_model(kind)
            )
        rows.append(
            f"| `{kind}` | " + " | ".join(names_of(model, name) for name in SETS) + " |"
        )
    return "\n".join(rows) + "\n"


def names_of(model: torch.nn.Module, name: str) -> str:
    try:
        rule = ta.plan(ta.preset("lora", rank=1, targets=name), model).spec.rules[0]
    except ta.TensorAdaptError:
        return "refused"
    but = (
        f", but not {', '.join(f'`{name}`' for name in rule.exclude)}"
        if rule.exclude
        else ""
    )
    return ", ".join(f"`{target}`" for target in rule.targets) + but
