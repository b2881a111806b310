"""What lies beside the weights in a model's folder, and room for a second one.

Invariant: files that hold weights, or say where weights lie that are not written, are never taken for a model's others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tensoradapt.errors import FileError
from tensoradapt.io.checkpoint import Checkpoint
from tensoradapt.io.shards import Shard, read_index
from tensoradapt.sites import PICKLES

WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite")
INDEX = ".safetensors.index.json"


def folder_of(source: Checkpoint) -> Path:
    """The folder that holds the files of a checkpoint."""
    return source.files[0].parent


def _is_file(source: Checkpoint) -> bool:
    """Whether the base is a file by itself, whatever lies beside it."""
    return Path(source.name).name == source.files[0].name


def check_apart(source: Checkpoint, out: Path) -> None:
    """Raise FileError where one folder lies in the other, or they are the same."""
    here, there = folder_of(source).resolve(), out.resolve()
    if here == there or there in here.parents or (here in there.parents and not _is_file(source)):
        raise FileError(f"{out} and the base {source.name} lie in each other", hint="choose a folder beside it")


def others_of(source: Checkpoint) -> tuple[list[Path], list[str]]:
    """The other files of a folder that belong to a model, and the weights among them that are left out."""
    root = folder_of(source)
    if _is_file(source):
        return [], []
    written = {file.name for file in source.files}
    found = [file for file in files_in(root) if str(file.relative_to(root)) not in written]
    taken = [file.relative_to(root) for file in found if _is_copied(file, written)]
    return taken, sorted(str(file.relative_to(root)) for file in found if not _is_copied(file, written))


def files_in(root: Path) -> Iterator[Path]:
    """The regular files under a folder; none that is hidden, nor in a folder that is hidden or linked."""
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(place, name)
            if not name.startswith(".") and file.is_file():
                yield file


def _is_copied(file: Path, written: set[str]) -> bool:
    """Whether a file holds no weights, nor says where weights lie that are not written."""
    if file.name.endswith(INDEX):
        with suppress(FileError):
            return set(read_index(file).values()) <= written
    return file.suffix not in WEIGHTS and not file.name.endswith(".index.json")


def check_room(folder: Path, shards: Sequence[Shard]) -> None:
    """Raise OSError before the work begins where the disk has no room for it."""
    needed, free = sum(shard.stamp.size for shard in shards), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(28, f"no room: {needed:,} bytes are needed, {free:,} are free")
