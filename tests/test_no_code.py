"""Model folders that hold code, or name some: none of it runs, nothing is asked, and what can be read is read."""

import json

import pytest
import tiny

import tensoradapt as ta
from tensoradapt.errors import FileError

SPEC = ta.preset("lora", rank=1, targets=["all-linear"])
AUTO = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")}
MAKES = {"bert": tiny.bert_classifier, "gpt2": tiny.gpt2, "mixtral": tiny.mixtral, "t5": tiny.t5}
KNOWN = {
    "auto_map": {"auto_map": AUTO},
    "auto_map of another repository": {"auto_map": {name: f"org/evil--{to}" for name, to in AUTO.items()}},
    "a class of the folder": {"auto_map": AUTO, "architectures": ["EvilModel"]},
    "a kernel": {"attn_implementation": "kernels-community/flash-attn"},
    "experts by a kernel": {"experts_implementation": "deepgemm"},
    "attention that is not installed": {"attn_implementation": "flash_attention_2"},
    "pipelines": {"custom_pipelines": {"evil": {"impl": "evil.Pipeline", "pt": ["AutoModel"]}}},
}


def hostile(make, folder, **fields):
    """A model folder whose config says more, with a file of code that leaves a trace when it runs."""
    make().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    return folder


@pytest.mark.parametrize("fields", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_known_model_is_built_by_transformers_own_classes(make, fields, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    folder = hostile(make, tmp_path, **fields)
    model = make().base_model if "architectures" in fields else make()
    assert ta.plan(SPEC, folder).records() == ta.plan(SPEC, model).records()
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "architectures", [["Trainer"], ["pipeline"], ["AutoModel"], ["logging"], [3, None], "Trainer", {}]
)
def test_an_architecture_is_a_model_class_and_nothing_else(architectures, tmp_path):
    folder = hostile(tiny.gpt2, tmp_path, architectures=architectures)
    assert ta.plan(SPEC, folder).num_sites == ta.plan(SPEC, tiny.gpt2().transformer).num_sites


def test_a_model_by_code_of_its_own_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    folder = hostile(tiny.gpt2, tmp_path, auto_map=AUTO, model_type="evil")
    with pytest.raises(FileError, match="never run") as error:
        ta.plan(SPEC, folder)
    assert "safetensors" in str(error.value) and "trust_remote_code" not in str(error.value)
    assert ta.plan(SPEC, folder / "model.safetensors").num_sites
    report = ta.analyze(folder, {n: t + 0.1 for n, t in tiny.gpt2().state_dict().items()}, candidates=False)
    assert any("never run" in note for note in report.match["notes"])
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["hf-hub:org/name", "local-dir:/somewhere"])
def test_a_part_that_lies_elsewhere_is_refused(name, tmp_path):
    folder = hostile(tiny.gpt2, tmp_path, backbone_config={"model_type": "timm_backbone", "backbone": name})
    with pytest.raises(FileError, match="elsewhere"):
        ta.plan(SPEC, folder)
