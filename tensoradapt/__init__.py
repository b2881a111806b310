"""Tensor-structured adapters: an adapter is a tensor network over grouped weight deltas."""

from tensoradapt.adapter import Adapter
from tensoradapt.attach import attach, load
from tensoradapt.budget import BudgetTable, SolvedSpec
from tensoradapt.errors import AdapterError, FileError, RankError, ShapeError, SiteError, SpecError, TensorAdaptError
from tensoradapt.plan import Plan
from tensoradapt.presets import PRESETS, preset
from tensoradapt.scan import budget, plan, solve_rank
from tensoradapt.spec import Rule, Spec

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Adapter",
    "AdapterError",
    "BudgetTable",
    "FileError",
    "Plan",
    "RankError",
    "Rule",
    "ShapeError",
    "SiteError",
    "SolvedSpec",
    "Spec",
    "SpecError",
    "TensorAdaptError",
    "attach",
    "budget",
    "load",
    "plan",
    "preset",
    "solve_rank",
]
