"""Interrupted extractions: killed at every write, resumed to the same bytes; other work refused, damage done again."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import tensoradapt as ta
from tensoradapt.errors import FileError
from tensoradapt.extract import journal as journal_module
from tensoradapt.extract import output as output_module
from tensoradapt.extract import run as run_module
from tensoradapt.extract.work import Work
from tensoradapt.io import native as native_module
from tensoradapt.writing import atomic as atomic_module

SPEC = ta.preset("lora", rank=2, targets=["q"]) + ta.preset("lotr", rank=2, targets=["v"])
GROUPS = 3  # two of one layer each, and a stack


def sides(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints on disk."""
    base = {f"layers.{i}.{r}.weight": tiny.noise(8, 6, seed=i) for i in (0, 1) for r in "qv"}
    tuned = {name: t + 0.1 * tiny.noise(8, 6, seed=10 + k) for k, (name, t) in enumerate(base.items())}
    for name, state in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir(parents=True)
        save_file(state, tmp_path / name / "model.safetensors")
    return tmp_path / "base", tmp_path / "tuned"


@pytest.fixture
def made(tmp_path):
    """Two checkpoints, and what an uninterrupted run makes of them, at `whole`."""
    both = sides(tmp_path)
    ta.extract(*both, SPEC, tmp_path / "whole")
    return both


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a finished output, and nothing else in its folder; the record without the path, which is its own."""
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    record = json.loads(found.pop("extraction.json"))
    return {**found, "record": json.dumps({**record, "path": ""}).encode()}


def in_a_child(act) -> int:
    """Run a function in a forked process; how it ended (the signal as a negative number)."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Countdown:
    """Kills the process before the k-th of all writes, or after half of what it would write."""

    def __init__(self, left: int):
        self.left = left

    def wrap(self, write, half=None):
        def counted(*args, **options):
            self.left -= 1
            if self.left < 0:
                if half is not None:
                    write(*args, **options)
                    half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args, **options)

        return counted


def halved(_, path, *more) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def killed_at(step: int, both, out: Path) -> int:
    def act():
        countdown = Countdown(step)
        native_module.save_file = countdown.wrap(native_module.save_file, halved)
        for name in ("replace", "fsync"):
            setattr(atomic_module.os, name, countdown.wrap(getattr(os, name)))
        journal_module.shutil.rmtree = countdown.wrap(shutil.rmtree)
        ta.extract(*both, SPEC, out)

    return in_a_child(act)


def test_a_kill_at_any_write_leaves_all_or_nothing_and_is_gone_on_from(made, tmp_path):
    """Before every flush, renaming and removal, and in the middle of every file."""
    wanted = contents(tmp_path / "whole")
    there = set(tmp_path.iterdir())
    for step in range(200):
        out = tmp_path / f"out{step}"
        ended = killed_at(step, made, out)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        file = out / "adapter.safetensors"
        if file.exists():  # whole, or not there
            assert file.read_bytes() == wanted["adapter.safetensors"]
        ta.extract(*made, SPEC, out, overwrite=file.exists() and (out / "extraction.json").exists())
        assert contents(out) == wanted, step
        there.add(out)
        assert set(tmp_path.iterdir()) == there, step  # nothing beside it: no journal, no lock, nothing half made
    assert ended == 0 and step > 12


def interrupted(monkeypatch, both, out: Path, after: int = 1, error: BaseException | None = None) -> None:
    """Begin an extraction that ends after so many parts."""
    write, count = journal_module.Journal.write, [0]

    def limited(self, *args):
        write(self, *args)
        count[0] += 1
        if count[0] == after:
            raise error or KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.Journal, "write", limited)
        with pytest.raises(type(error) if error else KeyboardInterrupt):
            ta.extract(*both, SPEC, out)


def test_finished_groups_are_not_fitted_again(made, tmp_path, monkeypatch):
    interrupted(monkeypatch, made, tmp_path / "out", after=2)
    fitted = []
    fit = Work.fit
    monkeypatch.setattr(Work, "fit", lambda self, name: fitted.append(name) or fit(self, name))
    ta.extract(*made, SPEC, tmp_path / "out")
    assert len(fitted) == GROUPS - 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def touched(folder: Path) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    state["layers.0.q.weight"] = state["layers.0.q.weight"] * 1.5
    save_file(state, file)


CHANGES = {
    "the tuned side": (lambda both: touched(both[1]), {}, SPEC, "tuned"),
    "the base": (lambda both: touched(both[0]), {}, SPEC, "base"),
    "the rank": (
        None,
        {},
        ta.preset("lora", rank=1, targets=["q"]) + SPEC.model_copy(update={"rules": SPEC.rules[1:]}),
        "spec",
    ),
    "the stored dtype": (
        None,
        {},
        ta.Spec(rules=(SPEC.rules[0].model_copy(update={"dtype": "bfloat16"}), SPEC.rules[1])),
        "spec",
    ),
    "the targets": (None, {}, ta.preset("lora", rank=2, targets=["q"]), "sites and spec"),
    "the error": (None, {"error": 0.1}, SPEC, "goal"),
    "the budget": (None, {"max_parameters": 100}, SPEC, "goal"),
    "the seed": (None, {"seed": 1}, SPEC, "seed"),
    "how bad values are treated": (None, {"nonfinite": "skip"}, SPEC, "options"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_work_of_other_inputs_or_options_is_refused(change, made, tmp_path, monkeypatch):
    act, options, spec, named = CHANGES[change]
    interrupted(monkeypatch, made, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out.partial").iterdir()}
    if act is not None:
        act(made)
    with pytest.raises(FileError, match=f"interrupted work of another {named}"):
        ta.extract(*made, spec, tmp_path / "out", **options)
    after = {file.name: file.read_bytes() for file in (tmp_path / "out.partial").iterdir()}
    assert before == after and not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "out.partial")  # what the message says
    assert ta.extract(*made, spec, tmp_path / "out", **options).path is not None


@pytest.mark.parametrize("name", ["tensoradapt", "torch"])
def test_work_of_another_version_is_refused(name, made, tmp_path, monkeypatch):
    interrupted(monkeypatch, made, tmp_path / "out")
    file = tmp_path / "out.partial" / "work.json"
    work = json.loads(file.read_text())
    work["versions"][name] = "0.0.1"
    file.write_text(json.dumps(work))
    with pytest.raises(FileError, match="another versions"):
        ta.extract(*made, SPEC, tmp_path / "out")


def test_work_that_was_never_begun_is_no_obstacle(made, tmp_path):
    """A folder without a part, as a kill before the first leaves it, is claimed by whatever comes."""
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / "work.json").write_text(json.dumps({"seed": 7}))
    ta.extract(*made, SPEC, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def truncated(part: Path) -> None:
    os.truncate(part, part.stat().st_size - 7)


def flipped(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[-5] ^= 1
    part.write_bytes(data)


def flipped_record(part: Path) -> None:
    data = part.read_bytes()
    part.write_bytes(data.replace(b'fitted_error\\": 0.', b'fitted_error\\": 9.', 1))
    assert part.read_bytes() != data


def emptied(part: Path) -> None:
    part.write_bytes(b"")


def swapped(part: Path) -> None:
    """A part of another group under this one's name."""
    other = next(file for file in part.parent.glob("*.safetensors") if file != part)
    part.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [truncated, flipped, flipped_record, emptied, swapped, Path.unlink])
def test_damaged_parts_are_done_again(damage, made, tmp_path, monkeypatch):
    interrupted(monkeypatch, made, tmp_path / "out", after=3)
    damage(sorted((tmp_path / "out.partial").glob("*.safetensors"))[0])
    ta.extract(*made, SPEC, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_parts_of_which_nobody_knows_what_they_are_go(text, made, tmp_path, monkeypatch):
    interrupted(monkeypatch, made, tmp_path / "out", after=3)
    (tmp_path / "out.partial" / "work.json").write_text(text)
    fitted = []
    fit = Work.fit
    monkeypatch.setattr(Work, "fit", lambda self, name: fitted.append(name) or fit(self, name))
    ta.extract(*made, SPEC, tmp_path / "out")
    assert len(fitted) == GROUPS and contents(tmp_path / "out") == contents(tmp_path / "whole")


# -- two processes, full disks, folders that are taken --------------------------------------------------------------


def test_two_processes_with_one_output(made, tmp_path):
    """The second is told, and the first is not disturbed."""
    ready, go = os.pipe(), os.pipe()

    def slow():
        fit = Work.fit

        def waiting(self, name):
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            return fit(self, name)

        Work.fit = waiting
        run_module.each = lambda names, task, begun: (begun(n) or task(n) or n for n in names)
        ta.extract(*made, SPEC, tmp_path / "out")

    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            slow()
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(ready[1])  # a child that ended is then the end of the pipe
    assert os.read(ready[0], 1) == b"x"
    with pytest.raises(FileError, match="another process is writing"):
        ta.extract(*made, SPEC, tmp_path / "out")
    os.write(go[1], b"x" * GROUPS)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_keeps_what_was_done(tmp_path):
    """At every size that is too small: a sentence, no adapter, the rest of the work kept; then it is finished."""
    base = {f"layers.{i}.q.weight": torch.zeros(64, 64) for i in range(2)}
    tuned = {name: tiny.noise(64, 64, seed=k) for k, name in enumerate(base)}
    spec = ta.preset("lora", rank=24, targets=["q"])
    ta.extract(base, tuned, spec, tmp_path / "whole")
    size = (tmp_path / "whole" / "adapter.safetensors").stat().st_size
    for limit in (100, 5_000, size // 2 + 2_000, size - 1):
        out = tmp_path / f"out{limit}"

        def act(limit=limit, out=out):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with pytest.raises(FileError, match="cannot be written"):
                ta.extract(base, tuned, spec, out)

        assert in_a_child(act) == 0, limit
        assert not out.exists() or list(out.iterdir()) == []
        leftovers = [f.name for f in tmp_path.rglob("*.tmp-*")]
        assert leftovers == []
        ta.extract(base, tuned, spec, out)
        assert contents(out) == contents(tmp_path / "whole")


def occupied(tmp_path: Path, both) -> dict[str, tuple[Path, str]]:
    """Outputs that cannot be: the place, and what is said."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "odd" / "adapter.safetensors").mkdir(parents=True)
    for name in ("adapter", "shards"):
        shutil.copytree(both[0], tmp_path / f"{name}.partial")
    (tmp_path / "adapter.partial" / "work.json").write_text("{}")
    return {
        "a finished adapter": (tmp_path / "whole", "there already"),
        "its file": (tmp_path / "whole" / "adapter.safetensors", "there already"),
        "a folder with other files": (tmp_path / "full", "there already"),
        "a file": (tmp_path / "file", "not a folder"),
        "below a file": (tmp_path / "file" / "adapter", "cannot be written"),
        "a folder of the adapter's name": (tmp_path / "odd", "is a folder"),
        "the base": (both[0], "there already|holds a checkpoint"),
        "a folder in the journal's place": (tmp_path / "adapter", "holds other files"),
        "weights in the journal's place": (tmp_path / "shards.safetensors", "holds other files"),
        "a name of 300 letters": (tmp_path / ("a" * 300), "cannot be written"),
        "the root": (Path("/"), "no output"),
        "nothing": (Path(" "), "no output"),
    }


@pytest.mark.parametrize("case", [
    "a finished adapter", "its file", "a folder with other files", "a file", "below a file",
    "a folder of the adapter's name", "the base", "a name of 300 letters", "the root", "nothing",
    "a folder in the journal's place", "weights in the journal's place",
])  # fmt: skip
def test_outputs_that_are_taken(case, made, tmp_path):
    out, message = occupied(tmp_path, made)[case]
    before = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
    with pytest.raises(FileError, match=message):
        ta.extract(*made, SPEC, out)
    assert before == {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}


def test_an_input_is_never_overwritten(made, tmp_path):
    """Not even when asked to, nor through a link."""
    (tmp_path / "link").symlink_to(made[1])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "model.safetensors").symlink_to(made[1] / "model.safetensors")
    before = (made[1] / "model.safetensors").read_bytes()
    for tuned, out in ((made[1], made[1]), (made[1], tmp_path / "link"), (tmp_path / "cache", tmp_path / "cache")):
        with pytest.raises(FileError, match="holds a checkpoint that is read"):
            ta.extract(made[0], tuned, SPEC, out, overwrite=True)
    assert (made[1] / "model.safetensors").read_bytes() == before


def test_overwriting_is_asked_for(made, tmp_path):
    spec = ta.preset("lora", rank=1, targets=["q"])
    result = ta.extract(*made, spec, tmp_path / "whole", overwrite=True)
    assert ta.extract(*made, spec, tmp_path / "other").path.read_bytes() == result.path.read_bytes()
    record = result.to_dict() | {"path": result.path.name}
    assert json.loads((tmp_path / "whole" / "extraction.json").read_text()) == record


def test_a_failed_overwriting_leaves_the_old_adapter_and_its_record(made, tmp_path, monkeypatch):
    before = contents(tmp_path / "whole")

    def fails(*_, **__):
        raise FileError("the disk is full")

    monkeypatch.setattr(output_module, "write", fails)
    with pytest.raises(FileError, match="full"):
        ta.extract(*made, ta.preset("lora", rank=1, targets=["q"]), tmp_path / "whole", overwrite=True)
    assert contents(tmp_path / "whole") == before


def test_an_empty_folder_is_free(made, tmp_path):
    (tmp_path / "empty").mkdir()
    assert ta.extract(*made, SPEC, tmp_path / "empty").path is not None


def test_paths_are_relative_to_where_one_is(made, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ta.extract(*made, SPEC, ".")
    assert contents(tmp_path / "here") == contents(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root writes everywhere")
def test_a_read_only_folder(made, tmp_path):
    for name in ("closed", "parent"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o555)
    for file in (made[0] / "model.safetensors", made[1] / "model.safetensors"):
        file.chmod(0o644)
    code = """
import sys, tensoradapt as ta
spec = ta.preset('lora', rank=1, targets=['q'])
for out in ('closed', 'parent/adapter'):
    try:
        ta.extract('base', 'tuned', spec, out)
    except ta.FileError as error:
        assert 'cannot be written' in str(error), error
    else:
        raise SystemExit('written')
"""
    # Root keeps its own files readable, wherever they are installed, and loses the right to write past the modes.
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*drop, sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "closed").iterdir()) == [] == list((tmp_path / "parent").iterdir())


def test_a_shard_that_goes_while_it_is_read(made, tmp_path, monkeypatch):
    """Removed between the headers and the values: a sentence that names the file, and nothing written."""
    fit = Work.fit

    def vanishing(self, name):
        (made[1] / "model.safetensors").unlink(missing_ok=True)
        return fit(self, name)

    monkeypatch.setattr(Work, "fit", vanishing)
    with pytest.raises(FileError, match=r"model\.safetensors"):
        ta.extract(*made, SPEC, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_before_the_first_part_leaves_nothing(made, tmp_path):
    with pytest.raises(ta.RankError, match="below the smallest"):
        ta.extract(*made, SPEC, tmp_path / "out", max_parameters=3)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_ctrl_c_exits_130_and_the_command_goes_on(made, tmp_path):
    """The program itself, interrupted by the signal once its first part is there."""
    spec = tmp_path / "spec.yaml"
    SPEC.save(spec)
    code = """
import sys, time
from tensoradapt.extract.work import Work
fit = Work.fit
Work.fit = lambda self, name: (fit(self, name), time.sleep(0 if name.startswith('layer') else 20))[0]
from tensoradapt.cli.app import run
sys.exit(run(sys.argv[1:]))
"""
    arguments = ["extract", str(made[0]), str(made[1]), "--spec", str(spec), "--out", str(tmp_path / "out"), "--json"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=-1, stderr=-1, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "interrupted" in err and "Traceback" not in err
    assert list(tmp_path.glob("out.partial/*.safetensors")) and not (tmp_path / "out").exists()
    ta.extract(*made, SPEC, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
