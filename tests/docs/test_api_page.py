"""The API pages name what the package exports, and nothing else."""

import re
from pathlib import Path

import tensoradapt
from tensoradapt import errors

PAGES = sorted((Path(__file__).parents[2] / "docs/api").glob("*.md"))
PAGE = "\n".join(page.read_text("utf-8") for page in PAGES)
DOCUMENTED = set(re.findall(r"(?:auto(?:function|class)|py:data):: tensoradapt\.(\w+)$", PAGE, re.M))
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type)}


def test_every_public_name_is_on_a_page():
    assert set(tensoradapt.__all__) - DOCUMENTED - ERRORS - {"optim"} == set()


def test_the_pages_have_public_names_only():
    assert DOCUMENTED - set(tensoradapt.__all__) == set()


def test_every_optimiser_is_on_a_page():
    named = set(re.findall(r"auto(?:function|class):: tensoradapt\.optim\.(\w+)$", PAGE, re.M))
    assert named == set(tensoradapt.optim.__all__) - {"Wrapper", "Schedule"}  # what they share: a base and a protocol


def test_every_error_is_public():
    assert "automodule:: tensoradapt.errors" in PAGE
    assert ERRORS - set(tensoradapt.__all__) == set()
