"""Run cells and print a line for each: `PYTHONPATH=tests python -m zoo.run [ARCHITECTURE ...] [--jobs A,B]`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import transformers
from zoo.building import LINES
from zoo.cells import outcome
from zoo.jobs import JOBS


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--part", default="0/1", help="K/N: every Nth architecture from the Kth")
    parser.add_argument("--not-right", action="store_true", help="no lines for what is right")
    parser.add_argument("--details", action="store_true", help="whole messages and tracebacks")
    given = parser.parse_args(arguments)
    first, step = map(int, given.part.split("/"))
    transformers.utils.logging.disable_progress_bar()
    for name in (given.names or list(LINES))[first::step]:
        with tempfile.TemporaryDirectory() as place:
            for job in given.jobs.split(","):
                begun = time.perf_counter()
                found = outcome(name, job, Path(place))
                if found.word != "right" or not given.not_right:
                    print(f"{name} | {job} | {found} | {time.perf_counter() - begun:.2f} s", flush=True)
                    if given.details and found.details:
                        print(found.details)


if __name__ == "__main__":
    main(sys.argv[1:])
