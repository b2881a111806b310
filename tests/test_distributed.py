"""More than one process: two ranks over gloo give what one gives, the first writes, and no error leaves one waiting."""

import copy
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import tensoradapt as ta
from tensoradapt.analysis.sharing import alike, together
from tensoradapt.distributed import team_of
from tensoradapt.errors import FileError
from tensoradapt.linalg import SOLO, Team

PATIENCE = 120  # seconds: what must not hang, does not


def sides(folder: Path) -> tuple[Path, Path]:
    """Two checkpoints whose stacks are read by both ranks together, with groups that each has alone."""
    base, tuned = {}, {}
    left, right = tiny.noise(40, 3), tiny.noise(3, 36, seed=1)
    for k, (layer, role) in enumerate((i, r) for i in range(4) for r in "qv"):
        name = f"layers.{layer}.{role}.weight"
        base[name] = tiny.noise(40, 36, seed=10 + k)
        tuned[name] = base[name] + 0.1 * left @ tiny.noise(3, 3, seed=40 + k) @ right
        tuned[name] += 1e-3 * tiny.noise(40, 36, seed=70 + k)
    base["head.weight"] = tiny.noise(8, 36, seed=2)
    tuned["head.weight"] = base["head.weight"] + tiny.noise(8, 36, seed=3)
    for name, state in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors")
    return folder / "base", folder / "tuned"


def launched(folder: Path, *arguments: str, count: int = 2, environment: dict[str, str] | None = None):
    """The command line in processes as torchrun starts them, without what torchrun prints: (code, out, err) of each.

    `environment` is for those after the first alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    running = []
    for rank in range(count):
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(count),
            **(environment or {} if rank else {}),
        }
        command = [sys.executable, "-m", "tensoradapt", *arguments]
        running.append(
            subprocess.Popen(command, cwd=folder, env={**os.environ, **team, **own}, stdout=-1, stderr=-1, text=True)
        )
    try:
        return [(p.returncode, out, err) for p in running for out, err in [p.communicate(timeout=PATIENCE)]]
    finally:
        for process in running:
            process.kill()


def close(one, two, tolerance: float = 1e-5) -> bool:
    """Whether two JSON values are equal, numbers within rounding."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(close(one[k], two[k], tolerance) for k in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(close(a, b, tolerance) for a, b in zip(one, two, strict=True))
    if isinstance(one, float):
        return one == pytest.approx(two, rel=tolerance, abs=tolerance)
    return one == two


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("team")
    sides(found)
    return found


def test_analyze_in_two_processes(folder):
    arguments = ["analyze", "base", "tuned", "--json", "--out", "report", "--no-candidates"]
    (code, out, err), (other, silent, quiet) = launched(folder, *arguments)
    assert (code, other) == (0, 0), err + quiet
    assert silent == "" and "analyze:" in err and "analyze:" not in quiet
    alone = ta.analyze(folder / "base", folder / "tuned", candidates=False).to_dict()
    found = json.loads(out)
    assert found == json.loads((folder / "report" / "report.json").read_text())
    for part in ("sites", "groups"):
        assert close(found[part], alone[part])


SPEC = ta.preset("lotr", rank=3, targets=["q", "v"]) + ta.preset("lora", rank=2, targets=["head"])


def same_adapters(one: Path, two: Path, folder: Path) -> None:
    states = [load_file(path / "adapter.safetensors") for path in (one, two)]
    assert {key: t.shape for key, t in states[0].items()} == {key: t.shape for key, t in states[1].items()}
    for path in ("layers.0.q", "layers.3.v", "head"):
        a, b = (ta.load(out, Plain(folder)).delta(path).detach() for out in (one, two))
        assert float((a - b).norm()) < 1e-4 * float(b.norm())


def test_a_budget_shared_out_by_two_processes(folder, tmp_path):
    """A stack that both read together, and a weight of one of them: the same adapter within rounding."""
    SPEC.save(tmp_path / "spec.yaml")
    arguments = ["extract", "base", "tuned", "--spec", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "two")]
    (code, out, err), (other, silent, quiet) = launched(folder, *arguments, "--json", "--max-parameters", "400")
    assert (code, other, silent) == (0, 0, ""), err + quiet
    alone = ta.extract(folder / "base", folder / "tuned", SPEC, tmp_path / "one", max_parameters=400)
    found = json.loads(out)
    assert close(found["sites"], alone.to_dict()["sites"], 1e-4)
    assert found["num_parameters"] == alone.num_parameters <= 400
    assert not (tmp_path / "two.partial").exists()
    same_adapters(tmp_path / "one", tmp_path / "two", folder)


class Plain(torch.nn.Module):
    """The model of the two checkpoints."""

    def __init__(self, folder: Path):
        super().__init__()
        linear = lambda out: torch.nn.Linear(36, out, bias=False)  # noqa: E731
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({r: linear(40) for r in "qv"}) for _ in range(4))
        self.head = linear(8)
        self.load_state_dict(load_file(folder / "base" / "model.safetensors"))


def test_an_error_at_the_door_is_told_once_and_ends_both(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    arguments = ["extract", "base", "tuned", "--preset", "lora", "--target", "q", "--out", str(tmp_path / "out")]
    (code, _, err), (other, _, quiet) = launched(folder, *arguments)
    assert (code, other) == (2, 2)
    assert err.count("there already") == 1 and quiet == ""


def test_an_error_that_one_rank_meets_ends_both(folder, tmp_path):
    """NaN in a weight that the second process alone reads."""
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        state = load_file(folder / name / "model.safetensors")
        if name == "tuned":
            state["layers.0.v.weight"][0, 0] = float("nan")
        save_file(state, tmp_path / name / "model.safetensors")
    results = launched(tmp_path, "extract", "base", "tuned", "--preset", "lora", "--target", "v", "--out", "out")
    assert [code for code, _, _ in results] == [2, 2]
    told = [err.count("layers.0.v is not finite") for _, _, err in results]
    assert sorted(told) == [0, 1] and not any("Traceback" in err for _, _, err in results)
    assert not (tmp_path / "out").exists()


def test_a_rank_that_dies_is_not_waited_for(folder, tmp_path):
    """The second process ends without a word (here: it finds no memory); the first says so."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import atexit, os, sys, threading\n"
        "def trace(frame, event, arg):\n"
        "    if event == 'call' and frame.f_code.co_name == 'site_report': os._exit(137)\n"
        "sys.setprofile(trace)\n"
        "threading.setprofile(trace)\n"  # weights are measured by threads of a pool
    )
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    (code, out, err), (other, _, _) = launched(folder, "analyze", "base", "tuned", environment={"PYTHONPATH": paths})
    assert other == 137 and code == 2 and out == ""
    assert "another process of the team has stopped" in err and "Traceback" not in err


def test_torchrun_itself(folder, tmp_path):
    """The command of the documentation, with torchrun's own way of finding a port."""
    SPEC.save(tmp_path / "spec.yaml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "tensoradapt", "extract", "base", "tuned", "--spec", str(tmp_path / "spec.yaml")]
    command += ["--out", str(tmp_path / "two")]
    done = subprocess.run(
        [*torchrun, *command], cwd=folder, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    ta.extract(folder / "base", folder / "tuned", SPEC, tmp_path / "one")
    same_adapters(tmp_path / "one", tmp_path / "two", folder)


# -- one process, and teams in threads -----------------------------------------------------------------------------


def test_alone_the_team_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with team_of("cpu") as (team, device):
        assert team is SOLO and device == "cpu" and team.gather(3) == [3]


class Threads(Team):
    """Two members as threads, which gather through a barrier."""

    def __init__(self, rank: int, board: list, barrier: threading.Barrier):
        super().__init__(rank, 2)
        object.__setattr__(self, "board", board)
        object.__setattr__(self, "barrier", barrier)

    def gather(self, value):
        self.board[self.rank] = value
        self.barrier.wait(10)
        found = copy.deepcopy(self.board)
        self.barrier.wait(10)
        return found


def in_threads(act) -> list:
    board, barrier, results = [None, None], threading.Barrier(2), [None, None]

    def member(rank):
        try:
            results[rank] = act(Threads(rank, board, barrier))
        except FileError as error:
            results[rank] = error

    members = [threading.Thread(target=member, args=(rank,)) for rank in (0, 1)]
    for thread in members:
        thread.start()
    for thread in members:
        thread.join(20)
    return results


def test_what_each_does_is_known_to_all():
    assert in_threads(lambda team: together(team, lambda: team.rank + 10)) == [[10, 11]] * 2
    assert in_threads(lambda team: alike(team, lambda: team.rank + 10)) == [10, 11]


@pytest.mark.parametrize("guilty", [(0,), (1,), (0, 1)], ids=str)
def test_an_error_of_one_is_an_error_of_all(guilty):
    def act(team):
        if team.rank in guilty:
            raise FileError(f"rank {team.rank} is at fault")

    found = in_threads(lambda team: alike(team, lambda: act(team)))
    assert [str(error) for error in found] == [f"rank {guilty[0]} is at fault"] * 2
    assert [error.told for error in found] == [rank != guilty[0] for rank in (0, 1)]
