"""Tiny random models, and what the tests of adapters do with them."""

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = 40
_LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
_LLAMA |= {"vocab_size": WORDS, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "head_dim": 4}
_BERT = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": WORDS}
_BERT |= {"max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(layers: int = 2, **more) -> BertModel:
    return _made(BertModel, BertConfig(**(_BERT | more), num_hidden_layers=layers))


def bert_classifier(layers: int = 2) -> BertForSequenceClassification:
    return _made(BertForSequenceClassification, BertConfig(**_BERT, num_hidden_layers=layers, num_labels=3))


def gpt2(layers: int = 2, **more) -> GPT2LMHeadModel:
    sizes = {"n_embd": 16, "n_head": 4, "vocab_size": WORDS, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 1}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _made(GPT2LMHeadModel, GPT2Config(n_layer=layers, **(sizes | quiet | more)))


def llama(layers: int = 2, **more) -> LlamaForCausalLM:
    return _made(LlamaForCausalLM, LlamaConfig(num_hidden_layers=layers, **(_LLAMA | more)))


def mixtral(layers: int = 1) -> MixtralForCausalLM:
    model = _made(MixtralForCausalLM, MixtralConfig(num_hidden_layers=layers, num_local_experts=3, **_LLAMA))
    if not any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters()):
        pytest.skip("in the lowest transformers that is supported every expert is a module of its own")
    return model


def gpt_oss(layers: int = 1) -> nn.Module:
    if not hasattr(transformers, "GptOssConfig"):
        pytest.skip("the lowest transformers that is supported does not know GPT-OSS")
    config = transformers.GptOssConfig(num_hidden_layers=layers, num_local_experts=3, num_experts_per_tok=2, **_LLAMA)
    return _made(transformers.GptOssForCausalLM, config)


def t5(layers: int = 2) -> T5ForConditionalGeneration:
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24, "vocab_size": WORDS, "dropout_rate": 0.0}
    return _made(T5ForConditionalGeneration, T5Config(num_layers=layers, decoder_start_token_id=0, **sizes))


def _made(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, WORDS, shape or (2, 5), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shake(adapter, size: float = 0.3, seed: int = 0) -> None:
    """Move every trained factor off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.parameters():
            if tensor.requires_grad:
                tensor.add_(size * torch.randn(tensor.shape, generator=generator).to(tensor))


def assert_merged_is_attached(model: nn.Module, adapter, before: torch.Tensor, x: torch.Tensor) -> None:
    """What an adapter does when attached is what merging does; every factor is trained; nothing is left of it."""
    assert torch.equal(model(x), before)
    shake(adapter)
    attached = model(x)
    attached.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapter.parameters() if p.requires_grad)
    adapter.merge()
    merged = model(x)
    assert torch.allclose(attached, merged, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged, before, atol=1e-3) and not torch.allclose(attached, before, atol=1e-3)
    adapter.unmerge()
    adapter.detach()
    assert torch.equal(model(x), before)


def base_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the base's tensors, by name."""
    return {n: t.detach().clone() for n, t in model.state_dict().items() if not n.startswith("tensoradapt.")}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of named tensors are the same bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
