"""PEFT folders out, for a server: what it refuses is refused, and what it wants beside an adapter is written."""

import warnings

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import tensoradapt as ta
from tensoradapt.peft import export_peft

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": tiny.WORDS}


def qwen() -> nn.Module:
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)).eval()


def shaken(model: nn.Module, *targets: str) -> ta.Adapter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = ta.attach(model, ta.preset("lora", rank=2, targets=list(targets)))
    tiny.shake(adapter)
    return adapter


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_table_that_is_tied_is_refused_for_llama_cpp(target, tmp_path):
    tied = tiny.llama(tie_word_embeddings=True)
    adapter = shaken(tiny.llama(tie_word_embeddings=True), target)
    for given in (adapter, adapter.as_saved()):
        with pytest.raises(ta.AdapterError, match=f"{target}: tied"):
            export_peft(given, tmp_path / "out", consumer="llama.cpp", model=tied)
    assert list(tmp_path.iterdir()) == []
    apart = shaken(tiny.llama(), target)
    assert export_peft(apart, tmp_path / "out", consumer="llama.cpp").max_error < 1e-6
    bare = export_peft(apart.as_saved(), tmp_path / "bare", consumer="llama.cpp")
    assert any("llama.cpp refuses this where the head is tied" in note for note in bare.notes)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_vllm_serves_tables_of_some_classes_alone(target, tmp_path):
    with pytest.raises(ta.AdapterError, match=f"Qwen2ForCausalLM has no LoRA of embeddings and heads: .*{target}"):
        export_peft(shaken(qwen(), target), tmp_path / "out", consumer="vllm")
    assert export_peft(shaken(tiny.llama(), target), tmp_path / "out", consumer="vllm").max_error < 1e-6


@pytest.mark.parametrize("consumer", ["sglang", "tgi", "lorax"])
def test_siblings_are_written_with_zero_factors(consumer, tmp_path):
    model = tiny.llama()
    adapter = shaken(model, "0.self_attn.q_proj")
    result = export_peft(adapter, tmp_path / "out", consumer=consumer)
    held = load_file(tmp_path / "out/adapter_model.safetensors")
    layers = {f"model.layers.{k}.self_attn.{name}_proj" for k in (0, 1) for name in "qkv"}
    assert result.max_error < 1e-6 and {*result.modules} == layers
    for path in layers - {"model.layers.0.self_attn.q_proj"}:
        assert not held[f"base_model.model.{path}.lora_B.weight"].any()
    served = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(served(tiny.tokens()).logits, model(tiny.tokens()).logits, rtol=1e-4, atol=1e-5)
    assert {*export_peft(adapter, tmp_path / "plain").modules} == {"model.layers.0.self_attn.q_proj"}


def test_a_zero_delta_is_written_where_that_is_asked_for(tmp_path):
    adapter = shaken(tiny.llama(), "q_proj", "v_proj")
    with torch.no_grad():
        for group in adapter.groups:
            if "v_proj" in str(adapter.groups[group].paths):
                adapter.set_factors(group, {n: torch.zeros_like(t) for n, t in adapter.factors(group).items()})
    result = export_peft(adapter, tmp_path / "out", zeros=True)
    assert sum("v_proj" in path for path in result.modules) == 2 and result.max_error < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_peft_adds_up_exports_of_its_own_adapters_as_it_does_the_originals(tmp_path):
    for k in (0, 1):
        model = get_peft_model(tiny.llama(), LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"]))
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / f"theirs{k}")
        saved = ta.import_peft(tmp_path / f"theirs{k}", out=tmp_path / f"native{k}")
        export_peft(saved if k else tmp_path / "native0", tmp_path / f"ours{k}", model=tiny.llama())
    found = []
    for kind in ("theirs", "ours"):
        model = PeftModel.from_pretrained(tiny.llama(), tmp_path / f"{kind}0", adapter_name="a")
        model.load_adapter(tmp_path / f"{kind}1", "b")
        model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "sum", combination_type="linear")
        model.set_adapter("sum")
        with torch.no_grad():
            found.append(model.eval()(tiny.tokens()).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
