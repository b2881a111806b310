"""What is expected of the cells that are not plain right, and which cells are known to be wrong: two files of text."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from zoo.building import HERE, LINES
from zoo.jobs import JOBS

PARTS = 3  # the suite runs one part in so many


@dataclass(frozen=True)
class Expected:
    """The name of a reason, the word for the outcome, and how its message begins; `*` stands for anything."""

    name: str
    word: str
    begins: str
    why: str

    def meets(self, text: str) -> bool:
        """Whether an outcome is this one."""
        return fnmatchcase(text, _literal(f"{self.word}: {self.begins}") + "*")


def _literal(pattern: str) -> str:
    return re.sub(r"([\[?])", r"[\1]", pattern)


@cache
def reasons() -> dict[str, Expected]:
    """The named reasons: `name | word | beginning of the message | what it means for a user`."""
    found = {}
    for line in _lines("reasons.txt"):
        name, word, begins, why = (part.strip() for part in line.split("|", 3))
        found[name] = Expected(name, word, begins, why)
    return found


@cache
def expected() -> dict[tuple[str, str], Expected]:
    """Cells that are not plain right: `architecture | job, job = reason; job = reason`; `== section` for all of one."""
    found: dict[tuple[str, str], Expected] = {}
    for line in _lines("expected.txt"):
        who, _, what = line.partition("|")
        who = who.strip()
        names = [n for n, row in LINES.items() if who in (n, f"== {row.section}")]
        assert names, f"{who} in expected.txt is no architecture and no section"
        for item in what.split(";"):
            jobs, _, reason = item.partition("=")
            for name in names:
                for job in jobs.split(","):
                    found[name, job.strip()] = reasons()[reason.strip()]
    return found


@cache
def known_wrong() -> set[tuple[str, str]]:
    """Cells that are wrong and not mended yet: `architecture | job, job`, `*` for all of them."""
    pairs = [(name.strip(), jobs.strip()) for name, jobs in (line.split("|") for line in _lines("known_wrong.txt"))]
    every = {(name, job) for name, jobs in pairs if jobs == "*" for job in JOBS}
    return every | {(name, job.strip()) for name, jobs in pairs if jobs != "*" for job in jobs.split(",")}


def in_part(name: str, job: str) -> bool:
    """Whether a cell is in the part that the suite runs: by a stable hash of its names."""
    return zlib.crc32(f"{name} {job}".encode()) % PARTS == 0


def _lines(file: str) -> list[str]:
    text = (HERE / file).read_text("utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
