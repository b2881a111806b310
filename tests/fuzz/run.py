"""Try changed files on every reader for a time: `python tests/fuzz/run.py --minutes 60 --processes 1`.

Inputs are other ones in every run (`--seed` repeats one). Each reader works in a process of its own, whose death counts
as an escape too. The smallest input of every new escape is kept under tests/fuzz/corpus, where the suite replays it.
Exits with 1 where anything escaped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import count, takewhile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}.items():
    os.environ.setdefault(name, value)

SLICE = 180.0  # seconds that one process tries one reader
BATCH = 200  # inputs between two looks at the clock
GROWTH = 300  # megabytes that a process may hold more after a slice
NAMES = ("spec_yaml", "spec_json", "header", "index", "peft", "adapter", "journal", "report", "config")


@dataclass
class Tally:
    """What became of the inputs of one reader."""

    reader: str
    words: dict[str, int] = field(default_factory=dict)
    escapes: dict[str, str] = field(default_factory=dict)  # by place: what was said, and where it is kept
    megabytes: float = 0.0  # grown by

    def add(self, other: Tally) -> None:
        self.words = dict(Counter(self.words) + Counter(other.words))
        self.escapes |= other.escapes
        self.megabytes = max(self.megabytes, other.megabytes)

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {word}" for word, count in sorted(self.words.items()))
        lines = [f"{self.reader:<10} {sum(self.words.values()):>9,} inputs: {counts}; grown by {self.megabytes:.0f} MB"]
        return "\n".join([*lines, *(f"  ESCAPE {place}\n    {said}" for place, said in self.escapes.items())])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--reader", action="append", choices=NAMES)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument(
        "--child", nargs=3, help=argparse.SUPPRESS
    )  # seconds, folder of the current input, known places
    given = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 30) if given.seed is None else given.seed
    if given.child:
        seconds, current, known = given.child
        print(json.dumps(asdict(tried(given.reader[0], seed, float(seconds), Path(current), set(json.loads(known))))))
        return 0
    return whole_run(given.reader or list(NAMES), given.minutes * 60, given.processes, seed)


# -- the parent -------------------------------------------------------------------------------------------------------


def whole_run(readers: list[str], seconds: float, processes: int, seed: int) -> int:
    """Slices of all readers in turn until the time is over; prints the counts, and answers 1 where anything escaped."""
    print(f"seed {seed}, {len(readers)} readers, {seconds / 60:g} minutes in {processes} processes", flush=True)
    share = min(SLICE, seconds * processes / len(readers))
    rounds = max(1, round(seconds * processes / (share * len(readers))))
    tallies = {name: Tally(name) for name in readers}

    def one(task: tuple[int, str]) -> None:
        k, name = task
        found = slice_of(name, seed + k, share, sorted(tallies[name].escapes))
        tallies[name].add(found)
        print(found, flush=True)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(one, enumerate(readers * rounds)))
    escapes = sum(len(tally.escapes) for tally in tallies.values())
    print("\nin all", *tallies.values(), sep="\n")
    print(f"{escapes} escapes" if escapes else "no escape")
    return 1 if escapes else 0


def slice_of(name: str, seed: int, seconds: float, known: list[str]) -> Tally:
    """One reader for some time in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        current = Path(place) / "current"
        child = [sys.executable, __file__, "--reader", name, "--seed", str(seed)]
        command = [*child, "--child", str(seconds), str(current), json.dumps(known)]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=20 * seconds + 600, check=False)
            said, code = found.stderr[-2000:], found.returncode
        except subprocess.TimeoutExpired:
            said, code = "no answer", "timeout"
        if code == 0:
            return Tally(**json.loads(found.stdout.splitlines()[-1]))
        kept = HERE / "corpus" / name / f"0-died-{seed}"
        if current.exists():
            shutil.copytree(current, kept, dirs_exist_ok=True)
        return Tally(name, {"died": 1}, {f"process ended with {code}": f"{said}\n    kept in {kept}"})


# -- the child --------------------------------------------------------------------------------------------------------


def tried(name: str, seed: int, seconds: float, current: Path, known: set[str]) -> Tally:
    """Inputs for one reader, by Hypothesis, which makes what escapes small; every place of an escape once."""
    from fuzz.kept import keep
    from fuzz.limits import held
    from fuzz.mutations import mutations
    from fuzz.readers import laid, outcome, warmed
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis.errors import HypothesisException

    reader, counts, tally = warmed(name), Counter(), Tally(name)
    until = time.monotonic() + seconds
    limit = int(time.process_time() + seconds + 400)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 30))

    def escape_of(files):
        """The escape of an input that is not known yet."""
        shutil.rmtree(current, ignore_errors=True)
        laid(files, current)
        before = held()
        found = outcome(reader, files)
        tally.megabytes += held() - before  # what making the input took is no reader's
        counts[found.word] += 1
        return found if found.escaped and found.place not in known else None

    found_here: list = []  # the escape that is made smaller, the latest last

    def batch(number: int) -> None:
        @seeded(number)
        @settings(
            max_examples=BATCH,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(mutations(reader.seeds()))
        def holds(files):
            if time.monotonic() > until + 60:
                return
            found = escape_of(files)
            if found is not None:
                found_here.append((found, files))
                raise AssertionError(found.place)

        try:
            holds()
        except (AssertionError, HypothesisException):  # the latter where an input is refused one time in two
            pass
        for found, files in smallest(found_here):
            known.add(found.place)
            tally.escapes[found.place] = f"{found.said[:500]}\n    kept in {keep(reader, files)}"
        found_here.clear()

    for number in takewhile(lambda _: time.monotonic() < until, count(seed * 100_003)):
        batch(number)
    tally.words = dict(counts)
    if tally.megabytes > GROWTH:
        tally.escapes["memory"] = f"the process grew by {tally.megabytes:.0f} MB"
    return tally


def smallest(found: list) -> list:
    """Of every place where something escaped, the escape with the smallest files."""
    by_place: dict = {}
    for escape, files in sorted(found, key=lambda pair: sum(map(len, pair[1].values()))):
        by_place.setdefault(escape.place, (escape, files))
    return list(by_place.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
