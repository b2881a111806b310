"""PEFT folders in: an adapter with the deltas that PEFT finds in the folder, or an error by file and key."""

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import tiny
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import tensoradapt as ta
from tensoradapt.io.saved import as_saved
from tensoradapt.peft import export_peft, import_peft, open_adapter

QV = ["query", "value"]
QUERY = "encoder.layer.0.attention.self.query"
FFN = ["query", "intermediate.dense", "output.dense"]
CONVS = ["0", "2"]


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, (1, 2)))


def signals() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 6, 3))


def named() -> nn.Module:
    """`q` is the end of `up.q`, `a.q` of `b.a.q`, and as an expression it means `a_q` too."""
    torch.manual_seed(0)
    one, two = nn.ModuleDict({"q": nn.Linear(6, 8)}), nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(6, 8)})})
    return nn.ModuleDict({"a": one, "a_q": nn.Linear(6, 8), "b": two, "q": nn.Linear(6, 8), "up": copy.deepcopy(one)})


WITHIN = {"^q": 2, "^a\\.q": 4, "a_q": 5}
UNEVEN = {"rank_pattern": {"layer.0.attention.self.query": 5, "value": 2}, "alpha_pattern": {"query": 11}}
CASES = {
    "lora": (tiny.bert, LoraConfig(r=3, lora_alpha=7, target_modules=QV)),
    "lora of many ranks": (tiny.bert, LoraConfig(r=3, lora_alpha=7, target_modules=QV, **UNEVEN)),
    "lora by alpha over the root": (
        tiny.llama,
        LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", use_rslora=True, alpha_pattern={"q_proj": 0.5}),
    ),
    "lora by an expression": (tiny.llama, LoraConfig(r=3, target_modules=r".*layers\.[01]\.(mlp|self_attn)\.[kqu].*")),
    "lora on layers": (tiny.llama, LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1])),
    "lora but for some": (
        tiny.llama,
        LoraConfig(r=3, target_modules=["q_proj"], exclude_modules=["0.self_attn.q_proj"]),
    ),
    "lora of higher rank than the weight": (tiny.bert, LoraConfig(r=20, target_modules=QV)),
    "lora of Conv1D": (tiny.gpt2, LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "lora of embeddings": (tiny.bert, LoraConfig(r=3, target_modules=["word_embeddings", "query"])),
    "lora of convolutions": (convolutions, LoraConfig(r=3, lora_alpha=7, target_modules=CONVS)),
    "lora of a Conv1d": (
        signals,
        LoraConfig(r=3, lora_alpha=7, target_modules=["0"]),
    ),
    "lora of names within names": (
        named,
        LoraConfig(r=3, target_modules=["q", "a_q"], rank_pattern=WITHIN),
    ),
    "loha": (tiny.bert, LoHaConfig(r=3, alpha=7, target_modules=QV, rank_pattern={"query": 5})),
    "loha of kernels": (convolutions, LoHaConfig(r=3, alpha=7, target_modules=CONVS, use_effective_conv2d=True)),
    "lokr of low rank": (tiny.bert, LoKrConfig(r=1, alpha=7, target_modules=FFN)),
    "lokr whole": (tiny.bert, LoKrConfig(r=4, alpha=7, target_modules=FFN, decompose_factor=4)),
    "lokr of both factors": (tiny.bert, LoKrConfig(r=1, alpha=7, target_modules=FFN, decompose_both=True)),
    "lokr of kernels": (
        convolutions,
        LoKrConfig(r=1, alpha=7, target_modules=CONVS, use_effective_conv2d=True, decompose_factor=2),
    ),
    "lokr of whole kernels": (convolutions, LoKrConfig(r=8, alpha=7, target_modules=CONVS, decompose_factor=2)),
    "vera": (tiny.bert, VeraConfig(r=8, target_modules=QV)),
}
WITH_MODEL = {
    "loha of flat kernels": (convolutions, LoHaConfig(r=3, alpha=7, target_modules=CONVS)),
    "lokr of flat kernels": (convolutions, LoKrConfig(r=1, alpha=7, target_modules=CONVS, decompose_factor=1)),
    "vera of several shapes": (tiny.bert, VeraConfig(r=8, target_modules=FFN)),
    "vera drawn from its seed": (
        tiny.bert,
        VeraConfig(r=8, target_modules=FFN, save_projection=False, projection_prng_key=5),
    ),
}


def trained(make, config, out: Path) -> Path:
    """A folder that PEFT wrote of an adapter whose factors have all moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make(), config)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(out)
    return out


def merged(make, out: Path) -> dict[str, torch.Tensor]:
    """The parameters of a model with PEFT's deltas in them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(make(), out).merge_and_unload()
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def agree(saved, make, out: Path) -> None:
    """Attached and merged, the adapter makes PEFT's weights; by itself, it says PEFT's deltas."""
    base, wanted = dict(make().named_parameters()), merged(make, out)
    model = make()
    adapter = ta.load(saved, model)
    adapter.merge(untie=True)
    found = dict(model.named_parameters())
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].detach(), tensor, atol=1e-5, rtol=1e-5, msg=name)
    for path in saved.sites:
        change = (wanted[f"{path}.weight"] - base[f"{path}.weight"]).detach()
        delta = saved.delta(path)
        turned = type(make().get_submodule(path)).__name__ in ("Conv1D", "Embedding")
        torch.testing.assert_close((delta.mT if turned else delta).reshape(change.shape), change, atol=1e-5, rtol=1e-5)
        assert change.norm() > 0.01


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:every module of the VeRA")
def test_deltas_are_those_of_peft(case, tmp_path):
    make, config = CASES[case]
    out = trained(make, config, tmp_path / "peft")
    saved = import_peft(out)
    assert {rule.family for rule in saved.plan.spec.rules} == {config.peft_type.value.lower()}
    agree(saved, make, out)
    agree(import_peft(out, model=make()), make, out)


@pytest.mark.parametrize("case", WITH_MODEL)
def test_a_model_gives_the_shapes_that_a_folder_lacks(case, tmp_path):
    make, config = WITH_MODEL[case]
    out = trained(make, config, tmp_path / "peft")
    agree(import_peft(out, model=make()), make, out)


@pytest.mark.parametrize("case", ["lora of many ranks", "loha", "lokr of low rank", "vera"])
@pytest.mark.filterwarnings("ignore:every module of the VeRA")
def test_what_was_imported_is_saved_loaded_and_exported_again(case, tmp_path):
    make, config = CASES[case]
    out = trained(make, config, tmp_path / "peft")
    saved = import_peft(out, out=tmp_path / "native")
    assert saved.path == tmp_path / "native/adapter.safetensors"
    agree(as_saved(tmp_path / "native"), make, out)
    if case not in ("lokr of low rank",):
        export_peft(saved, tmp_path / "again", model=make())
        agree(import_peft(tmp_path / "again"), make, out)


def test_one_rule_is_made_for_every_variation(tmp_path):
    out = trained(*CASES["lora of many ranks"], tmp_path)
    rules = import_peft(out).plan.spec.rules
    assert sorted((rule.rank, rule.alpha, len(rule.targets)) for rule in rules) == [
        (2, 7.0, 2),
        (3, 11.0, 1),
        (5, 11.0, 1),
    ]
    with_root = import_peft(trained(*CASES["lora by alpha over the root"], tmp_path / "root")).plan.spec.rules
    assert {(rule.scale, rule.alpha) for rule in with_root} == {("alpha/sqrt(rank)", 7.0), ("alpha/sqrt(rank)", 0.5)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_peft_reads_it(dtype, tmp_path):
    out = trained(*CASES["lora"], tmp_path)
    rewrite(out, lambda held: {key: tensor.to(dtype) for key, tensor in held.items()})
    saved = import_peft(out)
    assert {tensor.dtype for tensor in saved.tensors.values()} == {torch.float32}
    agree(saved, tiny.bert, out)


@pytest.mark.parametrize("key", ["dropout", "revision", "base_model_name_or_path"])
def test_what_a_config_says_beside_the_delta_is_kept(key, tmp_path):
    out = trained(tiny.bert, LoraConfig(r=2, target_modules=QV, lora_dropout=0.1, revision="abc"), tmp_path)
    edit(out, base_model_name_or_path="org/base")
    saved = import_peft(out)
    kept = {"dropout": saved.plan.spec.rules[0].dropout, "revision": saved.base["revision"]}
    assert (kept | {"base_model_name_or_path": saved.plan.model})[key] in (0.1, "abc", "org/base")


# -- what is trained whole ---------------------------------------------------------------------------------------------

WHOLE = {
    "a head": (tiny.bert_classifier, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), 2),
    "a named module": (tiny.bert, LoraConfig(r=2, target_modules=QV, modules_to_save=["pooler"]), 2),
    "all biases": (tiny.bert, LoraConfig(r=2, target_modules=QV, bias="all"), 18),
}


@pytest.mark.parametrize("case", WHOLE)
def test_parameters_trained_whole_are_imported(case, tmp_path):
    make, config, least = WHOLE[case]
    out = trained(make, config, tmp_path)
    saved = import_peft(out)
    assert len(saved.plan.extras) >= least
    agree(saved, make, out)


def test_the_base_s_own_embedding_beside_its_factors_is_kept_where_it_is_not_compared(tmp_path):
    out = trained(tiny.llama, LoraConfig(r=2, target_modules=["embed_tokens"]), tmp_path)
    with pytest.warns(UserWarning, match=r"embed_tokens\.weight in the folder replaces.* not compared: model="):
        saved = import_peft(out)
    agree(saved, tiny.llama, out)


# -- keys --------------------------------------------------------------------------------------------------------------


def rewrite(out: Path, change) -> None:
    held = load_file(out / "adapter_model.safetensors")
    save_file({key: t.contiguous() for key, t in change(held).items()}, out / "adapter_model.safetensors")


def edit(out: Path, **values) -> None:
    file = out / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without(part: str):
    return lambda held: {key: t for key, t in held.items() if part not in key}


def renamed(old: str, new: str):
    return lambda held: {key.replace(old, new): t for key, t in held.items()}


A = f"base_model.model.{QUERY}.lora_A.weight"
B = A.replace("lora_A", "lora_B")
KEYS = {
    "half of a pair": (without(f"{QUERY}.lora_B"), f"lacks the key '{B}'"),
    "no prefix": (renamed("base_model.model.", ""), f"'{QUERY}.* has no prefix 'base_model.model.'"),
    "half a prefix": (renamed("base_model.model.", "base_model."), "has no prefix"),
    "an adapter's name": (renamed("lora_A.weight", "lora_A.default.weight"), "lacks the key '.*lora_A.weight'"),
    "an unexpected tensor": (
        lambda held: held | {"base_model.model.x.weight": torch.ones(2)},
        "'base_model.model.x.weight'",
    ),
    "a bias of B": (lambda held: held | {B.replace("weight", "bias"): torch.ones(16)}, "a bias beside B"),
    "DoRA": (lambda held: held | {A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(16)}, "DoRA scales"),
    "no factors": (lambda held: {"base_model.model.lm_head.weight": torch.ones(2, 2)}, "adapts no module"),
    "another module": (renamed(QUERY, "encoder.layer.0.attention.self.key"), "does not name .*self.key"),
    "another rank": (lambda held: held | {A: torch.ones(2, 16), B: torch.ones(16, 2)}, f"{QUERY} has rank 2 .*and 3"),
    "sides that do not meet": (lambda held: held | {B: torch.ones(16, 2)}, f"tensors of {QUERY} .*do not fit"),
    "a vector": (lambda held: held | {A: torch.ones(3)}, "is no matrix"),
    "nothing in it": (lambda held: held | {A: torch.ones(3, 0)}, "holds no finite numbers"),
    "NaN": (lambda held: held | {A: torch.full((3, 16), float("nan"))}, "holds no finite numbers"),
    "integers": (lambda held: held | {A: torch.ones(3, 16, dtype=torch.int8)}, "holds no finite numbers"),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_that_peft_would_pass_over_are_errors(case, tmp_path):
    change, says = KEYS[case]
    out = trained(*CASES["lora"], tmp_path)
    rewrite(out, change)
    with pytest.raises(ta.FileError, match=says) as error:
        import_peft(out)
    assert str(tmp_path) in str(error.value)


def test_grouped_convolutions_are_refused(tmp_path):
    out = trained(lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), LoraConfig(r=2, target_modules=["0"]), tmp_path)
    if load_file(out / "adapter_model.safetensors")["base_model.model.0.lora_B.weight"].shape[1] == 2:
        pytest.skip("the lowest PEFT that is supported writes factors of a layer without groups")
    with pytest.raises(ta.FileError, match="no groups"):
        import_peft(out)


def test_kernels_of_b_are_refused(tmp_path):
    out = trained(*CASES["lora of convolutions"], tmp_path)
    rewrite(out, lambda held: held | {"base_model.model.0.lora_B.weight": torch.ones(6, 3, 2, 2)})
    with pytest.raises(ta.FileError, match="tensors of 0 .*do not fit together"):
        import_peft(out)


def test_factors_that_a_model_has_no_module_for_are_refused(tmp_path):
    out = trained(*CASES["lora"], tmp_path)
    with pytest.raises(ta.FileError, match="adapts encoder.* which the model lacks"):
        import_peft(out, model=tiny.gpt2())
    with pytest.raises(ta.FileError, match="has another shape"):
        import_peft(out, model=tiny.bert(hidden_size=32))
    with pytest.raises(ta.FileError, match="names encoder.layer.2.*no factors of it"):
        import_peft(out, model=tiny.bert(3))


def test_targets_without_factors_are_told(tmp_path):
    out = trained(*CASES["lora"], tmp_path)
    edit(out, target_modules=[*QV, "dense_9"])
    with pytest.warns(UserWarning, match="dense_9, and no factors are there"):
        import_peft(out)


def test_inputs_of_vera_s_modules_are_told_to_be_guessed(tmp_path):
    with pytest.warns(UserWarning, match="taken to have 16 inputs"):
        import_peft(trained(*CASES["vera"], tmp_path / "one"))
    with pytest.raises(ta.FileError, match="neither vera_A nor the shapes"):
        import_peft(trained(*WITH_MODEL["vera drawn from its seed"], tmp_path / "two"))


# -- configs -----------------------------------------------------------------------------------------------------------

CONFIGS = [
    ({"peft_type": "lora"}, "peft_type .* is not served"),
    ({"peft_type": "IA3"}, "peft_type .* is not served"),
    ({"peft_type": None}, "peft_type .* is not served"),
    ({"peft_type": ["LORA"]}, "peft_type .* is not served"),
    *(({"r": bad}, "r in .* is no r") for bad in ("8", 0, -1, True, 8.0, None, 10**9)),
    *(({"lora_alpha": bad}, "lora_alpha in .* is no") for bad in ("16", True, None, 10**400)),
    *(({"lora_alpha": float(bad)}, "cannot be read as JSON(?s:.*)is no number") for bad in ("nan", "inf")),
    ({"rank_pattern": {"query": "5"}}, r"rank_pattern\['query'\] in"),
    ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\] in"),
    ({"rank_pattern": [5]}, "rank_pattern in .* is no mapping"),
    ({"alpha_pattern": {"query": 1e31}}, r"alpha_pattern\['query'\] in"),
    ({"rank_pattern": {"query": 5}}, "has rank 3 in its tensors, and 5"),
    ({"target_modules": [1]}, "target_modules in"),
    ({"modules_to_save": "classifier"}, "modules_to_save in"),
    ({"use_rslora": "yes"}, "use_rslora in"),
    ({"bias": "some"}, "bias in"),
    ({"target_modules": ["value"]}, "does not name encoder.*query: PEFT would drop"),
    *(({key: True}, f"{key} in .* cannot be imported") for key in ("use_dora", "lora_bias", "use_qalora")),
    ({"layer_replication": [[0, 2]]}, "layer_replication in .* cannot be imported"),
    ({"target_parameters": ["experts.up"]}, "target_parameters in .* cannot be imported"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices in .* cannot be imported"),
    *(({"init_lora_weights": s}, "changes the base weight") for s in ("pissa", "pissa_niter_4", "olora", "loftq")),
]


@pytest.mark.parametrize(("values", "says"), CONFIGS, ids=[str(values)[:50] for values, _ in CONFIGS])
def test_values_that_mean_another_delta_are_refused(values, says, tmp_path):
    out = trained(*CASES["lora"], tmp_path)
    edit(out, **values)
    with pytest.raises(ta.FileError, match=says) as error:
        import_peft(out)
    assert "adapter_config.json" in str(error.value)


PATTERNS = ["(", "a**", "((((a+)*)*)*)*b", "((.*a){90}){90}", "(?:x?){4000}" * 3, "a" * 30_000, r"(a)\1"]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern[:20])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_expressions_that_are_invalid_or_explosive_are_refused(key, pattern, tmp_path):
    out = trained(*CASES["lora"], tmp_path)
    edit(out, **{key: {pattern: 5} if key.endswith("pattern") else pattern})
    with pytest.raises(ta.FileError, match=key):
        import_peft(out)


DAMAGED = {
    "no JSON": "{",
    "no object": "[]",
    "a key twice": '{"peft_type": "LORA", "r": 3, "r": 3}',
    "depth without end": "[" * 100_000,
    "too large": " " * 5_000_000,
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_configs_are_errors(case, tmp_path):
    out = trained(*CASES["lora"], tmp_path)
    (out / "adapter_config.json").write_text(DAMAGED[case])
    with pytest.raises(ta.FileError, match="adapter_config.json cannot be read as JSON"):
        import_peft(out)


def test_options_of_a_newer_peft_are_told(tmp_path):
    out = trained(*CASES["lora"], tmp_path)
    edit(out, use_brand_new=True, unused=None)
    with pytest.warns(UserWarning, match="not known here: use_brand_new$"):
        import_peft(out)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_damaged_and_missing_files_are_errors(tmp_path):
    out = trained(*CASES["lora"], tmp_path / "peft")
    weights = out / "adapter_model.safetensors"
    raw = weights.read_bytes()
    for broken in (raw[:-1], raw[:40], b""):
        weights.write_bytes(broken)
        with pytest.raises(ta.FileError, match="adapter_model.safetensors is damaged"):
            import_peft(out)
    weights.rename(out / "adapter_model.bin")
    with pytest.raises(ta.FileError, match="adapter_model.bin, which can run code when it is opened: not opened"):
        import_peft(out)
    for nothing in (tmp_path / "none", tmp_path, weights):
        with pytest.raises(ta.FileError, match="no adapter_config.json in|no adapter_model.safetensors in"):
            import_peft(nothing)


def test_any_adapter_is_opened(tmp_path):
    out = trained(*CASES["lora"], tmp_path / "peft")
    saved = import_peft(out, out=tmp_path / "native")
    wanted = saved.delta(QUERY)
    model = tiny.bert()
    sources = (out, str(out), out / "adapter_config.json", out / "adapter_model.safetensors", tmp_path / "native")
    for source in (*sources, tmp_path / "native/adapter.safetensors", saved, ta.load(saved, model)):
        torch.testing.assert_close(open_adapter(source).delta(QUERY), wanted)
    saved.save(out)  # a folder of both: the native file says more
    assert open_adapter(out).path == out / "adapter.safetensors"
    with pytest.raises(ta.FileError, match="no adapter at"):
        open_adapter(tmp_path)


def test_the_families_are_those_that_peft_names():
    for case, (_, config) in (CASES | WITH_MODEL).items():
        assert isinstance(config.peft_type, peft.PeftType), case
