"""`nn.MultiheadAttention` as PEFT has it: one layer around the whole, whose factors are those of two weights.

The layer's own factors change `in_proj_weight`, those under its `base_layer.out_proj` the weight of `out_proj`. To that
one PEFT (0.21) adds the product twice, in every forward pass as in a merge: by the layer, then by the module.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tensoradapt.peft.families import Found

INNER = ".base_layer.out_proj"
TIMES = 2.0  # how often PEFT adds the delta of an out_proj
NOTE = f"PEFT adds the delta of an out_proj of nn.MultiheadAttention {TIMES:g} times: so it is here"


def weights_of(path: str, paths: Collection[str]) -> str:
    """The path of the weight that a module's factors in a folder change, as a model has it."""
    if path.endswith(INNER):
        return f"{path.removesuffix(INNER)}.out_proj"
    return f"{path}.in_proj_weight" if f"{path}{INNER}" in paths else path


def is_parameter(path: str) -> bool:
    """Whether a path is a parameter's own, and not a module's that has a weight."""
    return path.endswith(".in_proj_weight")


def as_added(name: str, found: Found) -> Found:
    """The module that a name of PEFT's means, with the delta that PEFT adds."""
    if not name.endswith(INNER):
        return found
    return replace(found, fields={**found.fields, "alpha": TIMES * found.fields["alpha"]})
