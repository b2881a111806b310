"""Checkpoints: the named tensors of a model, wherever they lie, read one at a time.

Invariant: opening reads headers alone and finds every fault that a header or an index can have; reading makes no copy
of a tensor that lies in a file; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from tensoradapt.errors import FileError
from tensoradapt.io.held import held, spooled
from tensoradapt.io.hub import cached
from tensoradapt.io.names import distinct, plain_names
from tensoradapt.io.shards import Shards, open_file, open_folder, open_index
from tensoradapt.io.views import Store, View, under
from tensoradapt.io.wrapped import own_names
from tensoradapt.paths import Origin, expand, origin
from tensoradapt.spec import Rule, Spec

SOURCES = "a safetensors file, a folder of them, a cached hub id, a mapping, a module, or pairs of a name and a tensor"


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint; `file` is None where it does not lie in one of the user's, or in several of them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of one model, under the names of its modules: without the parts of wrappers.

    `name` is what messages call it, as the user wrote it; `entries` every tensor in stored order; `aliases` names of
    tensors that are the same as an earlier one; `folder` is where a config.json may lie; `label` is a folder's own
    name, a hub id or a module's class, for reports, and empty for tensors that came without a name of their own;
    `origin` is where the model is from, None where that is not known.
    """

    name: str
    entries: Mapping[str, Entry]
    aliases: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    revision: str | None = None
    label: str = ""
    origin: Origin | None = None
    view: View = field(repr=False, kw_only=True)
    conversion: Any = field(default=None, repr=False, kw_only=True)  # by which it has the names of a model's modules

    def read(self, name: str, index: int | None = None) -> Tensor:
        """One tensor in its stored dtype, on the CPU, or one of its entries; one of a file is mapped, not copied.

        Raises FileError where there is none of that name, or its file was changed since it was opened.
        """
        if name not in self.entries:
            raise FileError(f"{self.name} has no tensor {name!r}", expected=", ".join(list(self.entries)[:5]))
        return self.view.read(name, index)

    def under(self, names: Mapping[str, str]) -> Checkpoint:
        """The same tensors under other names: from those here to others; what is not given stays."""
        by = lambda name: names.get(name, name)  # noqa: E731
        entries = {by(name): replace(entry, name=by(name)) for name, entry in self.entries.items()}
        aliases = {by(name): by(first) for name, first in self.aliases.items()}
        return replace(self, entries=entries, aliases=aliases, view=self.view.renamed(names))

    def check(self, name: str) -> None:
        """Raise FileError where the tensor's file was changed since it was opened."""
        self.view.check(name)

    def first(self, name: str) -> str:
        """The first name of a tensor: another one only where it is tied."""
        return self.aliases.get(name, name)

    def identity(self) -> str:
        """A hash of names, shapes and dtypes, and of the files: size, time, header, samples; or of values in memory."""
        named = [[e.name, list(e.shape), str(e.dtype)] for e in self.entries.values()]
        return hashlib.sha256(json.dumps([named, self.view.store.fingerprint()]).encode()).hexdigest()

    def close(self) -> None:
        """Give up temporary files; tensors that were read stay."""
        self.view.store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(source: Any, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint, headers only.

    `source` is a safetensors file, a folder of them (with or without an index), a model folder, the id of a model in
    the local hub cache (`org/name` or `org/name@revision`), a mapping, a module, or pairs of a name and a tensor. An
    iterator, which can be read only once, is written tensor by tensor to a temporary folder (TMPDIR) that goes with the
    checkpoint. A checkpoint passes through. Raises FileError naming the file and tensor at fault; pickles are refused
    unopened.
    """
    if revision is not None and not isinstance(source, str):
        raise FileError(f"{type(source).__name__} has no revision {revision!r}", hint="revisions are of hub ids")
    return _opened(source, revision)


@singledispatch
def _opened(source: Any, revision: str | None) -> Checkpoint:
    if not hasattr(source, "__iter__") or isinstance(source, Spec | Rule):
        raise FileError("this is no checkpoint", got=type(source).__name__, expected=SOURCES)
    store = spooled(source)
    return _made(f"the stream of {len(store.entries)} tensors", store)


@_opened.register
def _(source: Checkpoint, revision: str | None) -> Checkpoint:
    return source


@_opened.register
def _(source: nn.Module, revision: str | None) -> Checkpoint:
    state = source.state_dict().items()
    kind = type(source).__name__
    tensors = [(name, tensor) for name, tensor in state if torch.is_tensor(tensor)]
    by = own_names(source)
    said = getattr(getattr(source, "config", None), "_name_or_path", None)
    of = origin(said) if isinstance(said, str) and said else None
    return _in_memory(tensors, kind, names=distinct({name: by(name) for name, _ in tensors}), label=kind, origin=of)


@_opened.register
def _(source: Mapping, revision: str | None) -> Checkpoint:
    return _in_memory(source.items(), f"the mapping of {len(source)} tensors")


@_opened.register(list)
@_opened.register(tuple)
def _(source: Sequence[Any], revision: str | None) -> Checkpoint:
    return _in_memory(source, f"the list of {len(source)} tensors")


@_opened.register
def _(source: os.PathLike, revision: str | None) -> Checkpoint:
    return _from_path(expand(source), str(source))


@_opened.register
def _(source: str, revision: str | None) -> Checkpoint:
    if "://" in source:  # not repeated as it is: there may be credentials in it
        raise FileError("a checkpoint is not read from a URL", got=urlsplit(source).scheme, expected=SOURCES)
    if not source.strip():
        raise FileError("an empty name is no checkpoint", expected=SOURCES)
    path = expand(source)
    if not os.path.lexists(path):
        return _from_cache(source, revision)
    if revision is not None:
        raise FileError(f"{source} is a path and has no revision {revision!r}", hint="revisions are of hub ids")
    return _from_path(path, source)


def _in_memory(pairs: Iterable[Any], name: str, **known: Any) -> Checkpoint:
    store = held(pairs)
    return _made(name, store, same=store.same(), **known)


def _from_path(path: Path, name: str, **known: Any) -> Checkpoint:
    if not os.path.lexists(path):
        raise FileError(f"no checkpoint at {name}", expected=SOURCES)
    try:
        of = origin(path)
        return _made(name, _shards(path), **{"label": of.name or name, "origin": of, **known})
    except OSError as error:
        raise FileError(f"{name} cannot be read", got=error.strerror, hint="look at its permissions") from None


def _shards(path: Path) -> Shards:
    if path.is_dir():
        return open_folder(path)
    return open_index(path) if path.name.endswith(".safetensors.index.json") else open_file(path)


def _made(
    name: str,
    store: Store,
    same: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    **known: Any,
) -> Checkpoint:
    """The checkpoint of a store, whose names are plain where `names` does not say what they become."""
    names = names or plain_names(entry[0] for entry in store)
    view = under(store, names)
    aliases = {names[other]: names[first] for other, first in (same or {}).items()}
    known = {"folder": store.files[0].parent if store.files else None, "files": store.files, **known}
    return Checkpoint(name, _entries(view), aliases, notes=store.notes, view=view, **known)


def _entries(view: View) -> dict[str, Entry]:
    return {entry[0]: Entry(*entry) for entry in view}


def _from_cache(source: str, revision: str | None) -> Checkpoint:
    """A model of the local hub cache, nothing downloaded."""
    path, name, revision = cached(source, revision, "checkpoint", SOURCES)
    return _from_path(path, name, revision=revision, label=name)
