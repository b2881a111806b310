"""PEFT folders out, onto the class that reads them: what PEFT does by model type happens before the folder is there."""

import copy
import json
import warnings

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import tensoradapt as ta
from tensoradapt.io.saved import Saved
from tensoradapt.peft import export_peft

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": tiny.WORDS, "head_dim": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MIXED = {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_routed_experts": 4}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
LATENT |= {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1}
STEPS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
STEPS |= {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 8}
MIXTURES = {
    "DeepseekV2": MIXED | LATENT | {"head_dim": 4},
    "DeepseekV3": MIXED | LATENT,
    "Glm4Moe": MIXED | {"n_group": 1, "topk_group": 1},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "HunYuanMoEV1": {"num_experts": 4, "moe_topk": 2},
    "Qwen3Next": STEPS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
}


def causal(name: str, **sizes) -> nn.Module:
    kind = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(0)
    model = kind(kind.config_class(**(SIZES | sizes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def shaken(model: nn.Module, targets: list[str]) -> ta.Adapter:
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=targets))
    tiny.shake(adapter, 0.1)
    return adapter


def linears(model: nn.Module) -> list[str]:
    paths = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    return [f"re:{path.replace('.', '[.]')}" for path in paths]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tiny.tokens()).logits


def by_peft(model: nn.Module, out) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(model, out).eval()


@pytest.mark.parametrize("layout", ["portable", "compact"])
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.filterwarnings("ignore:the compact layout")
def test_peft_gives_mixtures_the_outputs_that_the_attached_adapter_does(name, layout, tmp_path):
    base = causal(name, **MIXTURES[name])
    plain, model = logits(base), copy.deepcopy(base)
    adapter = shaken(model, linears(base))
    if layout == "compact":
        adapter = ta.truncate(adapter, error=0.4)
    attached = logits(ta.load(adapter, copy.deepcopy(base))._model[0] if layout == "compact" else model)
    assert (attached - plain).norm() > 0.05 * plain.norm()
    result = export_peft(adapter, tmp_path / "out", layout=layout, model=base)
    assert result.reader.endswith(f"{name}ForCausalLM") and "re-opened with PEFT" in str(result)
    torch.testing.assert_close(logits(by_peft(base, tmp_path / "out")), attached, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Mamba", "FalconMamba"])
def test_what_peft_refuses_of_a_model_type_is_refused_by_name(name, tmp_path):
    base = causal(name, state_size=4)
    adapter = shaken(copy.deepcopy(base), ["out_proj", "in_proj"])
    for model in (None, base):
        with pytest.raises(ta.AdapterError, match=r"(?s)out_proj.*merge"):
            export_peft(adapter, tmp_path / "out", model=model)
    assert list(tmp_path.iterdir()) == []
    base.config.architectures = [type(base).__name__]
    base.save_pretrained(tmp_path / "base")
    adapter.save(tmp_path / "saved")
    with pytest.raises(ta.AdapterError, match="out_proj"):
        export_peft(tmp_path / "saved", tmp_path / "out", model=tmp_path / "base")
    alone = shaken(copy.deepcopy(base), ["in_proj"])
    assert export_peft(alone, tmp_path / "out").max_error < 1e-6


class Listed(nn.Module):
    """Calls its layers from a plain list, so that a layer put in a module's place is not called."""

    def __init__(self, held=list) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = held([self.first]) if held is not dict else {"a": self.first}

    def forward(self, x):
        layers = self.layers.values() if isinstance(self.layers, dict) else self.layers
        for layer in layers:
            x = layer(x)
        return self.last(x)


class Twice(nn.Module):
    """Calls one module by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.scales = torch.ones(2)  # a tensor has a method `values`, and is no mapping

    def forward(self, x):
        return self.last(self.again(self.first(x)))


@pytest.mark.parametrize("make", [Listed, lambda: Listed(tuple), lambda: Listed(dict), Twice])
def test_a_module_that_is_called_from_two_places_is_refused_where_peft_wraps_one(make, tmp_path):
    adapter = shaken(make(), ["first", "last"])
    with pytest.raises(ta.AdapterError, match=r"(?s)first in one of its places alone.*(layers|again)"):
        export_peft(adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    model = make()
    alone = shaken(model, ["last"])
    export_peft(alone, tmp_path / "out")
    x = tiny.noise(3, 4)
    torch.testing.assert_close(PeftModel.from_pretrained(make_alike(model, make), tmp_path / "out")(x), model(x))


def make_alike(model: nn.Module, make) -> nn.Module:
    made = make()
    made.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("tensoradapt")})
    return made


def test_without_a_model_the_export_says_that_only_the_file_was_checked(tmp_path):
    shaken(tiny.llama(), ["q_proj"]).save(tmp_path / "saved")
    result = export_peft(tmp_path / "saved", tmp_path / "out")
    assert "only the file was checked" in str(result) and "re-opened" not in str(result)
    assert "re-opened with PEFT" in str(export_peft(tmp_path / "saved", tmp_path / "with", model=tiny.llama()))


def test_the_model_stays_as_it_is(tmp_path):
    model = tiny.bert_classifier()
    before, flags = tiny.base_of(model), [p.requires_grad for p in model.parameters()]
    adapter = ta.attach(tiny.bert_classifier(), ta.preset("lora", targets=["query"], train=["classifier"]))
    tiny.shake(adapter)
    export_peft(adapter, tmp_path / "out", model=model, extras=True, task_type="SEQ_CLS")
    assert tiny.same(before, tiny.base_of(model)) and flags == [p.requires_grad for p in model.parameters()]
    assert not any(name.endswith("base_layer.weight") for name, _ in model.named_parameters())


KERNELS = {"Conv1d": (3, 3), "Conv1d of one": (3, 1), "Conv2d of one row": (4, (1, 3)), "Conv2d of one": (4, 1)}


@pytest.mark.parametrize("model", ["its own", "given", "none"])
@pytest.mark.parametrize("case", KERNELS)
def test_convolutions_are_written_with_their_own_number_of_dimensions(case, model, tmp_path):
    dims, kernel = KERNELS[case]
    make = lambda: torch.manual_seed(0) and nn.Sequential((nn.Conv1d if dims == 3 else nn.Conv2d)(4, 6, kernel))  # noqa: E731
    adapter = shaken(make(), ["0"])
    delta = adapter.delta("0")
    source = adapter if model == "its own" else adapter.save(tmp_path / "saved")
    export_peft(source, tmp_path / "out", model=make() if model == "given" else None)
    base, merged = make(), by_peft(make(), tmp_path / "out").merge_and_unload()
    torch.testing.assert_close((merged[0].weight - base[0].weight).flatten(1), delta.flatten(1), rtol=1e-4, atol=1e-5)
    imported = ta.import_peft(tmp_path / "out")
    again = export_peft(imported, tmp_path / "again")
    assert again.max_error < 1e-6
    by_peft(make(), tmp_path / "again")


def test_a_kernel_of_one_row_that_no_module_stands_for_needs_the_model(tmp_path):
    plan = ta.plan(ta.preset("lora", rank=2, targets=["0"]), {"0": (6, 4, 1, 3)})
    saved = Saved.of(plan, {key: torch.ones(factor.shape) for key, factor in plan.factors.items()})
    with pytest.raises(ta.AdapterError, match=r"(?s)a Conv1d or a Conv2d.*model="):
        export_peft(saved, tmp_path / "out")
    assert export_peft(saved, tmp_path / "out", model=nn.Sequential(nn.Conv1d(4, 6, 3))).max_error < 1e-6


# -- parameters trained whole ------------------------------------------------------------------------------------------


class Aux(nn.Module):
    """A body, a head, and another one whose name ends like the first's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.aux_head = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)) + self.aux_head(self.body(x))


def roberta() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**sizes, vocab_size=tiny.WORDS, num_labels=3, max_position_embeddings=40)
    return transformers.RobertaForSequenceClassification(config).eval()


TRAINED = {
    "a head of two layers": (roberta, ["query"], ["classifier"], "SEQ_CLS"),
    "a head, and what it stands on": (tiny.bert_classifier, ["query"], ["classifier", "pooler"], "SEQ_CLS"),
    "a head whose name ends another's": (Aux, ["body"], ["head"], None),
    "a pooler": (tiny.bert_classifier, ["query"], ["bert.pooler"], None),
}


CLASSIFIERS = [case for case, (_, _, _, task) in TRAINED.items() if task]


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    if isinstance(getattr(model, "base_model", model), Aux) or isinstance(model, Aux):
        return model(tiny.noise(2, 8))
    return model(tiny.tokens()).logits


@pytest.mark.parametrize(
    ("case", "given"), [*((case, True) for case in TRAINED), *((case, False) for case in CLASSIFIERS)]
)
def test_what_was_trained_whole_is_what_peft_restores(case, given, tmp_path):
    make, targets, train, task = TRAINED[case]
    model = make()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=targets, train=train))
    tiny.shake(adapter)
    source = adapter if given else adapter.save(tmp_path / "saved")
    export_peft(source, tmp_path / "out", extras=True, task_type=task, model=make() if given else None)
    served = by_peft(make(), tmp_path / "out")
    served = served if task else served.base_model.model
    torch.testing.assert_close(output(served), output(model), rtol=1e-4, atol=1e-5)
    assert (output(model) - output(make())).norm() > 0.01


def test_a_head_that_peft_trains_and_the_adapter_does_not_is_named(tmp_path):
    adapter = ta.attach(tiny.bert_classifier(), ta.preset("lora", targets=["query"], train=["bert.pooler"]))
    tiny.shake(adapter)
    with pytest.raises(ta.AdapterError, match=r"(?s)SEQ_CLS.*nothing of classifier\.weight, classifier\.bias.*extras"):
        export_peft(adapter, tmp_path / "out", extras=True, task_type="SEQ_CLS")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_peft_trained_come_in_and_go_out_again(bias, tmp_path):
    model = get_peft_model(tiny.bert(), LoraConfig(r=2, target_modules=["query"], bias=bias))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "theirs")
    result = export_peft(ta.import_peft(tmp_path / "theirs"), tmp_path / "ours", extras=True, model=tiny.bert())
    one, two = (by_peft(tiny.bert(), tmp_path / name)(tiny.tokens()).last_hidden_state for name in ("theirs", "ours"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["bias"] == bias and result.max_error < 1e-6
    for consumer in ("vllm", "llama.cpp"):
        with pytest.raises(ta.AdapterError, match=r"trained whole are refused: .*query\.bias"):
            export_peft(ta.import_peft(tmp_path / "theirs"), tmp_path / "no", extras=True, consumer=consumer)
