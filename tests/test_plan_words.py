"""What plans and budgets say: names of groups, sizes beside the weights' own, columns that found no room."""

import pytest
import tiny
from torch import nn

import tensoradapt as ta
from tensoradapt.cli.app import run


def names(model: nn.Module, preset: str = "lora", **more) -> list[str]:
    plan = ta.plan(ta.preset(preset, rank=2, **more), model)
    return [
        line.split()[0] for line in str(plan).splitlines()[1:] if line.split()[1].isdecimal() and line[:5] != "note:"
    ]


def test_groups_have_the_names_of_their_layers_and_roles():
    """No word twice, no word that others share, and no layer that is not there."""
    assert names(tiny.bert(), targets=["query", "pooler.dense", "word_embeddings"]) == [
        "word_embeddings",
        "layer0..1_query",
        "pooler_dense",
    ]
    assert names(tiny.t5(), targets=["q", "wi"])[:4] == [
        "encoder_block_0..1_q",
        "encoder_block_0..1_wi",
        "decoder_block_0..1_SelfAttention_q",
        "decoder_block_0..1_EncDecAttention_q",
    ]
    assert names(tiny.t5(), "lotr_by_role", targets=["wi"]) == ["encoder_block_wi", "decoder_block_wi"]
    assert names(tiny.bert(), "lotr_by_role") == ["query", "value"]


@pytest.mark.parametrize(
    ("layers", "name"),
    [("01234", "layer0..4_q"), ("0124", "layer0..2,4_q"), ("3", "layer3_q"), ("02468", "layer0,2,..,8_q")],
)
def test_layers_that_are_left_out_are_not_in_the_name(layers, name):
    shapes = {f"h.{k}.{part}": (8, 8) for k in range(9) for part in "qk"}
    targets = [f"h.{k}.q" for k in layers]
    plan = ta.plan(ta.preset("lora", rank=2, targets=[*targets, *(["h.8.k"] if layers == "3" else [])]), shapes)
    assert str(plan).splitlines()[1].split()[:2] == [name, str(len(layers))]


def test_an_adapter_larger_than_the_weights_is_named_in_the_plan():
    """Of one weight of 16 x 16: rank 8 is as large as it, rank 9 larger."""
    spec = ta.preset("lora", rank=9, targets=["query"])
    says = " ".join(str(ta.plan(spec, tiny.bert())).split())
    assert "more parameters than the weights that they adapt: 576 for 512 entries; take a smaller rank" in says
    assert "more parameters" not in str(ta.plan(ta.preset("lora", rank=8, targets=["query"]), tiny.bert()))


def test_groups_of_unequal_ranks_are_one_row():
    """As an extraction by error makes them; every rank stands in the wide form."""
    ranks = {"layer0_query": 2, "layer1_query": 5}
    plan = ta.plan(ta.preset("lora", targets=["query"], ranks=ranks), tiny.bert())
    assert str(plan).splitlines()[1].split()[:4] == ["layer0..1_query", "2", "out=16", "in=16"]
    assert " 2-5 " in str(plan).splitlines()[1] and f" {7 * 32} " in str(plan).splitlines()[1]
    assert "layer0_query" in plan.text(wide=True) and "r_out=5" in plan.text(wide=True)


def test_single_groups_that_are_too_large_are_named():
    plan = ta.plan(ta.preset("lora", rank=3, targets=["0", "1"]), {"0": (64, 64), "1": (4, 5)})
    (note,) = [note for note in plan.notes if "more parameters" in note]
    assert note.startswith("more parameters than the weights that they adapt: layer1; take")


def test_a_budget_says_from_which_rank_on_it_is_too_large():
    table = ta.budget(ta.preset("lora", targets=["query"]), tiny.bert(), range(1, 20))
    assert "lora from rank 9: more parameters than the 512 entries of the weights" in str(table)
    assert "more parameters" not in str(ta.budget(ta.preset("lora", targets=["query"]), tiny.bert(), [4, 8]))


def test_columns_without_room_are_named_and_shown_wide(tmp_path, capsys):
    model = nn.ModuleDict({"a" * 60: nn.Linear(16, 16)})
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["a" * 60]))
    adapter.save(tmp_path)
    assert run(["info", str(tmp_path)]) == 0
    narrow = capsys.readouterr().out
    assert "no room for FLOP/token" in narrow and "(--wide)" in narrow and "out=16 in=16" not in narrow
    assert run(["info", str(tmp_path), "--wide"]) == 0
    wide = capsys.readouterr().out
    assert "no room" not in wide and "lowering" in wide and "out=16 in=16" in wide
