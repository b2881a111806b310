"""Where the weights of an adapter's sites lie among the tensors of a checkpoint: by the names that these may have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from tensoradapt.io.checkpoint import Checkpoint
from tensoradapt.io.names import shift
from tensoradapt.sites import Site


def names_of(site: Site) -> tuple[str, ...]:
    """What a checkpoint may call the tensor of a site, likeliest first."""
    return (site.tensor, f"{site.owner}.weight", site.owner, *(f"{alias}.weight" for alias in site.aliases))


def reader(sites: Sequence[Site], source: Checkpoint) -> Callable[[Site], Tensor | None]:
    """A function from a site to its tensor in a checkpoint, or to the one expert of it; None where there is none."""
    find = finder([site.tensor for site in sites], source.entries)
    named = lambda site: find(*names_of(site))  # noqa: E731
    return lambda site: None if (name := named(site)) is None else source.read(name, site.index)


def finder(names: Sequence[str], entries: Mapping[str, object]) -> Callable[..., str | None]:
    """A function from such names to the first of them that the entries have, with the prefix of one side or without."""
    by = shift(names, entries.keys())
    return lambda *wanted: next((n for name in wanted for n in (by(name), name) if n in entries), None)
