"""What the README tells a reader to type is what the checks run, and what the program offers."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALL = [
    'pip install -c constraints.txt -e ".[demo]" && tensoradapt demo',
    'pip install -c constraints.txt -e ".[dev]" && pytest',
]


def _lines(name: str) -> list[str]:
    return [line.strip() for line in (ROOT / name).read_text("utf-8").splitlines()]


@pytest.mark.parametrize("command", INSTALL)
def test_the_readme_has_the_command(command):
    assert command in _lines("README.md")


@pytest.mark.parametrize("command", INSTALL)
def test_the_checks_run_the_command(command):
    assert any(line.startswith(command) for line in _lines(".ci/run"))


def test_the_extras_exist():
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8").partition("optional-")[2], re.M)
    named = {extra for command in INSTALL for extra in re.findall(r"\[(\w+)\]", command)}
    assert named <= set(extras)
