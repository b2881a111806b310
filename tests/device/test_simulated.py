"""The jobs of this folder on simulated accelerators, each in a process of its own: torch keeps a device for good."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("device", ["sim"])
def test_every_job_computes_on_a_simulated_accelerator_what_it_computes_on_the_cpu(device):
    here = Path(__file__).parent
    quiet = ["-q", "-p", "no:cacheprovider", "--tb=short", "-n", "0"]
    command = [sys.executable, "-m", "pytest", *quiet, "--device", device, str(here)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
