"""What a stored tensor is: the weight that a model's config or module has for it, or the tensor as it is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from tensoradapt.io.checkpoint import Checkpoint, Entry
from tensoradapt.io.names import Shift, shift
from tensoradapt.layouts import AS_STORED, IN_OUT
from tensoradapt.sites import Site, SiteMap

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Stored:
    """The tensors of one checkpoint as sites; what is `known` of its model tells their layouts."""

    source: Checkpoint
    known: SiteMap

    def site(self, entry: Entry, saved: Site) -> Site | None:
        """The weight that a saved site is of, whole, with the shape that is stored; None where it cannot be that."""
        part = _part(entry.shape, saved)
        if part is None:
            return None
        here = self._sites.get((self._name(entry.name), saved.index))
        if here is None or len(part) != 2:
            return Site(saved.path, part, layout=AS_STORED, tensor=entry.name, owner=saved.owner)
        return replace(here, shape=part[::-1] if here.layout == IN_OUT else part)

    def _name(self, name: str) -> str:
        return (self._by(name) or name).removesuffix(".weight")

    @cached_property
    def _by(self) -> Shift:
        return shift(self.source.entries, self.known.parameters)

    @cached_property
    def _sites(self) -> dict[tuple[str, int | None], Site]:
        return {(site.owner, site.index): site for site in self.known.sites}


def _part(shape: Shape, saved: Site) -> Shape | None:
    """The shape of one expert of a tensor, or of the tensor, with as many sides as the site has."""
    if saved.index is not None and (len(shape) != 3 or saved.index >= shape[0]):
        return None
    part = shape if saved.index is None else shape[1:]
    if len(part) == 3:  # a 1-D convolution, whose kernel has one row
        part = (*part[:2], 1, part[2])
    if part[:2] == saved.shape[:2] and part[2:].count(1) == len(part) - 2 and len(saved.shape) == 2:
        return part[:2]
    return part if len(part) == len(saved.shape) else None
