"""What is changed: an attached adapter in place, or a new one without a model; and whether it and its groups can be.

Invariant: what is no adapter, a merged one, one without numbers, and factors that are not a group's own to choose, are
refused before anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensoradapt.adapter import Adapter
from tensoradapt.change.error import relative_error
from tensoradapt.change.install import Turn, in_place, in_saved
from tensoradapt.change.result import Change
from tensoradapt.errors import AdapterError, SpecError, TensorAdaptError
from tensoradapt.gauge import Network
from tensoradapt.grouping import Group
from tensoradapt.io.saved import Savable, Saved, as_saved
from tensoradapt.sharded import check_whole

Source = Adapter | Savable | str | Path
ATTACHED = "the Adapter that ta.attach or ta.load returned"


def opened(source: Source, optimizer: Any) -> Adapter | Saved:
    """The adapter to be changed in place, or one without a model. Raises AdapterError on a merged one or a meta one."""
    if isinstance(source, Adapter):
        source.check_unmerged()
        check_whole(source._model[0], source.parameters(), source.name)
        with_numbers(source.as_saved())
        return source
    if optimizer is not None:
        raise AdapterError("an optimiser can follow an attached adapter only", hint="leave optimizer out")
    return with_numbers(as_saved(source))


def with_numbers(saved: Saved) -> Saved:
    """Itself. Raises AdapterError where a tensor is on the meta device."""
    empty = [key for key, tensor in saved.tensors.items() if tensor.is_meta]
    if empty:
        raise AdapterError(
            "the adapter is on the meta device: its factors have no values to compute with",
            got=empty[0],
            hint="attach it to, or load it onto, a model whose weights are there",
        )
    return saved


def attached(source: Any, what: str, expected: str = ATTACHED) -> Adapter:
    """The adapter itself. Raises AdapterError, `what` being wrong, on all else: files, adapters without a model too."""
    if not isinstance(source, Adapter):
        raise AdapterError(
            what,
            got=type(source).__name__,
            expected=expected,
            hint="ta.load(path_or_saved, model) attaches one that has no model",
        )
    return source


def several(given: Iterable[Any], what: str, hint: str) -> Iterator[Any]:
    """The members of a list or another iterable. Raises AdapterError on one thing in the place of several."""
    try:
        if not isinstance(given, Mapping | str):
            return iter(given)
    except TypeError:
        pass
    raise AdapterError(f"{what} come as a list, or as another iterable", got=type(given).__name__, hint=hint)


def held_by(target: Adapter | Saved) -> list[tuple[Group, Network]]:
    """Every group with its network."""
    return [(group, network_of(target, group)) for group in target.plan.groups]


def network_of(target: Adapter | Saved, group: Group) -> Network:
    """The diagram of a group and its factors, detached."""
    return Network(group.diagram, {node: tensor.detach() for node, tensor in target.factors(group.name).items()})


def put(target: Adapter | Saved, turns: Sequence[Turn], optimizer: Any) -> Adapter | Saved:
    """Change the adapter in place and return it, or return the new one."""
    if isinstance(target, Adapter):
        in_place(target, turns, optimizer)
        return target
    return in_saved(target, turns)


def changed(target: Adapter | Saved, turns: Sequence[Turn], optimizer: Any) -> Change:
    """Put networks in their places, and say what that changed."""
    before = {turn.group.name: turn.group.rank for turn in turns}
    after = {turn.group.name: {bond: turn.after.diagram.sizes[bond] for bond in turn.group.rank} for turn in turns}
    error = relative_error(turns)
    return Change(put(target, turns, optimizer), error, before, after)


def require_free(group: Group, what: str) -> None:
    """Raise SpecError where a group's factors are not its own to choose: frozen nodes, differences, banks of slices.

    `what` begins the message: what cannot be done to the group.
    """
    if group.rule.frozen:
        raise SpecError(
            f"{what} group {group.name!r}: its nodes {', '.join(group.rule.frozen)} are frozen, and must stay as drawn",
            hint="merge the adapter, or leave it as it is",
        )
    if group.rule.start == "difference":
        raise SpecError(
            f"{what} group {group.name!r}: its delta is a difference from a frozen copy of the factors, which has to "
            "have their shapes and gauge",
            hint="wider ranks are possible; for smaller ones convert the adapter to a format with start: zero",
        )
    require_own(group, what)


def require_own(group: Group, what: str) -> None:
    """Raise SpecError where other groups use slices of the same factors."""
    if group.rule.shapes == "slices":
        raise SpecError(
            f"{what} group {group.name!r}: its factors are slices of a bank that other groups use too",
            hint="use shapes: separate",
        )


@contextmanager
def named(group: Group) -> Iterator[None]:
    """Errors about a network say which group's it is, once."""
    try:
        yield
    except TensorAdaptError as error:
        said = f"group {group.name!r}"
        raise type(error)(str(error) if said in str(error) else f"{said}: {error}") from None
