"""Small inputs that ask for much: answered, or refused by name, in 2 s of CPU (8 here, beside others) and 300 MB."""

import gc
import json
import time

import pytest
import torch
import yaml
from fuzz.limits import watched
from fuzz.readers import BERT, LLAMA, MIXTRAL
from safetensors.torch import save_file

import tensoradapt as ta
from tensoradapt.folds import fold
from tensoradapt.io import config as config_module

SHAPES = {f"encoder.layer.{k}.self.{role}": (96, 96) for k in range(12) for role in ("query", "key", "value")}
LORA = {"preset": "lora", "rank": 2}


def bounded(folder, work, seconds=8.0):
    """What the work answers, or the error that it is refused by."""
    with watched(folder, written=True, seconds=seconds) as watch:
        try:
            found = work()
        except ta.TensorAdaptError as error:
            found = error
    assert not watch.done
    return found


def planned(folder, text: str, name: str = "spec.yaml"):
    (folder / name).write_text(text, "utf-8")
    return bounded(folder, lambda: ta.plan(ta.Spec.load(folder / name), SHAPES))


def rule(**fields) -> str:
    return json.dumps({"rules": [{**LORA, "targets": ["query"], **fields}]})


CHAIN = ", ".join(f"a{k} a{k + 1}" for k in range(900))
DENSE = [" ".join(f"b{min(j, k)}{max(j, k)}" for k in range(10) if k != j) for j in range(10)]
DENSE = ["out " + DENSE[0], *DENSE[1:9], "in " + DENSE[9]]
LETTERS = "abcdefghijklmnopqrstu"
DOUBLED = [f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip(LETTERS, LETTERS[1:], strict=False)]
SPECS = {
    "an expression that explodes": rule(targets=["re:(.*)*x"]),
    "expressions that explode": rule(targets=["query"], exclude=[f"re:{'.*' * k}y" for k in range(3, 300)]),
    "exclude, layout and parts": rule(layout={"re:(a|a)*b": "in out"}, parts={"re:(\\w+\\.?)+!": ["a", "b"]}),
    "keys given twice": '{"rules": [{"ranks": {' + ", ".join(f'"k{k}": 1' for k in range(20_000)) + ', "k1": 1}}]}',
    "many keys": rule(ranks={f"k{k}": 1 for k in range(20_000)}),
    "many targets": rule(targets=[f"layer.{k}" for k in range(40_000)]),
    "many equal targets": rule(targets=["query"] * 40_000),
    "many globs": rule(targets=["*" * k + "query" for k in range(1, 3000)]),
    "many values": "[" + "a," * 1_500_000 + "]",
    "many empty lists": "rules: [" + "[]," * 40_000 + "]",
    "many lines": "rules:\n" + "- a\n" * 90_000,
    "targets that are numbers": rule(targets=[1] * 40_000),
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep mappings": "{a: " * 50_000 + "}" * 50_000,
    "deep dashes": "- " * 60_000,
    "aliases": "a: &a [x, x]\n" + "".join(DOUBLED),
    "a large hexadecimal rank": "rules: [{preset: lora, rank: 0x" + "f" * 400_000 + "}]",
    "a number in sixties": "rules: [{preset: lora, rank: 1" + ":1" * 100_000 + "}]",
    "many rules": json.dumps({"rules": [{**LORA, "targets": ["query"]}] * 20_000}),
    "a network of many nodes": rule(
        preset="", format="network", network=", ".join(f"a{k} a{k + 1}" for k in range(4000))
    ),
    "a long network": rule(preset="", format="network", network=f"out a0, {CHAIN}, a900 in -> out in"),
    "a dense network": rule(preset="", format="network", network=f"{', '.join(DENSE)} -> out in"),
    "many axes": rule(preset="", axes=["out", "in", *[f"in_{k}" for k in range(3000)]]),
    "many folds": rule(preset="tt_lora", folds={"in": [1] * 3000}),
    "a fold in many parts": rule(preset="tt_lora", folds={"in": "auto:1000000"}),
    "a fold by nought": rule(preset="lokr", folds={"in": "factor:0"}),
    "large ranks": rule(rank=10**9),
    "a long pattern": rule(pattern="{layer}" + "{role}.*?" * 400),
}
TAGS = [
    "!!bool x",
    "!!int x",
    "!!float x",
    "!!timestamp x",
    "!!set {a}",
    "!!binary a",
    "!!python/name:os.system",
    "!a b",
]
SPECS |= {tag: f"rules: [{{preset: lora, rank: {tag}}}]" for tag in [*TAGS, "2001-01-01", "&a 4", "*a", "<<: {a: 1}"]}


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_is_planned_or_refused_soon(name, tmp_path):
    found = planned(tmp_path, SPECS[name])
    assert isinstance(found, ta.TensorAdaptError | ta.Plan)
    assert len(str(found)) < 20_000
    assert name not in TAGS or "mend" in str(found) or "no value of a spec" in str(found)


@pytest.mark.parametrize("name", ["many targets", "keys given twice", "deep lists", "a large hexadecimal rank"])
def test_so_is_one_in_json(name, tmp_path):
    assert isinstance(planned(tmp_path, SPECS[name], "spec.json"), ta.TensorAdaptError)


def test_yaml_that_says_what_json_can_say_is_read(tmp_path):
    spec = ta.Spec.from_dict({"rules": [{**LORA, "targets": ["a", "1"], "alpha": 0.5, "kv_heads": None}]})
    text = yaml.safe_dump({"rules": [{**LORA, "targets": ["a", "1"], "alpha": 0.5, "kv_heads": None}]})
    (tmp_path / "spec.yaml").write_text(text)
    assert ta.Spec.load(tmp_path / "spec.yaml") == spec


@pytest.mark.parametrize(
    "key", ["rank_pattern", "alpha_pattern", "layers_pattern", "target_modules", "exclude_modules"]
)
def test_a_peft_config_of_many_expressions_is_imported_or_refused_soon(key, tmp_path):
    paths = [f"model.layers.{k}.self_attn.{role}_proj" for k in range(60) for role in "qkvo"]
    held = {f"base_model.model.{p}.lora_{side}.weight": torch.ones(2, 2) for p in paths for side in "AB"}
    save_file(held, tmp_path / "adapter_model.safetensors")
    many = [f"{'.*' * (2 + k % 9)}x{k}" for k in range(3000)]
    hostile = {"rank_pattern": dict.fromkeys(many, 2), "layers_pattern": many, "target_modules": "|".join(many)}
    hostile |= {"alpha_pattern": dict.fromkeys(many, 2), "exclude_modules": "|".join(many)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    config |= {"layers_to_transform": [*range(60)]} if key == "layers_pattern" else {}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: hostile[key]}))
    assert isinstance(bounded(tmp_path, lambda: ta.import_peft(tmp_path)), ta.FileError)


def test_a_rank_for_every_module_is_imported_soon(tmp_path):
    paths = [f"model.layers.{k}.self_attn.{role}_proj" for k in range(60) for role in "qkvo"]
    ranks = {path: 1 + k % 3 for k, path in enumerate(paths)}
    held = {}
    for path, rank in ranks.items():
        held |= {f"base_model.model.{path}.lora_A.weight": torch.ones(rank, 2)}
        held |= {f"base_model.model.{path}.lora_B.weight": torch.ones(2, rank)}
    save_file(held, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 8,
        "target_modules": r".*\.(q|k|v|o)_proj",
        "rank_pattern": ranks,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert bounded(tmp_path, lambda: ta.import_peft(tmp_path)).plan.num_sites == 240


def header(folder, tensors):
    text = json.dumps(tensors).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    return file


HEADERS = {
    "experts by the billion, bytes to fit": {
        "e.experts": {"dtype": "F32", "shape": [10**9, 2, 2], "data_offsets": [0, 16 * 10**9]}
    },
    "experts by the billion": {"e.experts": {"dtype": "F32", "shape": [10**9, 2, 2], "data_offsets": [0, 48]}},
    "many experts in many tensors": {
        f"l.{k}.experts.up": {"dtype": "U8", "shape": [4096, 1, 1], "data_offsets": [4096 * k, 4096 * k + 4096]}
        for k in range(40)
    },
    "an unknown dtype": {"e.experts": {"dtype": "X1", "shape": [10**9, 2, 2], "data_offsets": [0, 48]}},
    "many dimensions": {"a.weight": {"dtype": "F32", "shape": [2**40] * 50_000, "data_offsets": [0, 4]}},
    "huge sizes": {"a.weight": {"dtype": "F32", "shape": [10**30, 10**30], "data_offsets": [0, 4 * 10**60]}},
    "no order": {"a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_names_what_nobody_stored_is_refused_soon(name, tmp_path):
    file = header(tmp_path, HEADERS[name])
    found = bounded(tmp_path, lambda: ta.plan(ta.Rule(**LORA, targets=("all-linear",)), file))
    assert isinstance(found, ta.FileError)


NAMES = ["layers." + "9" * 5000 + ".q", ".".join("a" * 50_000), "layers.1." * 5000 + "q", "experts." * 5000]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_any_length_is_read_or_refused_soon(name, tmp_path):
    file = header(tmp_path, {f"{name}.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}})
    found = bounded(tmp_path, lambda: ta.plan(ta.Rule(**LORA, targets=("all-linear",)), file))
    assert isinstance(found, ta.FileError)


COUNTS = {"num_hidden_layers": (10**9, 20_000, 1025), "num_labels": (10**9,), "num_local_experts": (10**9, 10**6)}


@pytest.mark.parametrize(("key", "many"), [(key, many) for key, values in COUNTS.items() for many in values])
@pytest.mark.parametrize("config", [BERT, LLAMA, MIXTRAL], ids=["bert", "llama", "mixtral"])
def test_a_config_that_counts_by_the_thousand_is_refused_soon(config, key, many, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**config, key: many}))
    found = bounded(tmp_path, lambda: ta.plan(ta.Rule(**LORA, targets=("all-linear",)), tmp_path))
    assert isinstance(found, ta.FileError) and f"counts too many of {key}" in str(found)


def test_a_config_that_hides_its_counts_is_refused_soon(tmp_path):
    many = json.dumps({**LLAMA, "num_hidden_layers": 10**9})
    (tmp_path / "config.json").write_text('{"model_type": "llama", ' + many[1:])  # a key twice
    with pytest.raises(ta.FileError, match="counts too many"):
        ta.plan(ta.Rule(**LORA, targets=("all-linear",)), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "configuration_files": ["config.4.0.json"]}))
    (tmp_path / "config.4.0.json").write_text(many)
    with pytest.raises(ta.FileError, match="counts too many"):
        ta.plan(ta.Rule(**LORA, targets=("all-linear",)), tmp_path)


def test_a_config_that_multiplies_its_counts_is_refused_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "MAX_MODULES", 500)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 100}))
    with pytest.raises(ta.FileError, match="more than 500 modules"):
        ta.plan(ta.Rule(**LORA, targets=("all-linear",)), tmp_path)
    assert ta.plan(ta.Rule(**LORA, targets=("all-linear",)), {"a.q": (2, 2)}).num_sites == 1


def test_a_header_alone_is_planned(tmp_path):
    tensors = {"l.0.experts.up": {"dtype": "BF16", "shape": [128, 64, 32], "data_offsets": [0, 128 * 64 * 64]}}
    assert ta.plan(ta.Rule(**LORA, targets=("all-linear",)), header(tmp_path, tensors)).num_sites == 128


@pytest.mark.parametrize(
    "how", ["auto", "auto:2", "auto:12", "auto:64", "factor:-1", "factor:4", "factor:0", "auto:0", "auto:²"]
)
@pytest.mark.parametrize("size", [2**31 - 1, 2_095_133_040, 151_936, 10**18, 2**61 - 1, 10**30])
def test_a_side_of_any_size_is_cut_or_refused_soon(how, size, tmp_path):
    found = bounded(tmp_path, lambda: fold("in", size, how, {}))
    assert isinstance(found, ta.TensorAdaptError) == (size > 2**31 or how in ("factor:0", "auto:0", "auto:²"))


def test_sides_in_use_are_cut_as_before():
    assert list(fold("in", 4096, "auto:4", {}).values()) == [8, 8, 8, 8]
    assert list(fold("in", 151_936, "auto", {}).values()) == [1187, 16, 8]
    assert list(fold("in", 2**31 - 1, "auto:2", {}).values()) == [2**31 - 1, 1]
    assert list(fold("in", 4096, "factor:-1", {}).values()) == [64, 64]


def seconds(work) -> float:
    """The lesser CPU time of two, that of collecting garbage apart, which depends on the tests before."""
    found = []
    gc.disable()
    try:
        for _ in range(2):
            began = time.process_time()
            work()
            found.append(time.process_time() - began)
    finally:
        gc.enable()
    return min(found)


def experts(count):
    return {f"layers.0.mlp.experts.{k}.{role}_proj": (8, 8) for k in range(count // 2) for role in ("up", "down")}


def dull(count):
    """Roles of which no two are spelled alike, and which are one word in a group's name."""
    return {f"q{chr(0x2190 + k % 100)}{chr(0x2200 + k // 100)}": (8, 8) for k in range(count)}


def beside(count):
    return {f"layers.{k}.self_attn.{role}_proj": (8, 8) for k in range(8) for role in "qkvo"} | experts(count)


GROUPED = {
    "all in one tensor": (ta.preset("lotr", rank=2, targets=["*"]), dull),
    "experts on an axis": (
        ta.Rule(targets=["*"], rank=2, axes=("expert", "out", "in"), start="nonzero", init={"*": "normal(1)"}),
        experts,
    ),
    "a tensor for each": (ta.preset("lora", rank=2, targets=["*"]), experts),
    "names that are one": (ta.preset("lora", rank=2, targets=["*"]), dull),
    "a set without another": (ta.preset("lora", rank=2, targets=["attention"], exclude=["feed-forward"]), beside),
}


@pytest.mark.parametrize("name", GROUPED)
def test_the_time_of_a_plan_grows_with_its_sites(name):
    """A plan of twenty times the sites takes about twenty times as long."""
    spec, shapes = GROUPED[name]
    few, many = shapes(1000), shapes(20_000)
    assert len(str(ta.plan(spec, few))) > 100
    assert seconds(lambda: str(ta.plan(spec, many))) < 28 * seconds(lambda: str(ta.plan(spec, few)))


def test_a_rule_for_every_weight_is_planned_soon():
    """As many rules as a spec may have. What names no parts and no layout is not asked for them, rule by rule."""
    shapes = {f"layers.{k}.self_attn.{role}_proj": (8, 8) for k in range(250) for role in "qkvo"}
    plain = ta.Spec.from_dict({"rules": [{"preset": "lora", "rank": 2, "targets": [path]} for path in shapes]})
    plan = ta.plan(plain, shapes)
    assert [row["rule"] for row in plan.to_dict()["groups"]] == [*range(1000)]
    one = seconds(lambda: ta.plan(ta.preset("lora", rank=2, targets=["*"]), shapes).to_dict())
    assert seconds(lambda: ta.plan(plain, shapes).to_dict()) < 40 * one
