"""Safetensors files of one checkpoint: the index, the headers and the mapped contents.

Invariant: everything is validated before the first tensor is read, no file outside the folder is touched, and what is
read is what was there when the files were opened: a file that changed since is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tensoradapt.errors import FileError
from tensoradapt.io.mapped import Stamp, mapped
from tensoradapt.paths import check_regular
from tensoradapt.sites import PICKLES, no_weights, pickled, read_header, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000
LISTED = 50  # names in an error
SAMPLES, SAMPLE_BYTES = 64, 4096  # of a file's contents
DTYPES: Mapping[str, torch.dtype] = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}
PACKED = torch.uint8  # what a dtype of less than a byte, or one that torch lacks, is taken for: bytes


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header as validated, in stored order, and where behind it the tensors begin."""

    file: Path
    header: Mapping[str, Any]
    begin: int
    stamp: Stamp

    def read(self, name: str) -> Tensor:
        """One tensor, its pages those of the file. Raises FileError where the file is not what was opened."""
        entry = self.header[name]
        if entry["dtype"] not in DTYPES:
            raise FileError(f"{name} of {self.file} holds {entry['dtype']}", expected=f"one of {', '.join(DTYPES)}")
        begin = self.begin + entry["data_offsets"][0]
        return mapped(self.file, self.stamp, begin, tuple(entry["shape"]), DTYPES[entry["dtype"]])

    def stored(self, name: str) -> Tensor:
        """The bytes of one tensor, whatever its dtype."""
        first, last = self.header[name]["data_offsets"]
        return mapped(self.file, self.stamp, self.begin + first, (last - first,), torch.uint8)

    def head(self) -> bytes:
        """All that stands before the tensors."""
        with self.file.open("rb") as stream:
            return stream.read(self.begin)

    def fingerprint(self) -> list[Any]:
        """Name, size, time, header and samples: what differs once the file was written again.

        The samples tell files whose times were set alike, as images and archives do.
        """
        found = hashlib.sha256(self.head())
        with self.file.open("rb") as stream:
            for begin in range(self.begin, self.stamp.size, max(1, (self.stamp.size - self.begin) // SAMPLES)):
                stream.seek(begin)
                found.update(stream.read(SAMPLE_BYTES))
        self.stamp.check(self.file)
        return [self.file.name, self.stamp.size, self.stamp.mtime_ns, found.hexdigest()]


def open_shard(file: Path) -> Shard:
    """Judge a safetensors file by its header. Raises FileError where it is no file, damaged, or has a name twice."""
    check_regular(file)
    stamp = Stamp.of(file)
    try:
        with safe_open(file, framework="np"):  # the library's own checks: types, sizes, overlaps, holes
            pass
        with file.open("rb") as stream:
            begin = 8 + int.from_bytes(stream.read(8), "little")
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(
            f"{file} is damaged or no safetensors file", got=_first_line(error), hint="download or save it again"
        ) from None
    header = {name: entry for name, entry in read_header(file).items() if name != "__metadata__"}
    stamp.check(file)
    return Shard(file, dict(sorted(header.items(), key=_offset)), begin, stamp)


def _offset(item: tuple[str, Any]) -> tuple[int, ...]:
    return tuple(item[1]["data_offsets"])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@dataclass(frozen=True)
class Shards:
    """The files of one checkpoint, and which of them holds each tensor."""

    holders: Mapping[str, Shard]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, Path | None]]:
        for name, shard in self.holders.items():
            entry = shard.header[name]
            yield name, tuple(entry["shape"]), DTYPES.get(entry["dtype"], PACKED), shard.file

    def read(self, name: str) -> Tensor:
        """One tensor of the file that holds it."""
        return self.holders[name].read(name)

    def check(self, name: str) -> None:
        """Raise FileError where the tensor's file has changed since it was opened."""
        shard = self.holders[name]
        shard.stamp.check(shard.file)

    def fingerprint(self) -> list[Any]:
        """What differs once one of the files was written again."""
        return [shard.fingerprint() for shard in {id(shard): shard for shard in self.holders.values()}.values()]

    def close(self) -> None:
        """Nothing: a file is open only while a tensor of it is used."""


def open_file(file: Path) -> Shards:
    """One safetensors file. Raises FileError; a pickle is refused unopened."""
    if file.suffix in PICKLES:
        raise pickled(str(file))
    if file.suffix == ".json":
        raise FileError(
            f"{file} holds no weights",
            expected="a safetensors file, or a folder",
            hint=f"give its folder, {file.parent}",
        )
    shard = open_shard(file)
    return Shards(dict.fromkeys(shard.header, shard), (file,))


def open_folder(folder: Path) -> Shards:
    """The files of a model folder, as transformers would choose them: one file, an index, or all there are."""
    if (folder / SINGLE).is_file() or not (index := _index_of(folder)):
        return _without_index(folder)
    return open_index(index)


def _index_of(folder: Path) -> Path | None:
    """The folder's index: `model.safetensors.index.json`, or the only one there is."""
    found = sorted(folder.glob("*.safetensors.index.json"))
    if folder / INDEX in found or not found:
        return folder / INDEX if found else None
    if len(found) > 1:
        raise FileError(f"{folder} has several indexes", got=_listed([f.name for f in found]), hint="give one of them")
    return found[0]


def _without_index(folder: Path) -> Shards:
    # A name that begins with a dot is a file manager's or an unfinished one.
    files = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("[!.]*.safetensors"))
    if not files:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise pickled(f"{folder} ({_listed(pickles)})")
        raise no_weights(folder, "a safetensors file or a folder of shards")
    holders: dict[str, Shard] = {}
    for shard in map(open_shard, files):
        doubled = next((name for name in shard.header if name in holders), None)
        if doubled is not None:
            raise FileError(
                f"{doubled!r} is in two files of {folder}",
                got=f"{holders[doubled].file.name} and {shard.file.name}",
                hint="remove the file that does not belong, or give one of them",
            )
        holders |= dict.fromkeys(shard.header, shard)
    return Shards(holders, tuple(files))


def open_index(index: Path) -> Shards:
    """The shards that an index names. Raises FileError before any is read where one is missing or lacks a tensor."""
    wanted = read_index(index)
    names = list(dict.fromkeys(wanted.values()))
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise FileError(
            f"{len(missing)} of {len(names)} shards that {index} names are missing",
            got=_listed(missing),
            hint="download them, or remove the index where it is out of date",
        )
    shards = {name: open_shard(index.parent / name) for name in sorted(names)}
    lacking = [name for name, shard in wanted.items() if name not in shards[shard].header]
    if lacking:
        raise FileError(
            f"{len(lacking)} tensors that {index} names are not in their shards",
            got=_listed([f"{name} in {wanted[name]}" for name in lacking]),
            hint="the index and the shards are of different checkpoints: download both again",
        )
    unnamed = [name for shard in shards.values() for name in shard.header if wanted.get(name) != shard.file.name]
    notes = (f"{index.name} does not name {len(unnamed)} tensors of its shards: {_listed(unnamed)}",) if unnamed else ()
    holders = {n: s for s in shards.values() for n in s.header if wanted.get(n) == s.file.name}
    return Shards(holders, tuple(shard.file for shard in shards.values()), notes)


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an index. Raises FileError on anything but plain names of files beside it."""
    check_regular(index)
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise FileError(f"{index} is too large", got=f"{index.stat().st_size} bytes", expected=f"{MAX_INDEX_BYTES}")
    try:
        found = read_object(index.read_bytes()).get("weight_map")
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{index} cannot be read as an index", got=_first_line(error)) from None
    if not hasattr(found, "items") or not found:
        raise FileError(f"{index} has no weight_map", expected="an object of tensor names and file names")
    plain = set(filter(is_plain, {file for file in found.values() if type(file) is str}))
    for name, file in found.items():
        if type(file) is not str or file not in plain:
            raise FileError(
                f"{index} places {name!r} outside its folder, or in no file",
                got=repr(file)[:200],
                expected="the name of a .safetensors file beside the index",
            )
    return dict(found)


def is_plain(name: str) -> bool:
    """Whether this is the plain name of a safetensors file: no folder, drive, or character that ends a name."""
    bad = any(character in "/\\:" or ord(character) < 32 for character in name)
    return name.endswith(".safetensors") and not bad and len(name) < 256


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
