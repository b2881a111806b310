"""The jobs of this folder on the simulated accelerator, in a process of its own: torch keeps a device for good."""

import os
import subprocess
import sys
from pathlib import Path


def test_every_job_computes_on_a_simulated_accelerator_what_it_computes_on_the_cpu():
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "--tb=short",
        "--device",
        "sim",
        str(here),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
