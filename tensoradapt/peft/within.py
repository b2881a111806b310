"""Names as the model has them that PEFT would adapt, where the adapter was attached to something around it.

Invariant: every name loses the same prefix, or gets it, or none does.
"""

from __future__ import annotations

from torch import nn

from tensoradapt.errors import AdapterError
from tensoradapt.io.names import shift, sole
from tensoradapt.io.renamed import plainly, renamed, where_known
from tensoradapt.io.saved import Saved
from tensoradapt.scan import Model, scan


def seen_from_within(saved: Saved, model: Model | None) -> tuple[Saved, Model | None]:
    """An adapter and the model whose names PEFT will look for: a SentenceTransformer loads adapters into its inner one.

    Where a part of the adapter's own model is given, or a model around it, the names are that model's.
    Raises AdapterError where sites lie outside it.
    """
    saved = plainly(saved)
    if model is None:
        return saved, None
    inner = getattr(model, "transformers_model", None)
    if isinstance(model, nn.Module) and isinstance(inner, nn.Module):
        prefix = next((f"{path}." for path, module in model.named_modules() if module is inner and path), "")
        return _without(saved, prefix), inner
    owners = {placement.site.owner for _, placement in saved.sites.values()}
    known = scan(model)
    live = {site.owner for site in known.sites}
    by = sole(owners, live) or shift(owners, live)
    if by.strip:
        return _without(saved, by.prefix), model
    return renamed(saved, by, where_known(by, known.parameters)), model


def _without(saved: Saved, prefix: str) -> Saved:
    """The adapter with a prefix taken off every site and every parameter that was trained whole."""
    plan = saved.plan
    names = [*(placement.site.owner for _, placement in saved.sites.values()), *plan.extras]
    outside = [name for name in names if not name.startswith(prefix)]
    if outside:
        raise AdapterError(
            f"{outside[0]} lies outside the model that PEFT adapts, {prefix.rstrip('.')}",
            got=f"{len(outside)} of {len(names)} weights outside it",
            hint="leave it out of the adapter, or merge and save the whole model",
        )
    names_within = lambda name: name.removeprefix(prefix)  # noqa: E731
    return renamed(saved, names_within, names_within)
