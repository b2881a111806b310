"""Conversions: exact where the target holds the source, optimal where theory says how far off it must be."""

import json

import pytest
import tiny
import torch
from typer.testing import CliRunner

import tensoradapt as ta
from tensoradapt.cli.app import application
from tensoradapt.linalg import Product

TARGETS = ["query", "value"]
WIDE = {"hidden_size": 256, "intermediate_size": 64}  # wide enough for shared bases to be smaller than a side


def attached(name: str, layers: int = 2, **parameters):
    model = tiny.bert(layers, **WIDE)
    adapter = ta.attach(model, ta.preset(name, targets=TARGETS, **parameters))
    tiny.shake(adapter)
    return model, adapter


def paths_of(adapter) -> list[str]:
    return [p.site.path for g in adapter.plan.groups for p in g.placements]


def lost_and_total(adapter, converted) -> tuple[float, float]:
    lost = total = 0.0
    for path in paths_of(adapter):
        delta = adapter.delta(path).detach().double()
        lost += float((delta - converted.delta(path).double()).square().sum())
        total += float(delta.square().sum())
    return lost, total


EXACT = {
    "lora to lotr": (("lora", {"rank": 3}), ("lotr", {"rank": 12})),
    "lotr to lora": (("lotr", {"rank": 6}), ("lora", {"rank": 6})),
    "tt to tucker": (
        ("metatt_4d", {"rank": 4}),
        ("tenslora_qkv_depth", {"rank": {"in": 4, "out": 4, "role": 2, "layer": 2}}),
    ),
    "lora to tt": (("lora", {"rank": 2}), ("metatt_4d", {"rank": 8})),
    "folded tt to lora": (("tt_lora", {"rank": 3}), ("lora", {"rank": 3})),
    "kronecker to kronecker": (("lokr", {"rank": 2}), ("krona", {})),
    "lora to a larger lora": (("lora", {"rank": 2, "alpha": 5.0}), ("lora", {"rank": 4, "scale": -0.5})),
}


@pytest.mark.parametrize("case", EXACT)
def test_exact_where_the_target_holds_the_source(case):
    (old, given), (new, wanted) = EXACT[case]
    _, adapter = attached(old, **given)
    converted = ta.convert(adapter, ta.preset(new, targets=TARGETS, **wanted))
    lost, total = lost_and_total(adapter, converted)
    assert (lost / total) ** 0.5 < 1e-5
    assert converted.relative_error < 1e-5


def test_a_smaller_lora_loses_what_eckart_and_young_say():
    _, adapter = attached("lora", rank=4)
    converted = ta.convert(adapter, ta.preset("lora", targets=TARGETS, rank=2))
    lost, total = lost_and_total(adapter, converted)
    best = sum(
        float(torch.linalg.svdvals(adapter.delta(p).detach().double())[2:].square().sum()) for p in paths_of(adapter)
    )
    assert lost == pytest.approx(best, rel=1e-4)
    assert converted.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_no_dense_delta_is_formed_between_sandwiches(monkeypatch):
    def refuse(self):
        raise AssertionError("a dense delta was formed")

    _, adapter = attached("lora", rank=2)
    monkeypatch.setattr(Product, "dense", refuse)
    for preset in ("lotr", "lora", "metatt_4d"):
        ta.convert(adapter, ta.preset(preset, targets=TARGETS, rank=4))


def test_ranks_by_error_and_by_budget():
    _, adapter = attached("lora", rank=4)
    by_error = ta.convert(adapter, ta.preset("lotr", targets=TARGETS), error=0.2)
    assert by_error.relative_error <= 0.2
    budget = by_error.num_parameters - 1
    by_budget = ta.convert(adapter, ta.preset("lotr", targets=TARGETS), max_parameters=budget)
    assert by_budget.num_parameters <= budget


def test_saved_and_loaded_onto_the_model(tmp_path):
    model, adapter = attached("lora", rank=2)
    adapter.scale = 0.5
    wanted = {path: adapter.delta(path).detach() for path in paths_of(adapter)}
    converted = ta.convert(adapter, ta.preset("lotr", targets=TARGETS, rank=8), tmp_path / "new")
    adapter.detach()
    loaded = ta.load(converted.path, model)
    for path, delta in wanted.items():
        assert torch.allclose(loaded.delta(path), delta, atol=1e-5)
    with pytest.raises(ta.FileError, match="exists"):
        ta.convert(loaded, ta.preset("lora", targets=TARGETS), tmp_path / "new")
    again = ta.convert(loaded, ta.preset("lora", targets=TARGETS), tmp_path / "new", overwrite=True)
    assert ta.load(again.path, tiny.bert(2, **WIDE)).plan.spec.rules[0].family == "lora"


def test_without_targets_every_site_is_converted():
    """Beyond query and value, which a preset takes of a model."""
    model = tiny.bert(2, **WIDE)
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["key", "intermediate.dense"]))
    tiny.shake(adapter)
    converted = ta.convert(adapter, ta.preset("lora", rank=2))
    assert set(converted.sites) == set(paths_of(adapter))
    lost, total = lost_and_total(adapter, converted)
    assert (lost / total) ** 0.5 < 1e-5


def test_targets_outside_the_adapter_are_refused():
    _, adapter = attached("lora", rank=2)
    with pytest.raises(ta.SiteError, match="key"):
        ta.convert(adapter, ta.preset("lora", targets=["key"]))


def test_without_targets_every_weight_of_the_adapter_is_converted(tmp_path):
    """Keys and feed-forward weights too, which a preset's default set would leave behind."""
    model = tiny.bert(2, **WIDE)
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["key", "intermediate.dense", "word_embeddings"]))
    tiny.shake(adapter)
    converted = ta.convert(adapter, ta.preset("lotr", rank=8), tmp_path / "new")
    assert set(converted.sites) == set(paths_of(adapter)) and not converted.not_held
    lost, total = lost_and_total(adapter, converted)
    assert converted.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-6)


def test_weights_that_the_format_cannot_hold_count_as_lost():
    """Three heads do not divide the embedding's 256 entries; two do."""
    model = tiny.bert(1, hidden_size=12, intermediate_size=10, num_attention_heads=3)
    adapter = ta.attach(model, ta.preset("lora", rank=1, targets=["query", "intermediate.dense"]))
    tiny.shake(adapter)
    converted = ta.convert(adapter, ta.preset("lorta", rank=8, heads=3))
    assert list(converted.not_held) == ["encoder.layer.0.intermediate.dense"]
    deltas = {path: float(adapter.delta(path).detach().square().sum()) for path in paths_of(adapter)}
    lost = deltas["encoder.layer.0.intermediate.dense"] / sum(deltas.values())
    assert converted.relative_error == pytest.approx(lost**0.5, rel=1e-3)
    assert "not held: 1 weight, the format cannot hold it" in str(converted)


def test_modules_that_were_trained_beside_an_adapter_stay_with_it(tmp_path):
    model = tiny.bert_classifier()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=TARGETS, train=["classifier"]))
    tiny.shake(adapter)
    wanted = model(tiny.tokens()).logits.detach()
    converted = ta.convert(adapter, ta.preset("lotr", rank=8), tmp_path / "new")
    adapter.detach()
    assert not torch.allclose(model(tiny.tokens()).logits, wanted, atol=1e-3)
    ta.load(converted.path, model)
    assert torch.allclose(model(tiny.tokens()).logits, wanted, atol=1e-5)


def test_the_text_fits_a_terminal(tmp_path):
    _, adapter = attached("lora", layers=3, rank=2)
    converted = ta.convert(adapter, ta.preset("tt_lora", rank=3), tmp_path / "new")
    lines = str(converted).splitlines()
    assert len(lines) < 12 and all(len(line) <= 80 for line in lines[:-1])
    assert lines[0].split() == ["role", "weights", "ranks", "parameters", "error"]
    assert lines[-1] == f"written to {converted.path}"


def test_bases_of_the_weights_are_refused():
    _, adapter = attached("lora", rank=2)
    with pytest.raises(ta.SpecError, match="base's weights"):
        ta.convert(adapter, ta.preset("lora_xs", targets=TARGETS))


def test_the_command_converts_every_site(tmp_path):
    _, adapter = attached("lora", rank=2)
    adapter.save(tmp_path / "old")
    arguments = ["convert", str(tmp_path / "old"), "--preset", "lotr", "--rank", "8", "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(application(), [*arguments, "--json"])
    found = json.loads(result.stdout)
    assert found["relative_error"] < 1e-5
    assert set(found["sites"]) == set(paths_of(adapter))
    assert (tmp_path / "new" / "adapter.safetensors").is_file()
