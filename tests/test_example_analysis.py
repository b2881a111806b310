"""examples/analyse_finetuning.py on a tiny BERT and a made-up task: what it trains, extracts, scores and writes."""

import csv
import importlib
import json
import sys

import pytest
import torch
import transformers
from test_example_text import EXAMPLES, LAYERS, WIDTH, data, model  # noqa: F401 (the fixtures of the other example)

import tensoradapt as ta

MIDDLE = 32
PER_LAYER = 4 * (WIDTH + WIDTH) + 2 * (WIDTH + MIDDLE)  # of LoRA r=1 on the six roles
SITES = 6 * LAYERS
FORMATS = ["LoRA", "TT-LoRA", "LoTR", "CP", "TT-matrix"]


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("analyse_finetuning")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def call(example, model, data):  # noqa: F811
    """Run the example in-process: `call(out, *arguments)` returns the exit code."""

    def go(out, *arguments):
        threads = str(torch.get_num_threads())
        fixed = ["--data", str(data), "--model", str(model), "--out", str(out), "--threads", threads, "--lr", "3e-3"]
        return example.main([*fixed, *arguments])

    return go


@pytest.fixture(scope="module")
def ran(call, tmp_path_factory):
    """One run, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("analysis") / "out"
    assert call(out, "--epochs", "4", "--lora-ranks", "1", "16") == 0
    return out


@pytest.fixture(scope="module")
def rows(ran):
    with (ran / "table.csv").open() as file:
        return list(csv.DictReader(file))


def weights(folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)  # noqa: F811
    return {path: value.detach() for path, value in model.named_parameters()}


def test_every_format_is_there_at_every_budget_and_none_exceeds_it(rows):
    found = [(row["format"], int(row["budget"])) for row in rows if row["budget"]]
    assert found == [(name, LAYERS * PER_LAYER * rank) for rank in (1, 16) for name in FORMATS]
    for row in rows[2:]:
        assert 0 < int(row["num_parameters"]) <= int(row["budget"])


def test_the_errors_and_counts_are_those_of_the_adapters_on_the_disk(ran, rows):
    base, tuned = weights(ran / "base"), weights(ran / "tuned")
    paths = [path for path in json.loads((ran / "report.json").read_text())["sites"]]
    assert len(paths) == SITES
    for row in (row for row in rows if row["budget"]):
        rank = int(row["budget"]) // (LAYERS * PER_LAYER)
        host = transformers.AutoModelForSequenceClassification.from_pretrained(ran / "base")
        adapter = ta.load(ran / "adapters" / f"{row['format'].lower()}-{rank}", host)
        held = {path for group in adapter.plan.groups for path in group.paths}
        lost = total = 0.0
        for path in paths:
            delta = tuned[f"{path}.weight"] - base[f"{path}.weight"]
            left = delta - adapter.delta(path) if path in held else delta
            lost, total = lost + float(left.square().sum()), total + float(delta.square().sum())
        assert float(row["relative_error"]) == pytest.approx((lost / total) ** 0.5, rel=1e-4, abs=1e-6)
        assert int(row["num_parameters"]) == sum(p.numel() for p in adapter.parameters())


def test_the_whole_change_scores_as_the_tuned_model_and_no_change_as_the_base_with_the_tuned_rest(example, ran, rows):
    tuned, base = (weights(ran / side) for side in ("tuned", "base"))
    args = example.parser().parse_args(["--data", "unused"])
    full = example.load(ran / "tuned", "cpu")
    bare = example.base_with_rest_tuned(example.load(ran / "base", "cpu"), full, ["bert.encoder.layer.1.output.dense"])
    changed = {path for path, value in bare.named_parameters() if not torch.equal(value, tuned[path])}
    assert changed == {"bert.encoder.layer.1.output.dense.weight"}
    assert torch.equal(bare.get_parameter(*changed), base[changed.pop()])
    assert args.lora_ranks == [1, 4, 16]
    assert [float(row["relative_error"]) for row in rows[:2]] == [0.0, 1.0]
    assert int(rows[0]["num_parameters"]) == LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * MIDDLE)


def test_an_adapter_that_holds_all_scores_as_the_full_change(rows):
    """LoRA r=16 has the whole rank of these weights."""
    full = rows[0]
    (row,) = [row for row in rows if row["format"] == "LoRA" and int(row["budget"]) == 16 * LAYERS * PER_LAYER]
    assert float(row["relative_error"]) < 1e-5
    assert (row["f1"], row["accuracy"]) == (full["f1"], full["accuracy"])
    assert float(full["accuracy"]) > 0.75


def test_the_table_the_figure_and_the_report_are_written(ran, rows):
    lines = (ran / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows) and lines[0].startswith("| format | budget | parameters | relative error | f1")
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "<svg" in (ran / "figure.svg").read_text()
    text = (ran / "report.txt").read_text()
    assert text.startswith("What rank is it?") and "bfloat16: ranks above the rounding noise" in text
    assert (ran / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_half_precision_leaves_fewer_ranks_and_bfloat16_fewest(example, ran):
    said = example.in_halves(ran / "base", ran / "tuned", ["query", "intermediate.dense"]).splitlines()
    medians = {line.split(":")[0].strip(): int(line.rsplit(" ", 1)[1]) for line in said[1:]}
    assert 0 <= medians["bfloat16"] < medians["float16"] <= WIDTH


def test_checkpoints_that_are_there_are_used_and_those_of_other_settings_refused(
    call, example, ran, monkeypatch, capsys
):
    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(example, "train", refuse)
    monkeypatch.setattr(example, "compare", lambda *_: [])
    before = (ran / "tuned" / "model.safetensors").read_bytes()
    assert call(ran, "--epochs", "4") == 0
    assert call(ran, "--epochs", "3") == 2
    assert "epochs=4" in capsys.readouterr().err
    assert (ran / "tuned" / "model.safetensors").read_bytes() == before


def test_a_training_that_was_cut_off_is_done_again(call, example, tmp_path, monkeypatch):
    train = example.train

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "train", interrupt)
    monkeypatch.setattr(example, "compare", lambda *_: [])
    assert call(tmp_path / "out", "--epochs", "1") == 130
    monkeypatch.setattr(example, "train", train)
    assert call(tmp_path / "out", "--epochs", "1") == 0


def test_a_format_that_cannot_go_so_low_says_what_it_needs(example, ran, capsys):
    args = example.parser().parse_args(["--data", "unused", "--out", str(ran), "--device", "cpu", "--lora-ranks", "1"])
    monkey = sys.modules["analyse_finetuning_extract"]
    kept = monkey.budgets
    try:
        monkey.budgets = lambda *_: {1: 20}
        found = {
            row.format: row for row in example.compare(ran / "base", ran / "tuned", args, lambda _: {}, example.load)
        }
    finally:
        monkey.budgets = kept
    assert "at least" in found["LoTR"].note and found["LoTR"].relative_error is None
    assert found["TT-LoRA"].num_parameters <= 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--targets", "qery"], "qery"), (["--lr", "1e30"], "diverged"), (["--task", "rte"], "rte")],
)
def test_bad_input_exits_with_2_and_says_why(call, tmp_path, capsys, arguments, words):
    assert call(tmp_path / "out", "--epochs", "1", *arguments) == 2
    assert words in capsys.readouterr().err
