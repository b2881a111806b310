"""What the jobs of this folder run on: the simulated accelerator with `--device sim`, otherwise CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import simulated
import torch

MODES = {"sim": nullcontext, "sim without float64": simulated.without_float64}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mode" not in metafunc.fixturenames:
        return
    names = (
        list(MODES) if metafunc.config.getoption("device") == "sim" else [pytest.param("cuda", marks=pytest.mark.gpu)]
    )
    metafunc.parametrize("mode", names, indirect=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The device's own tests need it, and the test that starts a process with it does not run inside that process."""
    only = {"test_refusals.py": "sim", "test_simulated.py": "cuda"}
    return True if only.get(collection_path.name, config.getoption("device")) != config.getoption("device") else None


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device to run a job on, in one of its modes."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device; the same jobs run on the simulated one in test_simulated.py")
        yield "cuda"
        return
    simulated.register()
    with MODES[request.param]():
        yield "sim"


@pytest.fixture
def device(mode: str) -> str:
    return mode
