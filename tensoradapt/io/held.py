"""Tensors that come from the program rather than from a file: held in memory, or spooled to one from a stream.

Invariant: names are distinct, every tensor has values on some device, and reading one makes no copy on the CPU.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from tensoradapt.errors import FileError
from tensoradapt.io.mapped import paged
from tensoradapt.linalg import as_tensor

ALIGNED = 64  # bytes: where a tensor begins in a spool
Listing = Iterator[tuple[str, tuple[int, ...], torch.dtype, Path | None]]


@dataclass(frozen=True)
class Held:
    """Tensors of a mapping, as they are."""

    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    copied: dict[tuple[str, int], Tensor] = field(default_factory=dict, compare=False, repr=False)  # the last one

    def __iter__(self) -> Listing:
        for name, tensor in self.tensors.items():
            yield name, tuple(tensor.shape), tensor.dtype, None

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. A large one is read in many strips: its copy from a device is kept until the next."""
        tensor = self.tensors[name].detach()
        if tensor.device.type == "cpu" or tensor.is_inference():
            return tensor.cpu()
        as_it_is = name, tensor._version
        if (copy := self.copied.get(as_it_is)) is None:
            copy = tensor.cpu()
            self.copied.clear()
            self.copied[as_it_is] = copy
        return copy

    def check(self, name: str) -> None:
        """Nothing: no file can change."""

    def fingerprint(self) -> list[Any]:
        """A hash of every tensor's values."""
        return [_digest(self.read(name)) for name in self.tensors]

    def close(self) -> None:
        """Nothing: the tensors are the caller's."""

    def same(self) -> dict[str, str]:
        """Name -> first name of the same tensor: equal memory, shape and strides."""
        first: dict[Any, str] = {}
        found = {}
        for name, tensor in self.tensors.items():
            if tensor.numel():
                key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                if first.setdefault(key, name) != name:
                    found[name] = first[key]
        return found


def held(pairs: Iterable[tuple[str, Tensor]]) -> Held:
    """Named tensors in memory. Raises FileError on a name that is there twice, and on what is no tensor."""
    return Held(dict(_distinct(pairs)))


def _distinct(pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The pairs, each judged when it comes."""
    seen = set()
    for pair in pairs:
        name, tensor = _pair(pair)
        if name in seen:
            raise FileError(f"{name!r} is there twice", hint="names are distinct within a checkpoint")
        seen.add(name)
        yield name, tensor


def _pair(pair: Any) -> tuple[str, Tensor]:
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
        raise FileError("this is no named tensor", got=type(pair).__name__, expected="pairs of a name and a tensor")
    name, tensor = pair
    if isinstance(tensor, np.ndarray):
        tensor = as_tensor(tensor, repr(name))
    if not isinstance(tensor, Tensor):
        raise FileError(f"{name!r} is no tensor", got=type(tensor).__name__, hint="leave it out")
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else "quantised" if tensor.is_quantized else str(tensor.layout)[6:]
        raise FileError(f"{name!r} has no values that can be read", got=f"a {kind} tensor", expected="a dense tensor")
    return name, tensor


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor).numpy().data).hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's values as they are stored, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@dataclass
class Spool:
    """Tensors of a stream that can be read only once, in a file without a name: it goes when its process does."""

    file: IO[bytes]
    entries: dict[str, tuple[tuple[int, ...], torch.dtype, int, str]] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Listing:
        for name, (shape, dtype, _, _) in self.entries.items():
            yield name, shape, dtype, None

    def fill(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensor by tensor."""
        for name, tensor in _distinct(pairs):
            self.file.write(b"\0" * (-self.file.tell() % ALIGNED))
            begin, stored = self.file.tell(), as_bytes(tensor).numpy().data
            self.file.write(stored)
            digest = hashlib.sha256(stored).hexdigest()
            self.entries[name] = (tuple(tensor.shape), tensor.dtype, begin, digest)
        self.file.flush()

    def read(self, name: str) -> Tensor:
        """One tensor, its pages those of the temporary file."""
        if self.file.closed:
            raise FileError("this checkpoint is closed", hint="open it again")
        shape, dtype, begin, _ = self.entries[name]
        try:
            return paged(self.file.fileno(), begin, shape, dtype)
        except OSError as error:
            raise FileError("the stream of tensors cannot be read again", got=error.strerror) from None

    def check(self, name: str) -> None:
        """Nothing: the file is nobody else's."""

    def fingerprint(self) -> list[Any]:
        """A hash of every tensor's values."""
        return [digest for *_, digest in self.entries.values()]

    def close(self) -> None:
        """Give up the temporary file; tensors that were read stay."""
        with suppress(OSError):  # what is left to write, where there is no room for it
            self.file.close()


def spooled(pairs: Iterable[tuple[str, Tensor]]) -> Spool:
    """A stream of named tensors, written to the temporary folder one by one. Raises FileError."""
    try:
        spool = Spool(tempfile.TemporaryFile(prefix="tensoradapt-"))
        try:
            spool.fill(pairs)
        except BaseException:
            spool.close()
            raise
    except OSError as error:
        raise FileError(
            f"the stream of tensors cannot be kept in {tempfile.gettempdir()}",
            got=error.strerror,
            hint="set TMPDIR to a folder with room for the model, or give a checkpoint on disk",
        ) from error
    return spool
