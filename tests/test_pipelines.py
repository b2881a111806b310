"""Folders of several models, as diffusers writes them: the commands ask for one of the subfolders, and take it."""

import json

import pytest
import tiny
import torch
from safetensors.torch import save_file

import tensoradapt as ta
from tensoradapt.cli.app import run as command_line

RANK = 2


def unet(seed: int) -> dict[str, torch.Tensor]:
    """A small change of rank two of the attention of two blocks, beside a convolution."""
    names = [f"down_blocks.{k}.attentions.0.transformer_blocks.0.attn1.to_{role}" for k in (0, 1) for role in "qv"]
    base = {f"{name}.weight": tiny.noise(12, 12, seed=k) for k, name in enumerate(names)}
    base |= {"conv_in.weight": tiny.noise(12, 4, 3, 3, seed=9), "conv_in.bias": torch.zeros(12)}
    if seed:
        for name in base:
            if "attn1" in name:
                base[name] = base[name] + 0.1 * tiny.noise(12, RANK, seed=seed) @ tiny.noise(RANK, 12, seed=seed + 1)
    return base


def pipeline(folder, seed: int = 0):
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.35.0", "sample_size": 8}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    save_file(unet(seed), folder / "unet" / "diffusion_pytorch_model.safetensors")
    tiny.bert().save_pretrained(folder / "text_encoder")
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "BertModel"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline", **parts}))
    return folder


@pytest.fixture
def folders(tmp_path):
    return {
        "base": pipeline(tmp_path / "base"),
        "tuned": pipeline(tmp_path / "tuned", seed=20),
        "out": tmp_path / "out",
    }


def run(line: str, folders) -> int:
    return command_line([word.format(**folders) for word in line.split()])


LORA = "--preset lora --rank 2 --target to_q"
COMMANDS = {
    "plan": f"plan --model {{base}} {LORA}",
    "budget": "budget --model {base} --preset lora --target to_q --ranks 1:2",
    "analyze": "analyze {base} {tuned} --out {out}",
    "extract": f"extract {{base}} {{tuned}} {LORA} --out {{out}}",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipeline_names_its_subfolders(command, folders, capsys):
    assert run(COMMANDS[command], folders) == 2
    said = capsys.readouterr()
    assert f"{folders['base']} is a pipeline of several models" in " ".join(said.err.split())
    assert "safetensors files in text_encoder, unet" in said.err and "Traceback" not in said.err
    assert said.out == "" and not folders["out"].exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_subfolder_of_a_pipeline_is_a_model(command, folders, capsys):
    """Whose config is diffusers' and none that transformers can build."""
    line = COMMANDS[command].replace("{base}", "{base}/unet").replace("{tuned}", "{tuned}/unet")
    assert run(line, folders) == 0
    assert "layouts are not known" not in capsys.readouterr().err


def test_what_is_found_in_a_subfolder_is_right(folders):
    result = ta.extract(
        folders["base"] / "unet",
        folders["tuned"] / "unet",
        ta.preset("lora", rank=RANK, targets=["to_q", "to_v"]),
        folders["out"],
    )
    assert result.relative_error < 1e-5
    plan = ta.plan(ta.preset("lotr", rank=2, targets=["to_q", "to_v"]), folders["base"] / "unet")
    assert plan.num_sites == 4 and plan.num_trainable == 2 * 2 * 12 + 4 * 4


def test_the_text_encoder_is_built_from_its_config(folders):
    assert ta.plan(ta.preset("lora", rank=2, targets=["query"]), folders["base"] / "text_encoder").num_sites == 2


def test_a_folder_with_models_below_it(tmp_path):
    """Checkpoints of a run, say."""
    pipeline(tmp_path / "run")
    (tmp_path / "run" / "model_index.json").unlink()
    with pytest.raises(ta.FileError, match="no .safetensors file in .* itself(?s:.*)text_encoder, unet(?s:.*)next"):
        ta.plan(ta.preset("lora", rank=2, targets=["query"]), tmp_path / "run")


def test_a_pipeline_without_safetensors_files(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ta.FileError, match="is a pipeline(?s:.*)none of its subfolders"):
        ta.analyze(tmp_path, tmp_path)
