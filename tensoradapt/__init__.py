"""Tensor-structured adapters: an adapter is a tensor network over grouped weight deltas."""

from tensoradapt import optim
from tensoradapt.adapter import Adapter
from tensoradapt.analysis.report import Report
from tensoradapt.analysis.run import analyze
from tensoradapt.attach import attach, load
from tensoradapt.budget import BudgetTable, SolvedSpec
from tensoradapt.change import Change, combine, orthogonalize, resize, truncate
from tensoradapt.collection import analyze_adapters
from tensoradapt.convert import Converted, convert
from tensoradapt.errors import AdapterError, FileError, RankError, ShapeError, SiteError, SpecError, TensorAdaptError
from tensoradapt.extract import Extraction, extract
from tensoradapt.fit import Fit, fit
from tensoradapt.folders import MergeResult, merge_folder
from tensoradapt.io.saved import Saved
from tensoradapt.peft import Exported, export_peft, import_peft, open_adapter
from tensoradapt.plan import Plan
from tensoradapt.presets import PRESETS, preset
from tensoradapt.scan import budget, plan, solve_rank
from tensoradapt.spec import Rule, Spec
from tensoradapt.start import Activations, Gradients, activations, gradients, initialize
from tensoradapt.verify import Verification, verify

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Activations",
    "Adapter",
    "AdapterError",
    "BudgetTable",
    "Change",
    "Converted",
    "Exported",
    "Extraction",
    "FileError",
    "Fit",
    "Gradients",
    "MergeResult",
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
    "Verification",
    "activations",
    "analyze",
    "analyze_adapters",
    "attach",
    "budget",
    "combine",
    "convert",
    "export_peft",
    "extract",
    "fit",
    "gradients",
    "import_peft",
    "initialize",
    "load",
    "merge_folder",
    "open_adapter",
    "optim",
    "orthogonalize",
    "plan",
    "preset",
    "resize",
    "solve_rank",
    "truncate",
    "verify",
]
