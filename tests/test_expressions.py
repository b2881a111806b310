"""Regular expressions: they mean what Python's engine says, and none takes long, whoever wrote it and for what path."""

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tensoradapt as ta
from tensoradapt.expressions import Expression, _ends, _Text, means, read
from tensoradapt.targets import matches

pytestmark = pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
PATH = "base.model.model.language_model.layers.17.self_attn.experts.63.gate_up_proj.weight"
USUAL = {
    r".*\.(q|v)_proj": ("model.layers.0.q_proj", "model.layers.0.k_proj"),
    r"layers\.\d+\..*": ("layers.12.mlp", "model.layers.1.mlp"),
    r".*": (PATH, None),
    r".*language_model.*layers\.\d+\..*(attn|mlp).*(q|k|v|o|gate_up)_proj.*": (PATH, "base.layers.1.attn.q"),
    r"^(?!.*vision).*\.(?:q|k|v|o|gate|up|down)_proj$": ("text.q_proj", "vision.q_proj"),
    r"^(?!.*patch_embed).*(?:gate_proj|k_proj|(?<!v)q_proj).*": ("model.layers.10.k_proj", "x.vq_proj"),
    r"model\.layers\.(0|1|2|[3-9]|1\d)\.(self_attn\.(q|k|v|o)|mlp\.(up|down))_proj": (
        "model.layers.12.mlp.up_proj",
        "x",
    ),
    r"(\w+\.)*q": ("a.b.c.q", "a..q"),
    r"model(\.\w+)+\.(query|value)": ("model.a.b.query", "model.query"),
    r"[a-z_.]*layer\.(?:[0-9]|1[01])\.[a-z_.]+": ("bert.layer.11.x", "bert.layer.12.x"),
    r".*\.layer\.\d{1,3}\.(.*)\.dense": ("e.layer.100.output.dense", "e.layer.1000.output.dense"),
    r"(?i).*\.Q_PROJ": ("a.q_proj", "a.q"),
    r".*\bquery\b.*": ("a.query.b", "a.queryb"),
    r".*\.h\.(2[0-9]|3[0-1])\..*": ("t.h.25.c", "t.h.32.c"),
    "|".join(re.escape(f"model.layers.{k}.self_attn.q_proj") for k in range(80)): (
        "model.layers.79.self_attn.q_proj",
        "x",
    ),
}
NESTED = ("(.*)*x", "(a|a)*b", "((a+)+)+$", "(a?){40}a{40}", "(\\w+\\.?)+x!", "(a|b|ab)*c", "(x+x+)+y", "(.*?,)*$")
NESTED += ("(((((a*)*)*)*)*)*b", "(?=(.*)*y).*", "(?=" * 40 + ".*" + ")" * 40 + "x", "(a|" * 900 + "b" + ")" * 900)
COUNTED = (".*" * 30 + "x", "(.*.*.*.*.*.*)x", ".{1000000}", "(a{1000}){1000}", "((?:a|e|i|o|l)?){5000}x")
COUNTED += ("(?:.?){900}.{90}z", "(?:(?:(?:a{0,90}){0,90}){0,90}){0,90}b", "(?i)[\u0000-\U0010ffff]" * 500)
NONE = ("(" * 5000, "[" * 300, "(.)\\1*x", "(?>a*)b", "a*+b", "(?(1)a|b)")
EXPLOSIVE = (*NESTED, *COUNTED, *NONE)


def tried_by_sets(pattern: str, text: str) -> bool:
    return bool(_ends(read(pattern).tree, 1, _Text.of(text)) >> len(text))


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_expressions_are_not_refused(pattern):
    inside, outside = USUAL[pattern]
    assert means(pattern, inside) and (outside is None or not means(pattern, outside))


@pytest.mark.parametrize("pattern", EXPLOSIVE)
@pytest.mark.parametrize("path", [PATH, "a" * 90, "a." * 300 + "!"])
def test_no_expression_takes_long_on_any_path(pattern, path):
    begun = time.process_time()
    try:
        found = matches(f"re:{pattern}", path)
        assert found in (True, False)
    except ta.SpecError as error:
        assert "no regular expression that can be used" in str(error)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("pattern", ["(.*)*x", "(a|a)*b", "(\\w+\\.?)+x", "(a?){40}a{40}", ".*.*.*.*.*x"])
def test_what_explodes_in_the_engine_alone_is_answered(pattern):
    assert means(pattern, "a" * 40 + "x") in (True, False)
    assert means("(.*)*x", "a" * 90 + "x") and not means("(.*)*x", "a" * 90)


ATOMS = st.sampled_from(
    [
        "a",
        "b",
        ".",
        "[ab]",
        "[^a]",
        "\\d",
        "\\w",
        "[a-c.]",
        "\\.",
        "\\b",
        "^",
        "$",
        "\\B",
        "[\\d.]",
        "\\W",
        "(?=a)",
        "(?!b)",
        "(?<=ab)",
        "(?<!b)",
    ]
)


def _grown(inner):
    repeat = st.sampled_from(["*", "+", "?", "{0,2}", "{2}", "*?", "+?", "{1,}"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(inner, repeat).map("(?:{0[0]}){0[1]}".format),
        inner.map("(?={})".format),
        inner.map("(?!{})".format),
    )


@given(st.recursive(ATOMS, _grown, max_leaves=7), st.text("ab.1_", min_size=1, max_size=7))
@example("(?:a*)*b", "aab")
@example("(?:a|ab)(?:c|bcd)*", "abcd")
def test_sets_mean_what_the_engine_means(pattern, text):
    try:
        wanted = re.fullmatch(pattern, text) is not None
    except re.error:
        return
    assert tried_by_sets(pattern, text) == wanted


@given(st.text("(a|b)*+?.\\d{1,2}[]^$", max_size=14), st.text("ab1.", max_size=6))
def test_any_text_is_refused_or_means_what_the_engine_means(pattern, text):
    try:
        found = means(pattern, text)
    except ta.SpecError:
        return
    assert found == (re.fullmatch(pattern, text) is not None)


def test_both_ways_are_taken():
    assert isinstance(read(r".*\.q"), Expression) and read(r".*\.q").steps(80) < 100
    assert read(r"(.*)*x").steps(80) == float("inf")
