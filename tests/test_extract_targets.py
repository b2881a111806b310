"""Extraction without targets: every weight that differs and that the format can hold, on models of several kinds.

Judged by subtracting state dicts, and by the deltas of the adapter once it is loaded onto the base model.
"""

import math

import pytest
import tiny
import torch
from torch import nn
from toys import Convolutions

import tensoradapt as ta
from tensoradapt.extract import preview
from tensoradapt.sites import from_mapping

State = dict[str, torch.Tensor]


def tuned_of(base: State, *, but: tuple[str, ...] = ()) -> State:
    """A state in which every float changed, but those whose names end so."""
    found = {}
    for k, (name, tensor) in enumerate(base.items()):
        moves = tensor.is_floating_point() and not name.endswith(but or ("no such ending",))
        found[name] = tensor + 0.05 * tiny.noise(*tensor.shape, seed=k) if moves else tensor.clone()
    return found


def state_of(model: torch.nn.Module) -> State:
    """A model's tensors, tied ones once."""
    seen: dict[int, str] = {}
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if seen.setdefault(tensor.data_ptr(), name) != name:
            del state[name]
    return state


def folders(make, tmp_path, **changes):
    """A base folder and a tuned one of the same model, with their states."""
    model = make()
    base = state_of(model)
    tuned = tuned_of(base, **changes)
    for name, state in (("base", base), ("tuned", tuned)):
        model.load_state_dict(state, strict=False)
        model.tie_weights() if hasattr(model, "tie_weights") else None
        model.save_pretrained(tmp_path / name)
    return tmp_path / "base", tmp_path / "tuned", base, tuned


MODELS = {"bert": tiny.bert_classifier, "conv1d, tied": tiny.gpt2, "experts": tiny.mixtral, "decoder": tiny.llama}
FORMATS = {
    "lora": {"rank": 2},
    "lotr": {"rank": 3},
    "lotr_by_role": {"rank": 3},
    "metatt_4d": {"rank": 3},
    "tt_lora": {"rank": 3, "folds": "auto:2"},
    "lokr": {"rank": 2},
    "vera": {"rank": 4},
    "fact_tt": {"rank": 2},
    "polar": {"rank": 2},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_matrix_that_differs_is_held(form, kind, tmp_path):
    """Nothing is dropped: what is no matrix is listed, and the model with the adapter is as far off as was said."""
    base_folder, tuned_folder, base, tuned = folders(
        MODELS[kind], tmp_path, but=("layer.1.attention.self.value.weight",)
    )
    sides = (base, tuned) if kind == "experts" else (base_folder, tuned_folder)  # on disk they have other names
    result = ta.extract(*sides, ta.preset(form, **FORMATS[form]), tmp_path / "a")
    vectors = {name for name, tensor in base.items() if tensor.dim() < 2 and tensor.is_floating_point()}
    assert {row["reason"][:3] for row in result.change.not_held.values()} == {"1-D"}
    changed = {n for n in base if not torch.equal(base[n], tuned[n])}
    assert set(result.change.not_held) == vectors & changed
    assert result.change.changed_tensors == len(changed)
    assert not any(target.startswith("re:") for rule in result.plan.spec.rules for target in rule.targets)
    model = MODELS[kind]()
    model.load_state_dict(base, strict=False)
    model.tie_weights()
    adapter = ta.load(result.path, model)
    adapter.merge(untie=True)
    lost = total = 0.0
    for name, tensor in model.state_dict().items():
        plain = name.replace(".base_layer", "")
        if plain in changed:
            lost += float((tuned[plain].double() - tensor.double()).square().sum())
            total += float((tuned[plain].double() - base[plain].double()).square().sum())
    assert math.sqrt(lost / total) == pytest.approx(result.whole_error, rel=1e-4)


def test_what_did_not_change_is_not_taken(tmp_path):
    base_folder, tuned_folder, base, _ = folders(tiny.bert, tmp_path, but=("key.weight", "position_embeddings.weight"))
    result = ta.extract(base_folder, tuned_folder, ta.preset("lotr", rank=2), tmp_path / "a")
    sites = {path for group in result.plan.groups for path in group.paths}
    assert not any(path.endswith(("key", "position_embeddings")) for path in sites)
    assert len(sites) == sum(t.dim() > 1 for t in base.values()) - 3


def test_embeddings_and_weights_outside_the_layers_have_groups_of_their_own(tmp_path):
    """The pooler has the shape of an attention weight, and still no factor in common with it."""
    base_folder, tuned_folder, *_ = folders(tiny.bert, tmp_path)
    result = ta.extract(base_folder, tuned_folder, ta.preset("lotr", rank=2), tmp_path / "a")
    alone = [group.paths for group in result.plan.groups if len(group.paths) == 1]
    assert {path for paths in alone for path in paths} >= {"pooler.dense", "embeddings.word_embeddings"}


def test_heads_that_a_format_needs_and_nobody_knows_are_asked_for(tmp_path):
    base = {f"layers.{k}.{role}.weight": tiny.noise(8, 8, seed=k) for k in range(2) for role in "qv"}
    with pytest.raises(ta.SpecError, match="head"):
        ta.extract(base, tuned_of(base), ta.preset("lorta", rank=2), tmp_path / "a")
    result = ta.extract(base, tuned_of(base), ta.preset("lorta", rank=2, heads=2), tmp_path / "a")
    assert result.change.held_tensors == 4


def test_one_odd_weight_is_listed_and_the_others_are_held(tmp_path):
    """Five rows are no multiple of two heads."""
    base = {f"layers.{k}.{role}.weight": tiny.noise(8, 8, seed=k) for k in range(2) for role in "qv"}
    base["layers.0.gate.weight"] = tiny.noise(5, 8)
    base["head.weight"] = tiny.noise(7, 8)
    result = ta.extract(base, tuned_of(base), ta.preset("lorta", rank=2, heads=2), tmp_path / "a")
    assert result.change.held_tensors == 4 and set(result.change.not_held) == {"layers.0.gate.weight", "head.weight"}
    assert all("the format cannot hold it" in row["reason"] for row in result.change.not_held.values())
    shares = {n: float((tuned_of(base)[n] - base[n]).square().sum()) for n in base}
    wanted = shares["head.weight"] / sum(shares.values())
    assert result.change.not_held["head.weight"]["share"] == pytest.approx(wanted, rel=1e-5)


def test_a_narrow_weight_does_not_cut_all_others_into_its_slots(tmp_path):
    base = {f"layers.{k}.{role}.weight": tiny.noise(32, 32, seed=k) for k in range(2) for role in "qv"}
    base |= {f"layers.{k}.router.weight": tiny.noise(2, 32) for k in range(2)}
    result = ta.extract(base, tuned_of(base), ta.preset("fact_tt", rank=4), tmp_path / "a")
    sizes = {group.diagram.sizes["out"]: group.diagram.sizes["site"] for group in result.plan.groups}
    assert sizes == {32: 4, 2: 2 * 1} or sizes == {32: 4, 2: 32}
    assert result.change.held_tensors == 6


def test_convolutions_are_held(tmp_path):
    base = {name: t for name, t in Convolutions().state_dict().items()}
    tuned = tuned_of(base)
    for form in ("lora", "locon"):
        result = ta.extract(base, tuned, ta.preset(form, rank=2), tmp_path / form)
        assert result.change.held_tensors == sum(t.dim() > 1 for t in base.values())


def test_a_rule_without_targets_takes_what_others_leave(tmp_path):
    base_folder, tuned_folder, base, _ = folders(tiny.bert, tmp_path)
    spec = ta.preset("lora", rank=1, targets=["query"]) + ta.preset("lotr", rank=2, exclude=["pooler.dense"])
    result = ta.extract(base_folder, tuned_folder, spec, tmp_path / "a")
    ranks = {path: max(group.rank.values()) for group in result.plan.groups for path in group.paths}
    assert {rank for path, rank in ranks.items() if path.endswith("query")} == {1}
    assert {rank for path, rank in ranks.items() if path.endswith("value")} == {2}
    matrices = {name.removesuffix(".weight") for name, t in base.items() if t.dim() > 1}
    assert matrices - set(ranks) == {"pooler.dense"}
    assert result.change.not_held["pooler.dense.weight"]["reason"] == "not among the targets"


def test_a_preset_of_two_rules_takes_each_set_and_then_the_rest(tmp_path):
    base_folder, tuned_folder, base, _ = folders(tiny.bert, tmp_path)
    result = ta.extract(base_folder, tuned_folder, ta.preset("cara", rank=4), tmp_path / "a")
    families = {path: "head" in group.diagram.open for group in result.plan.groups for path in group.paths}
    assert all(heads == path.endswith(("query", "key", "value")) for path, heads in families.items())
    assert len(families) == sum(t.dim() > 1 for t in base.values())


def test_nothing_but_vectors_differs(tmp_path):
    base = {"layers.0.q.weight": tiny.noise(8, 8), "norm.weight": tiny.noise(8)}
    result = ta.extract(base, base | {"norm.weight": tiny.noise(8, seed=5)}, ta.preset("lora"), tmp_path / "a")
    assert result.path is None and list(result.change.not_held) == ["norm.weight"] and result.whole_error == 1.0
    assert "nothing to extract" in str(result) and not (tmp_path / "a").exists()


def test_the_dry_run_takes_the_same_weights(tmp_path):
    base_folder, tuned_folder, *_ = folders(tiny.bert, tmp_path, but=("key.weight",))
    spec = ta.preset("lotr", rank=2)
    seen = preview(base_folder, tuned_folder, spec)
    made = ta.extract(base_folder, tuned_folder, spec, tmp_path / "a")
    assert seen.plan.to_dict()["groups"] == made.plan.to_dict()["groups"]


def test_a_plan_made_of_shapes_does_not_know_what_differs():
    """Elsewhere a rule without targets means its preset's default set."""
    plan = ta.plan(ta.preset("lora"), from_mapping({f"layers.{k}.{r}_proj": (8, 8) for k in range(2) for r in "qkv"}))
    assert plan.num_sites == 4


def test_a_network_many_times_larger_than_its_weight_is_no_adapter_of_it(tmp_path):
    """A vocabulary that is a prime number has no folds: one gate over all of it would have its square of parameters."""
    base = {"embed_tokens.weight": tiny.noise(1009, 8), "layers.0.q_proj.weight": tiny.noise(8, 8)}
    layer = nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=False)})
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(1009, 8), "layers": nn.ModuleList([layer])})
    result = ta.extract(base, tuned_of(base), "quanta", tmp_path / "a", model=model)
    row = result.change.not_held["embed_tokens.weight"]
    assert result.change.held_tensors == 1 and "parameters for 8,072 entries" in row["reason"]
    with pytest.raises(ta.errors.TensorAdaptError, match="parameters for 8,072 entries"):
        alone = {name: side["embed_tokens.weight"] for name, side in (("base", base), ("tuned", tuned_of(base)))}
        one, two = ({"embed_tokens.weight": tensor} for tensor in alone.values())
        ta.extract(one, two, "quanta", tmp_path / "b", model=model)
