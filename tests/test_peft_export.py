"""PEFT folders out: PEFT itself re-opens them and finds the adapter's deltas, module by module."""

import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tensoradapt as ta
from tensoradapt.io.saved import Saved, as_saved
from tensoradapt.peft import export, export_peft, factors, open_adapter
from tensoradapt.writing import folder as folders

QV = ["query", "value"]
QUERY = "encoder.layer.0.attention.self.query"
ROWS = {"parts": {"c_attn": ["q", "k", "v"]}}


class Named(nn.Module):
    """Linear modules with any names, dots for levels."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            *above, leaf = name.split(".")
            owner = self
            for part in above:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(leaf, nn.Linear(6, 8))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, (1, 2)))


MIXED = ta.preset("lotr", rank=2, targets=QV) + ta.preset("lora", rank=5, targets=["output.dense"])
CASES = {
    "lora": (tiny.bert, ta.preset("lora", rank=2, targets=QV)),
    "tucker": (tiny.bert, ta.preset("lotr", rank=3, targets=QV)),
    "cp over heads": (tiny.llama, ta.preset("lorta", rank=3, targets=["q_proj", "o_proj"])),
    "tensor train over layers and roles": (tiny.bert, ta.preset("metatt_4d", rank=3, targets=QV)),
    "tensor trains in folds": (tiny.bert, ta.preset("loretta", rank=3, tt_rank=2, targets=QV)),
    "an entrywise product": (tiny.bert, ta.preset("loha", rank=2, targets=["query", "output.dense"])),
    "slices of frozen banks": (tiny.bert, ta.preset("vera", rank=4, targets=["query", "intermediate.dense"])),
    "frozen bases": (tiny.bert, ta.preset("lora_xs", rank=2, targets=QV)),
    "slots": (tiny.bert, ta.preset("fact_tt", rank=2, targets=["query", "intermediate.dense", "output.dense"])),
    "a difference": (
        tiny.bert,
        ta.preset("lora", rank=2, targets=QV, start="difference", init={"core_out": "normal(0.2)"}),
    ),
    "an embedding": (tiny.bert, ta.preset("lora", rank=2, targets=["word_embeddings", "query"])),
    "Conv1D": (tiny.gpt2, ta.preset("lora", rank=2, targets=["c_attn", "c_fc"])),
    "Conv1D, and an embedding": (tiny.gpt2, ta.preset("lora", rank=2, targets=["c_attn", "wpe"])),
    "rows of a fused weight": (tiny.gpt2, ta.preset("lora", rank=2, targets=["c_attn[q]", "c_attn[v]"], **ROWS)),
    "convolutions": (convolutions, ta.preset("locon", rank=2, targets=["0"]) + ta.preset("lora", targets=["2"])),
    "two ranks": (tiny.bert, MIXED),
}


def attached(case: str = "lora", scale: float = 1.5):
    make, spec = CASES[case]
    model = make()
    adapter = ta.attach(model, spec)
    tiny.shake(adapter)
    adapter.scale = scale
    return adapter


def made(model: nn.Module, spec: ta.Spec) -> Saved:
    adapter = ta.attach(model, spec)
    tiny.shake(adapter)
    saved = as_saved(adapter)
    adapter.detach()
    return saved


def config_of(out: Path) -> dict:
    return json.loads((out / "adapter_config.json").read_text())


def merged(model: nn.Module, out: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to every parameter of a model; PEFT has nothing to warn of."""
    base = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*tie.*|.*fan_in_fan_out.*")
        found = PeftModel.from_pretrained(model, out).merge_and_unload()
    return {name: tensor.detach() - base[name] for name, tensor in found.named_parameters() if name in base}


def agree(model: nn.Module, out: Path, adapter, tolerance: float = 1e-5) -> None:
    """PEFT adds the adapter's deltas, and nothing else."""
    owners = {path: path.partition("[")[0] for group in adapter.groups.values() for path in group.paths}
    for name, change in merged(model, out).items():
        owner = name.removesuffix(".weight")
        paths = [path for path, mine in owners.items() if mine == owner]
        wanted = torch.zeros_like(change)
        for path in paths:
            delta = adapter.delta(path).detach()
            start = {"q": 0, "k": 16, "v": 32}[path[-2]] if "[" in path else 0
            turned = type(model.get_submodule(owner)).__name__ in ("Conv1D", "Embedding")
            whole = wanted.mT if turned else wanted
            whole[start : start + len(delta)] += delta
        assert (change - wanted).norm() <= tolerance * max(1.0, float(wanted.norm())), name


# -- PEFT is the oracle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["portable", "compact"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:the compact layout")
def test_peft_merges_what_the_adapter_adds(case, layout, tmp_path):
    adapter = attached(case)
    result = export_peft(adapter, tmp_path / "out", layout=layout)
    assert result.max_error < 1e-6 and result.reader.startswith("PEFT")
    assert all(adapter.delta(path).norm() > 0.01 for group in adapter.groups.values() for path in group.paths)
    agree(CASES[case][0](), tmp_path / "out", adapter)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_half_precision_is_within_its_rounding(dtype, tolerance, tmp_path):
    adapter = attached("two ranks")
    result = export_peft(adapter, tmp_path / "out", dtype=dtype)
    assert 1e-6 < result.max_error < tolerance
    assert {t.dtype for t in load_file(tmp_path / "out/adapter_model.safetensors").values()} == {getattr(torch, dtype)}
    agree(tiny.bert(), tmp_path / "out", adapter, tolerance)


def test_factors_of_half_precision_are_multiplied_in_full(tmp_path):
    model = tiny.bert()
    saved = made(model, ta.preset("lora", rank=4, targets=QV, dtype="bfloat16"))
    export_peft(saved, tmp_path / "out")
    factors = {node: tensor.double().numpy() for node, tensor in saved.factors("layer0_query").items()}
    change = merged(model, tmp_path / "out")[f"{QUERY}.weight"]
    np.testing.assert_allclose(change, 2.0 * factors["core_out"] @ factors["core_in"], atol=1e-6)


def test_an_adapter_is_exported_merged_detached_from_a_file_and_from_memory(tmp_path):
    adapter = attached()
    adapter.merge()
    file = adapter.save(tmp_path / "adapter")
    adapter.unmerge()
    for k, source in enumerate((adapter, as_saved(adapter), file, str(file.parent))):
        export_peft(source, tmp_path / str(k))
        agree(tiny.bert(), tmp_path / str(k), adapter)


def test_tied_modules_adapted_together_are_both_exported(tmp_path):
    model = tiny.gpt2()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["wte", "lm_head"]))
    tiny.shake(adapter)
    wanted = model(tiny.tokens()).logits
    result = export_peft(adapter, tmp_path / "out")
    assert set(result.modules) == {"transformer.wte", "lm_head"} and "tied" in str(result)
    found = PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "out")
    torch.testing.assert_close(found(tiny.tokens()).logits, wanted)
    with pytest.raises(ta.AdapterError, match="lm_head is tied to transformer.wte"):
        export_peft(as_saved(adapter), tmp_path / "other")


def test_dilated_convolutions_are_said_to_need_peft_s_merge(tmp_path):
    def dilated():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 6, 3, dilation=2))

    adapter = ta.attach(dilated(), ta.preset("lora", rank=2, targets=["0"]))
    tiny.shake(adapter)
    assert "PEFT forgets the dilation of 0 unless it merges" in str(export_peft(adapter, tmp_path / "out"))
    agree(dilated(), tmp_path / "out", adapter)
    with pytest.raises(RuntimeError, match="must match"):
        PeftModel.from_pretrained(dilated(), tmp_path / "out")(tiny.noise(1, 2, 9, 9))
    assert "dilation" not in str(export_peft(attached("convolutions"), tmp_path / "plain"))


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_heads_are_written_where_they_are_asked_for(task, tmp_path):
    model = tiny.bert_classifier()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=QV, train=["classifier"]))
    tiny.shake(adapter)
    wanted = model(tiny.tokens()).logits
    result = export_peft(adapter, tmp_path / "out", extras=True, task_type=task)
    assert result.dropped == () and config_of(tmp_path / "out")["modules_to_save"] == ["classifier"]
    found = PeftModel.from_pretrained(tiny.bert_classifier(), tmp_path / "out").eval()
    torch.testing.assert_close(found(tiny.tokens()).logits, wanted)


def test_heads_left_out_are_named(tmp_path):
    adapter = ta.attach(tiny.bert_classifier(), ta.preset("lora", targets=QV, train=["classifier"]))
    tiny.shake(adapter)
    result = export_peft(adapter, tmp_path / "out")
    assert result.dropped == ("classifier.weight", "classifier.bias") and "extras=True" in str(result)
    assert not any("classifier" in key for key in load_file(tmp_path / "out/adapter_model.safetensors"))
    with pytest.raises(ta.AdapterError, match="PEFT expects a trained head"):
        export_peft(adapter, tmp_path / "other", task_type="SEQ_CLS")


# -- the portable layout -----------------------------------------------------------------------------------------------

SCALES = {
    "PEFT": lambda config, path, a: (
        config["alpha_pattern"].get(path, config["lora_alpha"]) / config["rank_pattern"].get(path, config["r"])
    ),
    "vLLM, sglang": lambda config, path, a: config["lora_alpha"] / config["r"],
    "llama.cpp": lambda config, path, a: config["lora_alpha"] / len(a),
}


@pytest.mark.parametrize("rule", SCALES)
def test_every_scale_rule_gives_the_deltas_of_the_portable_layout(rule, tmp_path):
    adapter = attached("two ranks")
    export_peft(adapter, tmp_path / "out")
    config, held = config_of(tmp_path / "out"), load_file(tmp_path / "out/adapter_model.safetensors")
    for group in adapter.groups.values():
        for path in group.paths:
            a, b = (held[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
            found = SCALES[rule](config, path, a) * b @ a
            torch.testing.assert_close(found, adapter.delta(path).detach(), atol=1e-5, rtol=1e-5)


def test_the_portable_config_says_one_rank_and_no_patterns(tmp_path):
    result = export_peft(attached("two ranks"), tmp_path / "out", task_type="FEATURE_EXTRACTION", base_name="org/base")
    config = config_of(tmp_path / "out")
    assert config == {
        **{"peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": "org/base"},
        **{"revision": None, "inference_mode": True, "r": 5, "lora_alpha": 5, "use_rslora": False, "use_dora": False},
        **{"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True},
        **{"modules_to_save": None, "target_modules": ["output.dense", "query", "value"]},
        **{"rank_pattern": {}, "alpha_pattern": {}},
    }
    assert result.rank == 5 and {row["rank"] for row in result.modules.values()} == {2, 5}
    held = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {len(t) for key, t in held.items() if "lora_A" in key} == {5}
    assert {t.shape[1] for key, t in held.items() if "lora_B" in key} == {5}
    with safe_open(tmp_path / "out/adapter_model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("task", ["CAUSAL_LM", "FEATURE_EXTRACTION", None])
def test_peft_finds_the_task(task, tmp_path):
    model = tiny.llama()
    saved = made(model, ta.preset("lora", rank=2, targets=["q_proj"]))
    assert export_peft(saved, tmp_path / "out", task_type=task, model=model).reader.startswith("PEFT")
    found = PeftModel.from_pretrained(model, tmp_path / "out")
    assert found.peft_config["default"].task_type == task


def test_the_compact_layout_states_ranks_and_warns(tmp_path):
    with pytest.warns(UserWarning, match="read right by PEFT and newer vLLM alone"):
        export_peft(attached("two ranks"), tmp_path / "out", layout="compact")
    config, held = config_of(tmp_path / "out"), load_file(tmp_path / "out/adapter_model.safetensors")
    assert config["rank_pattern"] == config["alpha_pattern"] and set(config["rank_pattern"].values()) == {2}
    assert config["rank_pattern"].keys() == {f"encoder.layer.{n}.attention.self.{r}" for n in (0, 1) for r in QV}
    assert {len(t) for key, t in held.items() if "lora_A" in key} == {2, 5}


# -- names -------------------------------------------------------------------------------------------------------------

COLLISIONS = [
    ("q", "enc.q"),
    ("a.q", "a_q"),
    ("a.q", "b.a.q"),
    ("x.q+", "x.qq", "x.q"),
    ("layers.1.q", "layers.11.q", "enc.layers.1.q"),
    ("(q)", "q"),
]


@pytest.mark.parametrize("names", COLLISIONS, ids=" ".join)
@pytest.mark.parametrize("layout", ["portable", "compact"])
@pytest.mark.filterwarnings("ignore:the compact layout")
def test_names_that_match_each_other_keep_their_own_ranks(names, layout, tmp_path):
    specs = [ta.preset("lora", rank=k + 2, targets=[f"re:{_escaped(name)}"]) for k, name in enumerate(names)]
    adapter = ta.attach(Named(*names), ta.Spec(rules=tuple(rule for spec in specs for rule in spec.rules)))
    tiny.shake(adapter)
    export_peft(adapter, tmp_path / "out", layout=layout)
    agree(Named(*names), tmp_path / "out", adapter)
    loaded = PeftModel.from_pretrained(Named(*names), tmp_path / "out")  # PEFT sorts the patterns when it saves them
    loaded.save_pretrained(tmp_path / "again")
    agree(Named(*names), tmp_path / "again", adapter)


def _escaped(name: str) -> str:
    return "".join(f"\\{c}" if c in ".+()" else c for c in name)


TARGETS = {
    "a suffix for all": (("a.q", "b.q", "a.k"), ("a.q", "b.q"), ["q"]),
    "a longer suffix": (("a.x.q", "b.x.q", "c.y.q"), ("a.x.q", "b.x.q"), ["x.q"]),
    "full paths": (("a.q", "b.q", "c.q"), ("a.q", "c.q"), ["a.q", "c.q"]),
    "a suffix of a container": (("a.q", "q.a"), ("a.q",), ["a.q"]),
    "no numbers": (("layer.0.q", "layer.1.q"), ("layer.1.q",), ["layer.1.q"]),
    "an expression": (("q", "enc.q"), ("q",), "q"),
    "an expression of several": (("a.q", "b.a.q", "k"), ("a.q", "k"), r"a\.q|k"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_select_exactly_what_is_exported(case, tmp_path):
    names, chosen, wanted = TARGETS[case]
    model = Named(*names)
    saved = made(model, ta.preset("lora", rank=2, targets=[f"re:{_escaped(name)}" for name in chosen]))
    export_peft(saved, tmp_path / "known", model=model)
    assert config_of(tmp_path / "known")["target_modules"] == wanted
    found = PeftModel.from_pretrained(model, tmp_path / "known")
    adapted = {n.removeprefix("base_model.model.") for n, m in found.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(chosen)
    export_peft(saved, tmp_path / "unknown")
    assert config_of(tmp_path / "unknown")["target_modules"] == sorted(chosen)


def test_names_come_from_a_config_or_a_folder_too(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    saved = made(tiny.llama(), ta.preset("lora", rank=2, targets=["q_proj"]))
    for k, model in enumerate((tmp_path / "model", tmp_path / "model/config.json", str(tmp_path / "model"))):
        export_peft(saved, tmp_path / str(k), model=model)
        assert config_of(tmp_path / str(k))["target_modules"] == ["q_proj"]


BASES = {
    "org/base": "org/base",
    "org/base@v2": "org/base",
    "gpt2": None,  # which may be the own name of a folder, where nothing says that it is a hub's
    "/home/me/model": None,
    "~/model": None,
    "./model": None,
    "..": None,
    "C:\\models\\m": None,
    "BertModel": None,
    "": None,
}


def of_base(model, **said):
    saved = made(tiny.llama(), ta.preset("lora", rank=2, targets=["q_proj"]))
    return replace(saved, plan=replace(saved.plan, model=model), base=said)


@pytest.mark.parametrize("name", BASES)
def test_paths_of_this_machine_are_not_written(name):
    revision = "v2" if "@" in name else None
    assert export.base_of(of_base(name), None) == (BASES[name], revision)
    assert export.base_of(of_base(name), "/given") == ("/given", None)


def test_a_revision_goes_with_the_base_that_it_is_of():
    known = {"name": "gpt2", "hub": True, "revision": "v2"}
    assert export.base_of(of_base("", **known), None) == ("gpt2", "v2")
    assert export.base_of(of_base("", **known), "org/mine") == ("org/mine", None)
    assert export.base_of(of_base("", **known | {"hub": False}), None) == (None, None)


def test_a_folder_that_looks_like_a_name_is_not_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/best").mkdir(parents=True)
    assert export.base_of(of_base("runs/best"), None) == (None, None)


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_the_rank_is_that_of_the_delta(tmp_path):
    model = nn.Sequential(nn.Linear(5, 4))
    saved = made(model, _cp(30))
    result = export_peft(saved, tmp_path / "out")
    assert result.rank == 4 and result.max_error < 1e-6
    held = load_file(tmp_path / "out/adapter_model.safetensors")
    assert held["base_model.model.0.lora_A.weight"].shape == (4, 5)


def _cp(rank: int) -> ta.Spec:
    return ta.Spec(
        rules=(ta.Rule(targets=("0",), format="cp", axes=("out", "in"), rank=rank, excess="keep", start="nonzero"),)
    )


def test_modules_without_a_change_are_left_out(tmp_path):
    adapter = attached()
    adapter.set_factors("layer0_query", {"core_out": torch.zeros(16, 2)})
    result = export_peft(adapter, tmp_path / "out")
    assert QUERY not in result.modules and len(result.modules) == 3 and f"zero: {QUERY}" in str(result)
    targets = ["encoder.layer.0.attention.self.value", "encoder.layer.1.attention.self.query"]
    assert config_of(tmp_path / "out")["target_modules"] == [*targets, "encoder.layer.1.attention.self.value"]
    agree(tiny.bert(), tmp_path / "out", adapter)


def test_an_adapter_that_changes_nothing_is_refused(tmp_path):
    with pytest.raises(ta.AdapterError, match="every delta is zero"):
        export_peft(ta.attach(tiny.bert(), ta.preset("lora", targets=QV)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


FULL = {
    "tt-matrix": ta.preset("mpo_shared", rank=3, targets=QV),
    "kronecker": ta.preset("krona", targets=QV),
    "gates": ta.preset("quanta", folds="auto:2", targets=QV),
}


@pytest.mark.parametrize("case", FULL)
def test_full_rank_formats_are_refused_or_truncated_with_the_error_stated(case, tmp_path):
    model = tiny.bert()
    saved = made(model, FULL[case])
    with pytest.raises(ta.AdapterError, match=f"delta of {QUERY} is of full matrix rank"):
        export_peft(saved, tmp_path / "out")
    result = export_peft(saved, tmp_path / "out", rank=3)
    assert result.rank == 3 and "truncated" in str(result)
    for path, row in result.modules.items():
        values = np.linalg.svd(saved.delta(path).double().numpy(), compute_uv=False)
        assert row["error"] == pytest.approx(np.sqrt((values[3:] ** 2).sum() / (values**2).sum()), rel=1e-3)
    change = merged(model, tmp_path / "out")[f"{QUERY}.weight"]
    assert np.linalg.matrix_rank(change.numpy(), tol=1e-4) == 3


def test_a_smaller_rank_truncates_low_rank_deltas_too(tmp_path):
    result = export_peft(attached("two ranks"), tmp_path / "out", rank=2)
    assert result.rank == 2 and 0.01 < result.max_error < 1


def test_small_deltas_survive_half_precision(tmp_path):
    adapter = attached(scale=1.0)
    with torch.no_grad():
        for name in adapter.groups:
            adapter.factors(name)["core_out"].mul_(1e-9)
    assert export_peft(adapter, tmp_path / "out", dtype="float16").max_error < 3e-3
    held = load_file(tmp_path / "out/adapter_model.safetensors")
    norms = {side: held[f"base_model.model.{QUERY}.lora_{side}.weight"].float().norm() for side in "AB"}
    torch.testing.assert_close(norms["A"], norms["B"], rtol=1e-2, atol=0)


def test_deltas_that_half_precision_cannot_hold_are_refused(tmp_path):
    adapter = attached(scale=1e-17)
    with pytest.raises(ta.FileError, match="is not what it was in float16: nothing was written"):
        export_peft(adapter, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_factors_are_found_without_forming_a_delta():
    model = nn.Sequential(nn.Linear(60, 50))
    saved = made(model, ta.preset("lotr", rank=3, targets=["0"]))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                assert not isinstance(tensor, torch.Tensor) or tensor.numel() < 50 * 50, func
            return result

    with Watch():
        pair = factors.factors_of(saved, "0")
        found = factors.balanced(pair)
    torch.testing.assert_close(found.b @ found.a, saved.delta("0"))


# -- what is refused ---------------------------------------------------------------------------------------------------

UNSERVED = {
    "experts": (tiny.mixtral, ta.preset("lotr", rank=2, targets=["gate_up_proj"]), r"experts\.gate_up_proj\[0\]"),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)),
        ta.preset("lora", rank=2, targets=["0"]),
        "delta of 0",
    ),
    "a parameter": (
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
        ta.preset("lora", rank=2, targets=["in_proj_weight"]),
        "0.in_proj_weight",
    ),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_what_lora_cannot_hold_is_named(case, tmp_path):
    make, spec, name = UNSERVED[case]
    with pytest.raises(ta.AdapterError, match=name):
        export_peft(made(make(), spec), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused_with_what_does_not_fit(tmp_path):
    saved = as_saved(attached("two ranks"))
    with pytest.raises(ta.FileError, match="8 modules do not fit") as error:
        export_peft(saved, tmp_path / "out", model=tiny.bert(hidden_size=32))
    assert str(error.value).count("in the adapter") == 5
    with pytest.raises(ta.FileError, match=f"{QUERY}.*nothing in the model"):
        export_peft(saved, tmp_path / "out", model=tiny.gpt2())


@pytest.mark.parametrize("shape", [(40, 16), (40, 40)], ids=str)
def test_a_plan_of_bare_files_needs_the_model_where_it_may_mean_an_embedding(shape, tmp_path):
    plan = ta.plan(ta.preset("lora", rank=2, targets=["wte"]), {"wte": shape})
    tensors = {"wte.core_out": tiny.noise(shape[0], 2), "wte.core_in": tiny.noise(2, shape[1], seed=1)}
    with pytest.raises(ta.AdapterError, match="wte has the name of an embedding"):
        export_peft(Saved.of(plan, tensors), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_bare_file_calls_a_matrix_is_what_the_model_says(tmp_path):
    model = nn.ModuleDict({"wte": nn.Embedding(40, 16), "h": nn.Linear(16, 40)})
    plan = ta.plan(ta.preset("lora", rank=2, targets=["wte", "h"]), {"wte": (40, 16), "h": (40, 16)})
    tensors = {key: tiny.noise(*factor.shape, seed=k) for k, (key, factor) in enumerate(plan.factors.items())}
    saved = Saved.of(plan, tensors)
    export_peft(saved, tmp_path / "out", model=model)
    change = merged(model, tmp_path / "out")
    for path in ("wte", "h"):  # both as the file has them: (40, 16)
        torch.testing.assert_close(change[f"{path}.weight"], saved.delta(path), atol=1e-5, rtol=1e-5)


OPTIONS = [
    ({"layout": "flat"}, "no layout 'flat'"),
    ({"dtype": "float64"}, "no dtype 'float64'"),
    ({"consumer": "ollama"}, "consumer='ollama' is none"),
    ({"task_type": "causal"}, "no task_type 'causal'"),
    ({"rank": 0}, "a rank is a positive integer"),
    ({"rank": True}, "a rank is a positive integer"),
]


@pytest.mark.parametrize(("options", "says"), OPTIONS, ids=[says for _, says in OPTIONS])
def test_options_are_checked(options, says, tmp_path):
    with pytest.raises(ta.SpecError, match=says):
        export_peft(attached(), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_named(bad, tmp_path):
    adapter = attached()
    with torch.no_grad():
        adapter.factors("layer0_query")["core_in"][0, 0] = bad
    with pytest.raises(ta.FileError, match="layer0_query.core_in has no finite values"):
        export_peft(adapter, tmp_path / "out")


def test_factors_on_the_meta_device_are_named(tmp_path):
    with torch.device("meta"):
        model = tiny.bert()
    with pytest.raises(ta.FileError, match="has no finite values to export"):
        export_peft(ta.attach(model, ta.preset("lora", targets=QV)), tmp_path / "out")


# -- servers -----------------------------------------------------------------------------------------------------------

LINTS = [
    ("vllm", "convolutions", {}, "vLLM has no LoRA of convolutions: 0, 2"),
    ("llama.cpp", "convolutions", {}, "llama.cpp has no LoRA of convolutions"),
    ("vllm", "two ranks", {"layout": "compact"}, "drop rank_pattern"),
    ("llama.cpp", "two ranks", {"layout": "compact"}, "alpha_pattern is ignored"),
]


@pytest.mark.parametrize(("consumer", "case", "options", "says"), LINTS)
def test_what_a_server_refuses_is_said_before_anything_is_written(consumer, case, options, says, tmp_path):
    with pytest.raises(ta.AdapterError, match=says):
        export_peft(attached(case), tmp_path / "out", consumer=consumer, **options)
    assert list(tmp_path.iterdir()) == []
    assert export_peft(attached("two ranks"), tmp_path / "out", consumer=consumer).rank == 5


def test_servers_refuse_modules_trained_whole_and_ranks_without_end(tmp_path):
    adapter = ta.attach(tiny.bert_classifier(), ta.preset("lora", targets=QV, train=["pooler"]))
    tiny.shake(adapter)
    for consumer in ("vllm", "llama.cpp"):
        with pytest.raises(ta.AdapterError, match=r"modules trained whole are refused: bert\.pooler"):
            export_peft(adapter, tmp_path / "out", consumer=consumer, extras=True)
    wide = made(nn.Sequential(nn.Linear(600, 600)), ta.preset("lora", rank=513, targets=["0"]))
    with pytest.raises(ta.AdapterError, match="rank 513 is above 512"):
        export_peft(wide, tmp_path / "out", consumer="vllm")
    assert "vLLM serves ranks up to 512" in str(export_peft(wide, tmp_path / "out"))


def test_llama_cpp_refuses_a_tied_head(tmp_path):
    adapter = ta.attach(tiny.gpt2(), ta.preset("lora", rank=2, targets=["wte", "lm_head"]))
    tiny.shake(adapter)
    with pytest.raises(ta.AdapterError, match="lm_head.*tied, one tensor for embedding and head"):
        export_peft(adapter, tmp_path / "out", consumer="llama.cpp")


@pytest.mark.parametrize(("rank", "flag"), [(2, 8), (8, 8), (9, 16), (16, 16)])
def test_the_rank_that_vllm_has_to_allow_is_told(rank, flag, tmp_path):
    saved = made(nn.Sequential(nn.Linear(20, 20)), ta.preset("lora", rank=rank, targets=["0"]))
    assert f"--max-lora-rank {flag}" in export_peft(saved, tmp_path / "out").notes[0]


# -- the folder --------------------------------------------------------------------------------------------------------


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


def test_the_result_is_told_and_the_folder_is_whole(tmp_path):
    result = export_peft(attached(), tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert result.path == tmp_path / "out" and "4 modules, rank 2" in str(result)
    told = json.loads(json.dumps(result.to_dict()))
    assert told["max_error"] == result.max_error and told["modules"][QUERY]["rank"] == 2
    card = (tmp_path / "out/README.md").read_text()
    assert f"| {QUERY} | 2 |" in card and str(tmp_path) not in card


def test_equal_adapters_give_equal_bytes_and_no_random_number_is_drawn(tmp_path):
    state = torch.random.get_rng_state()
    for name in ("one", "two"):
        adapter = attached("two ranks")
        state = torch.random.get_rng_state()
        export_peft(adapter, tmp_path / name)
        assert torch.equal(torch.random.get_rng_state(), state)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_without_peft_the_folder_is_re_opened_by_its_own_rules(tmp_path, monkeypatch):
    export_peft(attached("two ranks"), tmp_path / "with")
    monkeypatch.setitem(sys.modules, "peft", None)
    result = export_peft(attached("two ranks"), tmp_path / "without")
    assert result.reader == "safetensors, by PEFT's rules" and result.max_error < 1e-6
    assert contents(tmp_path / "with") == contents(tmp_path / "without")


@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("fault", ["a factor", "the scale", "a key"])
def test_a_folder_with_other_deltas_is_never_left_behind(fault, peft, tmp_path, monkeypatch):
    tensors, config = export._tensors, export.config_of

    def damaged(*args, **more):
        found = tensors(*args, **more)
        key = next(iter(found))
        if fault == "a factor":
            found[key] = found[key] * 1.01
        return {k.replace("base_model.", ""): t for k, t in found.items()} if fault == "a key" else found

    monkeypatch.setattr(export, "_tensors", damaged)
    if fault == "the scale":
        monkeypatch.setattr(export, "config_of", lambda *a, **k: {**config(*a, **k), "lora_alpha": 16})
    if not peft:
        monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises((ta.FileError, ta.AdapterError, KeyError)):
        export_peft(attached(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_kept_unless_it_is_to_be_overwritten(tmp_path):
    export_peft(attached(), tmp_path / "out")
    old = contents(tmp_path / "out")
    with pytest.raises(ta.FileError, match="is there already"):
        export_peft(attached("two ranks"), tmp_path / "out")
    assert contents(tmp_path / "out") == old
    export_peft(attached("two ranks"), tmp_path / "out", overwrite=True)
    assert config_of(tmp_path / "out")["r"] == 5 and list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_other_files_are_never_lost(tmp_path):
    adapter = attached()
    adapter.save(tmp_path / "adapter")
    with pytest.raises(ta.FileError, match="holds other files, which would be lost"):
        export_peft(adapter, tmp_path / "adapter", overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ta.FileError, match="is no folder"):
        export_peft(adapter, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "adapter/adapter.safetensors").exists()


@pytest.mark.parametrize("step", ["write_tensors", "flush", "exchange", "first rename", "second rename"])
def test_a_failure_leaves_the_old_folder_and_nothing_else(step, tmp_path, monkeypatch):
    export_peft(attached(), tmp_path / "out")
    old, replace, calls = contents(tmp_path / "out"), os.replace, []

    def fails(*args, **more):
        calls.append(args)
        if step == "second rename" and len(calls) != 2:
            return replace(*args)
        raise OSError(28, "No space left on device")

    where = {"write_tensors": (export, "write_tensors"), "flush": (folders, "flush")}
    where |= {"exchange": (folders, "exchanged")}
    monkeypatch.setattr(*where.get(step, (folders.os, "replace")), fails)
    if "rename" in step:  # where a system cannot exchange two folders
        monkeypatch.setattr(folders, "exchanged", lambda *_: False)
    with pytest.raises(ta.FileError, match="No space left"):
        export_peft(attached("two ranks"), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == old and list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("name", ["with spaces", "ünïcödé", "deep/er/still"])
def test_any_name_of_a_folder_will_do(name, tmp_path):
    export_peft(attached(), tmp_path / name)
    assert open_adapter(tmp_path / name).plan.num_sites == 4


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ta.FileError, match="cannot be written"):
        export_peft(attached(), tmp_path / "file/out")
