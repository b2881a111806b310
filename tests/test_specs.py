"""Specs: they round-trip, and what they do not understand is an error that says what to write instead."""

import json
import os
import time

import pytest
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tensoradapt as ta
from tensoradapt import spec as specs
from tensoradapt.diagram import Diagram
from tensoradapt.rows import alike

SHAPES = {f"encoder.layer.{k}.self.{role}": (16, 16) for k in range(2) for role in ("query", "key", "value")}
LORA = {"targets": ["query"], "init": {"core_out": "zero"}}


def planned(rule: dict, shapes=SHAPES, **model) -> ta.Plan:
    return ta.plan(ta.Spec.from_dict({"rules": [{**LORA, **rule}]}), shapes)


def fault(kind, *says: str):
    """The error is of a kind, has these texts, and tells what is expected or what to do next."""

    def check(error) -> bool:
        text = str(error)
        return all(part in text for part in says) and ("\n  next: " in text or "\n  expected: " in text)

    return pytest.RaisesGroup if False else pytest.raises(kind, check=check)


def file_of(tmp_path, text: str | bytes, name: str = "spec.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# -- round trips ------------------------------------------------------------------------------------------------------

EVERYTHING = ta.Rule(
    name="all",
    targets=("query", "re:.*value"),
    default="block",
    exclude=("*.0.*",),
    pattern="encoder.layer.{layer}.self.{role}",
    parts={"c_attn": ["q", "k"], "qkv": {"q": 4, "kv": 12}},
    layout={"experts.up": "in out"},
    format="tucker",
    axes=("layer", "role", "slot", "out", "in"),
    folds={"out": ["head", "head_dim"], "in": [4, 4], "kernel": "auto:2"},
    compress=("out", "in"),
    rank={"head": 2, "in_0": 3, "layer": "layer"},
    ranks={"all_query": 4, "all_value": [1, 2]},
    excess="keep",
    delivery={"query": "weight"},
    shapes="slots",
    slot=(16, 16),
    scale="alpha/sqrt(rank)",
    alpha=0.25,
    dropout=0.125,
    dropout_at="code",
    start="zero",
    zero="core",
    init={"core": "zero", "*": "normal(1/sqrt(in))"},
    frozen=("factor_in_0",),
    train=("classifier",),
    heads=8,
    kv_heads=2,
    dtype="bfloat16",
)
SPECS = {name: ta.preset(name) for name in ta.PRESETS} | {
    "everything": ta.Spec(rules=(EVERYTHING,)),
    "network": ta.Spec(
        rules=(ta.Rule(targets=("query",), format="network", network="a: out r, b: r in -> out in", zero="a"),)
    ),
    "several": ta.preset("lotr", rank=3, targets=["query"]) + ta.preset("lora", targets=["key"]),
    "rows": ta.Spec.from_dict(
        {
            "defaults": {"targets": ["query"], "dropout": 0.5},
            "rules": [
                {"preset": "lotr", "rank": 4},
                {"preset": "vera", "rank": 8, "scale": "one", "start": "zero", "dropout": 0.0},
                {"preset": "lokr", "options": {"factor": 4, "decompose": False}},
                {"preset": "krona", "options": {"folds": {"out": [4, 4], "in": [2, 8]}}},
            ],
        }
    ),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_round_trips(spec, tmp_path):
    assert ta.Spec.from_dict(spec.to_dict()) == spec
    assert ta.Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for name in ("spec.yaml", "spec.json"):
        spec.save(tmp_path / name)
        loaded = ta.Spec.load(tmp_path / name)
        assert loaded == spec and loaded.to_dict() == spec.to_dict()
    assert json.loads((tmp_path / "spec.json").read_text()) == yaml.safe_load((tmp_path / "spec.yaml").read_text())


def test_every_field_has_been_on_the_way():
    same = {
        name for name in ta.Rule.model_fields if getattr(EVERYTHING, name) == ta.Rule.model_fields[name].get_default()
    }
    assert same <= {"preset", "options", "family", "network", "start"}


def test_a_preset_row_keeps_what_equals_a_rule_s_default(tmp_path):
    """Rank 8 is a rule's default, and 256 that of the preset: what was written stays written."""
    row = {"preset": "vera", "rank": 8, "targets": ["query"]}
    spec = ta.Spec.from_dict({"rules": [row]})
    spec.save(tmp_path / "spec.yaml")
    again = ta.Spec.load(tmp_path / "spec.yaml")
    direct = ta.preset("vera", rank=8, targets=["query"])
    assert len({ta.plan(s, SHAPES).num_parameters for s in (spec, again, direct)}) == 1
    assert ta.plan(spec, SHAPES).num_parameters != ta.plan(ta.preset("vera", targets=["query"]), SHAPES).num_parameters


@pytest.mark.parametrize("name", ta.PRESETS)
def test_a_preset_row_is_the_preset(name):
    heads = {"heads": 4} if "heads" in ta.PRESETS[name].parameters else {}
    model = {"layer.0.query": (16, 16), "layer.1.query": (16, 16)}
    if name == "cara":
        heads["projections"] = ["query"]
        model |= {"layer.0.key": (16, 16)}
    own = {k: v for k, v in heads.items() if k not in ta.Rule.model_fields}
    fields = {k: v for k, v in heads.items() if k not in own}
    targets = ["key"] if name == "cara" else ["query"]
    row = ta.Spec.from_dict({"rules": [{"preset": name, "targets": targets, "options": own, **fields, "name": "mine"}]})
    direct = ta.preset(name, targets=targets, name="mine", **heads)
    assert ta.plan(row, model).to_dict()["groups"] == ta.plan(direct, model).to_dict()["groups"]


def test_defaults_are_shared_and_overridden():
    text = {
        "defaults": {"preset": "lora", "rank": 2, "targets": ["query"]},
        "rules": [{"rank": 3, "targets": ["key"]}, {}],
    }
    found = {g.placements[0].site.coordinates["role"]: g.rank for g in ta.plan(ta.Spec.from_dict(text), SHAPES).groups}
    assert {role: next(iter(rank.values())) for role, rank in found.items()} == {"key": 3, "query": 2}


def test_specs_are_added_in_order():
    one, two = ta.preset("lora", targets=["query"]), ta.preset("lotr", targets=["key"])
    assert (one + two).rules == (*one.rules, *two.rules)


def test_one_target_needs_no_list():
    assert ta.preset("lora", targets="query") == ta.preset("lora", targets=["query"])


def test_a_spec_is_not_written_over_weights(tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"weights")
    with pytest.raises(ta.FileError, match="a name of weights(?s:.*)yaml"):
        ta.preset("lora").save(path)
    assert path.read_bytes() == b"weights"


def test_yaml_that_is_saved_has_no_anchors(tmp_path):
    sides = [4, 4]
    spec = ta.Spec.from_dict({"rules": [{"preset": "krona", "options": {"folds": {"out": sides, "in": sides}}}]})
    spec.save(tmp_path / "spec.yaml")
    assert "&" not in (tmp_path / "spec.yaml").read_text()
    assert ta.Spec.load(tmp_path / "spec.yaml") == spec


WORDS = st.text("abz_.*[]:é \n'\"#&-", min_size=1, max_size=8)
RULES = st.fixed_dictionaries(
    {"targets": st.lists(WORDS, min_size=1, max_size=3)},
    optional={
        "name": WORDS,
        "exclude": st.lists(WORDS, max_size=2),
        "folds": st.dictionaries(st.sampled_from(["out", "in"]), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
        "rank": st.integers(1, 10**6)
        | st.lists(st.integers(1, 99), min_size=1, max_size=3)
        | st.dictionaries(WORDS, st.integers(1, 9), min_size=1),
        "scale": st.sampled_from(["alpha", "one", "alpha/rank"]) | st.floats(-1e6, 1e6),
        "dropout": st.floats(0, 0.99),
        "init": st.dictionaries(WORDS, WORDS, max_size=2),
        "shapes": st.sampled_from(["separate", "slices"]),
        "heads": st.none(),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
    },
)


@given(st.lists(RULES, max_size=3))
def test_any_spec_round_trips(tmp_path_factory, rows):
    spec = ta.Spec.from_dict({"rules": rows})
    for name in ("spec.yaml", "spec.json"):
        path = tmp_path_factory.getbasetemp() / name
        spec.save(path)
        assert ta.Spec.load(path) == spec


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_of_100_megabytes_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "weights.yaml"
    with path.open("wb") as stream:
        stream.truncate(100_000_000)
    monkeypatch.setattr(specs.Path, "read_text", lambda *a, **k: pytest.fail("read"))
    with fault(ta.FileError, str(path), "too large", "100,000,000 bytes", "is it a weight file?"):
        ta.Spec.load(path)


@pytest.mark.parametrize(
    "text",
    ["rules: []  # Größe".encode("latin-1"), "rules: []".encode("utf-16"), b"\xff\xfe\x00"],
    ids=["latin", "16", "cut"],
)
@pytest.mark.parametrize("name", ["spec.yaml", "spec.json"])
def test_a_file_that_is_not_utf_8(text, name, tmp_path):
    with fault(ta.FileError, name, "is not UTF-8", "save it as UTF-8"):
        ta.Spec.load(file_of(tmp_path, text, name))


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("a.yaml", "rules:\n- {preset: lora, rank: 2, rank: 3}", "rank"),
        ("b.yaml", "rules: []\nrules: []", "rules"),
        ("c.yaml", "rules:\n- preset: lora\n  folds:\n    out: [2]\n    out: [3]", "out"),
        ("d.yaml", "defaults: {targets: [a], 'targets': [b]}\nrules: []", "targets"),
        ("e.json", '{"rules": [{"preset": "lora", "rank": 2, "rank": 3}]}', "rank"),
        ("f.json", '{"rules": [], "rules": []}', "rules"),
    ],
)
def test_a_key_that_is_given_twice(name, text, key, tmp_path):
    with fault(ta.SpecError, f"key '{key}' is given twice", "keep one of them"):
        ta.Spec.load(file_of(tmp_path, text, name))


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, levels)]
    return "\n".join([*lines, f"rules: [{{targets: *a{levels - 1}}}]"])


HOSTILE = {
    "a bomb": bomb(12),
    "a bomb in a rule": "rules:\n- preset: lora\n  options:\n"
    + "".join(f"    {line}\n" for line in bomb(12).splitlines()[:-1]),
    "an endless list": "rules: &r [*r]",
    "deep lists": "rules: " + "[" * 5000,
    "deep maps": "{a: " * 5000,
    "a long number": "rules: [{preset: lora, rank: " + "9" * 5000 + "}]",
    "python": "rules: !!python/object/apply:os.system ['true']",
    "a tab": "rules:\n\t- preset: lora",
    "zeros": "\0\0\0\0",
    "two documents": "rules: []\n---\nrules: []",
    "a list as a key": "? [1, 2]\n: 3",
    "a date": "2001-01-01",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_refused_at_once(text, tmp_path):
    begin = time.process_time()
    with fault(ta.TensorAdaptError):
        ta.Spec.load(file_of(tmp_path, text))
    assert time.process_time() - begin < 10  # a bomb takes years


@pytest.mark.parametrize(
    "text",
    ["", "[", "[" * 100_000, "{'rules': []}", '{"rules": [{"preset": "lora", "alpha": NaN}]}', "1" * 5000, "null"],
)
def test_hostile_json_is_refused(text, tmp_path):
    with fault(ta.TensorAdaptError):
        ta.Spec.load(file_of(tmp_path, text, "spec.json"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a spec is a mapping with a list of rules"),
        ("lora", "a spec is a mapping with a list of rules"),
        ("- preset: lora", "a spec is a mapping with a list of rules"),
        ("rules: lora", "a spec is a mapping with a list of rules"),
        ("rules: [lora]", "a rule is a mapping from field to value"),
        ("rules: [{1: 2}]", "a rule is a mapping from field to value"),
        ("rules: []\nrule: []", "unknown key 'rule' in a spec"),
        ("rules: []\n1: 2", "unknown key 1 in a spec"),
        ("rules: [{}]\ndefaults: [lora]", "defaults"),
        ("rules: [{}]\ndefaults: lora", "defaults"),
    ],
)
def test_what_is_no_spec(text, says, tmp_path):
    with fault(ta.SpecError, says):
        ta.Spec.load(file_of(tmp_path, text))


@pytest.mark.parametrize("data", [None, [], "rules", 3, {}], ids=repr)
def test_what_is_no_mapping(data):
    with fault(ta.SpecError, "a spec is a mapping with a list of rules"):
        ta.Spec.from_dict(data)


def test_paths_without_a_spec(tmp_path):
    for path in (tmp_path, tmp_path / "missing.yaml"):
        with fault(ta.FileError, f"no spec file at {path}", "give the path"):
            ta.Spec.load(path)


def test_paths_that_cannot_be_read_or_written(tmp_path, monkeypatch):
    path = file_of(tmp_path, "rules: []")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(specs.Path, "read_text", denied)
        with fault(ta.FileError, str(path), "Permission denied"):
            ta.Spec.load(path)
    for target in (tmp_path / "missing" / "spec.yaml", path / "spec.yaml", tmp_path):
        with fault(ta.FileError, f"{target} cannot be written"):
            ta.preset("lora").save(target)


def test_saving_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = file_of(tmp_path, "rules: []")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for where, name in ((specs.Path, "write_text"), (specs.Path, "mkdir"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, full)
            with fault(ta.FileError, "cannot be written", "No space left"):
                ta.preset("lora").save(path)
        assert path.read_text() == "rules: []" and list(tmp_path.iterdir()) == [path]


# -- fields -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "near"),
    [("target", "targets"), ("rnak", "rank"), ("colour", "the fields are name, targets"), ("Rank", "rank")],
)
def test_unknown_keys_are_suggested(field, near):
    with fault(ta.SpecError, f"unknown key '{field}' in a rule", near):
        ta.Spec.from_dict({"rules": [{"preset": "lora", field: 1}]})
    with fault(ta.SpecError, field, near.removeprefix("the fields are name, ")):
        ta.preset("lora", **{field: 1})


@pytest.mark.parametrize(
    ("name", "field", "says"),
    [
        ("krona", {"rank": 4}, "its own: folds"),
        ("quanta", {"rank": 4}, "its own: folds"),
        ("lora", {"factor": 4}, "its own: rank"),
        ("lora", {"heads": 4}, "its own: rank"),
        ("lokr", {"tt_rank": 4}, "its own: rank, factor"),
    ],
)
def test_a_parameter_that_the_preset_lacks(name, field, says):
    with fault(ta.SpecError, f"preset '{name}' has no parameter '{next(iter(field))}'", says):
        ta.preset(name, **field)
    with fault(ta.SpecError, f"preset '{name}' has no parameter '{next(iter(field))}'", says):
        ta.plan(ta.Spec.from_dict({"rules": [{"preset": name, "targets": ["query"], "options": field}]}), SHAPES)


def test_a_preset_that_is_not_there():
    with fault(ta.SpecError, "no preset 'lotrr'", "did you mean lotr"):
        ta.preset("lotrr")
    with fault(ta.SpecError, "no preset 'zzz'", "lora, lotr"):
        ta.plan(ta.Spec.from_dict({"rules": [{"preset": "zzz", "targets": ["query"]}]}), SHAPES)


def test_a_parameter_that_is_given_twice():
    with fault(ta.SpecError, "'rank' is given twice", "options"):
        ta.plan(ta.Spec.from_dict({"rules": [{"preset": "lora", "rank": 2, "options": {"rank": 3}}]}), SHAPES)


RANKS = [0, -1, 2.0, 2.5, True, "8", None, [], [0], [2, -1], [2.5], {"out": 0}, {"out": 2.5}, {"out": True}, 10**400]


@pytest.mark.parametrize("rank", RANKS, ids=repr)
def test_what_is_no_rank(rank):
    with fault(ta.RankError, "is not a rank", repr(rank)[:60], "positive integer", "rank=8"):
        ta.preset("lora", rank=rank, targets=["query"])
    with fault(ta.RankError, "is not a rank"):
        ta.Rule(rank=rank)
    with fault(ta.RankError, "is not a rank"):
        ta.Rule(ranks={"group": rank})


@pytest.mark.parametrize(
    ("rule", "bond"),
    [
        ({"rank": 17}, ("out", 16)),
        ({"rank": 17, "format": "network", "network": "core_out: out a, b: a in -> out in"}, ("a", 16)),
        ({"rank": 3, "axes": ["layer", "out", "in"], "init": {"core_layer": "zero"}}, ("layer", 2)),
        ({"rank": 17, "format": "tucker", "init": {"core": "zero"}}, ("out", 16)),
        ({"rank": {"out": 17, "in": 2}, "format": "tucker", "init": {"core": "zero"}}, ("out", 2)),
    ],
)
def test_a_rank_above_its_bond(rule, bond):
    name, limit = bond
    with fault(ta.RankError, f"of bond '{name}' is above its limit", f"at most {limit},", f"use rank <= {limit}"):
        planned({**rule, "excess": "error"})
    (capped, *_) = planned({**rule, "excess": "cap"}).groups
    (kept, *_) = planned({**rule, "excess": "keep"}).groups
    asked = rule["rank"]["out"] if isinstance(rule["rank"], dict) else rule["rank"]
    assert [next(v for k, v in g.rank.items() if k.endswith(name)) for g in (capped, kept)] == [limit, asked]


def test_a_rank_above_its_bond_is_capped_aloud():
    assert any("capped at 16" in note for note in planned({"rank": 99}).notes)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"rank": [2, 3]}, "2"),
        ({"rank": {"outt": 2}}, "outt"),
        ({"rank": {}}, "out"),
        ({"rank": {"out": 2, "layer": 2}, "format": "tucker", "init": {"core": "zero"}}, "layer"),
        ({"ranks": {"nobody": 3}}, "nobody"),
    ],
)
def test_ranks_for_bonds_that_are_not_there(rule, says):
    with fault(ta.TensorAdaptError, says):
        planned(rule)


@pytest.mark.parametrize(
    ("folds", "says"),
    [
        ({"out": [4, 5]}, ["do not multiply out", "product of 16", "(4, 4)"]),
        ({"out": [-4, -4]}, ["folds"]),
        ({"out": [0, 16]}, ["folds"]),
        ({"out": [4.0, 4]}, ["folds"]),
        ({"out": []}, ["folds"]),
        ({"out": "auto:0"}, ["auto:0", "auto:3"]),
        ({"out": "auto:x"}, ["auto:x", "auto:3"]),
        ({"out": "halves"}, ["halves", "auto:3"]),
        ({"out": ["a", "b"]}, ["'a', 'b'", "name=size"]),
        ({"out": ["a=0", "b"]}, ["out"]),
        ({"out": ["out", "b=4"]}, ["out"]),
        ({"out": ["a=4", "a=4"]}, ["a"]),
        ({"outt": [4, 4]}, ["'outt'", "out, in"]),
        ({"layer": [2, 1]}, ["'layer'", "out, in"]),
    ],
)
def test_folds_that_do_not_fit(folds, says):
    with fault(ta.TensorAdaptError, *says):
        planned({"folds": folds, "init": {}, "start": "nonzero"})


def test_folds_of_a_prime():
    """A list has to multiply out; `auto` fills up with ones, and the adapter works."""
    prime = {"layer.0.query": (17, 13)}
    with fault(ta.ShapeError, "do not multiply out", "product of 17", "(17, 1, 1)", "auto:3"):
        ta.plan(ta.preset("tt_lora", rank=2, folds=[4, 2, 2], targets=["query"]), prime)
    model = nn.Sequential(nn.Linear(13, 17))
    adapter = ta.attach(model, ta.preset("tt_lora", rank=2, folds="auto:3", targets=["0"]))
    assert [adapter.plan.groups[0].diagram.sizes[f"out_{k}"] for k in range(3)] == [17, 1, 1]
    x = tiny.noise(2, 13)
    attached = model(x)
    adapter.merge()
    assert torch.allclose(model(x), attached, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"init": {}}, ["exactly one zero node", "0 zero nodes", "start: nonzero"]),
        ({"init": {"core_out": "zero", "core_in": "zero"}}, ["exactly one zero node", "2 zero nodes"]),
        ({"init": {"*": "zero"}}, ["exactly one zero node", "2 zero nodes"]),
        ({"zero": "core_in"}, ["exactly one zero node", "2 zero nodes"]),
        ({"frozen": ["core_out"]}, ["core_out is zero and frozen", "core_in"]),
        ({"start": "nonzero"}, ["'core_out' is zero, but the start is 'nonzero'", "start: zero"]),
        ({"start": "difference"}, ["'core_out' is zero, but the start is 'difference'"]),
        ({"zero": "core"}, ["zero names the node 'core'", "core_out, core_in"]),
        ({"frozen": ["B"]}, ["frozen names the node 'B'", "core_out, core_in"]),
        ({"init": {"core_out": "zero", "A": "eye"}}, ["init names the node 'A'", "core_out, core_in"]),
    ],
)
def test_nodes_of_a_start(rule, says):
    with fault(ta.SpecError, *says):
        planned(rule)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"network": "out a, a in -> out in"}, ["'network' has no effect", "format: network"]),
        ({"options": {"rank": 2}}, ["'options' has no effect", "a preset"]),
        ({"slot": [4, 4]}, ["'slot' has no effect", "shapes: slots"]),
        ({"compress": ["out"]}, ["'compress' has no effect", "format: tucker"]),
        ({"start": "nonzero", "zero": "core_in"}, ["'zero' has no effect", "start: zero"]),
        ({"heads": 4}, ["'heads' has no effect", "head"]),
        ({"kv_heads": 4}, ["'kv_heads' has no effect", "head"]),
        ({"alpha": 4.0}, ["'alpha' has no effect"]),
        (
            {"format": "network", "network": "out a, a in -> out in", "axes": ["out", "in"]},
            ["'axes' has no effect", "network"],
        ),
        ({"format": "network"}, ["needs a network", "out a, a in"]),
        ({"dropout": 0.1, "dropout_at": "code", "start": "difference"}, ["do not go together", "dropout_at: in"]),
        ({"format": "tensor"}, ["'format'", "tt, tucker, cp, ttm or network"]),
        ({"dropout": 1.0}, ["'dropout'", "[0, 1)"]),
        ({"dropout": -0.1}, ["'dropout'"]),
        ({"scale": float("nan")}, ["'scale'"]),
        ({"scale": float("inf")}, ["'scale'"]),
        ({"scale": "alpha*rank"}, ["'scale'"]),
        ({"scale": True}, ["'scale'"]),
        ({"alpha": "big", "scale": "alpha"}, ["'alpha'"]),
        ({"slot": [0, 4], "shapes": "slots"}, ["'slot'"]),
        ({"heads": 0}, ["'heads'"]),
        ({"heads": 2.0}, ["'heads'"]),
        ({"targets": 3}, ["'targets'"]),
        ({"targets": [["query"]]}, ["'targets'"]),
        ({"layout": {"query": "in, out"}}, ["'layout'"]),
        ({"dtype": "int8"}, ["'dtype'"]),
        ({"init": {"core_in": 3}}, ["'init'"]),
    ],
)
def test_fields_without_effect_or_of_another_kind(rule, says):
    with fault(ta.SpecError, *says):
        planned(rule)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"axes": ["out"]}, ["lacks the axis 'in'", "add 'in'"]),
        ({"axes": ["out", "in", "depth"]}, ["unknown axis 'depth'", "layer"]),
        ({"axes": ["out", "in", "in"]}, ["twice"]),
        ({"axes": ["site", "layer", "out", "in"]}, ["site"]),
        ({"axes": ["expert", "out", "in"]}, ["no expert", "site"]),
        ({"pattern": "encoder.layer.{role}.self.{layer}"}, ["the pattern does not match", "mend the pattern"]),
        ({"format": "tucker", "compress": ["depth"], "init": {"core": "zero"}}, ["compress names the axis 'depth'"]),
        (
            {"format": "tucker", "compress": ["out"], "folds": {"out": [4, 4]}, "init": {"core": "zero"}},
            ["compress names the axis 'out'", "named by its folds", "out_0"],
        ),
        ({"format": "network", "network": "out a, a in"}, ["nodes -> axes", "write for example"]),
        ({"format": "network", "network": "out a, b in -> out in"}, ["bond 'a' ends nowhere"]),
        ({"format": "network", "network": "out a a, a in -> out in"}, ["each once"]),
        ({"format": "network", "network": "x: out a, x: a in -> out in"}, ["given twice"]),
        ({"format": "network", "network": "1x: out a, a in -> out in"}, ["no identifier"]),
        ({"init": {"core_out": "zero", "core_in": "gauss(1)"}}, ["no law 'gauss(1)'", "normal(...)"]),
        ({"init": {"core_out": "zero", "core_in": "normal(1/width)"}}, ["cannot evaluate '1/width'", "sqrt()"]),
        ({"init": {"core_out": "zero", "core_in": "normal(10**10**10)"}}, ["cannot evaluate"]),
        ({"init": {"core_out": "zero", "core_in": "normal(__import__('os'))"}}, ["cannot evaluate"]),
    ],
)
def test_tensors_that_cannot_be(rule, says):
    with fault(ta.TensorAdaptError, *says):
        ta.attach(tiny.bert(), ta.Spec.from_dict({"rules": [{**LORA, **rule}]}))


def test_an_empty_spec_is_an_error():
    with fault(ta.TensorAdaptError, "no rules"):
        ta.plan(ta.Spec(), SHAPES)


# -- narrow sites -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ta.PRESETS if n != "locon"])
@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1)], ids=str)
def test_narrow_sites_are_adapted_like_any(name, shape):
    """The head of a regression has one output."""
    out, inp = shape
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out), nn.Linear(inp, out))
    heads = {"heads": 1} if "heads" in ta.PRESETS[name].parameters else {}
    heads |= {"projections": ["1"]} if name == "cara" else {}
    adapter = ta.attach(model, ta.preset(name, targets=["0"] if name == "cara" else ["0", "1"], **heads))
    tiny.shake(adapter)
    x = tiny.noise(3, inp)
    attached = [model[k](x) for k in range(2)]
    bases = [nn.functional.linear(x, model[k].weight, model[k].bias) for k in range(2)]
    assert not any(torch.allclose(y, base, atol=1e-5) for y, base in zip(attached, bases, strict=True))
    adapter.merge()
    assert all(torch.allclose(model[k](x), y, atol=1e-4) for k, y in enumerate(attached))


FIELDS = {
    "name": "mine",
    "targets": ["*query"],
    "exclude": ["*layer.0.*"],
    "default": "all-linear",
    "pattern": "layer.{layer}.self.{role}",
    "parts": {"query": ["a", "b"]},
    "layout": {"query": "out in"},
    "delivery": "weight",
    "ranks": {},
    "excess": "cap",
    "shapes": "separate",
    "slot": [8, 8],
    "scale": 0.5,
    "alpha": 3.0,
    "dropout": 0.25,
    "dropout_at": "in",
    "start": "difference",
    "init": {"*": "normal(0.5)"},
    "frozen": [],
    "train": ["pooler"],
    "dtype": "float64",
}


@pytest.mark.parametrize("name", ta.PRESETS)
def test_every_preset_takes_every_field_of_a_rule(name):
    """By itself where it has an effect there; beside the field that gives it one where it has none."""
    plain = ta.PRESETS[name].rules
    trained = [r.zero or next((n for n, law in r.init.items() if law == "zero"), "") for r in plain]
    for field, value in {**FIELDS, "zero": trained[0]}.items():
        beside: dict = {}
        if field == "slot" and all(r.shapes != "slots" for r in plain):
            beside = {"shapes": "slots"}
            if "site" not in {a for r in plain for a in r.tensor_axes}:
                with fault(ta.SpecError, "need an axis"):
                    ta.preset(name, slot=value, **beside)
                continue
        if field == "alpha" and not any(str(r.scale).startswith("alpha") for r in plain):
            beside = {"scale": "alpha"}
        if field == "zero" and not value:
            continue
        made = ta.preset(name, **{field: value}, **beside).rules
        kept = [getattr(rule, field) for rule in made]
        whole = {"shapes": "slots", "axes": ["site", "out", "in"], "scale": "alpha", field: value}
        wanted = getattr(ta.Rule(**whole), field)
        if field in ("init", "exclude"):
            assert any(set(wanted) <= set(one) for one in kept), (field, kept)
        else:
            assert wanted in kept, (field, kept)


def test_fields_of_one_of_several_rules_go_to_it():
    shapes = {f"layer.{k}.self.{role}": (16, 16) for k in range(2) for role in ("query", "key", "value")}
    shapes |= {f"layer.{k}.mlp.{role}": size for k in range(2) for role, size in (("up", (64, 16)), ("down", (16, 64)))}
    more = {"heads": 4, "projections": ["up", "down"]}
    rest = {"slot": (8, 16), "init": {"factor_head": "normal(1)", "factor_out": "normal(2)"}, "frozen": "factor_head"}
    attention, blocks = ta.plan(ta.preset("cara", rank=2, **more, **rest), shapes).groups
    assert (blocks.diagram.sizes["out"], blocks.diagram.sizes["in"]) == (8, 16)
    assert attention.diagram.sizes["in"] == 16 and blocks.diagram.sizes["site"] == 2 * (8 + 8)
    assert (attention.laws["factor_head"], blocks.laws["factor_out"]) == ("normal(1)", "normal(2)")
    assert "factor_head" not in attention.trainable and set(blocks.trainable) == set(blocks.diagram.nodes)
    with fault(ta.SpecError, "init names the node 'factor_tail'"):
        ta.plan(ta.preset("cara", rank=2, **more, init={"factor_tail": "normal(1)"}), shapes)


def test_a_field_that_makes_another_network_points_to_rules():
    with fault(ta.SpecError, "preset 'lora' has no parameter 'axes'", "write a rule with a format of its own"):
        ta.preset("lora", axes=["layer", "out", "in"])


@pytest.mark.parametrize(
    ("rule", "notes"),
    [
        (
            {"preset": "loretta", "options": {"tt_rank": 50, "folds": "auto:2"}},
            ["rank 50 of bond a_0 is capped at 4", "b_1"],
        ),
        (
            {"axes": ["out", "in"], "folds": {"in": [4, 4]}, "rank": [4, 90], "excess": "cap"},
            ["rank 90 of bond r_in_0"],
        ),
        ({"format": "tucker", "rank": {"out": 99, "in": 2}, "excess": "cap"}, ["rank 99 of bond r_out is capped at 2"]),
        ({"format": "network", "network": "out a, a in -> out in", "rank": {"a": 17}, "excess": "cap"}, ["at 16"]),
    ],
)
def test_ranks_given_by_bond_are_capped_aloud(rule, notes):
    first = {} if "preset" in rule else {"init": {"*": "normal(1)"}, "start": "nonzero"}
    made = ta.plan({"targets": ["query"], **first, **rule}, SHAPES)
    said = " ".join(made.notes)
    assert all(note in said for note in notes), made.notes


DIAGRAM = {"sizes": {"out": 4, "in": 6, "r": 2}, "nodes": {"B": ("out", "r"), "A": ("r", "in")}, "open": ("out", "in")}


def test_equal_diagrams_hash_alike_and_other_orders_of_nodes_are_others():
    """Nodes are the operands of an equation, in order; sizes and folds are looked up by name."""
    folds = {"out": ("a", "b"), "in": ("c",)}
    made = Diagram(**DIAGRAM, folds=folds)
    sizes = dict(reversed(DIAGRAM["sizes"].items()))
    turned = Diagram(**{**DIAGRAM, "sizes": sizes}, folds=dict(reversed(folds.items())))
    assert made == turned and hash(made) == hash(turned) and len({made, turned}) == 1
    others = [
        {"nodes": dict(reversed(DIAGRAM["nodes"].items()))},
        {"sizes": {**DIAGRAM["sizes"], "r": 3}},
        {"open": ("in", "out")},
    ]
    for other in [*others, {"folds": {}}]:
        assert Diagram(**{**DIAGRAM, "folds": folds, **other}) != made
    assert made != "B[out r]"


def test_rows_of_a_plan_tell_diagrams_apart_whose_hashes_are_equal(monkeypatch):
    """A hash says that two may be equal, not that they are."""
    spec = [{**LORA, "targets": [f"layer.{k}.self.query"], "rank": k + 1} for k in range(2)]
    made = ta.plan(ta.Spec.from_dict({"rules": spec}), SHAPES)
    monkeypatch.setattr(Diagram, "__hash__", lambda self: 1)
    assert len(alike(made.groups)) == 2
