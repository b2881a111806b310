"""What the commands print: results on stdout, everything else on stderr.

Invariant: with `--json` one JSON object goes to stdout and nothing else.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TextIO

from tensoradapt.cli.run.words import in_options
from tensoradapt.tables import wrapped


class Result(Protocol):
    """What a command ends with: a text for people, and plain JSON values."""

    def to_dict(self) -> Mapping[str, Any]:
        """The result as plain JSON values."""
        ...


# What stands for the one letter of our own sentences that a terminal may lack; paths may have the others.
PLAIN = str.maketrans({"\u2026": "..."})


def emit(text: str) -> None:
    """Print a text on stdout."""
    sys.stdout.write(_for(sys.stdout, text.rstrip("\n") + "\n"))


def _for(stream: TextIO, text: str) -> str:
    """A text without letters of ours that a stream's encoding lacks; what the user wrote stays."""
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return text.translate(PLAIN)
    return text


def emit_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    emit(json.dumps(values))


def show(result: Result, *, as_json: bool, text: str | None = None) -> None:
    """Print a result as it prints itself, or in another text, or as one JSON object."""
    if as_json:
        emit_json(result.to_dict())
    else:
        emit(_notes_in_options(text or str(result)))


def _notes_in_options(text: str) -> str:
    """A text whose notes, each with its indented lines, speak of options."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("  ") and lines and lines[-1].startswith("note: "):
            lines[-1] += line[1:]
        else:
            lines.append(line)
    told = (wrapped(in_options(line)) if line.startswith("note: ") else [line] for line in lines)
    return "\n".join(line for part in told for line in part)


@contextmanager
def told() -> Iterator[None]:
    """Print warnings as lines on stderr, when what is inside is over or failed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for text in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
                note(f"warning: {text}")


def note(text: str) -> None:
    """Print a line beside the result, on stderr; nothing for no text."""
    if text:
        with suppress(OSError):  # a result does not fail since nobody hears what is said beside it
            sys.stderr.write(_for(sys.stderr, in_options(text).rstrip("\n") + "\n"))
