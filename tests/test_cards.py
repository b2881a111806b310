"""What an adapter says of itself: in print, in its folder's card, and to `tensoradapt info`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import tensoradapt as ta
from tensoradapt.cli.app import run
from tensoradapt.io.card import CARD, MARK

SPEC = ta.preset("lotr", rank=2, targets=["query", "value"], train=["classifier"])


def adapted(spec=SPEC, make=tiny.bert_classifier):
    model = make()
    adapter = ta.attach(model, spec)
    tiny.shake(adapter)
    return model, adapter


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("make", [tiny.bert_classifier, tiny.gpt2, tiny.mixtral, tiny.t5])
def test_a_plan_knows_the_size_of_the_model(make, tmp_path):
    spec = ta.preset("lora", rank=1, targets=["all-linear"])
    assert ta.plan(spec, make()).num_model == size(make())
    make().save_pretrained(tmp_path)
    assert ta.plan(spec, tmp_path).num_model == size(make())


def test_trained_numbers_with_and_without_the_head():
    model, adapter = adapted()
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trained.items() if "classifier" in name)
    plan, whole = adapter.plan, sum(trained.values())
    assert (plan.num_trainable, plan.num_extra, plan.num_total) == (whole - head, head, whole)
    share = 100 * whole / size(tiny.bert_classifier())
    says = f"{whole - head} + {head} of classifier = {whole}, {share:.3g} % of the model's 5,987"
    assert says in str(adapter) and says in str(plan)
    assert str(adapter).splitlines()[0] == "adapter 'default' on BertForSequenceClassification: attached"
    assert "4 sites in 1 group: lotr on query, value; rank 2" in str(adapter)
    adapter.merge()
    assert "merged" in str(adapter).splitlines()[0] and len(str(adapter).splitlines()) <= 6


def test_no_size_is_made_up_where_none_is_known():
    plan = ta.plan(ta.preset("lora", rank=1, targets=["q"]), {"layer.0.q": (4, 6)})
    assert plan.num_model == 0 and "of the model" not in str(plan)
    assert plan.to_dict() | {"num_model": 0} == plan.to_dict()


def test_a_folder_has_a_card(tmp_path):
    model = tiny.bert_classifier()
    model.config._name_or_path = "/home/somebody/tiny"
    adapter = ta.attach(model, SPEC)
    tiny.shake(adapter)
    adapter.save(tmp_path)
    text = (tmp_path / CARD).read_text()
    assert "ta.load(" in text and "Adapter of tiny\n" in text and "lotr on query, value; rank 2" in text
    assert "131" in text and "/home" not in text and "library_name: tensoradapt" in text
    again = tiny.bert_classifier()
    code = text.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(tmp_path))
    scope: dict = {"model": again}
    exec(code.replace("model = ...", "# "), scope)
    ids = tiny.tokens()
    assert torch.equal(again.eval()(input_ids=ids).logits, adapter._model[0].eval()(input_ids=ids).logits)
    adapter.save(tmp_path / "bare.safetensors")
    assert len(list(tmp_path.glob("*.md"))) == 1


def test_a_card_that_was_changed_stays(tmp_path):
    _, adapter = adapted()
    adapter.save(tmp_path)
    first = (tmp_path / CARD).read_text()
    assert MARK.search(first)
    adapter.scale = 2.0
    other = adapted(ta.preset("lora", rank=1, targets=["key"]))[1]
    other.save(tmp_path)
    second = (tmp_path / CARD).read_text()
    assert second != first and "lora on key; rank 1" in second
    (tmp_path / CARD).write_text(second.replace("# Adapter", "# My adapter"))
    adapter.save(tmp_path)
    assert (tmp_path / CARD).read_text() == second.replace("# Adapter", "# My adapter")
    (tmp_path / CARD).write_bytes(b"\xff\xfe")
    adapter.save(tmp_path)
    assert (tmp_path / CARD).read_bytes() == b"\xff\xfe"


def told(capsys, *arguments) -> str:
    assert run([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_info(tmp_path, capsys):
    _, adapter = adapted()
    adapter.save(tmp_path / "a")
    text = told(capsys, "info", tmp_path / "a")
    assert "an adapter of BertForSequenceClassification" in text and "lotr on query, value; rank 2" in text
    assert "80 + 51 of classifier = 131" in text and "made by ta.attach" in text
    found = json.loads(told(capsys, "info", tmp_path / "a" / "adapter.safetensors", "--json"))
    assert (found["num_trainable"], found["num_total"], found["num_model"]) == (80, 131, 5987)
    assert found["base"]["name"] == "BertForSequenceClassification" and len(found["base"]["shapes"]) == 64
    assert run(["info", str(tmp_path)]) == 2 and "no adapter at" in capsys.readouterr().err


def test_info_of_a_peft_folder(tmp_path, capsys):
    _, adapter = adapted(ta.preset("lora", rank=2, targets=["query"]), tiny.bert)
    ta.export_peft(adapter, tmp_path / "p", base_name="org/base")
    assert "base_model: org/base" in (tmp_path / "p" / CARD).read_text()
    text = told(capsys, "info", tmp_path / "p")
    assert "org/base" in text and "rank 2" in text and "2 sites" in text
    assert json.loads(told(capsys, "info", tmp_path / "p", "--json"))["num_trainable"] == 2 * 2 * 2 * 16


def test_the_command_stands_in_the_card(tmp_path):
    base, tuned = tiny.bert(), tiny.bert()
    with torch.no_grad():
        tuned.encoder.layer[0].attention.self.query.weight += tiny.noise(16, 1) @ tiny.noise(1, 16, seed=1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    command = ["extract", "base", str(tmp_path / "tuned"), "--preset", "lora", "--rank", "1", "--out", "out"]
    program = [sys.executable, "-m", "tensoradapt", *command]
    subprocess.run(program, cwd=tmp_path, check=True, capture_output=True, env=_environment())
    text = (tmp_path / "out" / CARD).read_text()
    assert "Made by `tensoradapt extract base tuned --preset lora --rank 1 --out out`." in text
    assert str(tmp_path) not in text and ta.load(tmp_path / "out", base).plan.num_model == size(tiny.bert())


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(ta.__file__).parents[1])}
