"""The command line: its output, its exit codes, and that bad input is a few lines and no traceback."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tensoradapt.cli.app import run

COMMANDS = ("presets", "plan", "budget", "export", "plot", "demo")


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    roles = {"q": (16, 16), "v": (8, 16)}
    save_file({f"layers.{i}.{r}.weight": torch.zeros(s) for i in range(2) for r, s in roles.items()}, path)
    return str(path)


def lines(capsys):
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    assert run([command, "--help"]) == 0
    out, _ = lines(capsys)
    assert f"tensoradapt {command}" in out
    assert "Example:" in out


def test_presets_lists_every_family(capsys):
    assert run(["presets", "--json"]) == 0
    rows = json.loads(lines(capsys)[0])["presets"]
    assert {"lora", "lotr", "dota", "locon"} <= {row["name"] for row in rows}
    assert all(row["formula"] and row["cite"] and row["start"] in ("zero", "nonzero", "difference") for row in rows)
    assert run(["presets"]) == 0
    assert "arXiv:2402.01376" in lines(capsys)[0]


def test_plan_prints_a_table_and_one_json_object(weights, capsys):
    arguments = ["plan", "--model", weights, "--preset", "lora", "--rank", "2", "--target", "q", "--target", "v"]
    assert run(arguments) == 0
    assert "224 trainable" in lines(capsys)[0]
    assert run([*arguments, "--json"]) == 0
    out, err = lines(capsys)
    assert json.loads(out)["num_trainable"] == 224
    assert {"num_parameters", "num_bytes", "flops_per_token", "groups"} <= set(json.loads(out))
    assert err == ""


def test_plan_reads_a_spec_file(weights, tmp_path, capsys):
    spec = tmp_path / "spec.yaml"
    spec.write_text("rules:\n- {preset: lora, rank: 2, targets: [q]}\n- {preset: lora, rank: 4, targets: [v]}\n")
    assert run(["plan", "--model", weights, "--spec", str(spec), "--json"]) == 0
    assert json.loads(lines(capsys)[0])["num_trainable"] == 2 * (2 * 32 + 4 * 24)


def test_set_passes_a_presets_own_parameters(weights, capsys):
    arguments = ["plan", "--model", weights, "--preset", "lorta", "--target", "q", "--set", "heads=4", "--json"]
    assert run(arguments) == 0
    assert json.loads(lines(capsys)[0])["groups"][0]["diagram"]["sizes"]["head"] == 4


@pytest.mark.parametrize("suffix", ["png", "svg", "csv", "json"])
def test_budget_writes_figures_and_tables(weights, tmp_path, suffix, capsys):
    out = tmp_path / f"budget.{suffix}"
    arguments = ["budget", "--model", weights, "--preset", "lora", "--preset", "lotr", "--target", "q"]
    assert run([*arguments, "--ranks", "1:4", "--max-parameters", "200", "--out", str(out), "--json"]) == 0
    printed, err = lines(capsys)
    found = json.loads(printed)
    assert [row["rank"] for row in found["rows"]] == [1, 2, 3, 4] * 2
    assert found["solutions"]["lora"]["num_trainable"] <= 200
    assert out.stat().st_size > 0
    assert str(out) in err.replace("\n", "")


BAD = {
    "a misspelt target": (["--preset", "lora", "--target", "qq"], "matches no site"),
    "rank 0": (["--preset", "lora", "--rank", "0", "--target", "q"], "not a rank"),
    "a float rank": (["--preset", "lora", "--rank", "1.5", "--target", "q"], "valid integer"),
    "an unknown preset": (["--preset", "lroa", "--target", "q"], "did you mean"),
    "a parameter that the preset lacks": (["--preset", "krona", "--rank", "4", "--target", "q"], "has no parameter"),
    "a head format without head counts": (["--preset", "lorta", "--target", "q"], "pass heads"),
    "neither preset nor spec": ([], "give a preset or a spec file"),
    "an unknown option": (["--frobnicate"], "frobnicate"),
    "a missing spec file": (["--spec", "nowhere.yaml"], "no spec file"),
    "no assignment": (["--preset", "lora", "--target", "q", "--set", "heads"], "name=value"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_2_with_a_few_lines(case, weights, capsys):
    arguments, message = BAD[case]
    assert run(["plan", "--model", weights, *arguments]) == 2
    out, err = lines(capsys)
    assert message in err
    assert out == ""
    assert "Traceback" not in err
    assert len(err.splitlines()) < 12


def test_bad_ranks_and_missing_models(weights, capsys):
    for ranks in ("0:4", "4:1", "x", "-1"):
        assert run(["budget", "--model", weights, "--preset", "lora", "--target", "q", "--ranks", ranks]) == 2
    assert run(["plan", "--model", "nowhere", "--preset", "lora", "--target", "q"]) == 2
    assert "no model at" in lines(capsys)[1]


def test_interruption_exits_130(monkeypatch, weights, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tensoradapt.cli.plan.make_plan", interrupted)
    assert run(["plan", "--model", weights, "--preset", "lora", "--target", "q"]) == 130


def test_the_module_runs_as_a_program(weights):
    command = [sys.executable, "-m", "tensoradapt", "plan", "--model", weights, "--preset", "lora", "--target", "zz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "matches no site" in done.stderr
    assert subprocess.run([sys.executable, "-m", "tensoradapt", "--version"], check=True, capture_output=True).stdout
