"""The journal of an extraction: what is done of it, on disk, so that interrupted work goes on where it stopped.

One folder beside the output, `<out>.partial`, with what the work is of (inputs, options) and one safetensors file per
finished group. Invariant: a part is whole or not there; a damaged one is done again; work of other inputs or options is
never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tensoradapt.errors import FileError
from tensoradapt.io.atomic import atomic
from tensoradapt.io.native import checksum

if sys.platform == "win32":  # two processes with one output are not noticed there

    def _exclusive(file: Any) -> None:
        """Nothing."""
else:
    import fcntl

    def _exclusive(file: Any) -> None:
        """Lock a file until it is closed. Raises OSError where another process holds it."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


VERSION = "1"


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
        sums = {key: checksum(tensor) for key, tensor in whole.items()}
        metadata = {"name": name, "record": json.dumps(record), "crc32": json.dumps(sums)}
        with atomic(self.part(name)) as temporary:
            try:
                save_file(whole, temporary, metadata=metadata)
            except SafetensorError as error:
                raise OSError(str(error)) from error

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A finished group's factors and record; None where there is none, or a damaged one."""
        try:
            with safe_open(self.part(name), framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            sums = json.loads(metadata["crc32"])
            whole = metadata["name"] == name and sums == {key: checksum(tensor) for key, tensor in tensors.items()}
            return (tensors, json.loads(metadata["record"])) if whole else None
        except (SafetensorError, OSError, KeyError, ValueError):
            return None

    def remove(self) -> None:
        """Take the folder away: the work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def opened(out: Path, work: Mapping[str, Any], *, leader: bool = True) -> Iterator[Journal]:
    """The journal of an output, locked. `work` says what the work is of: all that its result depends on.

    Raises FileError where a journal of other work is there, or another process works on the same output.
    """
    folder = out.with_name(f"{out.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ("lock" if leader else f"lock-{os.getpid()}")).open("w")
    except OSError as error:
        raise FileError(
            f"{folder} cannot be written", got=error.strerror or str(error), hint="choose another output"
        ) from None
    with lock:
        _lock(lock, out)
        if leader:
            _claim(folder, work)
        yield Journal(folder)


def _lock(file: Any, out: Path) -> None:
    try:
        _exclusive(file)
    except OSError:
        raise FileError(f"another process is writing {out}", hint="wait for it, or choose another output") from None


def _claim(folder: Path, work: Mapping[str, Any]) -> None:
    """Write down what the work is of, or compare it with what stands there."""
    file = folder / "work.json"
    text = json.dumps({"version": VERSION, **work}, indent=1, sort_keys=True)
    try:
        before = json.loads(file.read_text("utf-8")) if file.exists() else None
    except (OSError, ValueError):
        before = None
    if before is None:
        for part in folder.glob("*.safetensors"):  # parts of which nobody knows what they are
            part.unlink()
        with atomic(file) as temporary:
            temporary.write_text(text, "utf-8")
        return
    now = json.loads(text)
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if changed:
        raise FileError(
            f"{folder} holds interrupted work of another {' and '.join(changed)}",
            got=", ".join(f"{key}: {_short(now.get(key))}" for key in changed),
            expected=", ".join(f"{key}: {_short(before.get(key))}" for key in changed),
            hint=f"give the same inputs and options to go on with it, or remove {folder}",
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
