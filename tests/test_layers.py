"""Each file imports only from what stands above it, and what stands above the line needs no torch."""

import ast
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from source_tree import LAYERS, PACKAGE, ROOT, TORCH_FREE, File, Import, files, layer_of

THIRD_PARTY_ABOVE_THE_LINE = {"pydantic", "yaml", "opt_einsum", "numpy"}
OPTIONAL = {"matplotlib", "transformers", "accelerate", "peft", "huggingface_hub", "sklearn", "pandas"}


def unknown_layers(tree: list[File]) -> list[str]:
    """Every file belongs to a layer, or it would escape the order."""
    return [f"{file.module} is in no layer" for file in tree if file.layer not in LAYERS]


def upward_imports(tree: list[File]) -> list[str]:
    placed = [file for file in tree if file.layer in LAYERS]
    return [_says(file, found) for file in placed for found in file.imports if not _is_downward(file, found)]


def _is_downward(file: File, found: Import) -> bool:
    layer = layer_of(found.module)
    if layer is None or (layer == file.layer and len(file.parts) > 1):
        return True
    importable = layer in LAYERS and layer not in ("__main__", "__init__")
    return importable and LAYERS.index(layer) < LAYERS.index(file.layer)


def cycles(tree: list[File]) -> list[str]:
    graph = {file.module: {found.module for found in file.imports} for file in tree}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def torch_above_the_line(tree: list[File]) -> list[str]:
    allowed = THIRD_PARTY_ABOVE_THE_LINE | sys.stdlib_module_names | {PACKAGE}
    above = [file for file in tree if file.layer in TORCH_FREE]
    optional = {"pandas"}  # only where a user asks for a data frame
    return [
        _says(file, found)
        for file in above
        for found in file.imports
        if _top(found) not in (allowed | optional if found.in_function else allowed)
    ]


def hidden_imports(tree: list[File]) -> list[str]:
    """Imports inside functions, but for the optional ones, and for a command's work in the file of its options."""
    return [
        _says(file, found)
        for file in tree
        for found in file.imports
        if found.in_function and _top(found) not in OPTIONAL and not (_is_signature(file) and _is_work(found))
    ]


def _is_signature(file: File) -> bool:
    """Whether a file holds options of commands: one that lies in `cli` itself."""
    return file.layer == "cli" and len(file.parts) == 2


def _is_work(found: Import) -> bool:
    return found.module.startswith(f"{PACKAGE}.cli.run.")


def imports_by_name(tree: list[File]) -> list[str]:
    """Modules imported by a call, which no other rule would see: only the public names are."""
    calls = [(file, node) for file in tree for node in ast.walk(file.tree) if isinstance(node, ast.Call)]
    return [
        f"{file.path.relative_to(file.root.parent)}:{node.lineno} calls {ast.unparse(node.func)}"
        for file, node in calls
        if ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__") and file.parts != ("__init__",)
    ]


def eager_work(tree: list[File]) -> list[str]:
    """What files of options import when they are imported: none of it may lead to torch, or help would wait for it."""
    graph = {file.module: [found for found in file.imports if not found.late] for file in tree}
    light = {name for name in graph if _is_light(name, graph, frozenset())}
    signatures = [file for file in tree if _is_signature(file) or file.parts == ("__init__",)]
    allowed = sys.stdlib_module_names | {"typer"}
    return [
        _says(file, found)
        for file in signatures
        for found in graph[file.module]
        if _top(found) not in allowed and found.module not in light
    ]


def _is_light(name: str, graph: dict[str, list[Import]], above: frozenset[str]) -> bool:
    """Whether a file of the package leads to nothing but the standard library and typer."""
    if name not in graph or name in above:
        return name in above
    allowed = sys.stdlib_module_names | {"typer"}
    return all(_top(f) in allowed or _is_light(f.module, graph, above | {name}) for f in graph[name])


def eager_optional_imports(tree: list[File]) -> list[str]:
    """Optional packages at the top of a file, where importing the file would need them."""
    return [
        _says(file, found)
        for file in tree
        for found in file.imports
        if _top(found) in OPTIONAL and not found.in_function and not found.type_checking
    ]


def _top(found: Import) -> str:
    return found.module.partition(".")[0]


def _says(file: File, found: Import) -> str:
    return f"{file.path.relative_to(file.root.parent)}:{found.line} imports {found.module}"


RULES = (
    unknown_layers,
    upward_imports,
    cycles,
    torch_above_the_line,
    hidden_imports,
    imports_by_name,
    eager_work,
    eager_optional_imports,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule):
    assert rule(files()) == []


BREACHES = [
    (unknown_layers, "utils.py", "", "utils"),
    (unknown_layers, "helpers/a.py", "", "helpers.a"),
    (upward_imports, "spec.py", "from .plan import Plan", "tensoradapt.plan"),
    (upward_imports, "spec.py", "from . import plan", "tensoradapt.plan"),
    (upward_imports, "spec.py", "import tensoradapt.plan", "tensoradapt.plan"),
    (upward_imports, "spec.py", "from tensoradapt import plan", "tensoradapt.plan"),
    (upward_imports, "spec.py", "from tensoradapt import attach", "tensoradapt.__init__"),
    (upward_imports, "spec.py", "def f():\n    from .plan import Plan", "spec.py:2"),
    (upward_imports, "spec.py", "if TYPE_CHECKING:\n    from .plan import Plan", "tensoradapt.plan"),
    (upward_imports, "spec.py", "from .spec import Spec", "tensoradapt.spec"),
    (upward_imports, "formats/tt.py", "from ..presets import lora", "tensoradapt.presets"),
    (upward_imports, "formats/tt.py", "from .. import presets", "tensoradapt.presets"),
    (upward_imports, "cli/plan.py", "from ..__main__ import main", "tensoradapt.__main__"),
    (upward_imports, "__init__.py", "from .__main__ import main", "tensoradapt.__main__"),
    (upward_imports, "budget.py", "from . import linalg", "tensoradapt.linalg"),
    (cycles, "formats/tt.py", "from .cp import cp", "tensoradapt.formats.cp"),
    (cycles, "formats/tt.py", "from . import FORMATS", "tensoradapt.formats.__init__"),
    (torch_above_the_line, "plan.py", "import torch.nn as nn", "plan.py:1 imports torch.nn"),
    (torch_above_the_line, "plan.py", "from torch import nn", "plan.py:1 imports torch"),
    (torch_above_the_line, "formats/tt.py", "import scipy", "imports scipy"),
    (torch_above_the_line, "plan.py", "import tensorly", "imports tensorly"),
    (hidden_imports, "plan.py", "class A:\n    def f(self):\n        import json", "plan.py:3 imports json"),
    (hidden_imports, "chain.py", "async def f():\n    from .spec import Spec", "chain.py:2"),
    (hidden_imports, "cli/plan.py", "def f():\n    from .. import linalg", "tensoradapt.linalg"),
    (hidden_imports, "cli/run/plan.py", "def f():\n    from ...cli.run import budget", "tensoradapt.cli.run.budget"),
    (hidden_imports, "__init__.py", "def f():\n    from .spec import Spec", "tensoradapt.spec"),
    (imports_by_name, "plan.py", "import importlib\nimportlib.import_module('torch')", "plan.py:2 calls importlib"),
    (imports_by_name, "cli/plan.py", "def f():\n    __import__('torch')", "cli/plan.py:2 calls __import__"),
    (eager_work, "cli/plan.py", "from ..linalg import svd", "imports tensoradapt.linalg"),
    (eager_work, "cli/plan.py", "from ..spec import Spec", "imports tensoradapt.spec"),
    (eager_work, "cli/plan.py", "import rich", "imports rich"),
    (eager_work, "__init__.py", "from .linalg import svd", "imports tensoradapt.linalg"),
    (eager_optional_imports, "plots.py", "import matplotlib.pyplot as plt", "imports matplotlib.pyplot"),
    (eager_optional_imports, "peft.py", "try:\n    import peft\nexcept ImportError:\n    peft = None", "imports peft"),
]


@pytest.fixture
def sound_tree(tmp_path: Path) -> Path:
    """A small package that keeps every rule, optional and local imports included."""
    sources = {
        "errors.py": "import json",
        "spec.py": "import pydantic\nfrom .errors import TensorAdaptError",
        "formats/cp.py": "from ..errors import TensorAdaptError\nfrom . import tt",
        "formats/tt.py": "from ..spec import Spec",
        "formats/__init__.py": "from . import cp, tt\nFORMATS = {}",
        "presets.py": "from .formats import FORMATS",
        "plan.py": "from tensoradapt import spec",
        "budget.py": "",
        "linalg.py": "import torch",
        "chain.py": "from tensoradapt.linalg import svd",
        "peft.py": "def f():\n    import peft",
        "plots.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from matplotlib.figure import Figure",
        "cli/options.py": "import typer\nfrom ..errors import TensorAdaptError",
        "cli/plan.py": "from .options import Choice\ndef f():\n    from tensoradapt.cli.run.plan import run",
        "cli/run/plan.py": "from ...linalg import svd\nimport rich",
        "cli/run/budget.py": "",
        "__main__.py": "from .cli import plan",
        "__init__.py": "from importlib import import_module\nif TYPE_CHECKING:\n    from .linalg import svd\n"
        "def __getattr__(name):\n    return import_module(name)",
    }
    root = tmp_path / PACKAGE
    for name, source in sources.items():
        _write(root / name, source)
    return root


def _write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_tree_is_accepted(rule, sound_tree):
    assert rule(files(sound_tree)) == []


@pytest.mark.parametrize(
    ("rule", "name", "source", "says"), BREACHES, ids=[f"{b[0].__name__}-{b[2]}" for b in BREACHES]
)
def test_a_breach_is_named(rule, name, source, says, sound_tree):
    _write(sound_tree / name, source)
    found = rule(files(sound_tree))
    assert len(found) == 1 and says in found[0], found


# A stand-in for the package's `__init__`, which imports torch, so that only the files above the line are executed.
WITHOUT_TORCH = """
import importlib, json, pathlib, sys, types
root, layers = json.loads(sys.argv[1])
sys.modules["torch"] = None
package = types.ModuleType("tensoradapt")
package.__path__ = [root]
sys.modules["tensoradapt"] = package
present = [name for name in layers if list(pathlib.Path(root).glob(name + "*"))]
for name in present:
    importlib.import_module("tensoradapt." + name)
print(json.dumps(present))
"""


def test_the_torch_free_half_runs_where_torch_cannot_be_imported():
    argument = json.dumps([str(ROOT), TORCH_FREE])
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, argument], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "plan" in json.loads(ran.stdout)


def test_the_torch_free_run_fails_when_a_file_needs_torch(sound_tree):
    _write(sound_tree / "errors.py", "class TensorAdaptError(Exception): ...")
    _write(sound_tree / "spec.py", "class Spec: ...")
    _write(sound_tree / "plan.py", "import torch")
    argument = json.dumps([str(sound_tree), TORCH_FREE])
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, argument], capture_output=True, text=True)
    assert ran.returncode != 0 and "import of torch halted" in ran.stderr, ran.stderr
