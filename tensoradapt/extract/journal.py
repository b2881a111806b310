"""The journal of an extraction: what is done of it, on disk, so that interrupted work goes on where it stopped.

One folder beside the output, `<out>.partial`, with what the work is of (inputs, options) and one safetensors file per
finished group. Invariant: a part is whole or not there; a damaged one is done again; work of other inputs or options is
never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tensoradapt.analysis.sharing import together
from tensoradapt.errors import FileError, TensorAdaptError
from tensoradapt.io.native import checksum, write_tensors
from tensoradapt.linalg import SOLO, Team
from tensoradapt.textfiles import write_text
from tensoradapt.writing.atomic import atomic
from tensoradapt.writing.folder import claimed
from tensoradapt.writing.hidden import stands_for, unwritten

VERSION, WORK = "1", "work.json"
OLD_LOCK = "lock"  # of an earlier version
PART = re.compile(r"[0-9a-f]{24}\.safetensors")


@dataclass(frozen=True)
class Journal:
    """The folder of parts of one extraction."""

    folder: Path

    def part(self, name: str) -> Path:
        """The file of one group's part."""
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"

    def write(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Store a finished group: its factors, and what is known of them."""
        whole = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
        metadata = {"name": name, "record": json.dumps(record)}
        metadata["crc32"] = json.dumps(_sums(whole, metadata["record"]))
        with atomic(self.part(name)) as temporary:
            write_tensors(whole, temporary, metadata)

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A finished group's factors and record; None where there is none, or a damaged one."""
        try:
            with safe_open(self.part(name), framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            sums = _sums(tensors, metadata["record"])
            whole = metadata["name"] == name and json.loads(metadata["crc32"]) == sums
            return (tensors, json.loads(metadata["record"])) if whole else None
        except (SafetensorError, OSError, KeyError, ValueError, RecursionError):
            return None

    def remove(self) -> None:
        """Take the folder away: the work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def begun(self) -> bool:
        """Whether any part is there."""
        return any(self.parts)

    @property
    def parts(self) -> Iterator[Path]:
        """The files of finished groups."""
        return (file for file in self.folder.glob("*.safetensors") if PART.fullmatch(file.name))

    def check_own(self) -> None:
        """Raise FileError where the folder holds files of others: it is removed when the work is done."""
        held = sorted(file.name for file in self.folder.iterdir()) if self.folder.is_dir() else []
        ours = (WORK, OLD_LOCK, self.folder.name)
        others = [n for n in held if (of := stands_for(n) or n) not in ours and not PART.fullmatch(of)]
        if others:
            raise FileError(
                f"{self.folder} holds other files, and is where unfinished work would lie",
                got=", ".join(others[:5]),
                hint="move them, or choose another output",
            )


def _sums(tensors: Mapping[str, Tensor], record: str) -> dict[str, int]:
    """The checksums of all that a part holds."""
    return {"": zlib.crc32(record.encode()), **{key: checksum(tensor) for key, tensor in tensors.items()}}


@contextmanager
def opened(folder: Path, work: Mapping[str, Any], team: Team = SOLO) -> Iterator[Journal]:
    """The journal of an output in its folder, claimed by the first of a team.

    `work` says what the work is of: all that its result depends on. Where an error ends the work before its first part,
    or the work itself is refused, the folder goes too. Raises FileError where a journal of other work is there, or
    another process works on the same journal.
    """
    journal, stack = Journal(folder), ExitStack()
    with stack:
        together(team, lambda: _held(folder, work, stack) if team.rank == 0 else None)
        try:
            yield journal
        except BaseException as error:
            if team.rank == 0 and (_refused(error) or not journal.begun):
                journal.remove()
            raise


def _refused(error: BaseException) -> bool:
    """Whether the same work would fail again: it is the input's fault, and no file's or machine's."""
    return isinstance(error, TensorAdaptError) and error.lasting


def _held(folder: Path, work: Mapping[str, Any], stack: ExitStack) -> None:
    """Claim the folder until the stack is left, make it, and write down what it is of."""
    stack.enter_context(claimed(folder))
    try:
        folder.mkdir(exist_ok=True)
        _write_down(folder, work)
    except OSError as error:
        raise unwritten(folder, error) from None
    finally:
        with suppress(OSError):  # an empty one is of no use
            folder.rmdir()


def _write_down(folder: Path, work: Mapping[str, Any]) -> None:
    """Write down what the work is of, or compare it with what stands there."""
    file = folder / WORK
    text = json.dumps({"journal": VERSION, **work}, indent=1, sort_keys=True)
    before, now = _read(file), json.loads(text)
    if before is None:
        for part in Journal(folder).parts:  # parts of which nobody knows what they are
            part.unlink()
    changed = sorted(key for key in {*(before or {}), *now} if (before or now).get(key) != now.get(key))
    if changed and Journal(folder).begun:
        raise FileError(
            f"{folder} holds interrupted work of another {' and '.join(changed)}",
            got=", ".join(f"{key}: {_short(now.get(key))}" for key in changed),
            expected=", ".join(f"{key}: {_short((before or {}).get(key))}" for key in changed),
            hint=f"give the same inputs and options to go on with it, or remove {folder}",
        )
    if before is None or changed:
        write_text(file, text)


def _read(file: Path) -> dict[str, Any] | None:
    """What a journal's work is of; None where it does not say."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return dict(found) if hasattr(found, "keys") else None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
