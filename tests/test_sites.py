"""Sites: where they come from, what their coordinates are, and which of them a rule means."""

import json
import struct
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import tensoradapt as ta
from tensoradapt.scan import scan
from tensoradapt.sites import by_pattern, locate
from tensoradapt.targets import matches


def sites(model, **fields):
    """The sites of one LoRA rule by path."""
    plan = ta.plan(ta.preset("lora", rank=1, **fields), model)
    return {p.site.path: p.site for group in plan.groups for p in group.placements}


def roles(model) -> dict[str, str]:
    return {site.path: site.coordinates["role"] for site in scan(model).sites}


# -- coordinates ----------------------------------------------------------------------------------------------------


def test_the_three_dense_of_bert_are_distinct():
    found = roles(tiny.bert())
    layer = {path.removeprefix("encoder.layer.1."): role for path, role in found.items() if "layer.1." in path}
    assert layer == {
        "attention.self.query": "query",
        "attention.self.key": "key",
        "attention.self.value": "value",
        "attention.output.dense": "attention.output.dense",
        "intermediate.dense": "intermediate.dense",
        "output.dense": "output.dense",
    }
    assert found["pooler.dense"] == "pooler.dense"  # nothing is said of a pooler by the last of its words


def test_the_two_c_proj_of_gpt2_are_distinct():
    found = roles(tiny.gpt2())
    assert (found["transformer.h.1.attn.c_proj"], found["transformer.h.1.mlp.c_proj"]) == ("attn.c_proj", "mlp.c_proj")


def test_the_two_stacks_of_t5_are_distinct():
    found = {site.path: dict(site.coordinates) for site in scan(tiny.t5()).sites}
    encoder, decoder = (found[f"{s}.block.1.layer.0.SelfAttention.q"] for s in ("encoder", "decoder"))
    assert (encoder["stack"], encoder["layer"]) == ("encoder.block", 1)
    assert (decoder["stack"], decoder["layer"]) == ("decoder.block", 1)
    assert found["decoder.block.1.layer.1.EncDecAttention.q"]["role"] == "EncDecAttention.q"
    assert len({tuple(sorted(where.items())) for where in found.values()}) == len(found)


def test_experts_as_modules():
    where = locate(
        [f"model.layers.{k}.block_sparse_moe.experts.{e}.w{w}" for k in (0, 1) for e in (0, 7) for w in (1, 2)]
    )
    expected = {"stack": "model.layers", "layer": 1, "expert": 7, "role": "w2"}
    assert where["model.layers.1.block_sparse_moe.experts.7.w2"] == expected


def test_experts_of_a_model_without_layers():
    where = locate(["moe.experts.0.w", "moe.experts.1.w", "experts.0.w", "gate"])
    assert where["moe.experts.1.w"] == {"expert": 1, "role": "moe.experts.w"}
    assert where["experts.0.w"] == {"expert": 0, "role": "experts.w"}


def test_experts_as_one_parameter():
    found = {site.path: site for site in scan(tiny.mixtral()).sites}
    site = found["model.layers.0.mlp.experts.gate_up_proj[2]"]
    assert (site.shape, site.index, site.layout, site.delivery) == ((48, 16), 2, "out in", "weight")
    assert dict(site.coordinates) == {"stack": "model.layers", "layer": 0, "role": "gate_up_proj", "expert": 2}
    router = found["model.layers.0.mlp.gate"]  # a module of its own class with a weight: named like any module
    assert (router.shape, router.coordinates["role"], router.delivery) == ((3, 16), "gate", "weight")


def test_transposed_experts_and_no_biases():
    found = {site.path: site for site in scan(tiny.gpt_oss()).sites}
    site = found["model.layers.0.mlp.experts.down_proj[1]"]
    assert (site.shape, site.layout) == ((16, 24), "in out")
    assert not [path for path in found if "bias" in path]


def test_layers_of_a_sequential():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 5)))
    found = {site.path: dict(site.coordinates) for site in scan(model).sites}
    assert found["0"] == {"stack": "", "layer": 0, "role": ""}
    assert found["2.0"] == {"stack": "", "layer": 2, "role": "0"}
    assert set(sites(model, targets=["0", "2.0"])) == {"0", "2.0"}


SIDES = ((0, "SelfAttention.q"), (1, "EncDecAttention.q"), (2, "DenseReluDense.wi"))
NUMBERED = {
    "a module in a container": (
        {f"0.model.encoder.layer.{k}.attention.self.query": (8, 8) for k in range(4)} | {"2.linear": (8, 8)},
        {"0.model.encoder.layer.3.attention.self.query": ("0.model.encoder.layer", 3), "2.linear": (None, None)},
    ),
    "two towers": (
        {f"towers.{t}.model.layers.{k}.q": (8, 8) for t in range(2) for k in range(4)},
        {"towers.1.model.layers.3.q": ("towers.1.model.layers", 3)},
    ),
    "as many towers as layers": (
        {f"towers.{t}.model.layers.{k}.q": (8, 8) for t in range(2) for k in range(2)},
        {"towers.1.model.layers.0.q": ("towers.1.model.layers", 0)},
    ),
    "one block of layers": (
        {f"blocks.0.layers.{k}.q": (8, 8) for k in range(6)},
        {"blocks.0.layers.5.q": ("blocks.0.layers", 5)},
    ),
    "a part of the weights": ({"0.encoder.layer.0.q": (8, 8)}, {"0.encoder.layer.0.q": ("0.encoder.layer", 0)}),
    "another part": ({"towers.1.layers.4.q": (8, 8)}, {"towers.1.layers.4.q": ("towers.1.layers", 4)}),
    "stages and blocks": (
        {f"layers.{s}.blocks.{b}.attn.q": (8 << s,) * 2 for s in range(3) for b in range((1, 2, 6)[s])}
        | {"layers.1.downsample.reduction": (4, 4)},
        {
            "layers.2.blocks.3.attn.q": ("layers.2.blocks", 3),
            "layers.0.blocks.0.attn.q": ("layers.0.blocks", 0),
            "layers.1.downsample.reduction": ("layers", 1),
        },
    ),
    "stages and blocks without names": (
        {f"features.{s}.{b}.mlp.{m}": (8 << s, 4) for s in (1, 3) for b in range(2) for m in (0, 3)},
        {"features.3.1.mlp.3": ("features.3", 1)},
    ),
    "parts of a block": (
        {f"block.{b}.layer.{k}.{name}": (8, 8) for b in range(3) for k, name in SIDES},
        {"block.2.layer.1.EncDecAttention.q": ("block", 2)},
    ),
    "a sequence in a layer": (
        {f"layers.{k}.net.{j}": (8, 8) for k in range(2) for j in (0, 2)},
        {"layers.1.net.2": ("layers", 1)},
    ),
    "layers of unlike widths": (
        {f"layers.{k}.{r}": (8 + k, 8) for k in range(3) for r in ("q", "net.0")},
        {"layers.2.net.0": ("layers", 2)},
    ),
}


@pytest.mark.parametrize("name", NUMBERED)
def test_the_layer_is_the_number_that_runs_through_the_layers(name):
    shapes, expected = NUMBERED[name]
    found = {site.path: site.coordinates for site in scan(shapes).sites}
    assert {p: (found[p].get("stack"), found[p].get("layer")) for p in expected} == expected


def inside(model):
    return nn.ModuleList([nn.Identity(), nn.ModuleDict({"auto_model": model})])


@pytest.mark.parametrize("around", [nn.Sequential, inside, lambda m: nn.Sequential(nn.Sequential(m), nn.Linear(16, 3))])
@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.t5, tiny.mixtral])
@pytest.mark.parametrize("name", ["lotr_by_role", "lotr", "lora"])
def test_a_model_in_a_container_has_the_groups_of_the_model(name, make, around):
    def groups(model):
        made = ta.plan(ta.preset(name, rank=2, targets="block"), model).groups
        return [(g.diagram, [tuple(p.index.items()) for p in g.placements]) for g in made]

    assert groups(around(make())) == groups(make())


def swin():
    sizes = {"embed_dim": 8, "depths": [1, 2, 3], "num_heads": [1, 2, 4], "window_size": 4, "image_size": 32}
    return transformers.SwinModel(transformers.SwinConfig(**sizes, patch_size=2))


def segformer():
    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 2, 2], "num_attention_heads": [1, 2, 2, 4]}
    return transformers.SegformerModel(transformers.SegformerConfig(**sizes))


@pytest.mark.parametrize("make", [swin, segformer, lambda: nn.Sequential(tiny.bert()), tiny.t5, tiny.mixtral])
def test_a_live_model_and_its_weights_have_the_same_coordinates(make):
    model = make()
    live = {site.path: dict(site.coordinates) for site in scan(model).sites}
    weights = {n.removesuffix(".weight"): t.shape for n, t in model.named_parameters() if n.endswith("weight")}
    held = {site.path: dict(site.coordinates) for site in scan({p: s for p, s in weights.items() if len(s) == 2}).sites}
    assert {p: (c.get("stack"), c.get("layer")) for p, c in held.items()} == {
        p: (live[p].get("stack"), live[p].get("layer")) for p in held
    }


def test_a_plan_says_where_the_layer_is_not_certain():
    shapes = {f"net.{t}.part.{k}.{role}": (8, 8) for t in (0, 1) for k in (0, 1) for role in ("query", "value")}
    made = ta.plan(ta.preset("lora", rank=1, targets=["query"]), shapes)
    (note,) = [note for note in made.notes if "certain" in note]
    assert "net.*.part.*.query" in note and "net.{stack}.part.{layer}.{role}" in note
    told = ta.plan(ta.preset("lora", rank=1, targets=["query"], pattern="net.{stack}.part.{layer}.{role}"), shapes)
    where = [dict(p.site.coordinates) for g in told.groups for p in g.placements]
    assert where[-1] == {"stack": 1, "layer": 1, "role": "query"} and not told.notes
    for sure in (tiny.bert(), tiny.t5(), nn.Sequential(tiny.gpt2()), swin()):
        notes = ta.plan(ta.preset("lora", rank=1, targets="block"), sure).notes
        assert not [note for note in notes if "certain" in note]


def test_swin_shares_factors_within_a_stage():
    made = ta.plan(ta.preset("lotr_by_role", rank=2, targets=["q_proj"]), swin())
    assert {g.labels["layer"] for g in made.groups} == {(0,), (0, 1), (0, 1, 2)}


def test_equal_coordinates_in_one_group_are_an_error_that_names_both():
    shapes = {"a.0.x.0.w": (4, 4), "a.0.x.1.w": (4, 4)}
    spec = ta.Spec(
        rules=(ta.Rule(targets=("re:.*",), axes=("layer", "out", "in"), pattern="a.{layer}.{role}", start="nonzero"),)
    )
    assert ta.plan(spec, shapes).num_sites == 2  # roles x.0.w and x.1.w: tensors of their own
    same_role = ta.Spec(rules=(spec.rules[0].model_copy(update={"pattern": "a.0.x.{layer}.{role}"}),))
    with pytest.raises(ta.SiteError, match=r"b\.0\.x\.0\.w"):
        ta.plan(same_role, {"b.0.x.0.w": (4, 4)} | shapes)
    collide = {"a.0.w": (4, 4), "b.0.w": (4, 4)}
    with pytest.raises(ta.SiteError, match=r"a\.0\.w and b\.0\.w have equal coordinates(?s:.*)axis 'site'"):
        ta.plan(
            ta.Spec(
                rules=(ta.Rule(targets=("w",), axes=("layer", "out", "in"), pattern="{layer}.{role}", start="nonzero"),)
            ),
            collide,
        )


# -- patterns and targets ---------------------------------------------------------------------------------------------


def test_a_pattern_with_named_fields():
    where = by_pattern("encoder.layer.{layer}.attention.self.{role}", "bert.encoder.layer.11.attention.self.query")
    assert where == {"layer": 11, "role": "query"}
    assert by_pattern("{stack}.block.{layer}.{role}", "decoder.block.2.layer.0.q") == {
        "stack": "decoder",
        "layer": 2,
        "role": "layer.0.q",
    }
    assert by_pattern("encoder.layer.{layer}.{role}", "encoder.layers.1.query") is None
    assert by_pattern("experts.{role}[{expert}]", "layers.0.experts.up[3]") == {"role": "up", "expert": 3}


def test_a_pattern_overrides_the_coordinates():
    shapes = {f"net.{side}.{k}.proj": (4, 4) for side in "ab" for k in range(3)}
    pattern = "net.{role}.{layer}.proj"
    spec = ta.preset("mpo_shared", rank=2, folds=[2, 2, 1], targets=["proj"], pattern=pattern)
    plan = ta.plan(spec, shapes)
    assert {g.name: g.labels["layer"] for g in plan.groups} == {"a": (0, 1, 2), "b": (0, 1, 2)}


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("encoder.{depth}.{role}", "{layer}, {role}, {stack}, {expert}, {task}"),
        ("{layer}.{layer}", "each once"),
        ("decoder.layer.{layer}.{role}", "mend the pattern, or exclude the site"),
    ],
)
def test_a_pattern_that_does_not_fit_is_an_error(pattern, says):
    with pytest.raises(ta.TensorAdaptError) as caught:
        sites({"encoder.layer.0.query": (4, 4)}, targets=["query"], pattern=pattern)
    assert says in str(caught.value)


PATHS = ("h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_attn", "h.1.mlp.c_proj", "head")


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("h.0.attn.c_proj", {1}),
        ("c_proj", {1, 2, 4}),
        ("attn.c_proj", {1}),
        ("h.*.c_proj", {1, 2, 4}),
        ("*.mlp.*", {2, 4}),
        ("h.?.attn.c_attn", {0, 3}),
        (r"re:h\.1\..*", {3, 4}),
        ("re:.*proj|head", {1, 2, 4, 5}),
        ("proj", set()),  # whole components only
        ("re:c_proj", set()),  # the whole path
    ],
)
def test_targets_are_paths_suffixes_globs_or_expressions(target, found):
    assert {k for k, path in enumerate(PATHS) if matches(target, path)} == found


def test_brackets_in_a_glob_are_themselves():
    assert matches("h.*.c_attn[q]", "h.0.attn.c_attn[q]")
    assert not matches("h.*.c_attn[q]", "h.0.attn.c_attnq")


def test_excludes_take_away():
    shapes = dict.fromkeys(PATHS, (4, 4))
    assert set(sites(shapes, targets=["c_proj"], exclude=["*.mlp.*"])) == {PATHS[1]}


def test_the_first_rule_that_matches_a_site_takes_it():
    shapes = dict.fromkeys(PATHS, (4, 4))
    spec = ta.preset("lora", rank=1, targets=["mlp.c_proj"], name="one") + ta.preset("lora", rank=2, targets=["c_proj"])
    ranks = {
        g.paths[0]: g.rank["r"] if "r" in g.rank else next(iter(g.rank.values())) for g in ta.plan(spec, shapes).groups
    }
    assert ranks == {PATHS[2]: 1, PATHS[4]: 1, PATHS[1]: 2}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"targets": ["qery"]}, ["'qery' matches no site", "did you mean 'query'?"]),
        ({"targets": ["query", "zzz"]}, ["'zzz' matches no site", "query"]),
        ({"targets": [], "default": ""}, ["no targets", "targets=["]),
        ({"targets": ["re:("]}, ["no regular expression"]),
        ({"targets": ["query"], "exclude": ["quary"]}, ["exclude", "'quary' matches no site", "'query'"]),
        ({"targets": ["query"], "exclude": ["query"]}, ["leaves", "exclude"]),
        ({"targets": ["query"], "parts": {"c_atn": ["q", "k"]}}, ["parts", "'c_atn' matches no site"]),
        ({"targets": ["query"], "layout": {"experts": "in out"}}, ["layout", "'experts' matches no site"]),
        ({"targets": ["query"], "layout": {"query": "in out"}}, ["query", "layout is known"]),
        ({"targets": ["query"], "parts": {"query": ["a", "b", "c"]}}, ["16 rows, not 3 equal parts", "'q': 64"]),
        ({"targets": ["query"], "parts": {"query": {"a": 3, "b": 3}}}, ["do not add up", "16"]),
        ({"targets": ["query"], "parts": {"query": {"a": 20, "b": -4}}}, ["parts of", "positive"]),
    ],
)
def test_what_matches_nothing_or_does_not_fit_is_an_error(fields, says):
    with pytest.raises(ta.TensorAdaptError) as caught:
        sites(tiny.bert(layers=1), **fields)
    for text in says:
        assert text in str(caught.value)


def test_a_rule_left_without_a_site_is_an_error():
    spec = ta.preset("lora", targets=["c_proj"]) + ta.preset("lotr", targets=["mlp.c_proj"])
    with pytest.raises(ta.SiteError, match="rule 2 is left without a site(?s:.*)put the more special rule first"):
        ta.plan(spec, dict.fromkeys(PATHS, (4, 4)))


def test_row_ranges_of_a_fused_weight():
    equal = sites(tiny.gpt2(), targets=["c_attn[q]", "c_attn[v]"], parts={"c_attn": ["q", "k", "v"]})
    assert {path: site.rows for path, site in equal.items() if ".0." in path} == {
        "transformer.h.0.attn.c_attn[q]": (0, 16),
        "transformer.h.0.attn.c_attn[v]": (32, 48),
    }
    grouped = sites({"l.0.qkv": (24, 16)}, targets=["qkv"], parts={"qkv": {"q": 16, "k": 4, "v": 4}})
    assert {site.coordinates["role"]: (site.shape, site.rows) for site in grouped.values()} == {
        "qkv[q]": ((16, 16), (0, 16)),
        "qkv[k]": ((4, 16), (16, 20)),
        "qkv[v]": ((4, 16), (20, 24)),
    }


# -- sources ----------------------------------------------------------------------------------------------------------


def table(model, **fields) -> str:
    return "\n".join(str(ta.plan(ta.preset("lotr", rank=2, targets=["q_proj", "v_proj"]), model)).splitlines()[:-1])


def test_live_meta_config_and_folder_give_one_plan(tmp_path):
    live = tiny.llama()
    with torch.device("meta"):
        meta = tiny.llama()
    live.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # a config is enough
    assert next(meta.parameters()).is_meta
    assert table(live) == table(meta) == table(tmp_path / "model") == table(str(tmp_path / "model" / "config.json"))


def test_a_config_under_another_name(tmp_path):
    (tmp_path / "small.json").write_text(tiny.llama().config.to_json_string(use_diff=False))
    assert table(tmp_path / "small.json") == table(tiny.llama())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "small.json"),
        ("[]", "small.json"),
        ("{}", "small.json"),
        ('{"model_type": "no_such_model"}', "no_such_model"),
        ('{"model_type": "bert", "hidden_size": "wide"}', "small.json"),
        ('{"model_type": "bert", "hidden_size": 7, "num_attention_heads": 4}', "small.json"),
    ],
)
def test_a_config_that_makes_no_model_is_an_error(text, says, tmp_path):
    (tmp_path / "small.json").write_text(text)
    with pytest.raises(ta.FileError, match=says):
        scan(tmp_path / "small.json")


def test_nothing_at_the_path(tmp_path):
    with pytest.raises(ta.FileError, match="no model at"):
        scan(tmp_path / "missing")
    with pytest.raises(ta.FileError, match="no .safetensors file in"):
        scan(tmp_path)


@pytest.fixture
def shards(tmp_path) -> Path:
    """A folder of two shards, without a config."""
    torch.save({}, tmp_path / "optimizer.bin")
    weights = {f"encoder.layer.{k}.query.weight": torch.zeros(6, 4) for k in range(4)}
    weights |= {"encoder.layer.0.query.bias": torch.zeros(6), "stem.weight": torch.zeros(3, 2, 5, 5)}
    names = sorted(weights)
    save_file({n: weights[n] for n in names[:3]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: weights[n] for n in names[3:]}, tmp_path / "model-00002-of-00002.safetensors")
    return tmp_path


def without_data(file: Path) -> Path:
    """The file cut off behind its header: whoever reads a tensor fails."""
    raw = file.read_bytes()
    file.write_bytes(raw[: 8 + struct.unpack("<Q", raw[:8])[0]])
    return file


def test_a_folder_of_shards_by_headers_alone(shards):
    for file in shards.glob("*.safetensors"):
        without_data(file)
    found = scan(shards)
    assert {s.path: s.shape for s in found.sites} == {f"encoder.layer.{k}.query": (6, 4) for k in range(4)} | {
        "stem": (3, 2, 5, 5)
    }
    assert found.parameters["encoder.layer.0.query.bias"] == (6,)
    assert ta.plan(ta.preset("lora", rank=2, targets=["query"]), shards).num_trainable == 4 * 2 * (6 + 4)


def test_one_file_by_its_header_alone(shards):
    file = without_data(sorted(shards.glob("*.safetensors"))[0])
    assert {s.path for s in scan(file).sites} == {"encoder.layer.0.query", "encoder.layer.1.query"}


def test_experts_in_a_header(tmp_path):
    save_file(
        {"layers.0.experts.up": torch.zeros(3, 6, 4), "layers.0.norm": torch.zeros(4)}, tmp_path / "m.safetensors"
    )
    found = {s.path: (s.shape, s.index, s.coordinates["expert"]) for s in scan(tmp_path / "m.safetensors").sites}
    assert found == {f"layers.0.experts.up[{k}]": ((6, 4), k, k) for k in range(3)}
    turned = sites(tmp_path / "m.safetensors", targets=["up"], layout={"experts.up": "in out"})
    assert {s.shape for s in turned.values()} == {(4, 6)}


def header(text: str | bytes, claimed: int | None = None) -> bytes:
    body = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(body) if claimed is None else claimed) + body


BAD_HEADERS = {
    "empty": b"",
    "short": b"\x07\x00",
    "cut": header("{}", claimed=50),
    "huge": header("{}", claimed=1 << 60),
    "no json": header("{nope"),
    "no mapping": header("[]"),
    "not utf-8": header(b"\xff\xfe{}"),
    "deep": header("[" * 100_000),
    "no shape": header('{"a.weight": {"dtype": "F32"}}'),
    "no entry": header('{"a.weight": 3}'),
    "shape of words": header('{"a.weight": {"dtype": "F32", "shape": ["x", "y"], "data_offsets": [0, 0]}}'),
    "shape is a number": header('{"a.weight": {"dtype": "F32", "shape": 4, "data_offsets": [0, 0]}}'),
}


@pytest.mark.parametrize("raw", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_damaged_header_is_an_error_that_names_the_file(raw, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(raw)
    with pytest.raises(ta.FileError, match=r"bad\.safetensors"):
        scan(tmp_path / "bad.safetensors")


def test_one_name_in_two_shards_is_an_error(shards):
    file = sorted(shards.glob("*.safetensors"))[0]
    (shards / "copy.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(ta.FileError, match="is in two files"):
        scan(shards)


def test_a_mapping_of_shapes():
    found = {
        s.path: (s.shape, s.kind, s.inp, s.kernel) for s in scan({"a": (3, 4), "c": torch.Size([8, 2, 3, 3])}).sites
    }
    assert found == {"a": ((3, 4), "linear", 4, 1), "c": ((8, 2, 3, 3), "conv", 2, 9)}


@pytest.mark.parametrize("shape", [(3,), (3, 0), (3, -1), (2, 3, 4), (3.0, 4), 5, "ab", None, (True, 4)], ids=repr)
def test_a_mapping_with_something_else_is_an_error(shape):
    with pytest.raises(ta.ShapeError, match="the shape of a is no weight's"):
        scan({"a": shape})


@pytest.mark.parametrize("model", [None, 3, ["a"]], ids=repr)
def test_what_is_no_model_is_an_error(model):
    with pytest.raises(ta.TensorAdaptError, match="no model"):
        scan(model)


def test_a_plan_allocates_no_weight(tmp_path):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 8, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))  # 70 billion entries
    found = scan(tmp_path / "config.json")
    assert (found.heads, found.kv_heads, found.head_dim) == (64, 8, 128)
    assert ta.plan(ta.preset("lora", rank=1, targets=["q_proj"]), tmp_path).num_trainable == 80 * 2 * 8192


# -- heads --------------------------------------------------------------------------------------------------------


def head_sizes(model, **fields) -> dict[str, int]:
    plan = ta.plan(ta.preset("metatt_5d", rank=2, targets=["q_proj", "v_proj"], **fields), model)
    return {g.placements[0].site.coordinates["role"]: g.diagram.sizes["head"] for g in plan.groups}


def test_heads_come_from_the_config():
    assert head_sizes(tiny.llama()) == {"q_proj": 4, "v_proj": 2}


def test_heads_that_are_given_win_over_the_config():
    assert head_sizes(tiny.llama(), heads=8, kv_heads=4) == {"q_proj": 8, "v_proj": 4}


@pytest.mark.parametrize(("make", "heads"), [(tiny.bert, 4), (tiny.gpt2, 4), (tiny.t5, 4)])
def test_heads_under_the_names_of_several_configs(make, heads):
    assert scan(make()).heads == heads


def test_heads_that_nobody_knows_are_an_error():
    with pytest.raises(ta.SpecError, match="number of heads is not known(?s:.*)pass heads="):
        head_sizes({"l.0.q_proj": (16, 16), "l.0.v_proj": (8, 16)})


# -- ties and repetitions -----------------------------------------------------------------------------------------


def test_tied_modules_know_each_other():
    found = {s.path: (s.tensor, s.aliases) for s in scan(tiny.gpt2()).sites}
    assert found["transformer.wte"] == ("transformer.wte.weight", ("lm_head",))
    assert found["lm_head"] == ("transformer.wte.weight", ("transformer.wte",))


def test_a_module_that_stands_under_two_names_is_one_site_and_no_tie():
    model = nn.Module()
    model.one = model.two = nn.Linear(3, 3)
    assert [(s.path, s.aliases) for s in scan(model).sites] == [("one", ())]


def test_an_adapter_is_no_site():
    model = tiny.bert()
    before = {s.path for s in scan(model).sites}
    ta.attach(model, ta.preset("lora", rank=1, targets=["query"]))
    assert {s.path for s in scan(model).sites} == before
    outer = nn.Sequential(model)
    assert not [s.path for s in scan(outer).sites if "tensoradapt" in s.path]


# -- a model in a container -------------------------------------------------------------------------------------------


def test_the_place_of_a_model_in_a_container_is_no_layer():
    """`nn.Sequential(encoder, pooling, head)`, as SentenceTransformer is one: layers are those of the encoder."""
    model = nn.Sequential(tiny.bert(layers=3), nn.Linear(16, 4))
    inner = {site.path: dict(site.coordinates) for site in scan(model[0]).sites}
    found = {site.path: dict(site.coordinates) for site in scan(model).sites}
    for path, coordinates in inner.items():
        stack = {"stack": f"0.{coordinates['stack']}"} if "layer" in coordinates else {}
        assert found[f"0.{path}"] == coordinates | stack
    assert "layer" not in found["1"]


def test_formats_share_over_the_layers_of_a_model_in_a_container():
    spec = ta.preset("lotr_by_role", rank=2, targets=["query", "value"])
    inner = ta.plan(spec, tiny.bert(layers=3))
    assert ta.plan(spec, nn.Sequential(tiny.bert(layers=3), nn.Tanh())).num_trainable == inner.num_trainable


@pytest.mark.parametrize(
    "paths",
    [
        ["0.q", "0.k", "1.q", "1.k"],  # layers of the root itself
        ["0.mlp.0", "0.mlp.2", "1.mlp.0", "1.mlp.2"],  # numbers within them
        ["0.weight", "4.0.conv1", "4.1.conv1", "5.0.conv1", "5.1.conv1"],  # unlike parts and like ones
    ],
)
def test_layers_of_a_root_stay_layers(paths):
    shapes = dict.fromkeys(paths, (4, 4))
    assert [s.coordinates["layer"] for s in scan(shapes).sites] == [int(path.partition(".")[0]) for path in paths]
