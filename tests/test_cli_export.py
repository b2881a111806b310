"""`tensoradapt export`: what it writes, what it says, and what it refuses."""

import json

import pytest
import tiny
from peft import PeftModel
from safetensors.torch import load_file

import tensoradapt as ta
from tensoradapt.cli.app import run
from tensoradapt.peft import import_peft


@pytest.fixture
def adapter(tmp_path):
    """The path of a saved adapter of two ranks on a two-layer Llama."""
    spec = ta.preset("lotr", rank=2, targets=["q_proj"]) + ta.preset("lora", rank=5, targets=["down_proj"])
    attached = ta.attach(tiny.llama(), spec)
    tiny.shake(attached)
    attached.save(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def config_of(out):
    return json.loads((out / "adapter_config.json").read_text())


def test_a_folder_is_written_and_told(adapter, tmp_path, capsys):
    out = tmp_path / "served"
    assert run(["export", adapter, "--to", "peft", "--out", str(out)]) == 0
    said, err = capsys.readouterr()
    assert "4 modules, rank 5, portable, float32" in said and "--max-lora-rank 8" in said and err == ""
    assert said.splitlines()[-1] == f"written to {out}" and all(len(line) <= 80 for line in said.splitlines()[:-1])
    assert PeftModel.from_pretrained(tiny.llama(), out) and len(config_of(out)["target_modules"]) == 4


def test_json_is_one_object_and_options_are_passed_on(adapter, tmp_path, capsys):
    out = tmp_path / "served"
    tiny.llama().save_pretrained(tmp_path / "base")
    options = ["--layout", "compact", "--dtype", "bfloat16", "--model", str(tmp_path / "base"), "--rank", "3"]
    more = ["--base-name", "org/base", "--task-type", "CAUSAL_LM", "--json"]
    assert run(["export", adapter, "--out", str(out), *options, *more]) == 0
    said, err = capsys.readouterr()
    told, config = json.loads(said), config_of(out)
    assert told["rank"] == 3 and told["layout"] == "compact" and told["dtype"] == "bfloat16" and told["max_error"] > 0
    assert "warning: the compact layout" in err and config["target_modules"] == ["down_proj", "q_proj"]
    assert config["rank_pattern"] and (config["base_model_name_or_path"], config["task_type"]) == (
        "org/base",
        "CAUSAL_LM",
    )
    assert {str(t.dtype) for t in load_file(out / "adapter_model.safetensors").values()} == {"torch.bfloat16"}


def test_a_peft_folder_is_an_adapter_too(adapter, tmp_path):
    for source, out in ((adapter, "one"), (str(tmp_path / "one"), "two")):
        assert run(["export", source, "--out", str(tmp_path / out), "--for", "vllm"]) == 0
    one, two = (import_peft(tmp_path / name) for name in ("one", "two"))
    assert all((one.delta(path) - two.delta(path)).abs().max() < 1e-6 for path in one.sites)


REFUSED = [
    (["--to", "gguf"], "no format 'gguf' to export to"),
    (["--for", "ollama"], "--for ollama is none"),
    (["--for", "vllm", "--layout", "compact"], "vllm does not serve this adapter"),
    (["--dtype", "int8"], "no dtype 'int8'"),
    (["--model", "nowhere"], "no model at nowhere"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_bad_input_is_a_few_lines_and_no_folder(options, says, adapter, tmp_path, capsys):
    assert run(["export", adapter, "--out", str(tmp_path / "out"), *options]) == 2
    said, err = capsys.readouterr()
    assert said == "" and says in err and "Traceback" not in err and not (tmp_path / "out").exists()


def test_a_folder_is_overwritten_when_that_is_asked_for(adapter, tmp_path, capsys):
    arguments = ["export", adapter, "--out", str(tmp_path / "out")]
    assert [run(arguments), run(arguments), run([*arguments, "--overwrite"])] == [0, 2, 0]
    assert "is there already" in capsys.readouterr().err
