"""Specs: what the user writes. A rule says which sites, how they are grouped, and which network holds their deltas.

Invariant: a spec is a value. It round-trips through Python, JSON and YAML, and whatever it does not understand is an
error that names the key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten, wrap
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, field_validator, model_validator

from tensoradapt.axes import SIDES, TAKEN, check_axes, parse
from tensoradapt.errors import FileError, RankError, SpecError
from tensoradapt.expressions import cost
from tensoradapt.foreign import PEFT_WORDS, peft_word
from tensoradapt.textfiles import read_plain, write_plain

WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")  # ends of names that no spec takes
MAX_RULES, MAX_PARTS = 1000, 64  # of a spec; of an axis that is cut
MAX_STEPS, MAX_LETTERS = 200_000, 400_000  # of a spec's expressions: steps on one path, a few ms, and characters
GLOB, LONG = 100, 100  # the steps of a glob, and the characters of a long path
Rank = Annotated[StrictInt, Field(gt=0, le=1 << 48)]
Ranks = Rank | Annotated[list[Rank], Field(min_length=1)] | dict[str, Rank | str]
Positive = Annotated[StrictInt, Field(gt=0)]
Fold = str | Annotated[list[Positive | str], Field(min_length=1, max_length=MAX_PARTS)]
LARGEST_SCALE = 1e12  # what a delta is multiplied by: a weight's largest number in float32 is 3e38
Scale = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-LARGEST_SCALE, le=LARGEST_SCALE)]
Law = Annotated[str, Field(max_length=200)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Set = Literal["query-value", "attention", "qkv", "feed-forward", "block", "convolutions", "all-linear"]
SETS: tuple[str, ...] = get_args(Set)  # words that stand for the weights of a model that have a part in common


class _Value(BaseModel):
    """A frozen model whose validation errors are `SpecError`s in the user's words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """What is no default: a rule has thirty fields."""
        fields = type(self).model_fields
        return ((name, getattr(self, name)) for name in fields if getattr(self, name) != fields[name].get_default())

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _explain(error, type(self), data) from None


def _explain(error: ValidationError, model: type[BaseModel], data: Mapping[str, Any]) -> SpecError:
    """Turn pydantic's first complaint into one of ours: the field, what was got, what it takes."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SpecError):
        return cause
    key = str(first["loc"][0]) if first["loc"] else model.__name__
    if first["type"] == "extra_forbidden" and key in PEFT_WORDS:
        return peft_word(key, first["input"])
    if first["type"] == "extra_forbidden":
        close = get_close_matches(key, model.model_fields, n=3)
        hint = (
            f"did you mean {' or '.join(map(repr, close))}?"
            if close
            else f"the fields are {', '.join(model.model_fields)}"
        )
        return SpecError(
            f"unknown key {key!r} in a {model.__name__.lower()}", got=f"{key}: {first['input']!r}", hint=hint
        )
    if key in ("rank", "ranks"):
        given = data.get(key)
        bad = given[first["loc"][1]] if key == "ranks" and len(first["loc"]) > 1 else given  # type: ignore[index]
        shown = repr(bad)[:80]
        return RankError(
            f"rank {shown} is not a rank",
            got=f"{shown} ({type(bad).__name__})",
            expected="a positive integer, a list of them (one per bond), or a mapping from axis to rank",
            hint="write for example rank=8",
        )
    field = model.model_fields.get(key)
    return SpecError(
        f"{key!r}: {first['msg']}", got=repr(first["input"]), expected=field.description if field else None
    )


class Rule(_Value):
    """Which sites, how they are grouped, and the network of their deltas: format, folds, ranks, scale, start, laws."""

    name: str = Field("", description="label of the rule's groups in tables and files; made from the sites where empty")
    targets: tuple[str, ...] = Field(
        (), description="paths, path suffixes, globs (`*.q_proj`), `re:` expressions, or sets of weights (`all-linear`)"
    )
    default: Set | Literal[""] = Field(
        "", description=f"the set of weights adapted where no targets are given: {', '.join(SETS)}"
    )
    exclude: tuple[str, ...] = Field((), description="like targets: what these match is left out")
    pattern: str = Field("", description="coordinates by named fields: `encoder.layer.{layer}.attention.self.{role}`")
    parts: dict[str, list[str] | dict[str, int]] = Field(
        {}, description="row ranges of fused weights: `{c_attn: [q, k, v]}` in equal parts, or `{qkv: {q: 64}}`"
    )
    layout: dict[str, Literal["out in", "in out"]] = Field(
        {}, description="layout of parameters that no module class tells: `{experts.down_proj: in out}`"
    )
    delivery: Literal["", "weight"] | dict[str, Literal["weight"]] = Field(
        "",
        description="`weight` (W + delta is formed at use) for all sites, `{conv1d: weight}` for some",
    )
    preset: str = Field("", description="a preset's name; the other fields given here override its own")
    options: dict[str, Any] = Field({}, description="the preset's own parameters, such as `factor` of `lokr`")
    family: str = Field("", description="the preset that the rule came from: a label, with no effect")
    format: Literal["tt", "tucker", "cp", "ttm", "network"] = Field("tt", description="tt, tucker, cp, ttm or network")
    network: str = Field("", description="nodes and axes, as in `out a, layer a b, b in -> layer out in`")
    axes: tuple[str, ...] = Field(
        (), description="the tensor's axes in order; coordinates left out keep their own tensor"
    )
    folds: dict[str, Fold] = Field(
        {}, description="cuts of an axis: `{out: [head, head_dim], in: [12, 8, 8]}` or `auto:3`"
    )
    compress: tuple[str, ...] = Field((), description="tucker: the axes that get a factor; all where empty")
    rank: Ranks = Field(8, description="one number for all bonds, or one per bond; an axis's name stands for its size")
    ranks: dict[str, Ranks] = Field({}, description="rank by group name, as `solve_rank` gives")
    excess: Literal["cap", "keep", "error"] | None = Field(
        None, description="a rank above its bond's limit: cap, keep or error"
    )
    shapes: Literal["separate", "slots", "slices"] = Field(
        "separate", description="sites of unequal shape: separate, slots or slices"
    )
    slot: tuple[Positive, Positive] | None = Field(
        None, description="(out, in) of a slot; the greatest common one where not given"
    )
    scale: Scale | Literal["alpha/rank", "alpha/sqrt(rank)", "alpha", "one"] = Field(
        "one", description="a number, or alpha/rank, alpha/sqrt(rank), alpha, one"
    )
    alpha: Scale = Field(1.0, description="alpha of the scale rule")
    dropout: Number = Field(0.0, ge=0, lt=1, description="probability in [0, 1)")
    dropout_at: Literal["in", "code"] = Field("in", description="on the input, or on the code before `out`")
    start: Literal["zero", "nonzero", "difference"] = Field("zero", description="zero, nonzero or difference")
    zero: str = Field(
        "", description="the node that is zero at a `zero` start; the one whose law is `zero` where empty"
    )
    init: dict[str, Law] = Field(
        {}, description="initial law per node: `uniform(1/sqrt(in))`, `normal(0.02)`, `orthogonal`"
    )
    frozen: tuple[str, ...] = Field((), description="nodes that are not trained")
    train: tuple[str, ...] = Field(
        (), description="modules trained beside the adapter and saved with it: `[classifier]`"
    )
    heads: Positive | None = Field(None, description="number of attention heads, for the axis `head`")
    kv_heads: Positive | None = Field(None, description="number of key and value heads; heads where not given")
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = Field("float32", description="dtype of the factors")

    @field_validator("targets", "exclude", "axes", "compress", "frozen", "train", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _folded(self) -> Rule:
        """Refuse folds of what cannot be cut, and parts whose names are not their own."""
        for axis in self.folds:
            if axis not in SIDES:
                raise SpecError(f"folds names the axis {axis!r}, which is not cut", expected=", ".join(SIDES))
        names = [str(part).partition("=")[0] for how in self.folds.values() if not isinstance(how, str) for part in how]
        times = Counter(name for name in names if not name.isdigit())
        for name in times:
            if name in TAKEN or times[name] > 1 or not name.isidentifier():
                raise SpecError(
                    f"the fold {name!r} has no name of its own",
                    got=dict(self.folds),
                    hint="give every fold a size, or a name that nothing else has: ['head', 'head_dim=64']",
                )
        return self

    @model_validator(mode="after")
    def _used(self) -> Rule:
        """Refuse fields that would have no effect."""
        heads = "head" in str(self.folds) or bool(self.preset)
        uses = (
            ("network", bool(self.network), self.format == "network" or bool(self.preset), "format: network"),
            ("options", bool(self.options), bool(self.preset), "a preset"),
            ("slot", self.slot is not None, self.shapes == "slots" or bool(self.preset), "shapes: slots"),
            ("compress", bool(self.compress), self.format == "tucker" or bool(self.preset), "format: tucker"),
            ("zero", bool(self.zero), self.start == "zero", "start: zero"),
            ("axes", bool(self.axes), self.format != "network", "the axes behind '->' of the network"),
            ("heads", self.heads is not None, heads, "folds: {out: [head, head_dim]}"),
            ("kv_heads", self.kv_heads is not None, heads, "folds: {out: [head, head_dim]}"),
            ("alpha", self.alpha != 1.0, str(self.scale)[:5] == "alpha" or bool(self.preset), "scale: alpha/rank"),
        )
        for field, given, used, owner in uses:
            if given and not used:
                raise SpecError(
                    f"{field!r} has no effect here", expected=owner, hint=f"remove {field!r} or use {owner}"
                )
        doubled = sorted(set(self.options) & self.model_fields_set)
        if doubled:
            raise SpecError(f"{doubled[0]!r} is given twice: as a field and among the options", hint="keep one of them")
        if self.dropout and self.dropout_at == "code" and self.start == "difference":
            raise SpecError("dropout at the code and a difference start do not go together", hint="use dropout_at: in")
        if self.format == "network" and not self.network and not self.preset:
            raise SpecError("format 'network' needs a network", hint="write network: 'out a, a in -> out in'")
        if not self.preset:  # a preset's own fields may go with what is given here
            check_axes(self.tensor_axes, self.folds, self.shapes)
        return self

    def __str__(self) -> str:
        where = ", ".join(self.targets or ((self.default,) if self.default else ())) or "no targets"
        said = [f"{self.family or self.preset or self.name or self.format} on {where}"]
        said += [f"without {', '.join(self.exclude)}"] if self.exclude else []
        ranks = self.rank.items() if isinstance(self.rank, dict) else ()
        said += [f"rank {' '.join(f'{bond}={size}' for bond, size in ranks) or self.rank}"]
        said += [f"{len(self.ranks)} groups with ranks of their own"] if self.ranks else []
        said += [f"scale {self.scale}" + (f" with alpha {self.alpha:g}" if "alpha" in str(self.scale) else "")]
        said += [f"dropout {self.dropout:g}"] if self.dropout else []
        said += (
            ["delivered by weight" + f": {', '.join(self.delivery)}" * (self.delivery != "weight")]
            if self.delivery
            else []
        )
        said += [f"start {self.start}"] if self.start != "zero" else []
        said += [f"{', '.join(self.train)} trained beside it"] if self.train else []
        return shorten("; ".join(said), 160)

    @property
    def tensor_axes(self) -> tuple[str, ...]:
        """The axes of a group's tensor, before their folds."""
        return parse(self.network)[1] if self.format == "network" else self.axes or ("out", "in")


class Spec(_Value):
    """An ordered list of rules; the first rule that matches a site takes it."""

    rules: tuple[Rule, ...] = Field((), max_length=MAX_RULES, description=f"the rules, in order; at most {MAX_RULES}")

    @model_validator(mode="after")
    def _soon(self) -> Spec:
        """Refuse expressions that together would take long on every weight of a model, and those that are none."""
        fields = [f for r in self.rules for f in (r.targets, r.exclude, r.layout, r.parts, r.delivery)]
        patterns = {name for field in fields for name in field if name.startswith("re:") or set(name) & set("*?")}
        expressions = {name[3:] for name in patterns if name.startswith("re:")}
        letters = sum(map(len, expressions))
        steps = GLOB * len(patterns) + sum(cost(text, LONG) for text in expressions if letters <= MAX_LETTERS)
        if letters > MAX_LETTERS or steps > MAX_STEPS:
            raise SpecError(
                "the expressions and globs of a spec would take long on every weight",
                got=f"{len(patterns):,} of {letters:,} characters",
                hint="write fewer of them: one with (a|b) in it for several, or paths",
            )
        return self

    def __str__(self) -> str:
        rules = [line for rule in self.rules[:6] for line in wrap(str(rule), 80, subsequent_indent="  ")]
        return "\n".join([*rules, *([f"and {len(self.rules) - 6} more rules"] if len(self.rules) > 6 else [])])

    def __add__(self, other: Spec | Rule) -> Spec:
        if not isinstance(other, Spec | Rule):
            raise SpecError("this is no spec", got=type(other).__name__, expected="a Spec or a Rule to add")
        if isinstance(other, Rule):
            return Spec(rules=(*self.rules, other))
        return Spec(rules=(*self.rules, *other.rules))

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON values: what was given to a preset, and what is not a default elsewhere."""
        rows = [(rule, bool(rule.preset)) for rule in self.rules]
        return {"rules": [r.model_dump(mode="json", exclude_unset=p, exclude_defaults=not p) for r, p in rows]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spec:
        """Read `{'defaults': {...}, 'rules': [{...}, ...]}`; a rule's own fields win over the defaults."""
        if not isinstance(data, Mapping) or not isinstance(data.get("rules"), list):
            raise SpecError(
                "a spec is a mapping with a list of rules",
                got=type(data).__name__,
                hint="write 'rules:' and under it '- preset: lotr_by_role'",
            )
        unknown = sorted(set(data) - {"rules", "defaults"}, key=str)
        if unknown:
            raise SpecError(
                f"unknown key {unknown[0]!r} in a spec",
                expected="rules, defaults",
                hint="fields of a rule go under 'rules' or 'defaults'",
            )
        defaults = _mapping(data.get("defaults") or {}, "defaults are")
        rows = [{**defaults, **_mapping(row, "a rule is")} for row in data["rules"][: MAX_RULES + 1]]
        return cls(rules=tuple(Rule(**row) for row in rows))

    @classmethod
    def load(cls, path: str | Path) -> Spec:
        """Read a spec from a YAML or JSON file. Raises FileError on an unreadable file, SpecError on its contents."""
        return cls.from_dict(read_plain(path))

    def save(self, path: str | Path) -> None:
        """Write the spec as YAML, or as JSON where the path ends in .json; an older file stays where that fails.

        Raises FileError.
        """
        if str(path).endswith(WEIGHTS):
            raise FileError(f"{path} is a name of weights", expected="a name that ends in .yaml or .json")
        write_plain(path, self.to_dict())


def _mapping(row: Any, what: str) -> dict[str, Any]:
    if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
        raise SpecError(
            f"{what} a mapping from field to value",
            got=repr(row)[:80],
            hint="write '- preset: lotr_by_role' and its fields below",
        )
    return dict(row)
