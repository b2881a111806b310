"""LoRAs that PEFT made for models with Conv1Ds: merged, verified, loaded and served as PEFT has them."""

from pathlib import Path

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

import tensoradapt as ta
from tensoradapt.folders import merge_folder
from tensoradapt.peft import import_peft


def openai_gpt() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_head": 4, "n_layer": 2, "vocab_size": tiny.WORDS, "n_positions": 32}
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()


MODELS = {
    "gpt2": (tiny.gpt2, ["c_attn", "c_proj", "c_fc"]),
    "openai-gpt": (openai_gpt, ["c_attn", "c_proj"]),
    "llama": (tiny.llama, ["q_proj", "o_proj", "down_proj"]),
    "bert": (tiny.bert, ["query", "word_embeddings", "token_type_embeddings"]),
}


def prepared(name: str, turned: bool, tmp_path: Path) -> tuple[Path, Path, Path, nn.Module]:
    """A base's folder, PEFT's folder of its LoRA, the folder that PEFT's own merge saves, and that model."""
    make, targets = MODELS[name]
    make().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=turned, init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(make(), config)
    model.save_pretrained(tmp_path / "peft")
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "peft", tmp_path / "tuned", merged


def forgotten(folder: Path) -> None:
    """What PEFT writes of fan_in_fan_out at run time, as older versions did not."""
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"fan_in_fan_out": true', '"fan_in_fan_out": false'))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("said", ["true", "false"])
@pytest.mark.filterwarnings("ignore")
def test_a_lora_changes_a_folder_as_pefts_own_merge_does(name, said, tmp_path):
    base, folder, tuned, merged = prepared(name, said == "true", tmp_path)
    if said == "false":
        forgotten(folder)
    wanted = stored(tuned)
    for given in (None, merged):
        adapter = import_peft(folder, model=given)
        out = stored(merge_folder(base, adapter, tmp_path / f"out {given is None}").path)
        assert out.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.allclose(out[key], tensor, atol=1e-6), key
        assert ta.verify(adapter, base, tuned).whole_error < 1e-5
        live = MODELS[name][0]()
        ta.load(adapter, live)
        assert torch.allclose(live(tiny.tokens())[0], merged(tiny.tokens())[0], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_without_a_config_the_layout_is_told_by_the_shape_or_by_model(name, tmp_path):
    """A square weight of a linear is refused by name where nothing tells, and right where model= does."""
    base, folder, tuned, merged = prepared(name, False, tmp_path)
    forgotten(folder)
    for side in (base, tuned):
        (side / "config.json").unlink()
    adapter = import_peft(folder)
    for call in (
        lambda **more: merge_folder(base, adapter, tmp_path / "out", **more),
        lambda **more: ta.verify(adapter, base, tuned, **more),
    ):
        with pytest.raises(ta.FileError, match=r"is square, and which of its sides is out cannot be told(?s:.*)model="):
            call()
        result = call(model=merged)
    assert result.whole_error < 1e-5
    out, wanted = stored(tmp_path / "out"), stored(tuned)
    assert all(torch.allclose(out[key], tensor, atol=1e-6) for key, tensor in wanted.items())


@pytest.mark.filterwarnings("ignore")
def test_a_conv1d_goes_out_again(tmp_path):
    """In, and out again onto the model, with PEFT's own outputs."""
    _, folder, _, merged = prepared("gpt2", True, tmp_path)
    ta.export_peft(import_peft(folder), tmp_path / "again", model=tiny.gpt2())
    again = peft.PeftModel.from_pretrained(tiny.gpt2(), str(tmp_path / "again"))
    assert torch.allclose(again(tiny.tokens())[0], merged(tiny.tokens())[0], atol=1e-4)
