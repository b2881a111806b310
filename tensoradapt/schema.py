"""A plan's rows as they stand in a file, typed: what is not of its kind, unknown, or beyond all bounds is refused.

Invariant: a row that was read holds plain values of the stated kinds only. What they say together is not judged here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tensoradapt.diagram import INDICES
from tensoradapt.errors import FileError
from tensoradapt.spec import Scale

LONGEST = 4000  # characters of a name
_PLAIN = r"^[^\x00-\x1f\x7f-\x9f]*$"  # control characters steer a terminal

Size = Annotated[int, Field(ge=1, lt=2**62)]
Count = Annotated[int, Field(ge=0, lt=2**62)]
Total = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(max_length=LONGEST, pattern=_PLAIN)]
Word = Annotated[str, Field(max_length=LONGEST, pattern=r"^\w+$")]  # of a group
Text = Annotated[str, Field(pattern=r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$")]
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]
Shape = Annotated[list[Size], Field(min_length=2, max_length=4)]
Kind = Literal["linear", "embedding", "conv", "parameter"]
Label = Count | Name


class Row(BaseModel):
    """A mapping with the stated keys and no others, whose values are of their kinds without conversion."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class DiagramRow(Row):
    """The network of a group."""

    sizes: Annotated[dict[Name, Size], Field(max_length=INDICES)]
    nodes: Annotated[dict[Name, list[Name]], Field(min_length=1)]
    open: list[Name]
    folds: dict[Name, list[Name]]


class SiteRow(Row):
    """A site, and where it lies in its group; what older files lack has a default."""

    path: Name
    shape: Shape
    coordinates: dict[Literal["stack", "layer", "role", "expert", "task"], Label]
    layout: Literal["out in", "in out", "as stored", "either", "unsure"] = "out in"
    delivery: Literal["output", "weight"] = "output"
    index: Count | None = None
    rows: Pair | None = None
    owner: Name = ""
    aliases: list[Name] = []
    joined: list[Name] = []
    joined_kinds: list[Kind] = []
    everywhere: bool = False
    tensor: Name = ""
    kind: Kind = "linear"
    dims: Literal[0, 1, 2] = 0
    place: dict[Name, Count]
    slots: Annotated[list[Size], Field(min_length=2, max_length=2)]


class GroupRow(Row):
    """A group; `lowering` and the FLOP are for readers, as each version lowers in its own way."""

    name: Word
    rule: Count
    diagram: DiagramRow
    scale: Scale
    start: str | None = None
    rank: dict[Name, Size] | None = None
    num_trainable: Total | None = None
    lowering: list[str] = []
    flops_per_token: Total = 0
    dense_flops_per_token: Total = 0
    labels: dict[Name, list[Label]]
    laws: dict[Name, Name]
    store: dict[Name, Name]
    sites: Annotated[list[Any], Field(min_length=1)]  # each read by `site_row` in its turn


class PlanRow(Row):
    """A plan; its spec is read by the spec's own rules."""

    model: Text
    layouts: Literal["stated"] | None = None
    num_trainable: Total | None = None
    num_frozen: Total | None = None
    num_parameters: Total | None = None
    num_extra: Total | None = None
    num_total: Total | None = None
    num_model: Total = 0
    num_dense: Total | None = None
    num_bytes: Total | None = None
    num_sites: Total | None = None
    flops_per_token: Total = 0
    dense_flops_per_token: Total = 0
    notes: list[Text]
    spec: dict[str, Any]
    extras: dict[Name, list[Size]]
    groups: list[Any]  # each read by `group_row` in its turn


class BaseRow(BaseModel):
    """What a file says of the base model; what a newer version adds is kept."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    name: Text = ""
    revision: Text = ""
    shapes: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    hub: bool | None = None
    weights: dict[Name, dict[str, Annotated[str, Field(pattern="^[0-9a-f]{8}$")]]] | None = None  # by module and dtype


def plan_row(data: Mapping[str, Any]) -> PlanRow:
    """A plan's dictionary, typed. Raises FileError that names the first value of another kind than it has to be."""
    try:
        return PlanRow.model_validate(data)
    except ValidationError as error:
        raise _unlike("the plan", error) from None


def group_row(data: Any) -> GroupRow:
    """A group's dictionary, typed, but for its sites. Raises FileError."""
    try:
        return GroupRow.model_validate(data)
    except ValidationError as error:
        raise _unlike("a group", error) from None


def site_row(data: Any) -> SiteRow:
    """A site's dictionary, typed. Raises FileError."""
    try:
        return SiteRow.model_validate(data)
    except ValidationError as error:
        raise _unlike("a site", error) from None


def base_row(data: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of the base model, as it was given. Raises FileError where a value is of another kind."""
    try:
        return BaseRow.model_validate(data).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise _unlike("what the file says of its base", error) from None


def _unlike(what: str, error: ValidationError) -> FileError:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"])) or what
    return FileError(
        f"{where} is not what it has to be" if where == what else f"{where} in {what} is not what it has to be",
        got=repr(first["input"])[:80],
        expected=first["msg"],
        hint="save the adapter again; a newer version may write what this one does not know",
    )
