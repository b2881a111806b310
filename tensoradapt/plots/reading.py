"""Reports as they lie on disk: read, and checked before anything is drawn from them.

Invariant: what `check_report` lets through has every key that is drawn, of the type that docs/report-schema.md gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tensoradapt.errors import FileError, TensorAdaptError
from tensoradapt.paths import expand

FORMAT, VERSION = "tensoradapt.report", 1
MAX_BYTES = 2_000_000_000
Coordinate = int | str


class Part(BaseModel):
    """A part of a report. Keys beyond these are let through: a later writer may say more."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class Match(Part):
    """How the two sides were matched by name."""

    matched: int
    only_base: list[str]
    only_tuned: list[str]
    reshaped: list[Any]
    refused: dict[str, str]
    notes: list[str]


class Noise(Part):
    """The rounding noise of one delta."""

    sigma: float | None
    edge: float | None
    scaled: bool


class Site(Part):
    """One weight's delta."""

    shape: list[int]
    coordinates: dict[str, Coordinate]
    group: str | None
    dtypes: list[str]
    norm: float
    relative_change: float | None
    spectral_norm: float | None
    singular_values: list[float]
    complete: bool
    residual: float | None
    method: str
    stable_rank: float | None
    effective_rank: float | None
    participation_ratio: float | None
    noise: Noise
    ranks: dict[str, int | None]


class Similarity(Part):
    """How alike the sites' leading subspaces are."""

    rank: int
    labels: list[str]
    matrix: list[list[float | None]]


class SharedEnergy(Part):
    """The energy held by one subspace for all sites, and by one for each."""

    rank: list[int] = []
    shared: list[float | None] = []
    private: list[float | None] = []


class Group(Part):
    """Sites that share one tensor."""

    axes: list[str]
    sizes: dict[str, int]
    labels: dict[str, list[Coordinate]]
    sites: list[str]
    norm: float
    captured: float | None
    mode_spectra: dict[str, list[float]]
    noise_edges: dict[str, float | None]
    tt_spectra: dict[str, list[float]]
    multilinear_rank: dict[str, dict[str, int | None]]
    similarity: dict[str, Similarity]
    shared_energy: SharedEnergy | None = None


class WorstSite(Part):
    """The site that a candidate serves worst."""

    path: str
    relative_error: float | None


class Candidate(Part):
    """One format at one size."""

    label: str
    preset: str
    rank: Any
    num_parameters: int
    share: float | None = None
    relative_error: float | None
    worst_site: WorstSite | None
    by_group: dict[str, int]
    front: bool


class Choice(Part):
    """The candidate that the analysis chose, by which rule, and why."""

    label: str
    reason: str
    reference: str = ""
    rule: str = ""
    warning: str = ""
    holds: bool = True


class AtError(Part):
    """What the formats cost at one error."""

    relative_error: float
    rows: list[dict[str, Any]]
    label: str = ""
    unreached: list[str] = []


class AtBudget(Part):
    """How well the formats do within one number of parameters."""

    max_parameters: int
    rows: list[dict[str, Any]]
    unreached: list[str] = []


class Comparisons(Part):
    """Formats beside each other."""

    at_error: list[AtError] = []
    at_budget: list[AtBudget] = []


class Tally(Part):
    """The tensors of one kind."""

    tensors: int
    differing: int
    weights: int
    share: float | None


class Account(Part):
    """What became of the tensors that both sides hold."""

    tensors: int
    differing: int
    norm: float
    kinds: dict[str, Tally]


class Ranks(Part):
    """The ranks of some weights by one rule."""

    median: int | None
    lowest: int | None
    highest: int | None
    computed: int | None


class Needed(Part):
    """The smallest adapter within an error."""

    relative_error: float
    label: str
    preset: str
    rank: int | None
    num_parameters: int
    share: float
    reached: float | None
    at_least: bool


class Answer(Part):
    """What rank the change has."""

    weights: int
    layers: bool
    dense: int
    ranks: dict[str, Ranks]
    noise_share: float | None
    needed: list[Needed]


class Report(Part):
    """The whole of a report."""

    format: Literal["tensoradapt.report"]
    version: Literal[1]
    kind: Literal["checkpoints", "adapters"]
    base: str | None
    tuned: str | None
    settings: dict[str, Any]
    match: Match
    sites: dict[str, Site]
    groups: dict[str, Group]
    candidates: list[Candidate]
    choice: Choice | None
    comparisons: Comparisons
    change: Account | None = None
    answer: Answer | None = None


def read_report(path: str | Path) -> dict[str, Any]:
    """A report's JSON, checked. Raises FileError where it is missing, damaged, or no report of this version."""
    path = expand(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FileError(f"{path} is too large for a report", expected=f"at most {MAX_BYTES:,} bytes")
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        hint = "give the report.json that analyze wrote"
        raise FileError(f"there is no report at {path}", got=error.strerror, hint=hint) from error
    except FileError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path} is damaged or no JSON", got=str(error), hint="write it again: tensoradapt analyze BASE TUNED"
        ) from error
    check_report(data)
    return data


@contextmanager
def consistent() -> Iterator[None]:
    """Raise FileError where values of a report contradict each other: what they run into is the error's cause."""
    try:
        yield
    except TensorAdaptError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise FileError("values of the report contradict each other", got=said) from error


def check_report(data: Any) -> None:
    """Raise FileError, naming the key, on what is no report of this version or lacks what a report has."""
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise FileError(
            "this is no report", expected=f'a JSON object with "format": "{FORMAT}"', hint="give a report.json"
        )
    if data.get("version") != VERSION:
        raise FileError(
            "the report is of another version",
            got=f"version {data.get('version')!r}",
            expected=f"version {VERSION}",
            hint="update tensoradapt, or analyse again",
        )
    try:
        Report.model_validate(data)
    except ValidationError as error:
        raise _complaint(error) from None
    _check_references(data)


def _complaint(error: ValidationError) -> FileError:
    """Pydantic's first complaint, with the key written as one would in Python."""
    first = error.errors(include_url=False)[0]
    key = _written(first["loc"])
    if first["type"] == "missing":
        return FileError(f"the report has no key {key}", hint="analyse again: docs/report-schema.md lists the keys")
    return FileError(
        f"the report's key {key} is wrong",
        got=f"{first['input']!r:.80} ({type(first['input']).__name__})",
        expected=first["msg"].removeprefix("Input should be "),
    )


def _check_references(data: Mapping[str, Any]) -> None:
    """Names that point elsewhere in the report point to something; a matrix is as large as its labels are many."""
    for name, group in data["groups"].items():
        for path in group["sites"]:
            if path not in data["sites"]:
                raise FileError(f"the report's key {_written(('groups', name, 'sites'))} is wrong", got=path)
        for side, found in group["similarity"].items():
            many = len(found["labels"])
            if [len(row) for row in found["matrix"]] != [many] * many:
                key = _written(("groups", name, "similarity", side, "matrix"))
                raise FileError(f"the report's key {key} is wrong", expected=f"{many} rows of {many} numbers")
        energy = group.get("shared_energy") or {}
        many = len(energy.get("rank", ()))
        if wrong := [key for key in ("shared", "private") if len(energy.get(key, ())) != many]:
            key = _written(("groups", name, "shared_energy", wrong[0]))
            raise FileError(f"the report's key {key} is wrong", expected=f"{many} numbers, one for each rank")
    chosen = data["choice"]
    if chosen is not None and chosen["label"] not in [candidate["label"] for candidate in data["candidates"]]:
        raise FileError("the report's key choice.label is wrong", got=chosen["label"], expected="a candidate's label")


def _written(keys: Sequence[int | str]) -> str:
    """`sites['layer.0.q'].ranks`: the way to a value."""
    text = ""
    for key in keys:
        text += f".{key}" if str(key).isidentifier() else f"[{key!r}]"
    return text.removeprefix(".")
