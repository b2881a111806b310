"""What the jobs of this folder run on: the simulated accelerator with `--device sim`, otherwise CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import simulated
import torch

ONLY = {
    "test_refusals.py": True,
    "test_there.py": True,
    "test_simulated.py": False,
}  # whether a file is for a simulated device


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The device's own tests need it, and the test that starts a process with it does not run inside that process."""
    there = config.getoption("device") != "cuda"
    return True if ONLY.get(collection_path.name, there) != there else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if config.getoption("device") == "cuda" and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device to run a job on."""
    name = request.config.getoption("device")
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device; test_simulated.py runs the same job on a simulated one")
        yield name
        return
    simulated.register()
    with nullcontext() if name == "sim" else simulated.without_float64():
        yield "sim"


@pytest.fixture
def second(device: str) -> str:
    """Another device than `device`: a second one of its kind where there is one, else the CPU."""
    return f"{device}:1" if device != "cuda" or torch.cuda.device_count() > 1 else "cpu"
