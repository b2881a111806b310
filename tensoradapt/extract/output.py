"""Outputs: where an adapter, its record and the journal of its making lie, and what stands in the way.

Invariant: the adapter and its record are both new or both as they were, but for a kill between their two renamings,
which the next run mends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensoradapt.errors import FileError
from tensoradapt.extract.journal import Journal
from tensoradapt.io.card import CARD
from tensoradapt.io.native import FILE, file_of, write
from tensoradapt.io.saved import Saved
from tensoradapt.writing.atomic import atomic
from tensoradapt.writing.hidden import is_leftover, unwritten, whole

RECORD = "extraction.json"


@dataclass(frozen=True)
class Output:
    """An adapter's file, the JSON record of its extraction, and the folder of unfinished work.

    A folder `adapter` holds `adapter.safetensors` and `extraction.json`; beside a file `a.safetensors` lies
    `a.extraction.json`. The journal is `adapter.partial`, or `a.partial`.
    """

    file: Path
    record: Path
    journal: Path
    claim: Path  # what is locked while one works on it

    @classmethod
    def of(cls, out: str | Path) -> Output:
        """The places that a path means. Raises FileError on the root of a file system, and on an empty path."""
        file = file_of(out)
        full = Path(os.path.abspath(whole(file)))
        folder = full.name == FILE
        if not str(out).strip() or (folder and full.parent == full.parent.parent):
            raise FileError(f"{str(out)!r} is no output", expected="a folder of the adapter's own")
        name = full.parent if folder else full.with_suffix("")
        record = file.with_name(RECORD) if folder else file.with_suffix(f".{RECORD}")
        return cls(file, record, name.with_name(f"{name.name}.partial"), name if folder else full)

    def check(self, inputs: Iterable[Path], *, overwrite: bool) -> None:
        """Raise FileError where something is there already, nothing can be written, or an input lies in the folder.

        So it does where files of others lie in the journal's place.
        """
        try:
            self._check_folder(overwrite=overwrite)
            Journal(self.journal).check_own()
        except OSError as error:
            raise unwritten(self.file, error) from None
        self._check_journal()
        own = self.file.parent.resolve()
        if any(own in (file.resolve().parent, file.parent.resolve()) for file in inputs):
            raise FileError(f"{self.file.parent} holds a checkpoint that is read", hint="choose another output folder")

    def _check_folder(self, *, overwrite: bool) -> None:
        folder = self.file.parent
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise FileError(f"{folder} is a file, not a folder", hint="choose another output")
        if self.file.is_dir():
            raise FileError(f"{self.file} is a folder", hint="choose another output")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise FileError(f"{folder} cannot be written", got="it is read-only", hint="choose another output")
        if not overwrite and not self._unfinished:
            self._check_free(folder)

    def _check_journal(self) -> None:
        """Raise FileError where no journal can be written beside the output, or read by its name."""
        try:
            os.fsencode(self.journal).decode()
        except UnicodeDecodeError:
            raise FileError(f"{self.file} is no name in UTF-8", hint="choose another output") from None
        beside = next(folder for folder in self.journal.parents if folder.exists())
        if not os.access(beside, os.W_OK | os.X_OK):
            raise FileError(
                f"{self.journal}, where unfinished work is kept, cannot be written",
                got=f"{beside} is read-only",
                hint=f"choose a folder within the output: {self.file.parent / 'adapter'}",
            )

    @property
    def _unfinished(self) -> bool:
        """Whether work was interrupted after the adapter was written and before its record was."""
        return self.journal.is_dir() and not self.record.exists()

    def _check_free(self, folder: Path) -> None:
        own = [file.name for file in (self.file, self.record) if file.exists()]
        made = (self.file.name, self.record.name, CARD, self.claim.name)
        held = folder.iterdir() if self.file.name == FILE else ()
        others = [entry.name for entry in held if not is_leftover(entry.name, made)]
        if own or others:
            raise FileError(
                f"{folder if others else self.file} is there already",
                got=", ".join(sorted({*own, *others})[:5]),
                hint="choose another output, or overwrite=True (--overwrite)",
            )

    def write(self, made: Saved, record: Mapping[str, Any]) -> None:
        """Write the adapter and its record, the record last. Raises FileError; nothing is changed then."""
        with atomic(self.record) as temporary:
            record = {**record, "path": self.file.name}  # a record that is moved with its folder stays true
            temporary.write_text(json.dumps(record, indent=1, allow_nan=False), "utf-8")
            write(self.file, made.plan, made.tensors, made.base, made="ta.extract(base, tuned, spec, out)")
