"""Layouts: an adapter's delta lands on the weight that it was measured on, the right way round, or is refused."""

from itertools import product

import pytest
import tiny
import torch

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


# -- what is done with an adapter whose layouts nothing tells --------------------------------------------------------


def of_states(model, target: str, folder, seed: int = 0, **rule):
    """An adapter of a change of some weights, from two state dicts, which tell no layout."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = dict(base)
    for k, (name, tensor) in enumerate(base.items()):
        if name.endswith(f"{target}.weight"):
            tuned[name] = tensor + tiny.noise(len(tensor), 2, seed=seed + k) @ tiny.noise(2, tensor.shape[1], seed=k)
    return ta.extract(base, tuned, ta.preset("lora", rank=2, **({"targets": [target]} | rule)), folder)


def test_rows_of_the_wrong_side_are_said_and_refused(tmp_path):
    """c_attn is stored (in, out): its parts as stored are ranges of its inputs."""
    rule = {"targets": ["c_attn[q]"], "parts": {"c_attn": {"q": 8, "k": 8}}}
    result = of_states(tiny.gpt2(), "c_attn", tmp_path / "a", **rule)
    assert any("taken to be stored (out, in)" in note for note in result.plan.notes)
    with pytest.raises(ta.FileError, match="a range of the inputs"):
        ta.load(result.path, tiny.gpt2())
    stated = {"targets": ["c_attn[q]"], "parts": {"c_attn": ["q", "k", "v"]}, "layout": {"c_attn": "in out"}}
    result = of_states(tiny.gpt2(), "c_attn", tmp_path / "b", **stated)
    names = [k for k, name in enumerate(tiny.gpt2().state_dict()) if name.endswith("c_attn.weight")]
    deltas = [tiny.noise(16, 2, seed=k) @ tiny.noise(2, 48, seed=k) for k in names]  # stored (in, out): q is in front
    lost, whole = sum(d[:, 16:].square().sum() for d in deltas), sum(d.square().sum() for d in deltas)
    assert result.whole_error == pytest.approx(float(lost / whole) ** 0.5, rel=1e-3)
    delta = ta.load(result.path, tiny.gpt2()).delta("transformer.h.0.attn.c_attn[q]")
    assert delta.shape == (16, 16) and not any("taken to be" in note for note in result.plan.notes)


def test_a_loaded_adapter_says_how_it_lies(tmp_path):
    """The layout of the model is taken over where the delta lies so; saved again, it lands where it did."""
    model = tiny.llama()
    first = ta.load(of_states(model, "q_proj", tmp_path / "a").path, tiny.llama())
    assert {p.site.layout for g in first.plan.groups for p in g.placements} == {"out in"}
    conv = ta.load(of_states(tiny.gpt2(), "attn.c_proj", tmp_path / "b").path, tiny.gpt2())
    assert {p.site.layout for g in conv.plan.groups for p in g.placements} == {"as stored"}
    path = "transformer.h.0.attn.c_proj"
    again = ta.load(conv.save(tmp_path / "c"), tiny.gpt2())
    smaller = ta.truncate(ta.load(tmp_path / "c", tiny.gpt2()), rank=2).adapter
    assert torch.equal(again.delta(path), conv.delta(path)) and torch.allclose(
        smaller.delta(path), conv.delta(path), atol=1e-5
    )
    assert torch.equal(conv.as_saved().delta(path).mT, conv.delta(path))
    with pytest.raises(ta.AdapterError, match="no start is made"):
        ta.initialize(conv, "pissa")


def test_adapters_that_lie_otherwise_have_no_sum(tmp_path):
    model, tuned = tiny.gpt2(), tiny.gpt2()
    with torch.no_grad():
        for block in tuned.transformer.h:
            block.attn.c_proj.weight += tiny.noise(16, 2) @ tiny.noise(2, 16)
    spec = ta.preset("lora", rank=2, targets=["attn.c_proj"])
    told = ta.extract(model, tuned, spec, tmp_path / "told")
    states = ta.extract(model.state_dict(), tuned.state_dict(), spec, tmp_path / "states")
    with pytest.raises(ta.AdapterError, match="lie the other way round"):
        ta.combine([told.path, states.path], [0.5, 0.5])
    assert ta.combine([states.path, states.path], [0.5, 0.5]).delta("transformer.h.0.attn.c_proj").shape == (
        16,
        16,
    )


def test_a_checkpoint_that_lies_otherwise_than_its_model_is_refused():
    """A Linear's shapes, and a checkpoint of Conv1Ds: its square weights could not be told."""
    state = tiny.gpt2().state_dict()
    shapes = {
        name.removesuffix(".weight"): tuple(t.shape[::-1])
        for name, t in state.items()
        if name.endswith("c_attn.weight")
    }
    with pytest.raises(ta.FileError, match="stored the other way round"):
        ta.extract(
            state,
            {n: t + 1 for n, t in state.items()},
            ta.preset("lora", rank=1, targets=["c_attn"]),
            "x",
            model=shapes,
        )
