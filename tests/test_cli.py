"""The command line: its output, its exit codes, and that bad input is a few lines and no traceback."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from safetensors.torch import save_file

import tensoradapt
from tensoradapt.cli.app import run
from tensoradapt.cli.plot import FIGURES

COMMANDS = ("presets", "plan", "budget", "analyze", "extract", "export", "plot", "demo")


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
    "a head format without head counts": (["--preset", "lorta", "--target", "q"], "pass --set heads="),
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
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tensoradapt.cli.run.plan.plan", interrupted)
    assert run(["plan", "--model", weights, "--preset", "lora", "--target", "q"]) == 130


def test_the_module_runs_as_a_program(weights):
    command = [sys.executable, "-m", "tensoradapt", "plan", "--model", weights, "--preset", "lora", "--target", "zz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "matches no site" in done.stderr
    assert subprocess.run([sys.executable, "-m", "tensoradapt", "--version"], check=True, capture_output=True).stdout


@pytest.fixture
def checkpoints(tmp_path):
    """Two checkpoints in folders, `base` and `tuned`, that differ by rank 2 at q alone."""
    base = {f"layers.{i}.{r}.weight": torch.randn(16, 12) for i in range(2) for r in "qv"}
    tuned = {n: t + torch.randn(16, 2) @ torch.randn(2, 12) if ".q." in n else t for n, t in base.items()}
    for name, state in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    return [str(tmp_path / "base"), str(tmp_path / "tuned")]


def test_analyze_prints_a_table_or_one_json_object(checkpoints, tmp_path, capsys):
    assert run(["analyze", *checkpoints]) == 0
    out, err = lines(capsys)
    assert out.startswith("What rank is it? 2 ") and "layers:\n  0.q " in out and "LoRA r=2" in out
    assert err == ""
    assert run(["analyze", *checkpoints, "--json", "--out", str(tmp_path / "report")]) == 0
    report = json.loads(lines(capsys)[0])
    assert report["sites"]["layers.0.q"]["ranks"]["noise"] == 2 and report["sites"]["layers.0.v"]["norm"] == 0
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"report.json", "report.html", "report.txt"}
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert (tmp_path / "report" / "report.txt").read_text() == out
    assert run(["analyze", *checkpoints, "--wide"]) == 0
    wide = lines(capsys)[0]
    assert "\nlayers.0.q " in wide and "\nlayers.0.v " in wide and "Marchenko-Pastur" in wide


def test_analyze_some_weights_and_some_values(checkpoints, capsys):
    arguments = ["analyze", *checkpoints, "--target", "q", "--values", "3", "--no-candidates", "--json"]
    assert run(arguments) == 0
    report = json.loads(lines(capsys)[0])
    assert list(report["sites"]) == ["layers.0.q", "layers.1.q"] and report["candidates"] == []
    assert {len(row["singular_values"]) for row in report["sites"].values()} == {3}


def test_extract_prints_a_table_or_one_json_object(checkpoints, tmp_path, capsys):
    arguments = ["extract", *checkpoints, "--preset", "lora", "--rank", "2", "--target", "q", "--out"]
    assert run([*arguments, str(tmp_path / "one")]) == 0
    out, err = lines(capsys)
    assert "written to" in out.splitlines()[-1] and err == ""
    assert [line.split()[:2] for line in out.splitlines()[:2]] == [["role", "weights"], ["q", "2"]]
    assert run([*arguments, str(tmp_path / "wide"), "--wide"]) == 0
    assert "layer0_q" in lines(capsys)[0]
    assert run([*arguments, str(tmp_path / "two"), "--json"]) == 0
    found = json.loads(lines(capsys)[0])
    assert found["path"] == str(tmp_path / "two" / "adapter.safetensors")
    assert found["num_parameters"] == 2 * 2 * 28 and found["relative_error"] < 1e-5
    assert run([*arguments, str(tmp_path / "one"), "--overwrite"]) == 0


def test_extract_says_when_nothing_differs(checkpoints, tmp_path, capsys):
    """A success: equal checkpoints are no mistake."""
    base = checkpoints[0]
    arguments = ["extract", base, base, "--preset", "lotr", "--target", "q", "--out", str(tmp_path / "a")]
    assert run(arguments) == 0
    assert "nothing to extract" in lines(capsys)[0] and not (tmp_path / "a").exists()
    assert run([*arguments, "--json"]) == 0
    assert json.loads(lines(capsys)[0])["path"] is None
    assert run(["analyze", base, base]) == 0
    assert "no weight differs" in lines(capsys)[0]


@pytest.mark.parametrize(
    "goal", [["--error", "0.5"], ["--error", "0"], ["--error", "noise"], ["--max-parameters", "60"]]
)
def test_extract_chooses_ranks(goal, checkpoints, tmp_path, capsys):
    arguments = ["extract", *checkpoints, "--preset", "lora", "--target", "q", "--out", str(tmp_path / "a"), "--json"]
    assert run([*arguments, *goal]) == 0
    found = json.loads(lines(capsys)[0])
    wanted = {"0.5": 0.5, "0": 1e-5, "noise": 1e-5, "60": 1}[goal[1]]
    assert found["relative_error"] <= wanted and found["num_parameters"] <= (60 if goal[1] == "60" else 112)


def test_a_dry_run_writes_nothing(checkpoints, tmp_path, capsys):
    arguments = ["extract", *checkpoints, "--preset", "lotr", "--rank", "2", "--target", "q", "--dry-run"]
    arguments += ["--out", str(tmp_path / "a")]
    assert run(arguments) == 0
    out, err = lines(capsys)
    assert "MiB" in out and "trainable" in out and err == ""
    assert run([*arguments, "--json"]) == 0
    assert json.loads(lines(capsys)[0])["num_trainable"] == 2 * 28 + 2 * 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "tuned"]


BAD_PAIRS = {
    "one checkpoint": (["analyze", "{base}"], "two checkpoints, or adapters"),
    "no such folder": (["analyze", "nowhere/at-all", "{tuned}"], "no checkpoint at nowhere/at-all"),
    "no weights in it": (["analyze", "{base}", "{empty}"], "no .safetensors file"),
    "a target of neither": (["analyze", "{base}", "{tuned}", "--target", "qq"], "matches no site"),
    "no values": (["analyze", "{base}", "{tuned}", "--values", "0"], "--values"),
    "a report over a file": (["analyze", "{base}", "{tuned}", "--out", "{file}"], "is a file"),
    "a report below a file": (["analyze", "{base}", "{tuned}", "--out", "{file}/report"], "is a file"),
    "no spec": (["extract", "{base}", "{tuned}", "--out", "{new}"], "give a preset or a spec file"),
    "no output": (["extract", "{base}", "{tuned}", "--preset", "lora"], "--out"),
    "no error": ([*"extract {base} {tuned} --preset lora --target q --out {new} --error much".split()], "is no error"),
    "both goals": (
        [*"extract {base} {tuned} --preset lora --target q --out {new} --error 0.1 --max-parameters 9".split()],
        "not both",
    ),
    "an output of its own inputs": (
        [*"extract {base} {tuned} --preset lora --target q --out {tuned}".split()],
        "there",
    ),
    "an output that is a file": (
        [*"extract {base} {tuned} --preset lora --target q --out {file}".split()],
        "is a file",
    ),
    "no such device": ([*"analyze {base} {tuned} --device gpu".split()], "device 'gpu'"),
    "no such rows": ([*"analyze {base} {tuned} --rows some".split()], "--rows some"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_checkpoints_and_outputs_exit_2_with_a_few_lines(case, checkpoints, tmp_path, capsys):
    arguments, message = BAD_PAIRS[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    names = {"base": checkpoints[0], "tuned": checkpoints[1], "new": tmp_path / "new"}
    names |= {"empty": tmp_path / "empty", "file": tmp_path / "file"}
    assert run([argument.format(**names) for argument in arguments]) == 2
    out, err = lines(capsys)
    assert message in err and out == "" and "Traceback" not in err and len(err.splitlines()) < 14
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "empty", "file", "tuned"]


ALL = (
    "presets",
    "plan",
    "budget",
    "analyze",
    "extract",
    "convert",
    "export",
    "merge",
    "verify",
    "info",
    "plot",
    "demo",
)
# What a command line has imported when it ends, told by a hook that runs at the very end.
TOLD = """
import atexit, json, sys
atexit.register(lambda: sys.stderr.write(json.dumps(sorted(sys.modules))))
sys.argv = ["tensoradapt", *json.loads(sys.argv[1])]
from tensoradapt.__main__ import main
main()
"""


def test_the_list_of_commands_is_whole(capsys):
    assert run(["--help"]) == 0
    assert re.findall(r"^  ([a-z]+) +[A-Z]", lines(capsys)[0].partition("Commands:")[2], re.M) == list(ALL)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], [], *([name, "--help"] for name in ALL)], ids=str)
def test_help_and_version_load_neither_torch_nor_the_library(arguments):
    told = subprocess.run([sys.executable, "-c", TOLD, json.dumps(arguments)], capture_output=True, text=True)
    *printed, loaded = [*told.stdout.splitlines(), *told.stderr.splitlines()]
    assert printed and "Traceback" not in told.stderr
    loaded = json.loads(loaded)
    assert "typer" in loaded and not {"torch", "numpy", "rich", "yaml", "tensoradapt.spec"} & set(loaded)


def test_the_version_is_that_of_the_package():
    assert metadata.version("tensoradapt") == tensoradapt.__version__


def test_a_copy_that_is_not_installed_extracts(tmp_path, monkeypatch):
    whole = metadata.distribution

    def gone(name):
        if name == "tensoradapt":
            raise metadata.PackageNotFoundError(name)
        return whole(name)

    monkeypatch.setattr(metadata, "distribution", gone)
    base = {"layer.0.q.weight": torch.zeros(6, 6)}
    tuned = {name: tensor + torch.eye(6) for name, tensor in base.items()}
    assert tensoradapt.extract(base, tuned, tensoradapt.preset("lora", rank=6), tmp_path / "out").relative_error < 1e-5


def test_plot_names_the_figures_that_there_are():
    assert tuple(tensoradapt.plots.FIGURES) == FIGURES


@pytest.mark.parametrize("name", ["", *ALL])
def test_help_fits_eighty_columns_and_cuts_nothing(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run([*([name] if name else []), "--help"]) == 0
    out = lines(capsys)[0]
    assert max(map(len, out.splitlines())) <= 80
    assert "..." not in out.replace("'re:...'", "").replace("extract ...", "").replace("[ARGS]...", "")
    assert "list[" not in out and "<int" not in out


@pytest.mark.parametrize(("word", "offered"), [("lot", {"lotr", "lotr_by_role"}), ("tt", {"tt_lora"}), ("zz", set())])
@pytest.mark.parametrize("before", [["plan", "--preset"], ["budget", "--preset"], ["presets"]], ids=str)
def test_a_shell_completes_names_of_presets(before, word, offered):
    assert offered == set(completed([*before, word]))


def test_a_shell_completes_commands_and_options():
    assert set(completed(["e"])) == {"extract", "export"}
    assert "--max-parameters" in completed(["extract", "--max"])


def completed(words):
    """What bash is offered for the last of the words."""
    line = {"_TENSORADAPT_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["tensoradapt", *words])}
    line |= {"COMP_CWORD": str(len(words))}
    script = "import sys; sys.argv = ['tensoradapt']; from tensoradapt.__main__ import main; main()"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **line})
    assert told.stderr == ""
    return told.stdout.split()


def test_completion_can_be_shown_for_a_shell():
    script = "import sys; sys.argv = ['tensoradapt', '--show-completion', 'bash']\n"
    script += "from tensoradapt.__main__ import main; main()"
    shell = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=shell)
    assert "_TENSORADAPT_COMPLETE=complete_bash" in told.stdout, told.stderr
