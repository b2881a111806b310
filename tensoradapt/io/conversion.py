"""Checkpoints of transformers under the names of its modules: by transformers' own mapping, which from_pretrained uses.

Invariant: a stored tensor appears under a module's name with that module's shape, in one piece with all that it is
converted with; or it keeps its name, and a note says why where it is the conversion that is not known here.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tensoradapt.errors import FileError
from tensoradapt.io.checkpoint import Checkpoint, Entry
from tensoradapt.io.renamed import renamed
from tensoradapt.io.saved import Saved
from tensoradapt.io.views import Key, Piece, View, as_it_is
from tensoradapt.io.wrapped import inside
from tensoradapt.tables import first_of

# Operations of transformers that only move entries: whatever is linear is converted by them as a weight is.
MOVES = frozenset(
    ("Concatenate", "Chunk", "Split", "MergeModulelist", "SplitModulelist", "Transpose", "Interleave", "PermuteForRope")
    + ("Conv3dToLinear", "LinearToConv3d", "VisionFuseAndPermuteForRope", "VisionUnfuseAndPermuteForRope")
    + ("ErnieFuseAndSplitTextVisionExperts", "ErnieSplitAndDecoupleTextVisionExperts")
)
SHOWN = 3  # names in a note
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Conversion:
    """How transformers finds a model's tensors in a checkpoint: which of its own each stored name is, and made how."""

    model: Any
    own: Mapping[str, Shape]
    renamings: Sequence[Any] = ()
    converters: Sequence[Any] = ()
    patterns: Mapping[str, str] = field(default_factory=dict)  # of transformers 4: expression -> replacement

    def name(self, stored: str) -> tuple[str, str | None]:
        """What the model calls a stored tensor, and the pattern of the converter that makes it; itself if nothing."""
        found, pattern = self._renamed(stored)
        if found not in self.own:  # it may have the model's own name, but for a prefix
            found, pattern = self._prefixed(stored), None
        return (found, pattern) if found in self.own else (stored, None)

    def path(self, name: str) -> str:
        """The model's path of a module or parameter, `experts[3]` too, that an adapter calls as it is stored."""
        stem, bracket, index = name.partition("[")
        if any(f"{stem}{suffix}" in self.own for suffix in (".weight", "")):
            return name
        for suffix in (".weight", ""):
            found, pattern = self.name(f"{stem}{suffix}")
            if found in self.own and pattern is None:
                return f"{found.removesuffix(suffix)}{bracket}{index}"
        return name

    def _renamed(self, stored: str) -> tuple[str, str | None]:
        for expression, replacement in self.patterns.items():
            stored, times = re.subn(expression, replacement, stored)
            if times:
                break
        for renaming in self.renamings:
            stored, _ = renaming.rename_source_key(stored)
        pattern = None
        for converter in self.converters:
            stored, pattern = converter.rename_source_key(stored)
            if pattern is not None:
                break
        return self._prefixed(stored), pattern

    def _prefixed(self, name: str) -> str:
        """The name with the base model's prefix more or less, where that makes it one of the model's."""
        prefix = f"{self.model.base_model_prefix}."
        if name in self.own:
            return name
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        return other if other in self.own else name


def conversion_of(model: nn.Module) -> Conversion | None:
    """The conversion of a model of transformers; None for any other, and where there is none to do."""
    transformers = sys.modules.get("transformers")  # what is not imported has made no model
    model = inside(model)
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers 4
        return Conversion(model, own, patterns=getattr(model, "_checkpoint_conversion_mapping", None) or {})
    found = get_model_conversion_mapping(model)
    converters = [each for each in found if isinstance(each, WeightConverter)]
    return Conversion(model, own, [each for each in found if each not in converters], converters)


def named_as(saved: Saved, conversion: Conversion | None) -> Saved:
    """An adapter under the names of a model's modules, where it has those under which the weights are stored.

    Raises FileError where a weight that is stored by itself is a part of one of the model's.
    """
    if conversion is None:
        return saved
    for _, placement in saved.sites.values():
        name, pattern = conversion.name(placement.site.tensor)
        if pattern is not None and placement.site.tensor not in conversion.own:
            raise FileError(
                f"{saved.where} adapts {placement.site.path} as it is stored: the model holds it as a part of {name}",
                hint="extract it again from the two folders, each with its config.json: it then has the model's names",
            )
    names = [*saved.sites, *saved.plan.extras]
    return renamed(saved, conversion.path, conversion.path) if any(conversion.path(n) != n for n in names) else saved


def converted(source: Checkpoint, conversion: Conversion | None) -> Checkpoint:
    """A checkpoint under the names, and in the shapes, of a model's modules; names that the model lacks stay.

    What is in memory under the model's own names and shapes is as it is: a state dict has nothing to convert.
    """
    shapes = {name: entry.shape for name, entry in source.entries.items()}
    if conversion is None or (not source.files and all(conversion.own.get(n) == s for n, s in shapes.items())):
        return source
    raw = {piece.here[0][0]: piece.stored[0] for piece in source.view.pieces}
    pieces, notes = _pieces(source.entries, raw, conversion)
    order = {stored: k for k, stored in enumerate(raw.values())}
    pieces.sort(key=lambda piece: order[piece.stored[0]])
    view = View(source.view.store, tuple(pieces))
    entries = {entry[0]: Entry(*entry) for entry in view}
    names = {raw_name: piece.here[0][0] for raw_name, piece in view.by_stored.items() if piece.forth is as_it_is}
    same = {names.get(raw[other], ""): names.get(raw[first], "") for other, first in source.aliases.items()}
    aliases = {other: first for other, first in same.items() if other and first}
    return replace(
        source, entries=entries, aliases=aliases, view=view, notes=(*source.notes, *notes), conversion=conversion
    )


def _pieces(
    entries: Mapping[str, Entry], raw: Mapping[str, str], conversion: Conversion
) -> tuple[list[Piece], list[str]]:
    """The pieces of a checkpoint's tensors, and what to say of those that could not be converted."""
    makings: dict[str, Making] = {}
    names: dict[str, str] = {}
    for stored in sorted(entries, key=_natural):  # as transformers does: the first of a pair of renamings comes first
        name, pattern = conversion.name(stored)
        if pattern is not None:
            makings.setdefault(name, Making(conversion, name, pattern)).take(pattern, entries[stored])
        else:
            names[stored] = name
    found, refused = [], {}
    for making in makings.values():
        reason = making.reason()
        if reason:
            refused[making.name] = reason
            names |= {entry.name: entry.name for entry in making.entries}
        else:
            found += making.pieces(raw)
    taken = {name for piece in found for name, _ in piece.here}
    for stored, name in names.items():
        own = name if name not in taken else stored
        taken.add(own)
        found.append(Piece((raw[stored],), ((own, None),)))
    return found, _said(refused)


def _said(refused: Mapping[str, str]) -> list[str]:
    """A note for every reason that tensors keep the names under which they are stored."""
    reasons: dict[str, list[str]] = {}
    for name, reason in refused.items():
        reasons.setdefault(reason, []).append(name)
    return [
        f"{first_of(names, SHOWN)} cannot be read "
        f"under this name: {reason}; load the model and save it again, or give the loaded model itself"
        for reason, names in reasons.items()
    ]


def _natural(name: str) -> list[tuple[Any, ...]]:
    """A key that sorts numbers as numbers."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name)]


@dataclass
class Making:
    """What one converter of transformers' makes one or several of the model's tensors of."""

    conversion: Conversion
    name: str  # of the first of the model's tensors
    pattern: str
    collected: dict[str, list[Entry]] = field(default_factory=dict)

    def take(self, pattern: str, entry: Entry) -> None:
        """A stored tensor more."""
        self.collected.setdefault(pattern, []).append(entry)

    @property
    def entries(self) -> list[Entry]:
        """The stored tensors, pattern by pattern."""
        return [entry for entries in self.collected.values() for entry in entries]

    @cached_property
    def converter(self) -> Any:
        """The converter that the pattern is of: the last one, as transformers has it."""
        return next(c for c in reversed(self.conversion.converters) if self.pattern in c.source_patterns)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The pattern of every stored tensor."""
        return tuple(pattern for pattern, entries in self.collected.items() for _ in entries)

    def made(self, patterns: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """What transformers' operations make of stored tensors, by the model's names."""
        held: dict[str, Any] = {}
        for pattern, tensor in zip(patterns, tensors, strict=True):
            held.setdefault(pattern, []).append(tensor)
        sides = {name: getattr(self.converter, name) for name in ("source_patterns", "target_patterns")}
        model = self.conversion.model
        for operation in self.converter.operations:
            held = operation.convert(held, **sides, full_layer_name=self.name, model=model, config=model.config)
        whole = self.name.replace("*.", "0.")
        prefix, _, suffix = next((whole.partition(part) for part in held if part in whole), ("", "", ""))
        return {f"{prefix}{k}{suffix}": t[0] if isinstance(t, list) else t for k, t in held.items()}

    @cached_property
    def blank(self) -> dict[str, Tensor]:
        """The model's tensors without values. Raises what transformers' operations raise."""
        return self.made(self.patterns, [torch.empty(e.shape, dtype=e.dtype, device="meta") for e in self.entries])

    def reason(self) -> str:
        """Why the tensors cannot be converted; empty where they can."""
        strange = [kind for each in self.converter.operations if (kind := type(each).__name__) not in MOVES]
        if strange:
            return f"transformers makes it by {strange[0]}, which does more than move entries"
        try:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.blank.items()}
        except Exception as error:  # whatever its operations say of parts that are missing or do not fit
            return f"transformers cannot make it of what is stored ({next(iter(str(error).splitlines()), '?')[:80]})"
        if any(self.conversion.own.get(name) != shape for name, shape in shapes.items()):
            return "what is stored does not have the shapes that the config says"
        if sum(map(math.prod, shapes.values())) != sum(math.prod(entry.shape) for entry in self.entries):
            return "the model has more or fewer entries of it than are stored"
        return ""

    def pieces(self, raw: Mapping[str, str]) -> list[Piece]:
        """The pieces: one for every expert where each is stored by itself, and one of all where not."""
        parts = list(self.collected.values())
        names = tuple(self.blank)
        count = len(parts[0])
        if len(names) == 1 and self._each_alone() and {len(part) for part in parts} == {count}:
            forth = Made(self, tuple(self.collected), names, single=True)
            return [
                Piece(tuple(raw[part[k].name] for part in parts), ((names[0], k),), forth, forth.undone)
                for k in range(count)
            ]
        forth = Made(self, self.patterns, names)
        keys: tuple[Key, ...] = tuple((name, None) for name in names)
        deep = {entry.shape[:1] if len(entry.shape) > 2 else () for entry in self.entries}
        along = deep == {self.blank[names[0]].shape[:1]} and _within(self.converter.operations)
        return [Piece(tuple(raw[entry.name] for entry in self.entries), keys, forth, forth.undone, along)]

    def _each_alone(self) -> bool:
        """Whether the tensors of a list are stacked first, and nothing then reaches across the stack."""
        first, *others = self.converter.operations
        return type(first).__name__ == "MergeModulelist" and first.dim == 0 and _within(others)


def _within(operations: Sequence[Any]) -> bool:
    """Whether operations leave the first axis alone, whatever its length."""
    dims = [getattr(each, name) for each in operations for name in ("dim", "dim0", "dim1") if hasattr(each, name)]
    plain = all(type(each).__name__ in ("Concatenate", "Chunk", "Transpose", "Interleave") for each in operations)
    checks = any(getattr(each, "check_dims", False) for each in operations)
    return plain and not checks and all(dim > 0 for dim in dims)


@dataclass(frozen=True)
class Made:
    """A function from stored tensors to the model's, and back."""

    making: Making
    patterns: tuple[str, ...]
    names: tuple[str, ...]
    single: bool = False  # one expert of a stack

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The model's tensors, in the order of their names."""
        found = self.making.made(self.patterns, tensors)
        return [found[name][0] if self.single else found[name] for name in self.names]

    def undone(self, made: Sequence[Tensor], stored: Sequence[Tensor]) -> Sequence[Tensor]:
        """The stored tensors of the model's: every entry goes where it came from."""
        total = sum(tensor.numel() for tensor in stored)
        numbers = torch.arange(total, dtype=torch.int32 if total < 2**31 else torch.int64)
        parts = numbers.split([tensor.numel() for tensor in stored])
        places = self([part.view(tensor.shape) for part, tensor in zip(parts, stored, strict=True)])
        out = torch.empty(total, dtype=made[0].dtype)
        for tensor, place in zip(made, places, strict=True):
            out[place.flatten()] = tensor.flatten()
        parts = out.split([tensor.numel() for tensor in stored])
        return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, stored, strict=True)]
