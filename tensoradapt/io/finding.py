"""Where the weights of an adapter's sites lie among the tensors of a checkpoint: by the names that these may have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tensoradapt.io.names import shift
from tensoradapt.sites import Site


def names_of(site: Site) -> tuple[str, ...]:
    """What a checkpoint may call the tensor of a site, likeliest first."""
    return (site.tensor, f"{site.owner}.weight", site.owner, *(f"{alias}.weight" for alias in site.aliases))


def finder(names: Sequence[str], entries: Mapping[str, object]) -> Callable[..., str | None]:
    """A function from such names to the first of them that the entries have, with the prefix of one side or without."""
    by = shift(names, entries.keys())
    return lambda *wanted: next((n for name in wanted for n in (by(name), name) if n in entries), None)
