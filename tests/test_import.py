"""`import tensoradapt` loads no torch, its names load no optional package, and change nothing outside it."""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import tensoradapt

OPTIONAL = ("transformers", "accelerate", "peft", "matplotlib", "sklearn")
STATES = (
    *("tensorly backend", "default dtype", "default device", "torch rng", "numpy rng", "random rng"),
    *(
        "grad enabled",
        "deterministic algorithms",
        "matmul precision",
        "torch threads",
        "warning filters",
        "environment",
    ),
)

IMPORTED = "import json, sys, tensoradapt; print(json.dumps(sorted(sys.modules)))"
LOADED = "import json, sys; from tensoradapt import *; print(json.dumps(sorted(sys.modules)))"

# Everything that the package itself imports is imported first: what changes afterwards is the package's doing.
CHANGED = """
import json, os, random, warnings
import numpy, opt_einsum, pydantic, safetensors.torch, scipy.linalg, tensorly, torch, yaml

def states():
    name, *numbers = numpy.random.get_state()
    return {
        "tensorly backend": tensorly.get_backend(),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": [name, numbers[0].tolist(), *numbers[1:]],
        "random rng": str(random.getstate()),
        "grad enabled": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "torch threads": torch.get_num_threads(),
        "warning filters": str(warnings.filters),
        "environment": dict(os.environ),
    }

for seed in (random.seed, numpy.random.seed, torch.manual_seed):
    seed(11)
before = states()
from tensoradapt import *
print(json.dumps({name: before[name] != now for name, now in states().items()}))
"""

OFFENDER = """
import importlib, os, random, sys, types, warnings
import numpy, tensorly, torch
torch.rand(1), numpy.random.rand(), random.random()
tensorly.set_backend("pytorch")
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.set_grad_enabled(False)
torch.use_deterministic_algorithms(True)
torch.set_float32_matmul_precision("medium")
torch.set_num_threads(torch.get_num_threads() + 1)
warnings.simplefilter("ignore")
os.environ["TENSORADAPT"] = "1"
for name in ("transformers", "accelerate", "peft", "matplotlib", "sklearn"):
    sys.modules[name] = types.ModuleType(name)
"""


@cache
def _run(script: str, folder: Path = Path(__file__).parents[1]):
    """The script's JSON from a process of its own, which finds the package first in the folder it runs in."""
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("name", OPTIONAL)
def test_import_loads_no(name):
    assert name not in _run(LOADED)


@pytest.mark.parametrize("state", STATES)
def test_import_leaves_alone_the(state):
    assert not _run(CHANGED)[state]


@pytest.fixture
def offender(tmp_path: Path) -> Path:
    (tmp_path / "tensoradapt.py").write_text(OFFENDER)
    return tmp_path


def test_the_check_sees_every_loaded_package(offender):
    assert set(OPTIONAL) <= set(_run(LOADED, offender))


def test_the_check_sees_every_changed_state(offender):
    assert _run(CHANGED, offender) == dict.fromkeys(STATES, True)


def test_import_alone_loads_no_torch():
    assert "torch" not in _run(IMPORTED) and "tensoradapt.errors" not in _run(IMPORTED)


def test_the_check_sees_torch(offender):
    assert "torch" in _run(IMPORTED, offender)


# A file has the name of a public function: importing the file must not put the module in the function's place.
SHADOWED = """
import importlib, json, pkgutil, types
import tensoradapt
names = [found.name for found in pkgutil.iter_modules(tensoradapt.__path__)]
for name in names:
    if name != "__main__":
        importlib.import_module(f"tensoradapt.{name}")
public = {name: isinstance(getattr(tensoradapt, name), types.ModuleType) for name in tensoradapt.__all__}
print(json.dumps([sorted(set(names) & set(public)), sorted(name for name, is_module in public.items() if is_module)]))
"""


def test_public_names_outlive_the_import_of_files_of_the_same_name():
    both, modules = _run(SHADOWED)
    assert {"plan", "budget", "extract", "convert", "verify", "attach", "fit"} <= set(both)
    assert modules == ["optim"]


def test_every_public_name_has_one_place_and_is_seen_by_type_checkers():
    source = (Path(tensoradapt.__file__)).read_text("utf-8")
    checked = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    seen = {name.name: node.module for node in checked.body for name in node.names}
    assert {**tensoradapt._PLACES, "optim": "tensoradapt"} == seen
    assert sorted(seen) == sorted(tensoradapt.__all__)
    assert set(tensoradapt.__all__) <= set(dir(tensoradapt))


def test_a_name_that_is_not_public_is_an_attribute_error():
    assert not hasattr(tensoradapt, "nowhere")
    with pytest.raises(AttributeError, match="'tensoradapt' has no attribute 'nowhere'"):
        tensoradapt.nowhere  # noqa: B018
    assert tensoradapt.plots.plot_budget


def test_a_public_name_can_be_replaced_and_put_back(monkeypatch):
    before = tensoradapt.plan
    with monkeypatch.context() as patch:
        patch.setattr(tensoradapt, "plan", "mine")
        assert tensoradapt.plan == "mine"
    assert tensoradapt.plan is before
