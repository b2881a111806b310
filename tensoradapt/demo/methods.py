"""What the demo compares: four adapter families at stated budgets, and the learning rate of each method.

Each rate was chosen on the validation images, over other seeds than the demo's own, and is the same at every budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tensoradapt.budget import SolvedSpec
from tensoradapt.demo.model import HEADS
from tensoradapt.presets import preset
from tensoradapt.scan import plan, solve_rank
from tensoradapt.spec import Spec

BUDGETS = (500, 1_600, 6_200)  # trainable parameters of the adapter, the head's apart
HEAD_RATE, FULL_RATE, FRESH_RATE = 3e-2, 1e-3, 4e-3


@dataclass(frozen=True)
class Family:
    """An adapter family: its spec at rank 1 on all query and value projections, and its learning rate."""

    label: str
    spec: Spec
    rate: float


def _family(label: str, name: str, rate: float, **parameters: Any) -> Family:
    return Family(label, preset(name, rank=1, targets=["q", "v"], train=["head"], **parameters), rate)


FAMILIES = (
    _family("LoRA", "lora", 5e-3),
    _family("LoTR", "lotr", 3e-2),
    # The published alpha of 16 is for wide models: unit-norm cores times 16 would drown weights of width 64.
    _family("TT-LoRA", "tt_lora", 2e-2, folds={"out": [8, 8], "in": [8, 8]}, alpha=1.0),
    _family("LoRTA", "lorta", 2e-2, heads=HEADS),
)

PROJECTIONS = ("q", "k", "v", "o", "mlp.0", "mlp.2")  # what the analysis looks at: all that a full fine-tuning changes
EXTRACTED = {
    "LoRA": preset("lora", rank=1, targets=PROJECTIONS),
    "LoTR": preset("lotr", rank=1, targets=PROJECTIONS),
}


@dataclass(frozen=True)
class Entry:
    """A family at a budget: the spec with the largest ranks that fit, None where rank 1 (`smallest`) is too much."""

    family: Family
    budget: int
    smallest: int
    spec: SolvedSpec | None

    @property
    def slug(self) -> str:
        """A name for files: `lotr-1600`."""
        return f"{self.family.label.lower()}-{self.budget}"

    @property
    def rank(self) -> str:
        """The ranks by group: one number, or the range of them."""
        ranks = sorted(set(self.spec.ranks.values())) if self.spec else []
        return "-".join(dict.fromkeys(str(rank) for rank in ranks[:1] + ranks[-1:]))


def entries(model: nn.Module, budgets: Sequence[int]) -> list[Entry]:
    """Every family at every budget, with the largest ranks that fit."""
    return [_entry(family, model, budget) for budget in budgets for family in FAMILIES]


def _entry(family: Family, model: nn.Module, budget: int) -> Entry:
    smallest = plan(family.spec, model).num_trainable
    solved = solve_rank(family.spec, model, max_parameters=budget) if smallest <= budget else None
    return Entry(family, budget, smallest, solved)
