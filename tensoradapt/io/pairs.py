"""Two checkpoints of one model side by side: which tensors belong together, and the stream of their differences.

Invariant: what is matched, what only one side has, what differs in shape and what is no weight is all in the report;
nothing is dropped without a name. One pair is in memory at a time, and of it one matrix of the asked dtype. What is
subtracted on a device goes there as it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from tensoradapt.errors import FileError, SiteError
from tensoradapt.io.checkpoint import Checkpoint, open_checkpoint
from tensoradapt.io.matching import Match, Pair, match, named_like
from tensoradapt.linalg import LARGE, home_of, moved, norm_of
from tensoradapt.sites import Site, SiteMap

BLOCK = 1 << 18  # entries that the CPU converts at a time: a block and its copies stay in the cache
HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Deltas:
    """The differences of two checkpoints, site by site, read when they are asked for, and formed on a device."""

    base: Checkpoint
    tuned: Checkpoint
    match: Match
    device: torch.device = HOST

    def on(self, device: torch.device) -> Deltas:
        """The same, formed on another device."""
        return replace(self, device=device)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that both sides hold, in the tuned side's order."""
        return self.match.sites.sites

    def __len__(self) -> int:
        return len(self.match.pairs)

    def __iter__(self) -> Iterator[tuple[Site, Tensor]]:
        """Site and delta, one pair in memory at a time."""
        for site in self.sites:
            yield site, self.delta(site.path)

    @cached_property
    def _pairs(self) -> dict[str, Pair]:
        return {pair.site.path: pair for pair in self.match.pairs}

    def pair(self, path: str) -> Pair:
        """The pair of a site. Raises SiteError on a path that is none."""
        if path not in self._pairs:
            raise SiteError(f"{path} is no site of both checkpoints", expected=", ".join(list(self._pairs)[:12]))
        return self._pairs[path]

    def weights(self, path: str) -> tuple[Tensor, Tensor]:
        """Both sides of a site as stored, base first, (out, in) or (out, in, kh, kw), no copy.

        Each side has its own rows where the shapes differ and `rows` was `pad`. Raises FileError, SiteError.
        """
        site = self.pair(path).site
        base, tuned = (_view(part, site) for part in self._stored(path))
        return base, tuned

    def delta(self, path: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """D[out, in] = tuned[out, in] - base[out, in], contiguous, (out, in) or (out, in, kh, kw).

        Formed block by block and rounded once: beside the stored tensors there is one matrix of `dtype`. Rows that
        the base lacks count as zero there, rows that the tuned side lacks as unchanged. Raises FileError on values that
        are not finite, naming the tensor and their number, and SiteError.
        """
        pair = self.pair(path)
        base, tuned = self._there(*self._stored(path))
        out = torch.empty(pair.site.shape, dtype=dtype, device=tuned.device)
        turned = out.mT if pair.site.layout == "in out" else out
        stored = turned if turned.dim() == tuned.dim() else turned.view(-1, *tuned.shape[1:])
        both = min(len(base), len(tuned))
        for rows in _blocks(stored[:both]):
            if not _subtract(tuned[rows], base[rows], stored[rows]):
                self._refuse_nonfinite(pair, dtype)
        stored[both:] = tuned[both:] if len(tuned) > both else 0
        if len(tuned) > both and not bool(stored[both:].isfinite().all()):
            self._refuse_nonfinite(pair, dtype)
        self.base.check(pair.base_name)
        self.tuned.check(pair.tuned_name)
        return out.to(self.device)

    def change(self, name: str) -> tuple[bool, float]:
        """Whether a tensor of both sides, named as on the tuned one, differs, and |tuned - base|^2, block by block.

        The squared norm is NaN where the two have other shapes, hold no floats, or are not finite.
        """
        base, tuned = self.base.read(self.match.names[name]), self.tuned.read(name)
        if base.shape != tuned.shape or not (base.is_floating_point() and tuned.is_floating_point()):
            return base.shape != tuned.shape or not torch.equal(base, tuned), math.nan
        base, tuned = self._there(torch.atleast_1d(base), torch.atleast_1d(tuned))
        squares = [_squared(base[rows], tuned[rows]) for rows in _blocks(base)]
        self.base.check(self.match.names[name])
        self.tuned.check(name)
        return any(squares), math.fsum(squares)

    def strip(self, path: str, at: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """A part of the delta, its kernel flattened into `in`: a range along its longer side.

        Shape: (range, in) where out > in, else (out, range). Raises FileError on values that are not finite.
        """
        pair = self.pair(path)
        sides = [_view(part, pair.site).flatten(1) for part in self._stored(path)]
        dim = 0 if max(side.shape[0] for side in sides) > max(side.shape[1] for side in sides) else 1
        base, tuned = self._there(*(side.narrow(dim, *_within(at, side.shape[dim])) for side in sides))
        found = _difference(base, tuned, dtype)
        self.base.check(pair.base_name)
        self.tuned.check(pair.tuned_name)
        if found is None:
            self._refuse_nonfinite(pair, dtype)
        return found.to(self.device)

    def nonfinite(self, path: str) -> tuple[int, int]:
        """How many entries of a site are NaN or infinite, of the base and of the tuned side."""
        base, tuned = (sum(int((~part[b].isfinite()).sum()) for b in _blocks(part)) for part in self._stored(path))
        return base, tuned

    def _stored(self, path: str) -> tuple[Tensor, Tensor]:
        """Both tensors as they lie in the files: one expert of them, and the rows in use."""
        pair = self.pair(path)
        base = self.base.read(pair.base_name, pair.site.index)
        tuned = self.tuned.read(pair.tuned_name, pair.site.index)
        rows = pair.site.shape[1 if pair.site.layout == "in out" else 0]
        return base[:rows], tuned[:rows]

    def _there(self, base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides where they are subtracted: on the CPU where the device has no float64, and one of them is that."""
        where = home_of(self.device) if torch.float64 in (base.dtype, tuned.dtype) else self.device
        return moved(base, where), moved(tuned, where)

    def _refuse_nonfinite(self, pair: Pair, dtype: torch.dtype) -> NoReturn:
        counts = self.nonfinite(pair.site.path)
        names = (pair.base_name, self.base.name), (pair.tuned_name, self.tuned.name)
        size = pair.site.numel
        bad = [f"{k} of {size} in {n} of {where}" for k, (n, where) in zip(counts, names, strict=True) if k]
        error = FileError(
            f"{pair.site.path} is not finite",
            got=f"NaN or infinite entries: {', '.join(bad)}" if bad else f"a difference beyond {str(dtype)[6:]}",
            hint='use another checkpoint, or leave such tensors out with nonfinite="skip"'
            if bad
            else "leave this weight out: name others in targets=, or it in exclude=",
        )
        error.lasting = True
        raise error

    def close(self) -> None:
        """Close both checkpoints."""
        self.base.close()
        self.tuned.close()

    def __enter__(self) -> Deltas:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _view(stored: Tensor, site: Site) -> Tensor:
    """A stored tensor as the site's (out, in) or (out, in, kh, kw); it shares the memory."""
    turned = stored.mT if site.layout == "in out" else stored
    return turned if turned.dim() == len(site.shape) else turned.unsqueeze(2)


def _blocks(tensor: Tensor) -> Iterator[slice]:
    """Ranges of rows of about BLOCK entries each; of many more on a device, which is waited for at every one."""
    size = BLOCK if tensor.device.type == "cpu" else LARGE
    height = max(1, size * len(tensor) // max(tensor.numel(), 1))
    return (slice(start, min(start + height, len(tensor))) for start in range(0, len(tensor), height))


def _squared(base: Tensor, tuned: Tensor) -> float:
    """|tuned - base|^2 of a block; entries that are equal are no change, whatever they are."""
    wide = torch.float64 if home_of(tuned.device) == tuned.device else torch.float32
    found = norm_of(torch.sub(tuned.to(wide), base)) ** 2
    if math.isfinite(found):
        return found
    differs = base != tuned
    return norm_of(torch.sub(tuned[differs].to(wide), base[differs])) ** 2


def _subtract(tuned: Tensor, base: Tensor, out: Tensor) -> bool:
    """Write tuned - base of a block; whether it is finite, which it is only where both sides are."""
    precise = torch.promote_types(torch.promote_types(tuned.dtype, base.dtype), out.dtype)
    if out.dtype == precise:
        total = torch.sub(tuned.to(precise), base.to(precise), out=out).sum()
    else:
        total = out.copy_(tuned.to(precise) - base.to(precise)).sum(dtype=precise)
    return bool(total.isfinite()) or bool(out.isfinite().all())


def _within(at: slice, size: int) -> tuple[int, int]:
    """The part of a range that a side of so many rows has: where it begins, and its length."""
    begin = min(at.start, size)
    return begin, min(at.stop, size) - begin


def _difference(base: Tensor, tuned: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The delta of two parts, laid out as they are; None where it is not finite.

    Rows or columns that the base lacks count as zero there, those that the tuned side lacks as unchanged.
    """
    if tuned.stride(0) < tuned.stride(1):
        turned = _difference(base.mT, tuned.mT, dtype)
        return None if turned is None else turned.mT
    rows, cols = (min(base.shape[k], tuned.shape[k]) for k in (0, 1))
    found = torch.zeros([max(base.shape[k], tuned.shape[k]) for k in (0, 1)], dtype=dtype, device=tuned.device)
    if (rows, cols) != tuned.shape:
        found[: tuned.shape[0], : tuned.shape[1]] = tuned
    blocks = _blocks(found[:rows, :cols])
    finite = all([_subtract(tuned[b, :cols], base[b, :cols], found[b, :cols]) for b in blocks])
    return found if finite and ((rows, cols) == found.shape or bool(found.isfinite().all())) else None


def open_deltas(
    base: Any,
    tuned: Any,
    *,
    rows: str = "error",
    nonfinite: str = "error",
    prefix: str = "auto",
    model: SiteMap | None = None,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
) -> Deltas:
    """The differences of two checkpoints of one model, each as `open_checkpoint` takes it.

    `rows` says what becomes of added token rows, `error`, `truncate` or `pad`; `nonfinite="skip"` reads everything once
    and leaves out the sites with NaN or infinite entries, `"error"` raises when one is read; `model` is what is known
    of the sites beside their names and shapes. Raises FileError.
    """
    if nonfinite not in ("error", "skip"):
        raise FileError(f"nonfinite={nonfinite!r} is no choice", expected="error or skip")
    sides = open_checkpoint(base, base_revision), open_checkpoint(tuned, tuned_revision)
    sides = (sides[0], named_like(sides[1], sides[0], model, prefix))
    found = Deltas(*sides, match(*sides, rows=rows, prefix=prefix, model=model))
    return found if nonfinite == "error" else _finite(found)


def _finite(deltas: Deltas) -> Deltas:
    """Those of the deltas that are finite; the others are in the report."""
    bad = {pair.site.path: deltas.nonfinite(pair.site.path) for pair in deltas.match.pairs}
    skipped = {path: counts for path, counts in bad.items() if any(counts)}
    return Deltas(deltas.base, deltas.tuned, without(deltas.match, skipped)) if skipped else deltas


def without(found: Match, skipped: dict[str, tuple[int, int]]) -> Match:
    """A match without some of its sites, each with the number of bad entries in `refused` and in a note."""
    kept = tuple(pair for pair in found.pairs if pair.site.path not in skipped)
    reasons = {
        path: f"not finite: {base} entries of the base, {tuned} of the tuned side"
        for path, (base, tuned) in skipped.items()
    }
    sites = replace(found.sites, sites=tuple(pair.site for pair in kept))
    note = f"{len(skipped)} sites with NaN or infinite entries are left out: {', '.join(list(skipped)[:5])}"
    return replace(found, pairs=kept, sites=sites, refused={**found.refused, **reasons}, notes=(*found.notes, note))
