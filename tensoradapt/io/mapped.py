"""Tensors whose pages are those of a file, and the stamp that tells whether it is still the same file.

Invariant: a tensor is mapped by itself, copy on write: memory is asked for none of it, files may be larger than the
machine's memory, and writing into the tensor never reaches the file.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tensoradapt.errors import FileError


@dataclass(frozen=True)
class Stamp:
    """What tells a file from the one that is there later under its name."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path | int) -> Stamp:
        """The stamp of a file, or of one that is open, as it is now."""
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)

    def check(self, file: Path) -> None:
        """Raise FileError where the file was changed, replaced or removed since."""
        try:
            now = Stamp.of(file)
        except OSError as error:
            raise FileError(f"{file} is gone since it was opened", got=error.strerror) from None
        self.compare(file, now)

    def compare(self, file: Path, now: Stamp) -> None:
        """Raise FileError where another stamp was found."""
        if now != self:
            raise FileError(f"{file} was changed since it was opened", hint="start again, with files that are complete")


def mapped(file: Path, stamp: Stamp, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that begins at a byte of a file. Raises FileError where it is not the file that was stamped."""
    try:
        with file.open("rb") as stream:
            stamp.compare(file, Stamp.of(stream.fileno()))
            return paged(stream.fileno(), begin, shape, dtype)
    except OSError as error:
        raise FileError(f"{file} cannot be read", got=error.strerror) from None


def paged(descriptor: int, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that begins at a byte of an open file; it stays when the file is closed. Raises OSError."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    first = begin - begin % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(descriptor, begin - first + size, access=mmap.ACCESS_COPY, offset=first)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape), offset=begin - first).view(shape)
