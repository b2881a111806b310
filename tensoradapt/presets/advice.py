"""When to take which preset, and the learning rate to begin with: what was measured, beside what was published.

Rates are AdamW's, with warm-up, for the preset's defaults. Those of lora, lotr, lotr_by_role, lorta, tt_lora and
metatt_4d are the best on held-out rows of MRPC and CoLA (docs/data/frontier.csv), the others the lowest within a
standard error of the best on SST-2, that of locon on digits (docs/data/preset-rates.csv).
"""

from __future__ import annotations

from typing import NamedTuple


class Advice(NamedTuple):
    """A sentence on when to take a preset, and the learning rate to begin with."""

    use: str
    rate: float | None = None


_TENSLORA = "to compare: LoRA's deltas as one Tucker or CP tensor, with attention heads, roles or layers as axes"

ADVICE: dict[str, Advice] = {
    "lora": Advice(
        "the first to try, and the one that every server reads; best where parameters are no concern", 1.5e-3
    ),
    "lotr": Advice("to reproduce the paper; its start learned least in our measurements: take lotr_by_role", 1.2e-3),
    "lotr_by_role": Advice("few parameters: at a tenth of LoRA's the closest to it of what we measured", 2e-3),
    "lorta": Advice("very few parameters (thousands); needs a high rate and tolerates it", 1e-2),
    "tt_lora": Advice("each weight alone at a few hundred parameters; learned less than shared formats", 6e-3),
    "loretta": Advice("as tt_lora, with the factors of LoRA as the trains", 8e-3),
    "fact_tt": Advice("vision transformers, as published; also a good default of few parameters for text", 8e-3),
    "fact_tk": Advice("as fact_tt, with a Tucker core over the weights", 8e-3),
    "metatt_4d": Advice("fewest parameters at a given rank: one train through all layers and roles", 2.4e-3),
    "metatt_5d": Advice("as metatt_4d, with the heads as an axis of their own", 8e-3),
    **{
        f"tenslora_{name}": Advice(_TENSLORA, 8e-3)
        for name in ("att", "qkv", "depth", "att_qkv", "att_depth", "att_qkv_depth")
    },
    "tenslora_qkv_depth": Advice(_TENSLORA, 3e-2),
    "cara": Advice("vision transformers, as published; also a good default for text", 8e-3),
    "lokr": Advice("full-rank deltas at few parameters; image generators use it", 8e-3),
    "krona": Advice("full-rank deltas at few parameters, one Kronecker product", 8e-3),
    "loha": Advice("deltas of a higher rank than LoRA's at the same count; image generators use it", 8e-3),
    "vera": Advice("a few numbers for each weight; costs time, since its frozen matrices are large", 3e-2),
    "lora_xs": Advice("the fewest numbers for each weight: rank squared, between the weight's singular vectors", 8e-3),
    "polar": Advice("as LoRA, with orthonormal factors and a rank that is used to the full", 2e-3),
    "quanta": Advice("full-rank deltas for wide models, as a circuit of small gates", 2e-3),
    "dota": Advice("to start from the weight's own tensor train instead of zero", 8e-3),
    "mpo_shared": Advice("experts and layers that share a central core", 8e-3),
    "locon": Advice("convolutions: the bottleneck of LoRA with a small kernel", 8e-3),
}
