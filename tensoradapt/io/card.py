"""Cards: the README in an adapter's folder, which says what it is, what it is of, and how it is loaded.

Invariant: a card that somebody has changed is never overwritten, and none names a folder of the machine.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensoradapt.paths import origin
from tensoradapt.plan import Plan
from tensoradapt.writing.atomic import atomic

CARD = "README.md"
MARK = re.compile(r"\n<!-- tensoradapt ([0-9a-f]{8}): this card is written anew until it is changed -->\n$")


def front_matter(library: str, base: str) -> list[str]:
    """The lines that a hub reads: the library, and the id of the base, where it has one."""
    return ["---", f"library_name: {library}", *([f"base_model: {base}"] if base else []), "---", ""]


def command(call: str) -> str:
    """The command line that this process is of, without its folders; the `call` where it is another program's."""
    program = Path(sys.argv[0])
    if program.stem != "tensoradapt" and program.parts[-2:] != ("tensoradapt", "__main__.py"):
        return call
    return shlex.join(["tensoradapt", *map(_argument, sys.argv[1:])])


def _argument(given: str) -> str:
    """An argument of a command line; of a path that begins at a root, at a home, or above here, its own name."""
    option, equals, value = given.partition("=") if given.startswith("-") else ("", "", given)
    placed = value.startswith((os.sep, "~", f"..{os.sep}")) or os.path.isabs(value)
    return f"{option}{equals}{origin(value).name if placed else value}"


def card(plan: Plan, base: Mapping[str, Any], made: str) -> str:
    """The text of an adapter's card: its base, its plan in words and in numbers, how to load it, and what made it."""
    name = plan.model
    revision = f", revision {base['revision']}" if base.get("revision") else ""
    return "\n".join(
        [
            *front_matter("tensoradapt", name if base["hub"] else ""),
            f"# Adapter of {name or 'a model without a name'}{revision}",
            "",
            plan.in_words,
            "",
            f"{plan.trained.capitalize()}.",
            "",
            *_fenced("python", _loading(name)),
            *([f"Made by `{made}`.", ""] if made else []),
            *_fenced("text", str(plan).splitlines()),
        ]
    )


def _loading(name: str) -> list[str]:
    return [
        "import tensoradapt as ta",
        f"model = ...  # {name or 'the base'}, loaded as usual",
        'adapter = ta.load("path/to/this/folder", model)  # adapter.merge_and_detach() makes it part of the weights',
    ]


def _fenced(language: str, lines: Sequence[str]) -> list[str]:
    return [f"```{language}", *lines, "```", ""]


def maker(folder: Path) -> str:
    """The command or the call that made an adapter, as its folder's card says; empty where it does not."""
    try:
        found = re.search(r"^Made by `(.+)`\.$", (folder / CARD).read_text("utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        return ""
    return found[1] if found else ""


@contextmanager
def carded(folder: Path, text: str) -> Iterator[None]:
    """A folder that gets its card when the block ends, unless there is one that was changed. Raises FileError.

    The card is made before the block, so that a disk without room for it is seen before the block writes anything.
    """
    file = folder / CARD
    if os.path.lexists(file) and not _is_ours(file):
        yield
        return
    with atomic(file) as temporary:
        mark = (
            f"\n<!-- tensoradapt {zlib.crc32(text.encode()):08x}: this card is written anew until it is changed -->\n"
        )
        temporary.write_text(text + mark, encoding="utf-8")
        yield


def _is_ours(file: Path) -> bool:
    """Whether a card is as it was written."""
    try:
        text = file.read_text("utf-8")
    except (OSError, ValueError):
        return False
    mark = MARK.search(text)
    return mark is not None and int(mark[1], 16) == zlib.crc32(text[: mark.start()].encode())
