"""Tensor-structured adapters: an adapter is a tensor network over grouped weight deltas.

The public names are imported when they are first used: the command line shows its help without loading torch.
"""

from importlib import import_module
from sys import modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tensoradapt.version import VERSION

if TYPE_CHECKING:
    from tensoradapt import optim
    from tensoradapt.adapter import Adapter
    from tensoradapt.analysis.report import Report
    from tensoradapt.analysis.run import analyze
    from tensoradapt.attach import attach, load
    from tensoradapt.budget import BudgetTable, SolvedSpec
    from tensoradapt.change import Change, combine, orthogonalize, resize, truncate
    from tensoradapt.collection import analyze_adapters
    from tensoradapt.convert import Converted, convert
    from tensoradapt.errors import (
        AdapterError,
        FileError,
        RankError,
        ShapeError,
        SiteError,
        SpecError,
        TensorAdaptError,
    )
    from tensoradapt.extract import Extraction, extract
    from tensoradapt.fit import Fit, fit
    from tensoradapt.folders import MergeResult, merge_folder
    from tensoradapt.io.saved import Saved
    from tensoradapt.peft import Exported, export_peft, import_peft, open_adapter
    from tensoradapt.plan import Plan
    from tensoradapt.presets import PRESETS, Preset, preset
    from tensoradapt.scan import budget, plan, solve_rank
    from tensoradapt.spec import Rule, Spec
    from tensoradapt.start import Activations, Gradients, activations, gradients, initialize
    from tensoradapt.verify import Verification, verify

__version__ = VERSION
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
    "Preset",
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

# Where each public name lies, but for `optim`, which is a folder.
_PLACES = {
    "Activations": "tensoradapt.start",
    "Adapter": "tensoradapt.adapter",
    "AdapterError": "tensoradapt.errors",
    "BudgetTable": "tensoradapt.budget",
    "Change": "tensoradapt.change",
    "Converted": "tensoradapt.convert",
    "Exported": "tensoradapt.peft",
    "Extraction": "tensoradapt.extract",
    "FileError": "tensoradapt.errors",
    "Fit": "tensoradapt.fit",
    "Gradients": "tensoradapt.start",
    "MergeResult": "tensoradapt.folders",
    "PRESETS": "tensoradapt.presets",
    "Plan": "tensoradapt.plan",
    "Preset": "tensoradapt.presets",
    "RankError": "tensoradapt.errors",
    "Report": "tensoradapt.analysis.report",
    "Rule": "tensoradapt.spec",
    "Saved": "tensoradapt.io.saved",
    "ShapeError": "tensoradapt.errors",
    "SiteError": "tensoradapt.errors",
    "SolvedSpec": "tensoradapt.budget",
    "Spec": "tensoradapt.spec",
    "SpecError": "tensoradapt.errors",
    "TensorAdaptError": "tensoradapt.errors",
    "Verification": "tensoradapt.verify",
    "activations": "tensoradapt.start",
    "analyze": "tensoradapt.analysis.run",
    "analyze_adapters": "tensoradapt.collection",
    "attach": "tensoradapt.attach",
    "budget": "tensoradapt.scan",
    "combine": "tensoradapt.change",
    "convert": "tensoradapt.convert",
    "export_peft": "tensoradapt.peft",
    "extract": "tensoradapt.extract",
    "fit": "tensoradapt.fit",
    "gradients": "tensoradapt.start",
    "import_peft": "tensoradapt.peft",
    "initialize": "tensoradapt.start",
    "load": "tensoradapt.attach",
    "merge_folder": "tensoradapt.folders",
    "open_adapter": "tensoradapt.peft",
    "orthogonalize": "tensoradapt.change",
    "plan": "tensoradapt.scan",
    "preset": "tensoradapt.presets",
    "resize": "tensoradapt.change",
    "solve_rank": "tensoradapt.scan",
    "truncate": "tensoradapt.change",
    "verify": "tensoradapt.verify",
}


def __getattr__(name: str) -> Any:
    """A public name, or a file or folder of the package such as `plots`, imported when it is first used."""
    module = _PLACES.get(name, f"tensoradapt.{name}")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name != f"tensoradapt.{name}":
            raise
        raise AttributeError(f"module 'tensoradapt' has no attribute {name!r}") from None
    value = globals()[name] = getattr(found, name) if name in _PLACES else found
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package: `tensoradapt.plan` is the public function, also once the file `plan.py` has been imported.

    The import system binds a submodule to its package, which would hide the function of the same name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and value is modules.get(f"tensoradapt.{name}")):
            super().__setattr__(name, value)


modules[__name__].__class__ = _Package
