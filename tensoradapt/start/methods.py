"""`initialize`: the first factors of an attached adapter by a method's name.

Invariant: where a method's factors are no zero delta their frozen copy is subtracted (a difference), so the output at
step 0 is the base's and a saved adapter applies to the base as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from tensoradapt.adapter import Adapter
from tensoradapt.change.targets import attached
from tensoradapt.errors import AdapterError, SpecError
from tensoradapt.init import require_seed
from tensoradapt.layouts import turns
from tensoradapt.start.activations import Activations
from tensoradapt.start.data import corda, corda_minor, eva, from_delta, lora_ga, lora_one
from tensoradapt.start.gradients import Gradients
from tensoradapt.start.install import Begun, Factors, install
from tensoradapt.start.targets import Job
from tensoradapt.start.weights import minor, olora, orthogonal, principal


@dataclass(frozen=True)
class Method:
    """A row of the table: the factors of one group, the data it needs, the start it makes, its own parameters."""

    make: Callable[..., Factors]
    needs: str = ""
    start: str = "difference"
    options: tuple[str, ...] = ()


METHODS: Mapping[str, Method] = {
    "pissa": Method(principal),
    "minor": Method(minor),
    "olora": Method(olora),
    "orthogonal": Method(orthogonal, start="nonzero"),
    "lora_ga": Method(lora_ga, "gradients", options=("gamma",)),
    "lora_one": Method(lora_one, "gradients", options=("gamma",)),
    "eva": Method(eva, "activations", "zero"),
    "corda": Method(corda, "activations", options=("damping",)),
    "corda_minor": Method(corda_minor, "activations", options=("damping",)),
    "delta": Method(from_delta, "deltas", "nonzero"),
}
COLLECT = {
    "gradients": "ta.gradients(model, adapter, batches)",
    "activations": "ta.activations(model, adapter, batches)",
    "deltas": "{path: delta}, or (base, tuned)",
}
KINDS: Mapping[str, tuple[type, ...]] = {
    "gradients": (Mapping,),
    "activations": (Activations,),
    "deltas": (Mapping, tuple),
}


@torch.no_grad()
def initialize(
    adapter: Adapter,
    method: str,
    *,
    gradients: Gradients | Mapping[str, Tensor] | None = None,
    activations: Activations | None = None,
    deltas: Mapping[str, Tensor] | tuple[Any, Any] | None = None,
    seed: int = 0,
    **options: float,
) -> Adapter:
    """Give an attached adapter other first factors, before it is trained; returns the adapter.

    From the weights: `pissa` (scale N_s ~ W_s), `minor` (their trailing directions), `olora` (QR). From a seed:
    `orthogonal`. From `gradients`: `lora_ga` (option `gamma`, 16), `lora_one` (`gamma`, 64). From `activations`: `eva`,
    `corda` and `corda_minor` (`damping`, 0.01). From `deltas`: `delta`, the networks closest to given changes of the
    weights, which the model's output then has from step 0 on. All others leave the output as it is: what does not start
    from a zero delta becomes a difference from a frozen copy, and the base is never written. Groups share what their
    format shares; frozen nodes stay. Raises SpecError, RankError, AdapterError, SiteError, FileError; the adapter is
    as it was then.
    """
    attached(adapter, "initialize needs an attached adapter")
    row = _checked(method, {"gradients": gradients, "activations": activations, "deltas": deltas}, options)
    require_seed(seed)
    _check_adapter(adapter)
    data = {"gradients": gradients, "activations": activations, "deltas": deltas}.get(row.needs)
    given = (data,) if row.needs else ()
    factors: dict[str, Factors] = {}
    zero: dict[str, str] = {}
    for group in adapter.plan.groups:
        made = row.make(Job(adapter, group, seed), *given, **options)
        factors[group.name] = made
        if row.start == "zero":
            zero[group.name] = next(node for node, tensor in made.items() if not bool(tensor.any()))
    install(adapter, Begun(factors, row.start, zero))
    return adapter


def _checked(method: str, data: Mapping[str, Any], options: Mapping[str, Any]) -> Method:
    """The method's row. Raises SpecError where it does not exist, or is given other data or options than it takes."""
    if type(method) is not str or method not in METHODS:
        raise SpecError(f"there is no initialisation {method!r}", expected=", ".join(METHODS))
    row = METHODS[method]
    if row.needs and data[row.needs] is None:
        raise SpecError(f"{method} starts from {row.needs}", hint=f"pass {row.needs}={COLLECT[row.needs]}")
    other = [name for name, value in data.items() if value is not None and name != row.needs]
    other += [name for name in options if name not in row.options]
    if other:
        takes = ", ".join((*((row.needs,) if row.needs else ()), *row.options, "seed"))
        raise SpecError(f"{other[0]!r} has no effect on {method}", expected=takes)
    if row.needs and not isinstance(data[row.needs], KINDS[row.needs]):
        raise SpecError(
            f"these are no {row.needs}",
            got=type(data[row.needs]).__name__,
            hint=f"pass {row.needs}={COLLECT[row.needs]}",
        )
    bad = [name for name, value in options.items() if not _positive(value)]
    if bad:
        raise SpecError(f"{bad[0]} is a positive number", got=repr(options[bad[0]]))
    return row


def _positive(value: Any) -> bool:
    return isinstance(value, SupportsFloat) and 0 < float(value) < float("inf")


def _check_adapter(adapter: Adapter) -> None:
    adapter.check_unmerged()
    if any(p.is_meta for p in adapter.parameters()):
        raise AdapterError(f"adapter {adapter.name!r} is on the meta device", hint="load the weights first")
    for group in adapter.plan.groups:
        if any(group.store[node] != f"{group.name}.{node}" for node in group.trainable):
            raise SpecError(
                f"group {group.name!r} trains factors that groups of other shapes share", hint="use shapes: separate"
            )
        if not group.scale:
            raise SpecError(f"the scale of group {group.name!r} is zero: no factors give a delta")
        turned = [p.site.path for p in group.placements if turns(p.site, adapter._lines[p.site.path][1])]
        if turned:
            raise AdapterError(
                f"the factors of {turned[0]} lie as its weight is stored, (in, out): no start is made for them",
                hint="attach the spec anew, or extract the adapter with what tells the layout: a module or model=",
            )
