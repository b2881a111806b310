"""Every reader of files on inputs that are wrong: read, or refused by a typed error, in bounded time and memory.

The inputs are the same in every run; `python tests/fuzz/run.py --minutes 60` tries others.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.kept import inputs
from fuzz.limits import Hang, watched
from fuzz.mutations import mutations
from fuzz.readers import READERS, Reader, outcome, warmed
from hypothesis import HealthCheck, Phase, given, settings

SECONDS = 8.0  # of CPU: other tests run beside these
EXAMPLES = {"report": 25, "config": 60, "journal": 60}
HELD = {f"{reader}/{name}": (reader, files) for reader, name, files in inputs()}


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_or_refused_by_name(name):
    reader = warmed(name)

    @settings(
        max_examples=EXAMPLES.get(name, 150),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(reader.seeds()))
    def holds(files):
        found = outcome(reader, files, SECONDS)
        assert not found.escaped, f"{found.place}: {found.said}"

    holds()


@pytest.mark.parametrize("held", HELD)
def test_what_escaped_once_does_not_escape_again(held):
    name, files = HELD[held]
    found = outcome(warmed(name), files, SECONDS)
    assert not found.escaped, f"{found.place}: {found.said}"


# -- the judge itself -------------------------------------------------------------------------------------------------

DEEDS = {
    "compile": lambda folder: exec(compile("1", str(folder / "x.py"), "exec")),
    "subprocess.Popen": lambda folder: subprocess.run(["true"], check=True),
    "os.system": lambda folder: os.system("true"),
    "open": lambda folder: (folder.parent / "left").write_text("x"),
    "took": lambda folder: b"x" * 400_000_000,
    "Hang": lambda folder: all(iter(lambda: True, False)),
    "KeyError": lambda folder: {}[1],
}


@pytest.mark.parametrize("deed", DEEDS)
def test_the_judge_sees_every_kind_of_escape(deed):
    found = outcome(Reader("bad", tuple, DEEDS[deed]), {"a": b""}, 1.0)
    assert found.escaped and found.place.startswith(deed), found


def test_the_judge_lets_a_reader_read_and_time_out_only_once(tmp_path):
    with watched(tmp_path, seconds=5.0) as watch:
        (tmp_path / "none").exists()
        with pytest.raises(OSError):
            (tmp_path / "none").read_text()
    assert not watch.done
    with pytest.raises(Hang), watched(tmp_path, seconds=0.3):
        while True:
            pass


def test_the_long_run_counts_what_it_tried_and_says_that_nothing_escaped():
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--minutes", "0.05", "--reader", "index"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "index" in found.stdout and "no escape" in found.stdout
