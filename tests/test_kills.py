"""Every job that writes, killed, interrupted or out of room at steps of its own: nothing is lost, nothing is left.

After it the output is not there, the old one, or complete; the same job then succeeds, to the same bytes, and leaves
nothing beside its output. A few steps of every job; `pytest tests/test_kills.py --kills all` takes every one of them.
"""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import kills
import pytest
import tiny
from safetensors.torch import save_file
from torch import nn

import tensoradapt as ta
from tensoradapt.cli.app import run as command_line

BASE = {f"layers.{i}.{role}.weight": tiny.noise(8, 6, seed=i) for i in (0, 1) for role in "qv"}


@dataclass(frozen=True)
class Job:
    """What is run, in the folder of the inputs; `out` is below a folder of its own.

    `whole`: the files of an output are of one run; else every file is whole by itself.
    """

    run: Callable[[str], list[str] | Callable[[], None]]
    out: str = "out"
    whole: bool = True
    few: int = 2  # steps, for each way to be stopped and each state before


def python(act: Callable[[Path], object]) -> Callable[[str], Callable[[], None]]:
    """A job in Python."""
    return lambda out: lambda: act(Path(out)) and None


def attached(rank: int = 2):
    model = nn.Sequential(nn.Linear(8, 8))
    adapter = ta.attach(model, ta.preset("lora", rank=rank, targets=["0"]), seed=1)
    tiny.shake(adapter)
    return adapter


def commands(text: str) -> Callable[[str], list[str]]:
    return lambda out: [word.replace("OUT", out) for word in text.split()]


JOBS = {
    "merge": Job(commands("merge base adapter --overwrite --out OUT")),
    "convert": Job(commands("convert adapter --preset lotr --rank 2 --overwrite --out OUT"), whole=False),
    "convert to a file": Job(commands("convert adapter --preset lotr --rank 2 --overwrite --out OUT"), "a.safetensors"),
    "export": Job(commands("export adapter --to peft --overwrite --out OUT"), few=1),
    "extract": Job(commands("extract base tuned --preset lora --rank 2 --overwrite --out OUT"), whole=False),
    "analyze": Job(commands("analyze base tuned --out OUT"), few=1),
    "plot": Job(commands("plot report --format svg --out OUT"), few=1),
    "one figure": Job(commands("plot report --figure ranks --out OUT"), "figure.svg"),
    "budget": Job(commands("budget --model base --preset lora --target q --ranks 1:4 --out OUT"), "table.csv"),
    "plan": Job(commands("plan --model base --preset lora --target q --rank 2 --out OUT"), "spec.yaml"),
    "a spec in Python": Job(python(lambda out: ta.preset("lora", rank=3).save(out)), "spec.json"),
    "an adapter in Python": Job(python(lambda out: attached().save(out)), whole=False),
    "a table in Python": Job(python(lambda out: attached().plan.to_csv(out)), "table.csv"),
}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Checkpoints, an adapter and a report; and what every job makes of them alone, and before with other inputs."""
    folder = tmp_path_factory.mktemp("kills")
    tuned = {name: t + 0.1 * tiny.noise(8, 6, seed=10 + k) for k, (name, t) in enumerate(BASE.items())}
    for name, state in (("base", BASE), ("tuned", tuned)):
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors")
    (folder / "base" / "more").mkdir()
    (folder / "base" / "more" / "notes.txt").write_text("kept")
    before = os.getcwd()
    os.chdir(folder)
    try:
        ta.extract("base", "tuned", ta.preset("lora", rank=2, targets=["q", "v"]), "adapter")
        assert command_line(["analyze", "base", "tuned", "--out", "report"]) == 0
        yield folder
    finally:
        os.chdir(before)


def made(inputs: Path, name: str) -> dict[str, bytes]:
    """The output of a job that nobody disturbs, made once in this process, which then has imported all it needs."""
    job, room = JOBS[name], inputs / f"whole {name}"
    if not room.exists():
        room.mkdir()
        act = job.run(str(room / job.out))
        assert (act() if callable(act) else command_line(act)) in (0, None)
        assert kills.run(job.run(str(room / job.out)), room).code == 0
    return _plain(kills.contents(room), room)


def _plain(held, room: Path) -> dict[str, bytes]:
    """Contents without the name of the folder that they lie in, which records and cards have."""
    return {name: text.replace(str(room).encode(), b"ROOM") for name, text in held.items()}


def older(inputs: Path, name: str) -> dict[str, bytes]:
    """An older output: every file of it is there, with a comment behind it or, in JSON, a space."""
    return {file: text + b"\n" for file, text in made(inputs, name).items()}


def room_of(tmp_path: Path, inputs: Path, name: str, state: str) -> Path:
    """A folder for one run, with the older output in it where there is one."""
    room = tmp_path / "room"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    for file, text in older(inputs, name).items() if state == "old" else ():
        (room / file).parent.mkdir(parents=True, exist_ok=True)
        (room / file).write_bytes(text)
    return room


def check_whole(held, old, new, job: Job) -> None:
    """Raise where an output is neither absent, nor old, nor complete; or, file by file, one is not."""
    moving = any(".ready-" in name for name in held)  # what is being moved when it is killed is moved by the next run
    seen = kills.visible(held)
    if job.whole and not moving:
        assert seen in ({}, old, new), sorted(seen)
    assert all(text in (old.get(name), new.get(name)) for name, text in seen.items())


WAYS = {"kill": kills.kill, "interrupt": kills.interrupt, "full": kills.fill}
CODES = {"kill": (-9,), "interrupt": (130,), "full": (2,)}


def steps_of(total: int, few: int, pytestconfig, seed: str) -> list[int]:
    every = range(1, total + 1)
    return list(every) if pytestconfig.getoption("--kills") == "all" else random.Random(seed).sample(every, few)


@pytest.mark.parametrize("state", ["none", "old"])
@pytest.mark.parametrize("name", JOBS)
def test_nothing_is_lost_and_nothing_is_left(name, state, inputs, tmp_path, pytestconfig):
    job, new = JOBS[name], made(inputs, name)
    old = older(inputs, name) if state == "old" else {}
    act = job.run(str(tmp_path / "room" / job.out))
    total = kills.run(act, room_of(tmp_path, inputs, name, state)).steps
    assert total > 5
    for way in WAYS:
        for at in steps_of(total, job.few, pytestconfig, f"{name} {state} {way}"):
            room = room_of(tmp_path, inputs, name, state)
            ended = kills.run(act, room, WAYS[way], at, on=way == "full")
            held = _plain(kills.contents(room), room)
            where = (way, at, ended)
            check_whole(held, old, new, job)
            check_end(ended, way, job, held, new, callable(act), where)
            if way == "full" and ended.code == 2:
                assert kills.visible(held) == held or "partial" in str(held), where  # nothing hidden is left
            again = kills.run(act, room)
            assert again.code == 0, (where, again)
            assert _plain(kills.contents(room), room) == new, where


def check_end(ended, way: str, job: Job, held, new, in_python: bool, where) -> None:
    """Raise where a run did not end as it should have: by the signal, with the code, in a few lines."""
    if in_python:
        errors = {"kill": "", "interrupt": "KeyboardInterrupt", "full": "FileError"}
        assert ended.code in (0, 1, -9) and errors[way] in ended.said or ended.code == 0, where
        return
    assert "Traceback" not in ended.said and "Exception ignored" not in ended.said, where
    if ended.code == 0:  # what came too late to matter
        assert kills.visible(held) == new, where
    else:
        assert ended.code in CODES[way], where
