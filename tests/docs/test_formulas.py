"""Every formula of the pages becomes MathML when they are built: no script and no network is needed to read it."""

import importlib.util
import re
from pathlib import Path

import pytest
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.glob("[!_]*.md")) + sorted(DOCS.glob("[!_]*/*.md"))


def formulas(text: str) -> list[str]:
    parsed = MarkdownIt().enable("table").use(dollarmath_plugin).parse(text)
    inner = [child for token in parsed for child in token.children or ()]
    return [token.content for token in [*parsed, *inner] if token.type in ("math_inline", "math_block")]


def unread(text: str) -> list[str]:
    """The formulas of which a command stays as it was written."""
    return [
        formula for formula in formulas(text) if "\\" in re.sub(r"<annotation.*?</annotation>", "", convert(formula))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_formula_is_understood(page):
    assert unread(page.read_text("utf-8")) == []


def test_primes_and_the_bars_of_norms_are_set_as_in_print():
    made = made_by_the_pages(r"\lVert T - T' \rVert^2")
    assert made.count('<mo stretchy="false">&#x02016;</mo>') == 2 and "<mo>&#x02016;</mo>" not in made
    assert "<mi>T</mi><mo>&#x02032;</mo>" in made and "<mi>&#x02032;</mi>" not in made


def made_by_the_pages(text: str) -> str:
    found = importlib.util.spec_from_file_location("mathml", DOCS / "mathml.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.formula(text, "inline")


def test_the_pages_have_formulas():
    assert sum(len(formulas(page.read_text("utf-8"))) for page in PAGES) > 100


def test_an_unknown_command_is_seen():
    assert unread("a $x$ and a $\\nosuchcommand x$") == ["\\nosuchcommand x"]


def test_no_page_needs_mathjax():
    assert "mathjax" not in (DOCS / "conf.py").read_text("utf-8").lower()
