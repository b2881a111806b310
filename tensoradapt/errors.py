"""The exceptions that users see: what went wrong, what was got, what was expected, what to do next.

Invariant: every error raised on user input is a `TensorAdaptError`, so that the command line can tell a user's mistake
(exit code 2, a few lines) from a fault of the library (a traceback).
"""

from __future__ import annotations

LONGEST = 4000  # characters of one part of a message


class TensorAdaptError(ValueError):
    """Base of all errors: `what`, and on lines of their own what was got, what was expected and what to do next."""

    told = False  # whether another process of a team tells the user of it
    lasting = True  # whether the same input would be refused again, so that work begun on it is of no use

    def __init__(self, what: str, *, got: object = None, expected: object = None, hint: str | None = None) -> None:
        lines = [_shown(what)]
        lines += [f"  got: {_shown(got)}"] if got is not None else []
        lines += [f"  expected: {_shown(expected)}"] if expected is not None else []
        lines += [f"  next: {_shown(hint)}"] if hint is not None else []
        super().__init__("\n".join(lines))


def _shown(said: object) -> str:
    """A part of a message: of a screen's length, with nothing in it that would move a terminal's cursor.

    Names come from files, and a file may have any.
    """
    text = str(said)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text):,} characters)"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class SpecError(TensorAdaptError):
    """A spec, a rule or a preset's parameters are at fault."""


class RankError(SpecError):
    """A rank is not a positive integer, or above the limit of its bond."""


class ShapeError(TensorAdaptError):
    """Sizes do not fit: folds that do not multiply out, factors of another shape."""


class SiteError(TensorAdaptError):
    """A target matches nothing, a module cannot be served, coordinates collide."""


class FileError(TensorAdaptError):
    """A file or folder is missing, damaged, of another version, or for another model."""

    lasting = False


class AdapterError(TensorAdaptError):
    """An operation does not fit the adapter's state: merged, detached, a name already in use."""
