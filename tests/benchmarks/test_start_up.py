"""How soon the command line answers, as ratios to starting Python: `pytest tests/benchmarks/test_start_up.py -n 0 -s`.

Python starts in about 20 ms on a usual machine, so 15 times that is 0.3 s and 25 times is 0.5 s. The second column of
ratios is to importing typer, which draws the help.
"""

import subprocess
import sys

import pytest
import typer
from harness import hardware, interleave, ratio, table

from tensoradapt.cli.app import application

COMMANDS = tuple(typer.main.get_command(application()).commands)
VERSION, HELP = 15, 25


def started(*arguments: str):
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


@pytest.mark.benchmark
def test_version_and_help_are_there_at_once():
    runs = {"python": started("-c", "pass"), "typer": started("-c", "import typer")}
    runs["--version"] = started("-m", "tensoradapt", "--version")
    runs |= {name: started("-m", "tensoradapt", name, "--help") for name in COMMANDS}
    timings = interleave(runs, repeats=7)
    print(f"\n{hardware()}\n{table(timings, 'python')}\n\n{table(timings, 'typer')}")
    limits = {name: VERSION if name == "--version" else HELP for name in timings}
    slow = {name: ratio(timings[name], timings["python"])[0] for name in timings}
    assert {name: value for name, value in slow.items() if value > limits[name]} == {}
