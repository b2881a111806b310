"""Sets of weights (`query-value`, `all-linear`, ...) against a table of architectures and PEFT's all-linear."""

import json
import warnings
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import tensoradapt as ta
from tensoradapt.io.names import plain_names
from tensoradapt.sites import from_headers
from tensoradapt.spec import SETS
from tests import tiny
from tests.toys import Convolutions, Toy

LLAMA = ("q_proj v_proj", "k_proj o_proj", "gate_proj up_proj down_proj")
BERT = ("query value", "key attention.output.dense", "intermediate.dense output.dense")
BART = ("q_proj v_proj", "k_proj out_proj", "fc1 fc2")
T5 = ("q v", "k o", "wi_0 wi_1 wo")
EXPERTS = (*LLAMA[:2], "gate_up_proj down_proj")
VIT = (*LLAMA[:2], "fc1 fc2")
NEOX = ("query_key_value", "dense", "dense_h_to_4h dense_4h_to_h")
GPT2 = ("c_attn", "attn.c_proj", "c_fc mlp.c_proj")
NONE = ("", "", "")

# Read from the source of transformers: what queries and values are in, what else its attention has, its feed-forward.
ROLES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "stablelm", "cohere"), LLAMA),
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss"), EXPERTS),
    **dict.fromkeys(("qwen2_moe", "llama4_text"), (*LLAMA[:2], "gate_proj up_proj gate_up_proj down_proj")),
    **dict.fromkeys(("bert", "roberta", "electra", "layoutlm", "big_bird", "data2vec-text", "swinv2", "dpt"), BERT),
    **dict.fromkeys(("bart", "mbart", "pegasus", "whisper", "clip", "opt"), BART),
    **dict.fromkeys(("vit", "deit", "beit", "dinov2", "swin", "segformer", "vit_mae"), VIT),
    **dict.fromkeys(("mt5", "umt5"), T5),
    **dict.fromkeys(("gpt_neox", "falcon", "bloom", "persimmon"), NEOX),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "openai-gpt"), GPT2),
    "t5": (*T5[:2], "wi wo"),
    "siglip": ("q_proj v_proj", "k_proj self_attn.out_proj", "mlp.fc1 mlp.fc2"),
    "phi": ("q_proj v_proj", "k_proj dense", "fc1 fc2"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj down_proj"),
    "glm": (*LLAMA[:2], "gate_up_proj down_proj"),
    "gptj": ("q_proj v_proj", "k_proj out_proj", "fc_in fc_out"),
    "gpt_neo": ("q_proj v_proj", "k_proj out_proj", "c_fc c_proj"),
    "codegen": ("qkv_proj", "out_proj", "fc_in fc_out"),
    "starcoder2": (*LLAMA[:2], "c_fc c_proj"),
    "mpt": ("Wqkv", "out_proj", "up_proj down_proj"),
    "modernbert": ("Wqkv", "attn.Wo", "Wi mlp.Wo"),
    "deberta": ("in_proj", "attention.output.dense", "intermediate.dense output.dense"),
    "deberta-v2": ("query_proj value_proj", "key_proj attention.output.dense", "intermediate.dense output.dense"),
    "distilbert": ("q_lin v_lin", "k_lin out_lin", "lin1 lin2"),
    "xlm": ("q_lin v_lin", "k_lin out_lin", "lin1 lin2"),
    "albert": ("query value", "key dense", "ffn ffn_output"),
    "ctrl": ("Wq Wv", "Wk dense", "ffn.0 ffn.2"),
    "wav2vec2": ("q_proj v_proj", "k_proj out_proj", "intermediate_dense output_dense"),
    "wav2vec2-conformer": ("linear_q linear_v", "linear_k linear_out", "intermediate_dense output_dense"),
    "deepseek_v3": ("q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj", "o_proj", "gate_proj up_proj down_proj"),
    "longformer": (
        "query value query_global value_global",
        "key key_global attention.output.dense",
        "intermediate.dense output.dense",
    ),
    "bark": ("att_proj", "attn.out_proj", "in_proj mlp.out_proj"),
    "mamba": NONE,
    "mamba2": NONE,
    "convnext": NONE,
    "xlnet": ("", "", "layer_1 layer_2"),
    "fnet": ("", "", "intermediate.dense output.dense"),
    "rwkv": ("", "", "feed_forward.key feed_forward.receptance feed_forward.value"),
}


def made(kind, name: str, **more):
    """A model of an architecture, two layers where its config has the field, with no memory behind it."""
    config = CONFIG_MAPPING[name]
    small = {k: 2 for k in ("num_hidden_layers",) if name not in ("segformer", "convnext", "swin", "swinv2", "gpt_neo")}
    small |= {"vocab_size": 1024} if name in ("llama", "mistral") else {}
    with torch.device("meta"):
        return kind.from_config(config(**small, **more))


def resolved(model, word: str) -> tuple[ta.Rule, dict[str, list[str]]]:
    """The rule of a plan for one set, and its sites' paths by target."""
    plan = ta.plan(ta.preset("lora", rank=1, targets=word), model)
    rule = plan.spec.rules[0]
    paths = [path for group in plan.groups for path in group.paths]
    return rule, {
        target: [p for p in paths if f".{p.partition('[')[0]}".endswith(f".{target}")] for target in rule.targets
    }


@pytest.mark.parametrize("name", ROLES)
def test_every_architecture_has_its_roles(name):
    model = made(AutoModel, name)
    query_value, rest, feed_forward = (words.split() for words in ROLES[name])
    for word, expected in (
        ("query-value", query_value),
        ("attention", [*query_value, *rest]),
        ("feed-forward", feed_forward),
    ):
        if not expected:
            with pytest.raises(ta.SiteError, match=rf"'{word}' cannot be told") as caught:
                resolved(model, word)
            assert "--target" in str(caught.value) and "re:" not in str(caught.value)
            continue
        rule, found = resolved(model, word)
        assert set(rule.targets) == set(expected), word
        assert all(found.values()) and not any("*" in t or "re:" in t for t in (*rule.targets, *rule.exclude))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "clip", "whisper"])
def test_each_layer_gives_one_weight_per_name(name):
    model = made(AutoModel, name)
    rule, found = resolved(model, "query-value")
    modules = Counter(path.rpartition(".")[2] for path, _ in model.named_modules())
    assert {target: len(paths) for target, paths in found.items()} == {t: modules[t] for t in rule.targets}


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_neox", "falcon", "bloom", "phi3", "qwen2", "qwen3", "gemma", "llama", "opt", "olmo2", "gptj"]
)
def test_all_linear_is_pefts(name):
    """PEFT: every linear layer but the output layer."""
    theirs = get_peft_model(
        made(AutoModelForCausalLM, name), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    paths = {p.removesuffix(".lora_A").removeprefix("base_model.model.") for p, _ in theirs.named_modules()}
    theirs = {
        p.removesuffix(".lora_A").removeprefix("base_model.model.")
        for p, _ in theirs.named_modules()
        if p.endswith("lora_A")
    }
    assert paths > theirs
    plan = ta.plan(ta.preset("lora", targets="all-linear"), made(AutoModelForCausalLM, name))
    assert {path for group in plan.groups for path in group.paths} == theirs


def test_all_linear_leaves_heads_and_embeddings_and_routers():
    with torch.device("meta"):
        bert = BertForSequenceClassification(BertConfig(num_hidden_layers=1))
    rule, _ = resolved(bert, "all-linear")
    assert set(rule.targets) == {"query", "key", "value", "dense"}
    mixtral = tiny.mixtral()
    rule, found = resolved(mixtral, "all-linear")
    assert set(rule.targets) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert len(found["down_proj"]) == 3  # one of each expert, none of the router


def test_a_head_of_any_name_is_left():
    """By its tie to the embedding, or by having a row for every word."""
    model = torch.nn.ModuleDict(
        {"words": torch.nn.Embedding(50, 8), "layers": torch.nn.ModuleList([torch.nn.Linear(8, 8)])}
    )
    model["unembed"], model["untied"] = torch.nn.Linear(8, 50, bias=False), torch.nn.Linear(8, 50)
    model["last"] = torch.nn.Linear(8, 8)
    model["unembed"].weight = model["words"].weight
    assert set(resolved(model, "all-linear")[0].targets) == {"layers.0", "last"}


def test_headers_tell_what_the_model_tells(tmp_path):
    """A checkpoint's header knows no classes: names have to do."""
    for model in (tiny.bert_classifier(), tiny.gpt2(), tiny.t5(), tiny.llama(), tiny.mixtral()):
        tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
        save_file(tensors, tmp_path / "model.safetensors")
        header = from_headers(tmp_path / "model.safetensors", plain_names)
        for word in ("query-value", "feed-forward", "all-linear"):
            live = {p for g in ta.plan(ta.preset("lora", targets=word), model).groups for p in g.paths}
            read = {p for g in ta.plan(ta.preset("lora", targets=word), header).groups for p in g.paths}
            assert live == read, (type(model).__name__, word)


def test_the_plan_says_what_it_took():
    plan = ta.plan(ta.preset("lora"), made(AutoModel, "llama", num_attention_heads=32))
    assert "4 sites: q_proj and v_proj of 2 layers (query-value)" in str(plan)
    assert plan.spec.rules[0].targets == ("q_proj", "v_proj") and plan.spec.rules[0].default == "query-value"
    plan = ta.plan(ta.preset("lora", targets="all-linear"), tiny.bert())
    assert "13 sites: query, key, value and dense of 2 layers and 1 outside them (all-linear)" in plan.notes
    plan = ta.plan(ta.preset("lora"), made(AutoModel, "gpt2"))
    assert any("c_attn holds the key too" in note for note in plan.notes)


def test_one_name_in_two_parts_of_a_layer_is_kept_apart():
    rule, found = resolved(tiny.bert(), "feed-forward")
    assert rule.exclude == ("attention.output.dense",)
    assert found["output.dense"] == [f"encoder.layer.{n}.output.dense" for n in range(2)]


def test_sets_and_names_mix_and_exclude():
    model = Toy(layers=2)

    def paths(**fields):
        plan = ta.plan(ta.preset("lora", **fields), model)
        return sorted({p.rpartition(".")[2] for g in plan.groups for p in g.paths})

    assert paths() == ["q_proj", "v_proj"]
    assert paths(targets=["query-value", "up_proj"]) == ["q_proj", "up_proj", "v_proj"]
    assert paths(targets="all-linear", exclude=["qkv"]) == ["down_proj", "o_proj", "up_proj"]
    assert paths(targets="attention", exclude=["query-value"]) == ["k_proj", "o_proj"]
    assert paths(targets=["*_proj"], exclude=["feed-forward"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert paths(default="feed-forward") == ["down_proj", "up_proj"]
    ranged = ta.plan(ta.preset("lora", targets="layers.[1-2].*"), Toy(layers=4))
    assert {p.split(".")[1] for g in ranged.groups for p in g.paths} == {"1", "2"}
    assert paths(targets=[], exclude=["layers.0.*"]) == ["q_proj", "v_proj"]
    with pytest.raises(ta.SiteError, match="exclude leaves nothing of qkv"):
        paths(targets="qkv", exclude=["attention"])


def test_convolutions():
    rule, found = resolved(Convolutions(), "convolutions")
    assert set(rule.targets) == {"conv1", "conv2"}
    assert ta.plan(ta.preset("locon", rank=2), Convolutions()).num_sites == 2


def test_a_weight_s_own_name_wins_over_the_set_s():
    """timm calls its fused weight `qkv`, others call a linear layer `attention`."""
    model = {"blocks.0.attention": (8, 8), "blocks.0.q": (8, 8), "blocks.0.v": (8, 8)}
    assert ta.plan(ta.preset("lora", targets="attention"), model).num_sites == 1
    assert ta.plan(ta.preset("lora"), model).num_sites == 2


def test_what_cannot_be_adapted_is_left_out_of_a_set():
    model = torch.nn.ModuleDict(
        {"conv": torch.nn.Conv2d(2, 2, 3), "up": torch.nn.ModuleDict({"conv": torch.nn.ConvTranspose2d(2, 2, 3)})}
    )
    assert ta.plan(ta.preset("locon", rank=1), model).num_sites == 1


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "falcon", "modernbert", "deepseek_v3"])
@pytest.mark.parametrize("preset", ["lorta", "metatt_5d", "cara", "tenslora_att"])
def test_the_rows_of_a_fused_weight_are_no_heads(name, preset):
    with pytest.raises(ta.SpecError, match="heads"):
        ta.plan(ta.preset(preset, rank=2), made(AutoModel, name))


def test_parts_of_a_fused_weight_have_heads():
    model = tiny.gpt2()
    plan = ta.plan(ta.preset("tenslora_att", rank=2, parts={"c_attn": ["q", "k", "v"]}), model)
    assert plan.spec.rules[0].targets == ("c_attn[q]", "c_attn[k]", "c_attn[v]")
    assert {g.diagram.sizes["head"] for g in plan.groups} == {4}
    assert ta.plan(ta.preset("lora", parts={"c_attn": ["q", "k", "v"]}), model).spec.rules[0].targets == (
        "c_attn[q]",
        "c_attn[v]",
    )


def test_presets_of_two_rules_take_a_layer_apart():
    plan = ta.plan(ta.preset("cara", rank=2), made(AutoModel, "vit"))
    first, second = plan.spec.rules
    assert set(first.targets) == {"q_proj", "k_proj", "v_proj"} and set(second.targets) == {"o_proj", "fc1", "fc2"}
    plan = ta.plan(ta.preset("cara", rank=2, targets=["q_proj"]), made(AutoModel, "vit"))
    assert plan.spec.rules[0].targets == ("q_proj",) and set(plan.spec.rules[1].targets) == {"o_proj", "fc1", "fc2"}
    assert set(ta.plan(ta.preset("fact_tk", rank=2), made(AutoModel, "vit")).spec.rules[0].targets) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    }


def test_no_preset_has_a_regular_expression():
    for name, row in ta.PRESETS.items():
        for rule in row.rules:
            assert rule.default in SETS and not rule.targets, name


def test_a_misspelt_set_is_told():
    with pytest.raises(ta.SiteError, match="did you mean 'all-linear'"):
        ta.plan(ta.preset("lora", targets="all_linear"), Toy())
    with pytest.raises(ta.SpecError, match="default.*query-value"):
        ta.preset("lora", default="everything")


def test_a_file_of_before_loads(tmp_path):
    """Older plans hold the regular expressions that presets had for targets, and no `default`."""
    model = Toy()
    adapter = ta.attach(model, ta.preset("lora", rank=2))
    tiny.shake(adapter)
    delta = adapter.delta("layers.0.q_proj")
    adapter.save(tmp_path / "a")
    adapter.detach()
    file = tmp_path / "a" / "adapter.safetensors"
    tensors, metadata = load_file(file), _metadata(file)
    plan = json.loads(metadata["tensoradapt"])
    rule = plan["spec"]["rules"][0]
    del rule["default"], metadata["crc32"]
    rule["targets"] = [r"re:(.*\.)?(query|value|q_proj|v_proj|q_lin|v_lin|q|v)"]
    save_file(tensors, file, {**metadata, "tensoradapt": json.dumps(plan)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ta.load(tmp_path / "a", model)
    assert torch.equal(again.delta("layers.0.q_proj"), delta)
    assert ta.plan(again.plan.spec, model).num_trainable == again.plan.num_trainable


def _metadata(file):
    return json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])["__metadata__"]
