"""examples/finetune_text.py on a tiny random BERT and a made-up task: it learns, resumes, and picks rates honestly."""

import importlib
import json
import random
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers

EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = [*"abcdefghijklmnop", "good", "bad"]
WIDTH, LAYERS = 16, 2
HEAD = WIDTH * WIDTH + WIDTH + 2 * WIDTH + 2  # pooler and classifier, biases included
ADAPTERS = {
    "peft-lora:rank=3,alpha=12": LAYERS * 2 * 3 * 2 * WIDTH,
    "lora:rank=3,alpha=12": LAYERS * 2 * 3 * 2 * WIDTH,
    "lotr:rank=3,scale=1": 3 * 2 * WIDTH + LAYERS * 2 * 3 * 3,
}


@pytest.fixture(scope="session")
def example():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("finetune_text")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A BERT of two layers and width 16, its vocabulary the words above."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def sentence(rng, label):
    words = rng.choices(WORDS[:-2], k=rng.randint(1, 12))
    words[rng.randrange(len(words))] = "good" if label else "bad"
    return " ".join(words)


def write_split(path, count, seed):
    rng = random.Random(seed)
    labels = [rng.randrange(2) for _ in range(count)]
    columns = {
        "sentence1": [sentence(rng, label) for label in labels],
        "sentence2": [" ".join(rng.choices(WORDS[:-2], k=4)) for _ in labels],
        "label": labels,
        "idx": list(range(count)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    write_split(folder / "mrpc" / "train.parquet", 120, seed=1)
    write_split(folder / "mrpc" / "validation.parquet", 40, seed=2)
    return folder


@pytest.fixture
def call(example, model, data, tmp_path):
    """Run the example in-process: `call(*arguments)` returns the exit code."""

    def go(*arguments, out=tmp_path / "out"):
        threads = torch.get_num_threads()
        return example.main(
            ["--data", str(data), "--model", str(model), "--out", str(out), "--threads", str(threads), *arguments]
        )

    go.out = tmp_path / "out"
    return go


@pytest.fixture
def seen(example, monkeypatch):
    """Record what each run trains on, in which order, with which initial classifier, and what it is scored on."""
    runs = []
    train, evaluate, collate = example.train, example.evaluate, example.collate

    def watch_train(model, rows, args, rate, seed):
        trained = {path: value for path, value in model.named_parameters() if value.requires_grad}
        heads = [v.detach().clone() for p, v in trained.items() if "classifier" in p and v.shape == (2, WIDTH)]
        runs.append({"rate": rate, "seed": seed, "rows": rows, "heads": heads, "order": []})
        return train(model, rows, args, rate, seed)

    def watch_evaluate(model, rows, args):
        runs[-1]["judge"] = rows
        return evaluate(model, rows, args)

    def watch_collate(batch, *rest):
        runs[-1]["order"].append([tuple(row.inputs["input_ids"].tolist()) for row in batch])
        return collate(batch, *rest)

    monkeypatch.setattr(example, "train", watch_train)
    monkeypatch.setattr(example, "evaluate", watch_evaluate)
    monkeypatch.setattr(example, "collate", watch_collate)
    return runs


def records(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_method_learns_and_counts_its_parameters(call, model, capsys):
    methods = [argument for method in ADAPTERS for argument in ("--method", f"{method},lr=2e-2")]
    assert call("--method", "full:lr=3e-3", *methods, "--epochs", "15", "--seeds", "0", "--save") == 0
    full, *adapted = records(call.out)
    assert full["adapter_parameters"] + full["head_parameters"] == full_count(model)
    assert [record["adapter_parameters"] for record in adapted] == list(ADAPTERS.values())
    assert all(record["head_parameters"] == HEAD for record in (full, *adapted))
    for record in (full, *adapted):
        assert record["metrics"]["accuracy"] > 0.75, record
    table = capsys.readouterr().out
    assert (call.out / "table.md").read_text() == table
    assert len(table.splitlines()) == 2 + 1 + len(ADAPTERS)


def full_count(model):
    config = transformers.AutoConfig.from_pretrained(model)
    return sum(value.numel() for value in transformers.BertForSequenceClassification(config).parameters())


def test_a_saved_adapter_scores_the_same_after_loading_and_merging(call):
    assert call("--method", "lotr:rank=3,scale=4,lr=2e-2", "--seeds", "1", "--save") == 0
    (record,) = records(call.out)
    assert record["reloaded"] == record["metrics"]
    assert list((call.out / "adapters").iterdir())


def test_a_spec_file_is_a_method(call, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("rules:\n  - preset: lotr\n    targets: [query, value]\n    rank: 3\n")
    assert call("--spec", f"{path}:lr=1e-2", "--epochs", "1", "--seeds", "0") == 0
    (record,) = records(call.out)
    assert record["adapter_parameters"] == ADAPTERS["lotr:rank=3,scale=1"]
    assert record["head_parameters"] == HEAD


def test_methods_share_head_and_order_and_seeds_do_not(call, seen):
    methods = ["full", *ADAPTERS]
    arguments = [argument for method in methods for argument in ("--method", method)]
    assert call(*arguments, "--epochs", "1", "--seeds", "0", "1") == 0
    for seed in (0, 1):
        runs = [run for run in seen if run["seed"] == seed]
        assert len(runs) == len(methods)
        assert all(len(run["heads"]) == 1 and torch.equal(run["heads"][0], runs[0]["heads"][0]) for run in runs)
        assert all(run["order"] == runs[0]["order"] for run in runs)
    first, second = (next(run for run in seen if run["seed"] == seed) for seed in (0, 1))
    assert not torch.equal(first["heads"][0], second["heads"][0])
    assert first["order"] != second["order"]


def test_a_rate_is_chosen_on_a_held_out_tenth_that_is_not_trained_on(call, seen):
    assert call("--method", "full:lr=1e-9/3e-3", "--epochs", "10", "--seeds", "0", "1") == 0
    tried, final = seen[:2], seen[2:]
    assert [run["rate"] for run in tried] == [1e-9, 3e-3]
    assert [(run["rate"], run["seed"]) for run in final] == [(3e-3, 0), (3e-3, 1)]
    whole, validation = ({id(row) for row in final[0][key]} for key in ("rows", "judge"))
    assert (len(whole), len(validation)) == (120, 40)
    for run in tried:
        trained, judge = ({id(row) for row in run[key]} for key in ("rows", "judge"))
        assert (len(trained), len(judge)) == (108, 12)
        assert trained | judge == whole


def test_an_interrupted_grid_goes_on_where_it_stopped(call, seen, capsys):
    arguments = ["--method", "full", "--method", "peft-lora:rank=2", "--epochs", "1", "--seeds", "0", "1"]
    assert call(*arguments) == 0
    table, path = capsys.readouterr().out, call.out / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(seen) == len(lines) == 4
    path.write_text("".join(lines[:2]) + lines[2][:40])  # killed while it wrote the third
    assert call(*arguments) == 0
    assert len(seen) == 4 + 2
    again = path.read_text().splitlines(keepends=True)
    assert again[:2] == lines[:2]
    assert [json.loads(line)["metrics"] for line in again[3:]] == [json.loads(line)["metrics"] for line in lines[2:]]
    assert cells(capsys.readouterr().out) == cells(table)
    assert call(*arguments) == 0
    assert len(seen) == 4 + 2


def test_ctrl_c_keeps_the_finished_runs(call, example, monkeypatch, capsys):
    train = example.train

    def watch_train(model, rows, args, rate, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return train(model, rows, args, rate, seed)

    monkeypatch.setattr(example, "train", watch_train)
    assert call("--method", "full", "--epochs", "1", "--seeds", "0", "1") == 130
    assert [record["settings"]["seed"] for record in records(call.out)] == [0]
    assert "results.jsonl" in capsys.readouterr().err


def cells(table):
    """A table without its last column, the minutes."""
    return [line.split("|")[1:-2] for line in table.splitlines()]


@pytest.mark.parametrize("change", [["--epochs", "2"], ["--rows", "60"], ["--batch-size", "8"], ["--lr", "2e-3"]])
def test_other_settings_are_other_runs(call, seen, change):
    arguments = ["--method", "full", "--epochs", "1", "--seeds", "0"]
    assert call(*arguments) == 0
    assert call(*arguments, *change) == 0
    assert len(seen) == 2


def test_a_run_that_diverges_is_cut_short_reported_and_never_chosen(call, seen, capsys):
    assert call("--method", "full:lr=1e30/3e-3", "--epochs", "1", "--seeds", "0") == 0
    assert len(seen[0]["order"]) < 7  # of the 7 batches of 108 rows
    tried, *_, final = records(call.out)
    assert tried["metrics"] is None
    assert final["settings"]["lr"] == 3e-3
    assert call("--method", "full:lr=1e30", "--epochs", "1", "--seeds", "0") == 0
    assert "diverged" in capsys.readouterr().out.splitlines()[-1]


def test_metrics_follow_glue(example):
    from finetune_text_data import score

    truth, guess = [1, 1, 1, 0, 0, 1], [1, 1, 0, 1, 0, 1]  # 3 true positives, 1 false, 1 missed, 1 true negative
    assert score("mrpc", truth, guess) == pytest.approx({"f1": 6 / 8, "accuracy": 4 / 6})
    assert score("cola", truth, guess) == pytest.approx({"matthews": (3 * 1 - 1 * 1) / (4 * 4 * 2 * 2) ** 0.5})
    assert score("rte", truth, guess) == score("sst2", truth, guess) == pytest.approx({"accuracy": 4 / 6})


def test_batches_hold_every_row_once_and_waste_little(example):
    from finetune_text_data import Row, batches, collate

    rng = random.Random(0)
    rows = [Row({"input_ids": torch.full((rng.randint(1, 60),), i + 1)}, i % 2) for i in range(203)]
    for generator in (None, torch.Generator().manual_seed(0)):
        made = list(batches(rows, 8, generator))
        assert sorted(id(row) for batch in made for row in batch) == sorted(map(id, rows))
        padded = [collate(batch, 0, "cpu")["input_ids"] for batch in made]
        zeros = sum(int((ids == 0).sum()) for ids in padded)
        assert zeros < 0.1 * sum(ids.numel() for ids in padded)


def drop(data, tmp_path, column):
    table = pyarrow.parquet.read_table(data / "mrpc" / "train.parquet")
    for split in ("train", "validation"):
        path = tmp_path / "cut" / "mrpc" / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table.drop_columns([column]), path)
    return str(tmp_path / "cut")


BAD = {
    "unknown method": (["--method", "lotrr:rank=2"], "full, peft-lora, lora, lotr"),
    "method without value": (["--method", "lotr:rank"], "NAME:key=value"),
    "option twice": (["--method", "lotr:rank=2,rank=3"], "NAME:key=value"),
    "option of full": (["--method", "full:rank=2"], "full fine-tuning has no option"),
    "unknown option of peft": (["--method", "peft-lora:rnak=2"], "rnak"),
    "unknown target of peft": (["--method", "peft-lora:targets=qery"], "qery"),
    "unknown target of ours": (["--method", "lotr:rank=2,targets=qery"], "qery"),
    "rank 0": (["--method", "lotr:rank=0"], "rank"),
    "negative rate": (["--method", "full:lr=-1"], "learning rate"),
    "no number": (["--method", "full:lr=1e-3/x"], "learning rate"),
    "no spec": (["--spec", "absent.yaml"], "absent.yaml"),
    "no such task in the folder": (["--method", "full", "--task", "rte"], "train.parquet"),
    "no such folder": (["--method", "full", "--data", "/absent"], "/absent"),
    "too few rows": (["--method", "full", "--rows", "5"], "5 rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_trained(call, seen, capsys, name):
    arguments, words = BAD[name]
    good = ["--method", "full:lr=1e-4", "--seeds", "0"]
    assert call(*good, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not seen
    assert not call.out.exists()


@pytest.mark.parametrize("column", ["label", "sentence2"])
def test_a_missing_column_is_named(call, data, tmp_path, capsys, column):
    assert call("--method", "full", "--data", drop(data, tmp_path, column)) == 2
    assert column in capsys.readouterr().err


@pytest.mark.parametrize("argument", [["--task", "mnli"], ["--epochs", "0"]])
def test_a_bad_command_line_exits_with_2(call, argument):
    with pytest.raises(SystemExit) as stop:
        call("--method", "full", *argument)
    assert stop.value.code == 2


def test_no_method_is_an_error(call, capsys):
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    assert "--method" in capsys.readouterr().err
