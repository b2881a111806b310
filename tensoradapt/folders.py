"""Model folders with an adapter merged into the weights: shard by shard, each laid out as it was.

Invariant: the merged folder has the base's shards, names, shapes and dtypes, and every weight that is not adapted byte
for byte; behind them stand trained modules that the base lacks. A merge that fails leaves nothing behind. One tensor is
in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensoradapt.analysis.source import as_modules
from tensoradapt.errors import AdapterError, FileError
from tensoradapt.io.appended import appendable, appended, is_of_another_module, longer_head, longer_index
from tensoradapt.io.base import check_base
from tensoradapt.io.beside import INDEX, check_apart, check_room, files_in, folder_of, others_of
from tensoradapt.io.checkpoint import Checkpoint, Entry, open_checkpoint
from tensoradapt.io.conversion import named_as
from tensoradapt.io.finding import finder, names_of, reader
from tensoradapt.io.held import as_bytes
from tensoradapt.io.renamed import plainly
from tensoradapt.io.saved import Savable, Saved, as_saved
from tensoradapt.io.shards import Shard, open_shard
from tensoradapt.io.stored import Stored
from tensoradapt.io.ties import check_ties, stored_names
from tensoradapt.io.views import Piece, View
from tensoradapt.io.weights import FLOATS, quantised
from tensoradapt.layouts import fits, viewed
from tensoradapt.merging import Rows, add_rows, rows_of
from tensoradapt.parts import view
from tensoradapt.paths import expand
from tensoradapt.scan import Model, scan
from tensoradapt.sites import Site, SiteMap
from tensoradapt.tables import first_of
from tensoradapt.writing.folder import atomic_folder, check_free, claimed

SHOWN = 5  # names in an error or a note
KEPT = 4  # tensors that were made before it is their turn to be written
Progress = Callable[[str, int, int], None]  # a tensor's name, how many are merged, how many there are


@dataclass(frozen=True)
class MergeResult:
    """A folder that was written: its sites and tensors with deltas, its bytes, and what to know."""

    path: Path
    num_sites: int
    num_tensors: int
    num_bytes: int
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        counts = {name: getattr(self, name) for name in ("num_sites", "num_tensors", "num_bytes")}
        return {"path": str(self.path), **counts, "files": list(self.files), "notes": list(self.notes)}

    def __str__(self) -> str:
        merged = f"{self.num_sites} sites merged into {self.num_tensors} tensors"
        lines = [f"{merged}, {self.num_bytes:,} bytes in {len(self.files)} files", f"written to {self.path}"]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


@dataclass
class Change:
    """What becomes of one tensor: the deltas of its sites are added, or a trained copy takes its place."""

    entry: Entry
    sites: list[Site] = field(default_factory=list)
    trained: Tensor | None = None

    def apply(self, tensor: Tensor, index: int | None, saved: Saved) -> Tensor:
        """What is stored instead of a tensor, or of its entry `index`, rounded once to its dtype.

        Raises AdapterError where it is not finite.
        """
        if self.trained is not None:
            tensor = (self.trained if index is None else self.trained[index]).to(tensor.dtype)
            if not bool(tensor.isfinite().all()):
                raise AdapterError(f"{self.entry.name} would not be finite", got=f"a trained copy in {tensor.dtype}")
        for site in self.sites:
            if index in (None, site.index):
                mine = site if index is None else replace(site, index=None)
                add_rows(view(tensor, mine), delta_rows(saved, site.path), site.path)
        return tensor

    def touches(self, index: int | None) -> bool:
        """Whether anything becomes of an entry."""
        return self.trained is not None or index is None or any(site.index == index for site in self.sites)


def delta_rows(saved: Saved, path: str, factor: float = 1.0) -> Rows:
    """A function that adds factor * delta of a site to a block of rows, in float32 at least."""
    group, _ = saved.sites[path]
    kept = next(iter(saved.factors(group.name).values()))
    like = torch.empty(0, dtype=torch.promote_types(kept.dtype, torch.float32))
    return rows_of(saved.chain(path, like), group.scale * factor)


@torch.no_grad()
def merge_folder(
    base: Any,
    adapter: Savable | str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    tied: bool = False,
    model: Model | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Write W + delta for every site of an adapter: a base folder, file or hub id, to a new folder.

    Sums are formed in float32 and rounded once to the stored dtype; modules that were trained whole replace the base's,
    or are added where it has none; configs and tokenizers are copied. `tied=True` merges into a tensor that modules
    share which are not adapted. `model` (a module, a config, a folder) tells how the weights are stored, where the
    base's own config does not. Warns where the base is another than the adapter was made on. Raises FileError,
    AdapterError; nothing is left then.
    """
    target = expand(out)
    with claimed(target), open_checkpoint(base, revision) as source:
        if not source.files:
            raise FileError(f"{source.name} is no folder", expected="a folder, a file or a cached hub id")
        check_apart(source, target)
        others, left = others_of(source)
        ours = {file.name for file in source.files} | {other.parts[0] for other in others}
        check_free(target, ours, overwrite=overwrite)
        saved, source, known = _under_one_kind_of_names(plainly(as_saved(adapter)), source)
        known = known if model is None else scan(model)
        changes, added = _changes(saved, Stored(source, known or SiteMap(())), tied=tied)
        check_base(saved.base, saved.plan, reader([p.site for _, p in saved.sites.values()], source), saved.where)
        added = {f"{_before(source)}{name}": tensor for name, tensor in added.items()}
        shards = [open_shard(file) for file in source.files]
        with atomic_folder(target, ours, overwrite=overwrite) as folder:
            check_room(folder, shards)
            merged = _Merged(saved, changes, source.view, progress)
            for shard in shards:
                merged.write(shard, folder / shard.file.name, added if shard is shards[-1] else {})
            for other in others:
                (folder / other).parent.mkdir(parents=True, exist_ok=True)
                if added and other.name.endswith(INDEX):
                    index = longer_index(folder_of(source) / other, shards[-1].file.name, added)
                    (folder / other).write_bytes(index)
                else:
                    shutil.copyfile(folder_of(source) / other, folder / other)
            _check_written(folder, source, added)
            files = {str(file.relative_to(folder)): file.stat().st_size for file in files_in(folder)}
    notes = [f"not copied, as the merged weights are not in them: {_listed(left)}"] if left else []
    notes += [appended(added)] if added else []
    sites = len({site.path for change in changes.values() for site in change.sites})
    tensors = len(merged.pieces) + len(added)
    return MergeResult(target, sites, tensors, sum(files.values()), tuple(sorted(files)), tuple(notes))


# -- what is to be changed ------------------------------------------------------------------------------------------


def _changes(saved: Saved, stored: Stored, *, tied: bool) -> tuple[dict[str, Change], dict[str, Tensor]]:
    """What becomes of every stored tensor that an adapter changes, and trained tensors that the base has none of.

    Raises FileError where one does not fit, or which of its sides is `out` cannot be told.
    """
    source = stored.source
    sites = [placement.site for _, placement in saved.sites.values()]
    extras = {path: saved.tensors[f"extra.{path}"] for path in saved.plan.extras}
    find = finder([site.tensor for site in sites], source.entries)
    found: dict[str, Change] = {}
    added: dict[str, Tensor] = {}
    missing: list[str] = []
    unfit: list[str] = []
    for site in sites:
        names = stored_names(site, names_of(site), find)
        wholes = {name: stored.site(source.entries[name], site) for name in names}
        here = {name: whole for name, whole in wholes.items() if whole is not None and fits(site, whole)}
        if not names or len(here) < len(names):
            (unfit if names else missing).append(site.path)
            continue
        for name, whole in here.items():
            found.setdefault(name, Change(source.entries[name])).sites.append(viewed(site, whole, saved.where))
    for name, change in found.items():
        check_ties(change.sites, name, find, source.name, tied=tied)
        if change.entry.dtype not in FLOATS:
            raise quantised(change.entry, source.name)
    for path, tensor in extras.items():
        held = find(path)
        if held is None and is_of_another_module(path, source.entries):
            added[path] = tensor
        elif held is None:
            missing.append(path)
        elif source.entries[held].shape != tuple(tensor.shape):
            unfit.append(path)
        else:
            found[held] = Change(source.entries[held], trained=tensor)
    _check_found(saved, source, missing, unfit)
    return found, appendable(added, saved.where, [change.entry.dtype for change in found.values()])


def _under_one_kind_of_names(saved: Saved, stored: Checkpoint) -> tuple[Saved, Checkpoint, SiteMap | None]:
    """An adapter and a base under the names of modules; or of the files, where the adapter was made of such."""
    modules, known = as_modules(stored)
    if modules.conversion is not None and _lacks(modules, saved) and not _lacks(stored, saved):
        return saved, stored, None
    return named_as(saved, modules.conversion), modules, known


def _lacks(source: Checkpoint, saved: Saved) -> bool:
    """Whether a base has no tensor of some site."""
    sites = [placement.site for _, placement in saved.sites.values()]
    find = finder([site.tensor for site in sites], source.entries)
    return any(find(*names_of(site)) is None for site in sites)


def _check_found(saved: Saved, source: Checkpoint, missing: Sequence[str], unfit: Sequence[str]) -> None:
    total = len(saved.sites) + len(saved.plan.extras)
    if missing:
        why = "".join(f" ({note})" for note in source.notes if "names" in note or "read" in note)
        raise FileError(
            f"{source.name} lacks {len(missing)} of the {total} weights that {saved.where} changes",
            got=f"no {_listed(missing)}; it has {_listed(list(source.entries))}{why}",
            hint="give the base that the adapter is of; where its files name weights otherwise than the model, load "
            "the model, merge there and save it",
        )
    if unfit:
        raise FileError(
            f"{len(unfit)} of the {total} weights that {saved.where} changes have another shape in {source.name}",
            got=_listed(unfit),
            hint="give the base that the adapter is of",
        )


# -- files ----------------------------------------------------------------------------------------------------------


@dataclass
class _Merged:
    """Shards that are written, and how many of the changed tensors they held so far."""

    saved: Saved
    changes: Mapping[str, Change]
    view: View
    progress: Progress | None
    done: int = 0
    ready: dict[str, Tensor] = field(default_factory=dict)  # what was made with a tensor that is written

    @cached_property
    def pieces(self) -> dict[str, Piece]:
        """The pieces that change, by the name of every tensor stored for them."""
        changed = [
            piece
            for piece in self.view.pieces
            if any(name in self.changes and self.changes[name].touches(index) for name, index in piece.here)
        ]
        return {stored: piece for piece in changed for stored in piece.stored}

    def write(self, shard: Shard, target: Path, added: Mapping[str, Tensor]) -> None:
        """Write a shard under the same header, what is not changed as bytes, tensor by tensor; `added` behind them."""
        with target.open("wb") as out:
            out.write(longer_head(shard, added) if added else shard.head())
            for name in shard.header:
                if name not in self.pieces or self.view.file_of[name] != shard.file:
                    out.write(shard.stored(name).numpy().data)
                else:
                    self._tell(name)
                    out.write(as_bytes(self._made(name)).numpy().data)
            for tensor in added.values():
                out.write(as_bytes(tensor).numpy().data)
        shard.stamp.check(shard.file)

    def _made(self, stored: str) -> Tensor:
        """The tensor that is written instead of a stored one; those made with it are kept until they are written."""
        if stored not in self.ready:
            piece = self.pieces[stored]
            self.ready = dict(list(self.ready.items())[-KEPT:])
            self.ready |= zip(piece.stored, self._changed(piece), strict=True)
        return self.ready.pop(stored)

    def _changed(self, piece: Piece) -> Sequence[Tensor]:
        stored = [self.view.store.read(name) for name in piece.stored]
        made = piece.forth(stored)
        changed = [
            self.changes[name].apply(tensor, index, self.saved) if name in self.changes else tensor
            for tensor, (name, index) in zip(made, piece.here, strict=True)
        ]
        return piece.back(changed, stored)

    def _tell(self, name: str) -> None:
        if self.progress is not None:
            self.progress(name, self.done, len(self.pieces))
        self.done += 1


def _before(source: Checkpoint) -> str:
    """What stands before every stored name: the `module.` of a wrapper, say."""
    stored = source.view.by_stored
    found = (n.removesuffix(piece.here[0][0]) for n, piece in stored.items() if n.endswith(f".{piece.here[0][0]}"))
    before = min(found, key=len, default="")
    return before if all(name.startswith(before) for name in stored) else ""


def _check_written(folder: Path, source: Checkpoint, added: Mapping[str, Tensor]) -> None:
    """Raise FileError where the folder that was written does not open with the base's names, shapes and dtypes."""
    with open_checkpoint(folder) as found:
        both = [{name: kind for name, *kind, _ in side.view.store} for side in (found, source)]
    if both[0] != both[1] | {name: [tuple(tensor.shape), tensor.dtype] for name, tensor in added.items()}:
        raise FileError(f"{folder} was not written as it should be", hint="look at the disk")


def _listed(names: Sequence[str]) -> str:
    return first_of(names, SHOWN)
