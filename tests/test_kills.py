"""Every job that writes, killed, interrupted or out of room at steps of its own: nothing is lost, nothing is left.

After it the output is not there, the old one, or complete; the same job then succeeds, to the same bytes, and leaves
nothing beside its output. A few steps of every job; `pytest tests/test_kills.py --kills all` takes every one of them.
"""

import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import kills
import pytest
import tiny
from safetensors.torch import save_file
from torch import nn

import tensoradapt as ta
from tensoradapt import plots
from tensoradapt.cli.app import run as command_line
from tensoradapt.writing import folder as folder_module
from tensoradapt.writing import locks
from tensoradapt.writing.folder import claimed

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
    mounted: bool = False  # whether the output, where it is there, is a folder that no other can replace


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
    "merge into a mounted folder": Job(commands("merge base adapter --overwrite --out OUT"), mounted=True),
    "convert": Job(commands("convert adapter --preset lotr --rank 2 --overwrite --out OUT"), whole=False),
    "convert to a file": Job(commands("convert adapter --preset lotr --rank 2 --overwrite --out OUT"), "a.safetensors"),
    "export": Job(commands("export adapter --to peft --overwrite --out OUT"), few=1),
    "extract": Job(commands("extract base tuned --preset lora --rank 2 --overwrite --out OUT"), whole=False),
    "analyze": Job(commands("analyze base tuned --out OUT"), few=1),
    "plot": Job(commands("plot report --format svg --out OUT"), few=1),
    "one figure": Job(commands("plot report --figure ranks --out OUT"), "figure.svg", few=1),
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


def mounted(monkeypatch, out: Path) -> None:
    """Let a folder, once it is there, be one that the system neither renames nor exchanges."""
    swap, is_mount = folder_module._swap, Path.is_mount

    def busy(new, path):
        if path == out and path.exists():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        swap(new, path)

    monkeypatch.setattr(folder_module, "_swap", busy)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out or is_mount(path))


WAYS = {"kill": kills.kill, "interrupt": kills.interrupt, "full": kills.fill}
CODES = {"kill": (-9,), "interrupt": (130,), "full": (2,)}


def ways_of(job: Job, state: str, pytestconfig) -> list[str]:
    """All of them; of a slow job, two for each state."""
    slow = job.few == 1 and pytestconfig.getoption("--kills") != "all"
    return [way for way in WAYS if not slow or way != {"none": "full", "old": "interrupt"}[state]]


def steps_of(total: int, few: int, pytestconfig, seed: str) -> list[int]:
    every = range(1, total + 1)
    return list(every) if pytestconfig.getoption("--kills") == "all" else random.Random(seed).sample(every, few)


@pytest.mark.parametrize("state", ["none", "old"])
@pytest.mark.parametrize("name", JOBS)
def test_nothing_is_lost_and_nothing_is_left(name, state, inputs, tmp_path, pytestconfig, monkeypatch):
    job, new = JOBS[name], made(inputs, name)
    if job.mounted:
        mounted(monkeypatch, tmp_path / "room" / job.out)
    old = older(inputs, name) if state == "old" else {}
    act = job.run(str(tmp_path / "room" / job.out))
    total = kills.run(act, room_of(tmp_path, inputs, name, state)).steps
    assert total > 5
    for way in ways_of(job, state, pytestconfig):
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


@pytest.mark.parametrize("limit", [300, 1000])
@pytest.mark.parametrize("name", ["merge", "convert", "export", "extract"])
def test_a_file_that_cannot_grow_is_an_error(name, limit, inputs, tmp_path):
    """The system refuses to write more: the writers in other languages, too."""
    job, new = JOBS[name], made(inputs, name)
    if limit > max(map(len, new.values())):
        return
    room = room_of(tmp_path, inputs, name, "old")
    ended = kills.run(job.run(str(room / job.out)), room, limit=limit)
    assert ended.code == 2 and ended.said.startswith("error: ") and "Traceback" not in ended.said
    held = _plain(kills.contents(room), room)
    assert kills.visible(held) == older(inputs, name)
    assert not any(
        ".tmp" in name or ".new" in name or "lock" in name or text == b"a folder" for name, text in held.items()
    )


@pytest.mark.parametrize("name", ["merge", "convert", "plan"])
def test_a_second_interruption_ends_at_once(name, inputs, tmp_path):
    """One comes before every step: before those that clean up, too."""
    job, new = JOBS[name], made(inputs, name)
    room = room_of(tmp_path, inputs, name, "old")
    ended = kills.run(job.run(str(room / job.out)), room, kills.interrupt, 4, on=True)
    assert ended.code == 130 and "Traceback" not in ended.said and "interrupted" in ended.said
    assert kills.visible(_plain(kills.contents(room), room)) == older(inputs, name)
    assert kills.run(job.run(str(room / job.out)), room).code == 0
    assert _plain(kills.contents(room), room) == new


CLAIMING = ("merge", "convert", "convert to a file", "export", "extract", "analyze", "plot")


@pytest.mark.parametrize("name", CLAIMING)
def test_a_second_process_is_refused_by_name(name, inputs, tmp_path, capsys):
    job, new = JOBS[name], made(inputs, name)
    room = room_of(tmp_path, inputs, name, "none")
    act, said = job.run(str(room / job.out)), []

    def second():
        said.append(command_line(act))

    assert kills.run(act, room, at=4, meanwhile=second).code == 0
    assert said == [2] and f"another process is writing {room / job.out}" in capsys.readouterr().err
    assert _plain(kills.contents(room), room) == new


def test_a_second_thread_is_refused_by_name(inputs, tmp_path):
    refused = []

    def within(*_):
        with ThreadPoolExecutor(1) as pool, pytest.raises(ta.FileError, match="another process is writing") as met:
            pool.submit(ta.convert, "adapter", "lora", tmp_path / "out").result()
        refused.append(met)

    ta.convert("adapter", "lotr", tmp_path / "out", progress=within)
    assert refused and sorted(os.listdir(tmp_path)) == ["out"]


def test_many_threads_that_save_one_file_each_save_it_whole(tmp_path):
    """They come one after the other, and the last one's stays."""
    adapters = [attached(rank) for rank in (1, 2, 3, 4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda adapter: [adapter.save(tmp_path / "out") for _ in range(5)], adapters))
    assert ta.open_adapter(tmp_path / "out").plan.num_trainable in {a.plan.num_trainable for a in adapters}
    assert sorted(kills.contents(tmp_path)) == ["out/README.md", "out/adapter.safetensors"]


def test_a_disk_without_locks_is_written_and_nobody_elses_temporaries_are_removed(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks, "_exclusive", none)
    others = [tmp_path / "out" / f".adapter.safetensors.tmp-{16 * 'a'}", tmp_path / f".out.new-{16 * 'b'}"]
    for folder in others:
        folder.mkdir(parents=True)
    with claimed(tmp_path / "out"):
        attached().save(tmp_path / "out")
    assert all(folder.is_dir() for folder in others)
    assert not [name for name in kills.contents(tmp_path) if "lock" in name]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("name", ["merge", "convert", "extract"])
def test_folders_that_cannot_be_flushed_are_written(name, code, inputs, tmp_path, monkeypatch):
    """As on shares of other systems; a file that cannot be is an error still."""
    flush, kinds = os.fsync, {stat.S_ISDIR}

    def fsync(descriptor):
        if any(kind(os.fstat(descriptor).st_mode) for kind in kinds):
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    new, room = made(inputs, name), room_of(tmp_path, inputs, name, "none")
    monkeypatch.setattr(os, "fsync", fsync)
    act = JOBS[name].run(str(room / "out"))
    assert kills.run(act, room).code == 0 and _plain(kills.contents(room), room) == new
    kinds.add(stat.S_ISREG)
    assert kills.run(act, room).code == 2


def test_a_current_folder_that_is_gone_is_an_error(inputs, tmp_path, monkeypatch):
    base, tuned, adapter = (str(inputs / side) for side in ("base", "tuned", "adapter"))
    report = json.loads((inputs / "report" / "report.json").read_text())
    spec = ta.preset("lora", rank=1, targets=["q"])
    acts = [
        lambda: ta.merge_folder(base, adapter, "out"),
        lambda: ta.convert(adapter, spec, "out"),
        lambda: ta.convert(adapter, spec, "out.safetensors"),
        lambda: ta.export_peft(adapter, "out"),
        lambda: ta.extract(base, tuned, spec, "out"),
        lambda: attached().save("out"),
        lambda: spec.save("out.yaml"),
        lambda: plots.draw_figure(report, "ranks", "out.svg"),
    ]
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for act in acts:
        with pytest.raises(ta.FileError, match=r"out\S* cannot be written"):
            act()


def test_what_other_versions_and_other_people_left(inputs, tmp_path):
    """Temporaries named by a process's number go; what merely looks like one stays."""
    for name in (".out.tmp-4711", f".out.old-{16 * '0'}", f".out.new-{16 * '0'}"):
        (tmp_path / name / "x").mkdir(parents=True)
    for name in (".out.tmp-mine", ".out.lock.txt", "out.tmp-4711", ".outer.tmp-4711"):
        (tmp_path / name).mkdir()
    shutil.copytree(inputs / "adapter", tmp_path / "out")
    with claimed(tmp_path / "out"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".out.lock.txt", ".out.tmp-mine", ".outer.tmp-4711", "out", "out.tmp-4711"]


@pytest.mark.parametrize("name", ["merge", "export", "extract"])
def test_hidden_files_of_others_are_no_leftovers(name, inputs, tmp_path, capsys):
    """Lock files of other programs have names like ours: they are not lost with the folder that is replaced."""
    act = JOBS[name].run(str(tmp_path / "out"))
    act = [word for word in act if name != "extract" or word != "--overwrite"]  # which overwrites its files alone
    for mine in (".package.lock", f".mine.new-{16 * 'a'}"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / mine).write_text("kept")
        assert command_line(act) == 2 and mine in capsys.readouterr().err
        assert kills.contents(tmp_path) == {f"out/{mine}": b"kept"}
        (tmp_path / "out" / mine).unlink()


@pytest.mark.parametrize("place", ["out", "out/more"])
def test_a_read_only_folder_is_not_replaced(place, inputs, tmp_path, monkeypatch, capsys):
    """Its user could not remove it afterwards."""
    room = room_of(tmp_path, inputs, "merge", "old")
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (mode & os.W_OK and Path(path) == room / place) and access(path, mode)
    )
    before = kills.contents(room)
    assert command_line(JOBS["merge"].run(str(room / "out"))) == 2
    assert f"{room / place} cannot be written" in capsys.readouterr().err and kills.contents(room) == before


@pytest.mark.parametrize("name", ["merge", "export", "analyze", "convert", "extract"])
def test_the_current_folder_stays_the_one_that_one_stands_in(name, inputs, tmp_path, monkeypatch):
    files = [file.partition("/")[2] for file in made(inputs, name)]
    for side in ("base", "tuned", "adapter"):
        (tmp_path / side).symlink_to(inputs / side)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    words = [f"../{word}" if word in ("base", "tuned", "adapter") else word for word in JOBS[name].run(".")]
    for _ in range(2):
        assert command_line(words) == 0
        assert [*kills.contents(Path())] == files
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out", "tuned"]


def test_a_folder_that_was_moved_aside_comes_back(inputs, tmp_path):
    """Where a system cannot exchange two folders, a kill may come between two renamings."""
    shutil.copytree(inputs / "adapter", tmp_path / f".out.old-{16 * '0'}")
    with pytest.raises(ta.FileError, match="other files, which would be lost"):
        ta.merge_folder("base", "adapter", tmp_path / "out")
    assert kills.contents(tmp_path / "out") == kills.contents(inputs / "adapter")
    assert os.listdir(tmp_path) == ["out"]


IMPORTING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
left = [int(sys.argv.pop(1))]

def interrupt(event, args):
    if event == "import" and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
from tensoradapt.__main__ import main
main()
"""


def test_an_interruption_of_any_import_is_one_of_the_command(inputs, tmp_path, pytestconfig):
    """Of whatever module: the process says `interrupted`, and leaves with 130."""
    every = range(1, 2000, 50) if pytestconfig.getoption("--kills") == "all" else (1, 700)
    for at in every:
        words = [str(at), "convert", "adapter", "--preset", "lotr", "--rank", "2", "--out", str(tmp_path / "out")]
        done = subprocess.run([sys.executable, "-c", IMPORTING, *words], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n"), at
        assert not (tmp_path / "out").exists()


def test_output_that_nobody_reads_or_that_has_no_room():
    command = f"{sys.executable} -m tensoradapt presets"
    read = subprocess.run(["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert (read.stdout, read.stderr) == ("141\n", "")
    full = subprocess.run(["bash", "-c", f"{command} > /dev/full"], capture_output=True, text=True, check=False)
    assert full.returncode == 2 and "No space left" in full.stderr and "Traceback" not in full.stderr
    deaf = subprocess.run(["bash", "-c", f"{command} 2> /dev/full"], capture_output=True, text=True, check=False)
    assert deaf.returncode == 0 and deaf.stdout


STREAM = """
import os, signal, sys, torch
import tensoradapt as ta

def pairs(scale):
    for k in range(4):
        yield f"layers.{k}.q.weight", scale * torch.eye(64)

ta.analyze(pairs(1.0), pairs(2.0), progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_kill_leaves_no_copy_of_a_stream(tmp_path):
    """Tensors that come in a stream are kept on disk while they are needed, in a file that has no name."""
    done = subprocess.run([sys.executable, "-c", STREAM], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert done.returncode == -9 and not [file for file in os.listdir(tmp_path) if "tensoradapt" in file]
