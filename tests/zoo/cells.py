"""What a cell of the matrix comes to, as a word and a reason.

- right
- without: right, but for weights that the library refused by name and said how to leave out
- partly: the adapter says that it leaves out a part of the change
- refused: a refusal by name, where there is nothing more to do
- none: the oracle itself cannot do it
- wrong: everything else, any foreign exception among it
"""

from __future__ import annotations

import logging
import re
import tempfile
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from zoo.jobs import JOBS, Partly, Without
from zoo.specimen import Specimen, Unavailable, Wrong, specimen

from tensoradapt import TensorAdaptError

ADVICE = re.compile(r"exclude=(\[[^\]]*\])")  # what a refusal says to leave out
ROUNDS = 20
KINDS: dict[type[Exception], str] = {Wrong: "wrong", Unavailable: "none", Partly: "partly", Without: "without"}


@dataclass
class Outcome:
    """The word and the reason; `details` has the whole message or the traceback."""

    word: str
    reason: str = ""
    details: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}" if self.reason else self.word


def outcome(name: str, job: str, place: Path) -> Outcome:
    """Do a job on an architecture; and again without the weights that a refusal says to leave out."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            it = specimen(name, place)
        except Exception as error:
            return Outcome("wrong", f"not built: {type(error).__name__}: {first_line(error)}", traceback.format_exc())
        without: list[str] = []
        reasons: list[Outcome] = []
        for _ in range(ROUNDS):
            found = _once(it, job, without)
            advised = re.findall(r"'([^']+)'", "".join(ADVICE.findall(found.details)))
            if found.word != "refused" or not advised or set(advised) <= set(without):
                break
            without += advised
            reasons.append(found)
    if found.word == "right" and reasons:
        return Outcome("without", "; ".join(each.reason for each in reasons), "\n".join(r.details for r in reasons))
    return found


def _once(it: Specimen, job: str, without: list[str]) -> Outcome:
    with tempfile.TemporaryDirectory(dir=it.place.parent) as folder:
        try:
            JOBS[job](it, Path(folder), tuple(without))
        except TensorAdaptError as error:
            return Outcome("refused", first_line(error).replace(folder, "FOLDER"), str(error))
        except tuple(KINDS) as error:
            return Outcome(KINDS[type(error)], first_line(error))
        except Exception as error:
            return Outcome("wrong", f"{type(error).__name__}: {first_line(error)}", traceback.format_exc())
    return Outcome("right")


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
