"""Adapters without a model: what `Saved` says of a site is what the attached adapter says."""

import pytest
import tiny
import torch
from torch import nn

import tensoradapt as ta
from tensoradapt.attach import attach
from tensoradapt.io.saved import Saved, as_saved

QV = ["query", "value"]


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, groups=2))


CASES = {
    "lora": (tiny.bert, ta.preset("lora", rank=2, targets=QV)),
    "lotr": (tiny.bert, ta.preset("lotr", rank=2, targets=QV)),
    "cp": (tiny.llama, ta.preset("lorta", rank=3, targets=["q_proj", "o_proj"])),
    "tt-matrix": (tiny.bert, ta.preset("mpo_shared", rank=3, targets=QV)),
    "tensor train in folds": (tiny.bert, ta.preset("tt_lora", rank=3, targets=QV)),
    "banks of slices": (tiny.bert, ta.preset("vera", rank=4, targets=[*QV, "intermediate.dense", "output.dense"])),
    "a difference": (tiny.bert, ta.preset("dota", rank=2, folds="auto:2", targets=QV)),
    "a difference of gates": (tiny.bert, ta.preset("quanta", folds="auto:2", targets=QV)),
    "frozen nodes from the weights": (tiny.bert, ta.preset("lora_xs", rank=2, targets=QV)),
    "embeddings": (tiny.bert, ta.preset("lora", rank=2, targets=["word_embeddings"])),
    "convolutions": (
        convolutions,
        ta.preset("locon", rank=2, targets=["0"]) + ta.preset("lora", rank=1, targets=["1"]),
    ),
    "experts": (tiny.mixtral, ta.preset("lotr", rank=2, targets=["gate_up_proj", "down_proj"])),
    "slots": (tiny.bert, ta.preset("fact_tt", rank=2, targets=[*QV, "intermediate.dense"])),
    "rows": (tiny.gpt2, ta.preset("lora", rank=2, targets=["c_attn[v]"], parts={"c_attn": ["q", "k", "v"]})),
    "two rules": (
        tiny.bert,
        ta.preset("lotr", rank=2, targets=QV) + ta.preset("lora", rank=3, targets=["output.dense"], dtype="bfloat16"),
    ),
    "extra modules": (tiny.bert_classifier, ta.preset("lora", rank=2, targets=QV, train=["classifier"])),
}


def attached(case: str) -> ta.Adapter:
    make, spec = CASES[case]
    adapter = attach(make(), spec)
    tiny.shake(adapter)
    return adapter


def agree(saved: Saved, adapter: ta.Adapter) -> None:
    assert list(saved.sites) == [path for group in adapter.groups.values() for path in group.paths]
    for path in saved.sites:
        wanted = adapter.delta(path).detach()
        assert wanted.abs().max() > 0 and torch.equal(saved.delta(path), wanted), path


@pytest.mark.parametrize("case", CASES)
def test_deltas_of_a_file_are_those_of_the_adapter(case, tmp_path):
    adapter = attached(case)
    saved = as_saved(adapter.save(tmp_path / "adapter"))
    agree(saved, adapter)
    for name, group in adapter.groups.items():
        assert list(saved.factors(name)) == list(group.diagram.nodes)
        assert all(torch.equal(t, adapter.factors(name)[node]) for node, t in saved.factors(name).items())
        assert (saved.starts(name) is not None) == (group.rule.start == "difference")


@pytest.mark.parametrize("case", CASES)
def test_chains_apply_what_deltas_are(case):
    saved = as_saved(attached(case))
    for path, (group, placement) in saved.sites.items():
        delta = saved.delta(path).flatten(1)
        if placement.site.kind == "linear":
            x = tiny.noise(3, delta.shape[1]).to(delta.dtype)
            close = {"rtol": 0.05, "atol": 0.05} if delta.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(saved.chain(path)(x) * group.scale, x @ delta.mT, **close)


def test_an_attached_adapter_is_had_without_its_model_in_every_state():
    adapter = attached("lotr")
    path = "encoder.layer.0.attention.self.query"
    before = adapter.delta(path).detach()
    adapter.scale = -2.5
    agree(as_saved(adapter), adapter)
    torch.testing.assert_close(as_saved(adapter).delta(path), -2.5 * before)
    adapter.merge()
    agree(as_saved(adapter), adapter)
    adapter.unmerge()
    adapter.detach()
    agree(as_saved(adapter), adapter)
    assert not any(tensor.requires_grad for tensor in as_saved(adapter).tensors.values())


def test_what_is_had_without_a_model_is_saved_read_and_loaded_again(tmp_path):
    adapter = attached("a difference")
    adapter.scale = 3.0
    file = as_saved(adapter).save(tmp_path / "adapter", revision="abc")
    again = as_saved(file)
    assert again.path == file and again.base["revision"] == "abc" and again.save(tmp_path / "copy") != file
    assert as_saved(tmp_path / "copy").base["revision"] == "abc"
    for source in (file, str(file), file.parent, again, as_saved(adapter)):
        agree(as_saved(source), adapter)
        agree(as_saved(source), ta.load(source, tiny.bert()))


def test_an_adapter_of_one_model_is_loaded_onto_another():
    adapter = attached("lotr")
    agree(as_saved(ta.load(adapter, tiny.bert())), adapter)


def test_adapters_made_in_memory_have_the_tensors_of_their_plan():
    adapter = attached("lotr")
    tensors = {key: tensor.detach() for key, tensor in adapter.tensors().items()}
    agree(Saved.of(adapter.plan, tensors), adapter)
    key = min(tensors)
    with pytest.raises(ta.FileError, match=f"the adapter lacks key '{key}'"):
        Saved.of(adapter.plan, {k: t for k, t in tensors.items() if k != key})
    with pytest.raises(ta.FileError, match="the adapter has an unknown key 'more'"):
        Saved.of(adapter.plan, tensors | {"more": torch.ones(1)})
    with pytest.raises(ta.FileError, match=f"'{key}' in the adapter has another shape"):
        Saved.of(adapter.plan, tensors | {key: torch.ones(1)})


def test_what_is_no_adapter_is_refused(tmp_path):
    saved = as_saved(attached("lora"))
    with pytest.raises(ta.SiteError, match="pooler is not adapted by the adapter"):
        saved.delta("pooler")
    with pytest.raises(ta.SpecError, match="no group 'nope'"):
        saved.factors("nope")
    with pytest.raises(ta.AdapterError, match="this is no adapter"):
        as_saved(tiny.bert())
    with pytest.raises(ta.FileError, match="no adapter at"):
        as_saved(tmp_path)
    with pytest.raises(ta.FileError, match="the adapter adapts .*, which the model lacks"):
        ta.load(saved, tiny.gpt2())
