"""The jobs of this folder on simulated accelerators, each in a process of its own: torch keeps a device for good."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NUMBERS = ("refusals", "there", "fits", "device_starts", "device_checkpoints")  # where float64 makes a difference
FILES = {"sim": [HERE / f"test_{name}.py" for name in NUMBERS], "sim-without-float64": [HERE]}


@pytest.mark.parametrize("device", FILES)
def test_every_job_computes_on_a_simulated_accelerator_what_it_computes_on_the_cpu(device):
    quiet = ["-q", "-p", "no:cacheprovider", "--tb=short", "-n", "0"]
    command = [sys.executable, "-m", "pytest", *quiet, "--device", device, *map(str, FILES[device])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
