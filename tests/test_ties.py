"""Weights that a model has under several names: one site with all of its modules, wherever the two sides keep it."""

import copy

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
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
from tensoradapt.io.saved import as_saved
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


def assert_as_tuned(model, expected, place) -> None:
    """Loaded, merged, and merged into the base's folder, the adapter in a place gives what the tuned model does."""
    adapter = ta.load(place / "adapter", model)
    assert close(outputs(model), expected)
    adapter.merge_and_detach()
    assert close(outputs(model), expected)
    merge_folder(place / "base", place / "adapter", place / "merged")
    assert close(outputs(type(model).from_pretrained(place / "merged")), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", MODELS)
def test_a_tied_weight_is_extracted_for_all_of_its_modules(case, form, tmp_path):
    """Loading, merging, and merging into the folder give the tuned model's output."""
    make, name = MODELS[case]
    base, tuned = make(), tuned_of(make())
    expected = outputs(tuned)
    assert not close(outputs(base), expected, 1e-2)
    given = sides(form, base, tuned, tmp_path)
    result = ta.extract(*given, ta.preset("lora", rank=16, targets=[name]), tmp_path / "adapter")
    assert result.whole_error < 1e-5 and result.plan.num_sites == 1 and result.change.changed_tensors == 1
    assert_as_tuned(make(), expected, tmp_path)
    found = verify(tmp_path / "adapter", *given)
    assert found.whole_error < 1e-5 and list(found.sites) == [result.plan.groups[0].paths[0]]


def untied(model):
    """The model with a head of its own, as a loader makes it: by its config, or because the file's values differ."""
    found = copy.deepcopy(model)
    found.config.tie_word_embeddings = found.config.is_encoder_decoder  # which ties the embeddings of both, too
    head = found.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return found


def head_tuned(base):
    """A model whose head and embedding went different ways."""
    model = untied(tuned_of(base))
    with torch.no_grad():
        model.get_output_embeddings().weight += 0.1 * tiny.noise(*model.get_output_embeddings().weight.shape, seed=7)
    return model


def head_of(model):
    return next(path for path, module in model.named_modules() if module is model.get_output_embeddings())


@pytest.mark.parametrize("form", ["folders", "module and folder", "folder and file"])
@pytest.mark.parametrize("case", MODELS)
def test_a_head_that_was_untied_by_tuning_has_a_delta_of_its_own(case, form, tmp_path):
    make, name = MODELS[case]
    base, tuned = make(), head_tuned(make())
    expected = outputs(tuned)
    given = sides(form, base, tuned, tmp_path)
    result = ta.extract(*given, ta.preset("lora", rank=16), tmp_path / "adapter")
    assert result.whole_error < 1e-5 and result.plan.num_sites == 2
    assert any("tied in the base" in note for note in result.notes)
    model = make()
    adapter = ta.load(tmp_path / "adapter", model)
    assert close(outputs(model), expected)
    with pytest.raises(ta.AdapterError, match="untie=True"):
        adapter.merge()
    adapter.merge_and_detach(untie=True)
    assert close(outputs(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert close(outputs(type(model).from_pretrained(tmp_path / "again")), expected)
    assert verify(tmp_path / "adapter", *given).whole_error < 1e-5
    for tied in (False, True):
        with pytest.raises(ta.AdapterError, match="untie"):
            merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", tied=tied)


@pytest.mark.parametrize("form", ["folders", "folder and module"])
@pytest.mark.parametrize("case", MODELS)
def test_a_head_that_was_tied_by_tuning_has_a_delta_of_its_own(case, form, tmp_path):
    make, name = MODELS[case]
    base, tuned = head_tuned(make()), tuned_of(make())
    expected = outputs(tuned)
    given = sides(form, base, tuned, tmp_path)
    result = ta.extract(*given, ta.preset("lora", rank=16), tmp_path / "adapter")
    assert result.whole_error < 1e-5
    assert any("tied in the tuned side" in note for note in result.notes)
    assert_as_tuned(head_tuned(make()), expected, tmp_path)
    assert verify(tmp_path / "adapter", *given).whole_error < 1e-5


def rewritten(folder, by):
    state = by(load_file(folder / "model.safetensors"))
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kept", ["head", "both", "both and head", "both and embedding"])
@pytest.mark.parametrize("case", ["gpt2", "llama", "gemma", "bert"])
def test_whichever_name_a_file_keeps(case, kept, tmp_path):
    """Files that hold the head's name alone, or both: a loader ties what is equal, and what is absent."""
    make, name = MODELS[case]
    base, tuned = make(), tuned_of(make())
    expected, head = outputs(tuned), f"{head_of(base)}.weight"
    sides("folders", base, tuned, tmp_path)
    embedding = next(n for n, p in base.named_parameters() if p is base.get_input_embeddings().weight)
    ways = {
        "head": lambda state: {(head if n == embedding else n): t for n, t in state.items()},
        "both": lambda state: {**state, head: state[embedding]},
        "embedding": dict,
    }
    for folder, way in zip(("base", "tuned"), kept.split(" and ") * 2, strict=False):
        rewritten(tmp_path / folder, ways[way])
    given = tmp_path / "base", tmp_path / "tuned"
    for target in (name, head.removesuffix(".weight")):
        result = ta.extract(*given, ta.preset("lora", rank=16, targets=[target]), tmp_path / target)
        assert result.whole_error < 1e-5 and result.plan.num_sites == 1 and result.change.changed_tensors == 1
        model = make()
        ta.load(tmp_path / target, model)
        assert close(outputs(model), expected)
        merge_folder(tmp_path / "base", tmp_path / target, tmp_path / f"{target}_merged")
        assert close(outputs(type(model).from_pretrained(tmp_path / f"{target}_merged")), expected)
        assert verify(tmp_path / target, *given).whole_error < 1e-5
    report = ta.analyze(*given)
    assert [path for path, row in report.sites.items() if row.norm] == [embedding.removesuffix(".weight")]
    assert head.removesuffix(".weight") not in report.sites
    said = f"is tied to {head.removesuffix('.weight')}: one weight"
    assert said in " ".join(str(report).split()) and said in " ".join(str(verify(tmp_path / name, *given)).split())


def test_equal_values_under_two_names_are_one_tensor(tmp_path):
    """State dicts of a saved copy: no memory is shared, and no config is there."""
    base, tuned = tiny.gpt2(), tuned_of(tiny.gpt2())
    given = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (base, tuned)]
    result = ta.extract(*given, ta.preset("lora", rank=16, targets=["lm_head"]), tmp_path / "adapter")
    assert result.whole_error < 1e-5 and result.plan.num_sites == 1
    ta.load(tmp_path / "adapter", base)
    assert close(outputs(base), outputs(tuned))


def save_model(model, file):
    """As safetensors' own save_model: one name of every tie."""
    kept = {tensor.data_ptr(): (name, tensor) for name, tensor in reversed(list(model.state_dict().items()))}
    save_file({name: tensor.contiguous() for name, tensor in kept.values()}, file)


@pytest.mark.parametrize("case", ["gpt2", "llama", "bert", "gemma"])
def test_a_tensor_of_no_known_model_is_that_of_all_modules_that_hold_it(case, tmp_path):
    """Files without a config, with one name of each tie: the model that the adapter is loaded onto tells the rest."""
    make, name = MODELS[case]
    base, tuned = make(), tuned_of(make())
    for model, file in ((base, "base.safetensors"), (tuned, "tuned.safetensors")):
        save_model(model, tmp_path / file)
    given = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    result = ta.extract(*given, ta.preset("lora", rank=16, targets=[name]), tmp_path / "adapter")
    assert result.whole_error < 1e-5
    model = make()
    adapter = ta.load(tmp_path / "adapter", model)
    assert close(outputs(model), outputs(tuned))
    adapter.merge_and_detach()
    assert close(outputs(model), outputs(tuned))
    alone = untied(make())
    ta.load(tmp_path / "adapter", alone)  # the head is a weight of its own there
    assert not close(outputs(alone), outputs(tuned), 1e-2)
    saved = as_saved(tmp_path / "adapter")
    assert ta.load(saved, make()).as_saved().plan.groups[0].placements[0].site.joined


def test_one_side_of_a_tie_that_was_trained_alone_stays_alone(tmp_path):
    """An adapter that `attach` made for one module, and PEFT's of one module, change that one."""
    model = tiny.gpt2()
    with pytest.warns(UserWarning, match="is tied to"):
        adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["wte"]))
    tiny.shake(adapter)
    adapter.save(tmp_path / "a")
    again = tiny.gpt2()
    ta.load(tmp_path / "a", again)
    assert close(outputs(again), outputs(model), 1e-6)


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_an_export_of_one_side_of_a_tie_says_what_its_reader_does(target, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny.gpt2()
    with pytest.warns(UserWarning, match="is tied to"):
        adapter = ta.attach(model, ta.preset("lora", rank=2, targets=[target]))
    tiny.shake(adapter)
    said = str(ta.export_peft(adapter, tmp_path / "peft"))
    assert "adds to" in said and "alone, and changes all of them when it merges" in " ".join(said.split())
    opened = peft.PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "peft")
    assert close(outputs(opened), outputs(model), 1e-5)
    merged = opened.merge_and_unload()
    assert not close(outputs(merged), outputs(model), 1e-2)


def test_an_export_of_an_extracted_tie_is_read_as_both(tmp_path):
    peft = pytest.importorskip("peft")
    base, tuned = tiny.gpt2(), tuned_of(tiny.gpt2())
    ta.extract(base, tuned, ta.preset("lora", rank=16, targets=["wte"]), tmp_path / "adapter")
    ta.export_peft(tmp_path / "adapter", tmp_path / "peft", model=base)
    opened = peft.PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "peft")
    assert close(outputs(opened), outputs(tuned))
