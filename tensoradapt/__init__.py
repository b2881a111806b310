"""Tensor-structured adapters: an adapter is a tensor network over grouped weight deltas."""

from tensoradapt.adapter import Adapter
from tensoradapt.analysis.report import Report
from tensoradapt.analysis.run import analyze
from tensoradapt.attach import attach, load
from tensoradapt.budget import BudgetTable, SolvedSpec
from tensoradapt.collection import analyze_adapters
from tensoradapt.convert import Converted, convert
from tensoradapt.errors import AdapterError, FileError, RankError, ShapeError, SiteError, SpecError, TensorAdaptError
from tensoradapt.extract import Extraction, extract
from tensoradapt.fit import Fit, fit
from tensoradapt.io.saved import Saved
from tensoradapt.peft import export_peft, import_peft
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
    "Converted",
    "Extraction",
    "FileError",
    "Fit",
    "Plan",
    "RankError",
    "Report",
    "Rule",
    "Saved",
    "ShapeError",
    "SiteError",
    "SolvedSpec",
    "Spec",
    "SpecError",
    "TensorAdaptError",
    "analyze",
    "analyze_adapters",
    "attach",
    "budget",
    "convert",
    "export_peft",
    "extract",
    "fit",
    "import_peft",
    "load",
    "plan",
    "preset",
    "solve_rank",
]
