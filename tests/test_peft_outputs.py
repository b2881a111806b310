"""PEFT folders in: what PEFT restores beside its factors, and what its layers do, is what the adapter does."""

import copy
import json
import warnings
from dataclasses import fields
from functools import partial

import pytest
import tiny
import torch
import transformers
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, PromptTuningConfig, VeraConfig, get_peft_model
from test_peft_classes import Aux
from torch import nn

import tensoradapt as ta


class Attention(nn.Module):
    """A `nn.MultiheadAttention`, which calls none of its linears, and a linear behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attn(x, x, x)[0])


class Blocks(nn.Module):
    """A list at the root, with a list within each of its entries: PEFT counts the inner ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = [
            nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8)})] * 1)}) for _ in range(2)
        ]
        for block in inner:
            block["blocks"].append(nn.ModuleDict({"q": nn.Linear(8, 8)}))
        self.layers = nn.ModuleList(inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            for block in layer["blocks"]:
                x = block["q"](x)
        return x


def resized(tie: bool, seed: int = 5) -> nn.Module:
    """A vocabulary with rows that were drawn when it grew."""
    model = tiny.llama(tie_word_embeddings=tie)
    torch.manual_seed(seed)
    model.resize_token_embeddings(48, mean_resizing=False)
    return model


def gemma() -> nn.Module:
    """A model whose embedding is scaled when it is read."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=4, vocab_size=tiny.WORDS)
    return transformers.Gemma3ForCausalLM(config).eval()


def tied() -> nn.Module:
    return tiny.llama(tie_word_embeddings=True)


def kernels() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, (1, 2)))


def signals() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 6, 3))


@torch.no_grad()
def words(model: nn.Module) -> torch.Tensor:
    found = model(tiny.tokens())
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@torch.no_grad()
def all_words(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(48)[None]).logits


def of(*shape: int):
    return torch.no_grad()(lambda model: model(tiny.noise(*shape)))


LAYERS = {"target_modules": ["embed_tokens", "q_proj"]}
# How it is made for training and for serving, where the two differ; the config, made in the test, since the lowest PEFT
# that is supported does not know every field; what is compared.
CASES = {
    "a resized vocabulary": (
        lambda: resized(False),
        lambda: resized(False, 6),
        partial(LoraConfig, r=2, **LAYERS),
        all_words,
    ),
    "a resized vocabulary with a tied head": (
        lambda: resized(True),
        lambda: resized(True, 6),
        partial(LoraConfig, r=2, **LAYERS),
        all_words,
    ),
    "an embedding": (tied, tied, partial(LoraConfig, r=2, **LAYERS), words),
    "a scaled embedding": (gemma, gemma, partial(LoraConfig, r=2, **LAYERS), words),
    "a head tied by PEFT": (tied, tied, partial(LoraConfig, r=2, ensure_weight_tying=True, **LAYERS), words),
    "an embedding trained whole, and its head": (
        tied,
        tied,
        partial(LoraConfig, r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        words,
    ),
    "layers behind a list at the root": (
        Blocks,
        Blocks,
        partial(LoraConfig, r=2, target_modules=["q"], layers_to_transform=[1]),
        of(2, 8),
    ),
    "attention that calls no linear": (
        Attention,
        Attention,
        partial(LoraConfig, r=2, target_modules=["attn"]),
        of(2, 5, 8),
    ),
    "a head whose name ends another's": (
        Aux,
        Aux,
        partial(LoraConfig, r=2, target_modules=["body"], modules_to_save=["head"]),
        of(2, 8),
    ),
    "VeLoRA": (tiny.bert, tiny.bert, partial(LoraConfig, r=2, target_modules=["query"], velora_config={}), words),
    "LoHa of kernels": (kernels, kernels, partial(LoHaConfig, r=2, target_modules=["0", "2"]), of(2, 4, 7, 7)),
    "LoKr of kernels": (kernels, kernels, partial(LoKrConfig, r=1, target_modules=["0", "2"]), of(2, 4, 7, 7)),
    "LoHa of a Conv1d": (signals, signals, partial(LoHaConfig, r=2, target_modules=["0"]), of(2, 4, 9)),
    "all linear modules": (tiny.llama, tiny.llama, partial(LoraConfig, r=2, target_modules="all-linear"), words),
}


def known(config: partial):
    """A config of this PEFT."""
    if missing := sorted(set(config.keywords) - {field.name for field in fields(config.func)}):
        pytest.skip(f"the lowest PEFT that is supported does not know {', '.join(missing)}")
    return config()


def trained(model: nn.Module, config, out) -> None:
    """A folder that PEFT wrote of an adapter whose factors have all moved."""
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_the_outputs_are_those_of_peft_attached_and_merged(case, given, tmp_path):
    before, after, config, outputs = CASES[case]
    trained(before(), known(config), tmp_path)
    wanted, base = outputs(PeftModel.from_pretrained(after(), tmp_path).eval()), outputs(after().eval())
    saved = ta.import_peft(tmp_path, model=after() if given else None)
    model = after().eval()
    adapter = ta.load(saved, model)
    size = (wanted - base).norm()
    assert size > 1e-5 * base.norm() and (outputs(model) - wanted).norm() < 1e-4 * size
    adapter.merge(untie=True)
    assert (outputs(model) - wanted).norm() < 1e-3 * size + 1e-6 * base.norm()


@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_peft_restores_is_left_out_where_it_is_the_model_s_own(tmp_path):
    trained(tied(), LoraConfig(r=2, **LAYERS), tmp_path / "peft")
    assert list(ta.import_peft(tmp_path / "peft").plan.extras) == ["model.embed_tokens.weight"]
    tied().save_pretrained(tmp_path / "base")
    for model in (tied(), tmp_path / "base"):
        saved = ta.import_peft(tmp_path / "peft", model=model)
        assert not saved.plan.extras and "is the model's own, and was not imported" in "".join(saved.plan.notes)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_makes_no_kronecker_product_of_is_refused_as_such(tmp_path):
    trained(signals(), LoKrConfig(r=8, target_modules=["0"]), tmp_path)
    with pytest.raises(ta.FileError, match=r"(?s)no Kronecker product of its weight.*\(b, a d, c k\)"):
        ta.import_peft(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_vera_whose_inputs_were_guessed_says_what_tells_them(tmp_path):
    trained(tiny.bert(), VeraConfig(r=4, target_modules=["query", "intermediate.dense", "output.dense"]), tmp_path)
    with pytest.raises(ta.FileError, match=r"(?s)another shape.*import_peft\(.*model="):
        ta.load(ta.import_peft(tmp_path), tiny.bert())


@pytest.mark.filterwarnings("ignore")
def test_prompts_are_not_said_to_be_merged(tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(tiny.llama(), config).save_pretrained(tmp_path)
    with pytest.raises(ta.FileError, match="PROMPT_TUNING") as error:
        ta.import_peft(tmp_path)
    assert "changes no weight" in str(error.value) and "merge_and_unload" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_an_export_with_target_parameters_comes_back(tmp_path):
    from test_peft_classes import MIXTURES, causal, linears, shaken

    base = causal("Glm4Moe", **MIXTURES["Glm4Moe"])
    adapter = shaken(copy.deepcopy(base), linears(base))
    ta.export_peft(adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["target_parameters"]
    saved = ta.import_peft(tmp_path / "out", model=base)
    for path in saved.sites:
        torch.testing.assert_close(saved.delta(path), adapter.delta(path).detach(), rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ta.export_peft(saved, tmp_path / "again", model=base).max_error < 1e-6
