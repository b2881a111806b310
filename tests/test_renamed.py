"""Adapters of a model whose names have a prefix more or less: `bert.encoder...` on the bare encoder, and back."""

import pytest
import tiny
import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaModel

import tensoradapt as ta

QV = ["query", "value"]


def llama_inside() -> LlamaModel:
    return tiny.llama().model


PAIRS = {  # made on, loaded onto, what stands before the names of either
    "a task model's on the encoder": (tiny.bert_classifier, tiny.bert, "bert.", ""),
    "an encoder's on the task model": (tiny.bert, tiny.bert_classifier, "", "bert."),
    "a decoder's without its head": (tiny.llama, llama_inside, "model.", ""),
}
SPECS = {
    "lora": ta.preset("lora", rank=2),
    "lotr": ta.preset("lotr", rank=2),
    "pooler": ta.preset("lora", rank=2, train=["pooler"]),
    "embedding": ta.preset("lora", rank=2, targets=["word_embeddings", "query"]),
}


def made(make, spec) -> ta.Adapter:
    adapter = ta.attach(make(), spec)
    tiny.shake(adapter)
    return adapter


@pytest.mark.parametrize(
    ("pair", "spec"), [(pair, spec) for pair in PAIRS for spec in SPECS if "decoder" not in pair or spec[0] == "l"]
)
def test_an_adapter_is_loaded_under_the_models_names(pair, spec, tmp_path):
    make, other, before, after = PAIRS[pair]
    adapter = made(make, SPECS[spec])
    file = adapter.save(tmp_path)
    loaded = ta.load(file, other())
    paths = [path for group in adapter.groups.values() for path in group.paths]
    for path in paths:
        assert torch.equal(loaded.delta(after + path.removeprefix(before)), adapter.delta(path)), path
    for path in adapter.plan.extras:
        mine, theirs = (a.as_saved().tensors for a in (adapter, loaded))
        assert torch.equal(theirs[f"extra.{after}{path.removeprefix(before)}"], mine[f"extra.{path}"])
    again = ta.load(loaded.save(tmp_path / "again"), other())  # under the new names for good
    assert torch.equal(again.delta(after + paths[0].removeprefix(before)), adapter.delta(paths[0]))


def test_what_it_computes_on_the_encoder_is_what_it_computed():
    model = tiny.bert_classifier()
    adapter = ta.attach(model, SPECS["lora"])
    tiny.shake(adapter)
    encoder = tiny.bert()
    encoder.load_state_dict({k.removeprefix("bert."): t for k, t in tiny.base_of(model).items() if k in tiny_names()})
    ta.load(adapter.as_saved(), encoder)
    ids = tiny.tokens()
    assert torch.equal(encoder(ids).last_hidden_state, model.bert(ids).last_hidden_state)


def tiny_names() -> set[str]:
    return {f"bert.{name}" for name in tiny.bert().state_dict()}


class Towers(nn.Module):
    """Two encoders with the same names behind their own prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = tiny.bert(), tiny.bert()


def test_which_of_two_towers_is_meant_is_not_guessed():
    saved = made(tiny.bert, SPECS["lora"]).as_saved()
    with pytest.raises(ta.FileError, match=r"which the model lacks(.|\n)*got: a Towers, with text\.embeddings"):
        ta.load(saved, Towers())


@pytest.mark.parametrize("pair", [name for name in PAIRS if "decoder" not in name])
def test_a_peft_folder_has_the_names_of_the_model_that_is_given(pair, tmp_path):
    make, other, before, after = PAIRS[pair]
    saved = made(make, SPECS["lora"]).as_saved()
    says = f"load it onto a model that has {before}encoder.layer.0.attention.self.query"
    assert says in " ".join(ta.export_peft(saved, tmp_path / "own").notes)
    result = ta.export_peft(saved, tmp_path / "theirs", model=other())
    assert "load it onto" not in " ".join(result.notes)
    found = PeftModel.from_pretrained(other(), tmp_path / "theirs").merge_and_unload()
    plain, path = other(), "encoder.layer.1.attention.self.query"
    change = found.get_submodule(after + path).weight - plain.get_submodule(after + path).weight
    torch.testing.assert_close(change.detach(), saved.delta(before + path), atol=1e-6, rtol=1e-4)
