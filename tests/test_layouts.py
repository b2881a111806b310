"""Layouts: an adapter's delta lands on the weight that it was measured on, the right way round, or is refused."""

from itertools import product

import pytest

import tensoradapt as ta
from tensoradapt.layouts import turns
from tensoradapt.plan import Plan
from tensoradapt.sites import Site

KNOWN, ALL = ("out in", "in out"), ("out in", "in out", "as stored", "either", "unsure")


def site(layout: str, shape: tuple[int, int], kind: str = "linear", **fields) -> Site:
    return Site("x", shape, layout=layout, kind=kind, owner="x", **fields)


def meanings(layout: str, shape: tuple[int, int]) -> list[tuple[tuple[int, int], bool]]:
    """What a site's delta can be: the true (out, in), and whether the stored tensor is its transpose."""
    stored, true = [(shape, False), (shape[::-1], True)], [(shape, False), (shape, True)]
    return {"out in": true[:1], "in out": true[1:], "as stored": stored, "either": true, "unsure": stored + true}[
        layout
    ]


@pytest.mark.parametrize(("saved", "here"), list(product(ALL[:4], ALL[:3])))
@pytest.mark.parametrize("shapes", [((4, 6), (4, 6)), ((4, 6), (6, 4)), ((4, 4), (4, 4))])
def test_the_answer_is_the_only_one_that_both_sides_allow(saved, here, shapes):
    """By enumeration: every weight that the two sites can both be, and how the delta then lies."""
    one, two = site(saved, shapes[0]), site(here, shapes[1])
    both = [m for m in meanings(saved, one.shape) if m in meanings(here, two.shape)]
    if saved in KNOWN and here in KNOWN:  # a Linear in a Conv1D's place: both are (out, in)
        both = [(one.shape, False)] if one.shape == two.shape else []
    if saved == here == "as stored":
        both = [(one.shape, False)] if one.shape == two.shape else []
    rows = lambda layout, stored_turned: layout == "as stored" and stored_turned  # noqa: E731
    answers = {rows(saved, stored) != rows(here, stored) for _, stored in both}
    if len(answers) == 1:
        assert turns(one, two) == answers.pop()
    else:
        with pytest.raises(ta.FileError, match="another shape" if not answers else "cannot be told"):
            turns(one, two)


def test_a_plan_of_an_older_file_is_not_believed():
    """Its `out in` of a linear may have been a guess: a square one is put onto no weight that is stored (in, out)."""
    row = ta.plan(ta.preset("lora", rank=1, targets=["x", "y"]), {"x": (4, 4), "y": (4, 6)}).to_dict()
    for entry in (entry for group in row["groups"] for entry in group["sites"]):
        entry["layout"] = "out in"
    older = {key: value for key, value in row.items() if key != "layouts"}
    new, old = (
        {p.site.path: p.site for g in Plan.from_dict(each).groups for p in g.placements} for each in (row, older)
    )
    assert not turns(new["x"], site("in out", (4, 4))) and not turns(old["x"], site("out in", (4, 4)))
    with pytest.raises(ta.FileError, match="cannot be told"):
        turns(old["x"], site("in out", (4, 4)))
    assert turns(old["y"], site("in out", (6, 4))) and not turns(old["y"], site("in out", (4, 6)))
    assert Plan.from_dict(Plan.from_dict(older).to_dict()).groups[0].placements[0].site.layout == "unsure"
