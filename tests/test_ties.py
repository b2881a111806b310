"""Weights that a model has under several names: one site with all of its modules, wherever the two sides keep it."""

import copy

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GemmaConfig,
    GemmaForCausalLM,
)

import tensoradapt as ta
from tensoradapt.folders import merge_folder
from tensoradapt.verify import verify

SMALL = {"vocab_size": tiny.WORDS, "max_position_embeddings": 32}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}


def _made(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


MODELS = {
    "gpt2": (tiny.gpt2, "wte"),
    "llama": (lambda: tiny.llama(1, tie_word_embeddings=True), "embed_tokens"),
    "bert": (lambda: _made(BertForMaskedLM, BertConfig(**tiny._BERT, num_hidden_layers=1)), "word_embeddings"),
    "albert": (
        lambda: _made(AlbertForMaskedLM, AlbertConfig(**tiny._BERT, embedding_size=8, num_hidden_layers=2)),
        "word_embeddings",
    ),
    "t5": (lambda: tiny.t5(1), "shared"),
    "bart": (lambda: _made(BartForConditionalGeneration, BartConfig(**SMALL, **BART)), "shared"),
    "gemma": (lambda: _made(GemmaForCausalLM, GemmaConfig(**tiny._LLAMA, num_hidden_layers=1)), "embed_tokens"),
}


def outputs(model):
    ids = {"input_ids": tiny.tokens()}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = tiny.tokens(seed=1)
    with torch.no_grad():
        return model(**ids).logits


def tuned_of(base, weight="input"):
    """The model with another matrix for its words: of every module that is tied, or of the head alone."""
    model = copy.deepcopy(base)
    held = model.get_input_embeddings().weight
    with torch.no_grad():
        held += 0.1 * tiny.noise(*held.shape, seed=3)
    return model


def close(one, two, tolerance=1e-4):
    return float((one - two).norm() / two.norm()) < tolerance


FORMS = ("folders", "modules", "state dicts", "module and folder", "folder and module", "folder and file")


def sides(form, base, tuned, place):
    """Two models as a user may give them."""
    names = dict(zip(("base", "tuned"), form.split(" and ") * 2, strict=False))
    found = []
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(place / name)
        kind = names[name].rstrip("s")
        found.append(
            {
                "folder": lambda n=name: place / n,
                "module": lambda m=model: m,
                "state dict": lambda m=model: dict(m.state_dict()),
                "file": lambda n=name: load_file(place / n / "model.safetensors"),
            }[kind]()
        )
    return found


NAMELESS = ("t5", "bart")  # `shared` says nothing of what it is


@pytest.mark.parametrize(
    ("case", "form"), [(c, f) for c in MODELS for f in FORMS if f != "state dicts" or c not in NAMELESS]
)
def test_a_tied_weight_is_extracted_for_all_of_its_modules(case, form, tmp_path):
    """Loading, merging, and merging into the folder give the tuned model's output."""
    make, name = MODELS[case]
    base, tuned = make(), tuned_of(make())
    expected = outputs(tuned)
    assert not close(outputs(base), expected, 1e-2)
    given = sides(form, base, tuned, tmp_path)
    result = ta.extract(*given, ta.preset("lora", rank=16, targets=[name]), tmp_path / "adapter")
    assert result.whole_error < 1e-5 and result.plan.num_sites == 1 and result.change.changed_tensors == 1
    model = make()
    adapter = ta.load(tmp_path / "adapter", model)
    assert close(outputs(model), expected)
    adapter.merge_and_detach()
    assert close(outputs(model), expected)
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert close(outputs(type(model).from_pretrained(tmp_path / "merged")), expected)
    found = verify(tmp_path / "adapter", *given)
    assert found.whole_error < 1e-5 and list(found.sites) == [result.plan.groups[0].paths[0]]
