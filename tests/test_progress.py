"""Progress: lines that come in time, say what is at work and how long it will take; results leave stdout alone."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import tensoradapt as ta
from tensoradapt.cli.app import run
from tensoradapt.cli.run import progress as module
from tensoradapt.cli.run.progress import Steps, progress, span


def test_an_estimate_is_of_the_steps_that_were_made_here():
    steps = Steps(begun=100.0).then("a", 0, 4, now=101.0)
    assert steps.left(110.0) is None and steps.line(110.0) == "0 of 4 (a)"
    assert steps.then("b", 1, 4, now=112.0).line(112.0) == "1 of 4 (b), about 36 s left"
    resumed = Steps(begun=100.0).then("k", 21, 24, now=110.0)
    assert resumed.left(110.0) == 30.0
    assert resumed.then("l", 23, 24, now=130.0).left(130.0) == 10.0


def test_numbers_that_begin_again_are_another_run():
    steps = Steps(begun=0.0).then("weights", 40, 40, now=80.0).then("groups", 1, 2, now=90.0)
    assert steps.left(95.0) == 5.0
    assert steps.then("groups", 0, 2, now=100.0).begun == 100.0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "1 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (3599.9, "1 h"), (7500, "2 h 5 min")],
)
def test_spans_read_as_people_say_them(seconds, said):
    assert span(seconds) == said


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(module, "FIRST", 0.05)
    monkeypatch.setattr(module, "EVERY", 0.1)


def test_one_long_step_is_seen_to_be_at_work(often, capsys):
    with progress("extract") as tell:
        time.sleep(0.08)
        tell("layer0_q", 0, 3)
        time.sleep(0.35)
    out, err = capsys.readouterr()
    first, *between, last = err.splitlines()
    assert first == "extract: reading, 1 s so far" and last == "extract: done in 1 s" and out == ""
    assert 2 <= len(between) <= 4 and set(between) == {"extract: 0 of 3 (layer0_q)"}


def test_many_short_steps_are_few_lines(often, capsys):
    with progress("verify") as tell:
        for done in range(1, 401):
            tell(f"w{done}", done, 400)
            time.sleep(0.001)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 12
    assert re.fullmatch(r"verify: \d+ of 400 \(w\d+\), about 1 s left", lines[0])


def test_short_work_and_quiet_processes_say_nothing(capsys):
    for quiet in (False, True):
        with progress("verify", quiet=quiet) as tell:
            tell("w", 1, 1)
    assert capsys.readouterr() == ("", "")


def test_work_that_fails_is_not_called_done(often, capsys):
    with pytest.raises(KeyboardInterrupt), progress("verify"):
        time.sleep(0.1)
        raise KeyboardInterrupt
    assert "done" not in capsys.readouterr().err
    before = capsys.readouterr().err
    time.sleep(0.25)
    assert before == capsys.readouterr().err == ""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Two checkpoints and an adapter between them in the working folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = {f"layers.{k}.q.weight": torch.randn(12, 10) for k in range(3)}
    tuned = {name: value + torch.randn(12, 2) @ torch.randn(2, 10) for name, value in base.items()}
    for name, state in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    ta.extract(base, tuned, ta.preset("lora", rank=2, targets=["q"]), "adapter")


COMMANDS = {
    "analyze base tuned": r"layers\.\d\.q",
    "extract base tuned --preset lora --rank 2 --target q --out new": "layer[s.]*[0-9]+[._]q",
    "convert adapter --preset lora --rank 1 --out new": r"layer\d_q",
    "export adapter --out new": r"factors of layers\.0\.q",
    "merge base adapter --out new": r"layers\.\d\.q\.weight",
    "verify adapter base tuned": r"layers\.\d\.q",
    "budget --model base --preset lora --target q --ranks 1:3 --max-parameters 900": "lora at rank 1",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_its_items(command, home, monkeypatch, capsys):
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Steps, "then", lambda self, *step: told.append(step[:3]) or self)
    assert run(command.split()) == 0
    items, done, totals = zip(*told, strict=True)
    assert re.search(COMMANDS[command], " ".join(items)), items
    assert all(0 <= k <= total and total for k, total in zip(done, totals, strict=True))


SLOW = """
import time, sys
from tensoradapt.cli.run.progress import progress
with progress("analyze") as tell:
    for done in range(3):
        tell(f"layers.{done}.q", done, 3)
        time.sleep(0.2)
print("result")
"""


def test_a_terminal_gets_a_bar_that_goes_away():
    reader, writer = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    ran = subprocess.run(
        [sys.executable, "-c", SLOW], stderr=writer, stdout=subprocess.PIPE, text=True, env=environment, check=True
    )
    os.close(writer)
    drawn = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert ran.stdout == "result\n"
    assert "analyze layers.1.q" in drawn and "1/3" in drawn and "━" in drawn
