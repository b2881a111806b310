"""What the command line says before long work, and of results that are worth little."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tensoradapt as ta
from tensoradapt.cli.app import run

SIDE = 24


@pytest.fixture
def pair(tmp_path, monkeypatch) -> tuple[str, str]:
    """Two checkpoints whose change of one weight has the full rank, all directions alike; and one of rank 1."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{k}.{part}.weight": torch.randn(SIDE, SIDE, generator=generator) for k in (0, 1) for part in "qk"}
    turned, _ = torch.linalg.qr(torch.randn(SIDE, SIDE, generator=generator))
    tuned = {name: weight + 0.1 * turned for name, weight in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        Path(name).mkdir()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, Path(name, "model.safetensors"))
    return "base", "tuned"


def said(command: str, capsys, code: int = 0) -> str:
    assert run(command.split()) == code
    return " ".join("".join(capsys.readouterr()).split())


def test_a_rank_that_another_option_overrules_is_named(pair, capsys):
    for goal in ("--error 0.5", "--max-parameters 200"):
        text = said(f"extract base tuned --preset lora --rank 3 {goal} --out new --overwrite", capsys)
        assert f"--rank 3 is not used: {goal.split()[0]} chooses the ranks" in text
        text = said(f"convert new --preset lora --rank 1 {goal} --out again --overwrite", capsys)
        assert f"--rank 1 is not used: {goal.split()[0]} chooses the ranks" in text


def test_a_rank_that_nobody_chose_is_named(pair, capsys):
    own = ta.preset("lora").rules[0].rank
    assert f"rank {own}, the preset's own" in said("extract base tuned --preset lora --out new", capsys)
    assert f"rank {own}, the preset's own" in said("convert new --preset lora --out again", capsys)
    for chosen in ("--rank 8", "--set rank=8", "--error 0.1", "--max-parameters 400"):
        text = said(f"extract base tuned --preset lora {chosen} --out new --overwrite", capsys)
        assert "the preset's own" not in text and "is not used" not in text


def test_factors_that_hold_next_to_nothing_are_called_that(pair, capsys):
    """All 24 singular values are alike: rank 1 holds a 24th of the square, rank 8 a third."""
    text = said("extract base tuned --preset lora --rank 1 --out new", capsys)
    assert "hold 4.2 % of the squared change, next to nothing: choose ranks for an error (--error 0.1), or" in text
    assert "next to nothing" not in said("extract base tuned --preset lora --rank 8 --out more", capsys)
    assert "next to nothing" in said("verify new base tuned", capsys)
    assert "next to nothing" in said("convert more --preset lora --rank 1 --out less", capsys)


def test_an_adapter_of_other_checkpoints_is_suspected(pair, capsys):
    said("extract base tuned --preset lora --rank 8 --out new", capsys)
    text = said("verify new tuned base", capsys)
    assert "worse than no adapter, whose error is 1: look whether it is of this base and this tuned model" in text
    assert "worse than" not in said("verify new base tuned", capsys)


@pytest.mark.parametrize(
    "command",
    [
        "extract nowhere nowhere --preset lora --rank 2 --out taken",
        "convert adapter --preset lora --rank 2 --out adapter",
        "export adapter --out taken",
        "merge base adapter --out taken",
    ],
)
def test_an_output_that_is_there_is_refused_before_anything_is_read(command, pair, capsys, monkeypatch):
    said("extract base tuned --preset lora --rank 2 --out adapter", capsys)
    Path("taken").mkdir()
    Path("taken/notes.txt").write_text("mine")

    def read(*_, **__):
        raise AssertionError("the work has begun")

    for name in ("extract.run.open_source", "peft.export._exact", "folders.as_saved", "convert.open_adapter"):
        module, _, work = name.rpartition(".")
        monkeypatch.setattr(sys.modules[f"tensoradapt.{module}"], work, read)
    text = said(command, capsys, code=2)
    assert "is there already" in text or "holds other files" in text or "exists" in text


def test_numbers_are_read_as_people_write_them(pair, capsys):
    counts = {}
    for text in ("1000", "1_000", "1,000", "1k", "0.001M"):
        said(f"extract base tuned --preset lora --max-parameters {text} --out new --overwrite", capsys)
        counts[text] = json.loads(Path("new/extraction.json").read_text())["requested"]["max_parameters"]
    assert set(counts.values()) == {1000}
    said("extract base tuned --preset lora --error 50% --out new --overwrite", capsys)
    assert json.loads(Path("new/extraction.json").read_text())["requested"]["error"] == 0.5
    assert "tolerance 0.9: passed" in said("verify new base tuned --tolerance 90%", capsys)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("extract base tuned --preset lora --error 1q --out new", "--error '1q' is no error expected: a number such"),
        ("verify base base tuned --tolerance x", "--tolerance 'x' is no error"),
        (
            "convert base --preset lora --max-parameters 30q --out new",
            "'30q' is no number of parameters expected:",
        ),
        (
            "analyze config.json tuned",
            "config.json holds no weights expected: a safetensors file, or a folder next:",
        ),
    ],
)
def test_numbers_and_files_that_are_none_are_answered_in_the_users_words(command, says, pair, capsys):
    Path("config.json").write_text('{"architectures": ["BertModel"]}')
    text = said(command, capsys, code=2)
    assert says in text and "Usage" not in text
