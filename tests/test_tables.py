"""Tables fit 80 columns with one line a row and whole names, on a terminal and in a pipe; details are under --wide."""

import json
import re
import subprocess
import sys
import time

import pytest
import tiny
from transformers import DeepseekV3Config, LlamaConfig

import tensoradapt as ta
from tensoradapt.cli.app import run
from tensoradapt.presets import PRESETS
from tensoradapt.sites import from_mapping
from tensoradapt.tables import columns, wrapped

BIG = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
MANY = ("lora", "lotr", "tt_lora", "vera", "lorta", "fact_tt", "metatt_4d", "lokr", "loha", "krona")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Configs of a dense model of 405 billion parameters, and of one with experts."""
    place = tmp_path_factory.mktemp("models")
    llama = {**BIG, "num_key_value_heads": 8, "vocab_size": 128256, "architectures": ["LlamaForCausalLM"]}
    LlamaConfig(**llama).save_pretrained(place / "llama")
    LlamaConfig(**{**llama, "num_hidden_layers": 4}).save_pretrained(place / "small")
    small = {"num_hidden_layers": 8, "n_routed_experts": 32, "architectures": ["DeepseekV3ForCausalLM"]}
    DeepseekV3Config(**small).save_pretrained(place / "experts")
    return place


COMMANDS = [
    *("presets", *(f"presets {name}" for name in PRESETS)),
    *(f"plan --model llama --preset {name} --target all-linear" for name in ("lora", "lotr", "tt_lora", "vera")),
    *("plan --model experts --preset lora --target all-linear", "plan --model llama --preset metatt_5d"),
    "budget --model small --ranks 1:17 --max-parameters 90000000" + "".join(f" --preset {name}" for name in MANY),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_table_fits_eighty_columns(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert run(command.split()) == 0
    out = capsys.readouterr().out
    assert out and max(map(len, out.splitlines())) <= 80, out


def test_a_row_is_a_line_and_names_are_whole(place, capsys):
    assert run(["plan", "--model", str(place / "experts"), "--preset", "lora", "--target", "all-linear"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    named = {row[0]: int(row[1]) for row in rows if row and row[0].startswith("layer")}
    assert named["layer0..7_q_a_proj"] == 8
    assert named["layer3..7_experts_down_proj_expert0..31"] == 5 * 32
    plan = ta.plan(ta.preset("lora", targets=["all-linear"]), place / "experts")
    assert sum(named.values()) == plan.num_sites
    assert sum(int(row[-1].replace(",", "")) for row in rows if row and row[0] in named) == plan.num_trainable


def test_wide_and_json_have_all_columns(place, capsys):
    arguments = ["plan", "--model", str(place / "small"), "--preset", "tt_lora", "--target", "q_proj"]
    assert run([*arguments, "--wide"]) == 0
    head, row, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == "group sites tensor ranks trainable frozen lowering FLOP/token dense".split()
    assert "r_in_0=5 r_in_1=5" in row and "in_0=" in row and len(row) > 80
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"][0]["diagram"]


def test_names_of_groups_leave_out_what_a_weight_has_not():
    shapes = {f"layers.{k}.q": (4, 4) for k in range(2)} | {f"layers.1.experts.{e}.up": (4, 4) for e in range(2)}
    names = [group.name for group in ta.plan(ta.preset("lora", targets=["q", "up"]), shapes | {"head": (4, 4)}).groups]
    assert names == ["layer0_q", "layer1_q", "layer1_up_expert0", "layer1_up_expert1"]


def test_a_budget_has_a_line_for_a_rank_and_a_column_for_a_preset(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    arguments = "budget --model small --preset lora --preset lotr --preset krona --ranks 1:64 --target q_proj".split()
    assert run(arguments) == 0
    out = capsys.readouterr().out
    table = {cells[0]: cells[1:] for cells in map(str.split, out.splitlines())}
    assert table["rank"] == ["lora", "lotr"] and [row for row in table if row.isdigit()] == [
        "1",
        "2",
        "4",
        "8",
        *"16 32 64".split(),
    ]
    for name, count in zip(table["rank"], table["16"], strict=True):
        assert (
            int(count.replace(",", "")) == ta.plan(ta.preset(name, rank=16, targets=["q_proj"]), "small").num_trainable
        )
    assert "krona:" in out and "all 64 ranks: --wide" in out
    assert run([*arguments, "--wide"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * 64 + 1


def test_a_budget_that_is_written_prints_the_answer_alone(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    arguments = "budget --model small --preset lora --preset lotr --ranks 1:64 --target q_proj --out".split()
    assert run([*arguments, str(tmp_path / "b.csv"), "--max-parameters", "10000000"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and re.match(r"lora: rank \d+", out) and f"wrote {tmp_path / 'b.csv'}" in err
    assert len((tmp_path / "b.csv").read_text().splitlines()) == 1 + 2 * 64
    assert run([*arguments, str(tmp_path / "b.csv")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 7


def test_a_plan_writes_the_spec_that_makes_it(place, tmp_path, capsys):
    for suffix in ("yaml", "json"):
        spec = tmp_path / f"spec.{suffix}"
        arguments = ["plan", "--model", str(place / "small"), "--preset", "lotr", "--rank", "3", "--json"]
        assert run([*arguments, "--out", str(spec)]) == 0
        first = capsys.readouterr().out
        assert run(["plan", "--model", str(place / "small"), "--spec", str(spec), "--json"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert again["groups"] == json.loads(first)["groups"]
        assert ta.Spec.load(spec).rules[0].targets == ("q_proj", "v_proj")
    assert run([*arguments, "--out", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_one_preset_is_shown_whole_with_a_command_and_a_call_that_work(place, capsys):
    for name, row in PRESETS.items():
        assert run(["presets", name]) == 0
        out = capsys.readouterr().out
        flat = " ".join(out.split())
        assert row.cite in flat and " ".join(row.formula.split()) in flat and " ".join(row.note.split()) in flat
        assert all(f"{parameter}=" in flat for parameter in row.parameters)
        call = re.search(r"spec = (ta\.preset\(.*\))", out)[1]
        spec = eval(call, {"ta": ta})  # our own text
        assert spec == ta.preset(name)
        command = re.search(r"tensoradapt (plan .*)", out)[1].replace("MODEL", str(place / "small"))
        if spec.rules[0].default != "convolutions":
            assert run(command.split()) == 0, command
        capsys.readouterr()
    assert run(["presets", "lort"]) == 2
    assert "did you mean" in capsys.readouterr().err


SHARED = {"lora": "nothing", "lotr": "factor_out and factor_in by all weights", "vera": "B and A by all weights"}


@pytest.mark.parametrize("name", SHARED)
def test_what_a_preset_shares_is_read_off_its_network(name, capsys):
    assert run(["presets", name]) == 0
    assert SHARED[name] in " ".join(capsys.readouterr().out.split())


def test_pipes_get_the_same_text_as_terminals(place):
    made = [sys.executable, "-m", "tensoradapt", "presets"]
    texts = {
        subprocess.run(made, capture_output=True, text=True, check=True, env={"PATH": "", "COLUMNS": size}).stdout
        for size in ("40", "80", "200")
    }
    assert len(texts) == 1


def test_columns_are_dropped_in_order_until_the_table_fits():
    head = ("name", "long", "also long", "count")
    rows = [("a" * 30, "b" * 30, "c" * 30, "1"), ("d", "e", "f", "22")]
    assert columns(head, rows, text=("name",))[0].split() == ["name", "long", "also", "long", "count"]
    lines = columns(head, rows, text=("name",), drop=("also long", "long"))
    assert lines[0].split() == ["name", "long", "count"] and len(lines[1]) == 30 + 2 + 30 + 2 + 5
    assert lines[2] == "d" + " " * 60 + "e" + "     22"
    assert wrapped("word " * 40)[1].startswith("  word") and max(map(len, wrapped("x" * 100))) == 100


def test_time_of_a_plan_is_linear_in_its_sites():
    """Twice the experts take about twice the time: 4 would be quadratic."""

    def seconds(experts: int) -> float:
        sites = {f"layers.{k}.mlp.experts.{e}.up": (64, 32) for k in range(12) for e in range(experts)}
        model = from_mapping(sites)
        begin = time.process_time()
        ta.plan(ta.preset("lora", rank=2, targets=["up"]), model)
        return time.process_time() - begin

    seconds(8)
    assert min(seconds(256) for _ in range(2)) < 3 * min(seconds(128) for _ in range(2))


def test_tied_weights_are_one_site_whatever_their_order():
    model = tiny.llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    for targets in (["lm_head", "embed_tokens"], ["embed_tokens", "lm_head"]):
        (group,) = ta.plan(ta.preset("lora", targets=targets), model).groups
        assert group.placements[0].site.joined
