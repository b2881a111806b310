"""Sites: the adaptable weights of a model, where they lie in it (coordinates), and which of them a rule means.

Invariant: within one model a site's coordinates follow from its path alone, and no two matched sites of one group share
them. No tensor is needed: paths and shapes come from a mapping, a checkpoint's header, or (in `scan`) a live module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from tensoradapt.errors import FileError, ShapeError, SiteError, SpecError
from tensoradapt.spec import Rule

Coordinates = Mapping[str, int | str]
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Site:
    """One adaptable weight.

    `path` is the module's path (or the parameter's, where no module stands for it); `shape` is the delta's,
    `(out, in)` or `(out, in, kh, kw)`, whatever the stored `layout`; `index` picks an expert of a 3-D parameter and
    `rows` a range of `out`; `delivery` says how the delta reaches the output.
    """

    path: str
    shape: tuple[int, ...]
    coordinates: Coordinates = field(default_factory=dict)
    layout: str = "out in"
    delivery: str = "output"
    index: int | None = None
    rows: tuple[int, int] | None = None
    owner: str = ""  # the path without index and part: what stands in the model
    aliases: tuple[str, ...] = ()  # other modules that hold the same tensor
    joined: tuple[str, ...] = ()  # those of them that the spec adapts too: one site, one delta
    tensor: str = ""  # the parameter's own name in the model: equal for tied modules
    kind: str = "linear"  # linear, embedding, conv, parameter: which module applies the delta

    @property
    def out(self) -> int:
        """The number of outputs."""
        return self.shape[0]

    @property
    def inp(self) -> int:
        """The number of inputs, per group of a convolution and without its kernel."""
        return self.shape[1]

    @property
    def kernel(self) -> int:
        """The number of kernel positions; 1 where there is no kernel."""
        return int(self.shape[2] * self.shape[3]) if len(self.shape) == 4 else 1

    @property
    def numel(self) -> int:
        """The number of entries of the delta."""
        return self.out * self.inp * self.kernel


@dataclass(frozen=True)
class SiteMap:
    """The sites of one model, with what its config says of heads and its name."""

    sites: tuple[Site, ...]
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    name: str = ""
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # every parameter's shape, by path
    refused: Mapping[str, str] = field(default_factory=dict)  # path -> why this module cannot be adapted


def locate(paths: Sequence[str]) -> dict[str, Coordinates]:
    """Coordinates of paths: layer, stack, role and expert.

    `layer` is the first numbered component, `stack` what precedes it, `expert` a number under a name that contains
    expert, `role` the shortest suffix of the rest that is unique within the layer (the whole rest where none is).
    """
    split = {path: _split(path) for path in paths}
    rests: dict[tuple[Any, Any], set[str]] = {}
    for coords, rest in split.values():
        rests.setdefault((coords.get("stack"), coords.get("layer")), set()).add(rest)
    owners = {key: _suffix_owners(group) for key, group in rests.items()}
    return {
        path: {**c, "role": _shortest(rest, owners[c.get("stack"), c.get("layer")])}
        for path, (c, rest) in split.items()
    }


def _split(path: str) -> tuple[dict[str, int | str], str]:
    parts = path.split(".")
    numbered = [k for k, part in enumerate(parts) if part.isdigit()]
    coords: dict[str, int | str] = {}
    rest = list(parts)
    for k in reversed(numbered[1:] if numbered else []):
        if "expert" in parts[k - 1]:
            coords["expert"] = int(rest.pop(k))
            break
    if numbered and "expert" not in parts[numbered[0] - 1 if numbered[0] else 0]:
        coords |= {"stack": ".".join(parts[: numbered[0]]), "layer": int(parts[numbered[0]])}
        rest = rest[numbered[0] + 1 :]
    return coords, ".".join(rest)


def _suffix_owners(rests: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for rest in rests:
        parts = rest.split(".")
        for k in range(len(parts)):
            suffix = ".".join(parts[k:])
            counts[suffix] = counts.get(suffix, 0) + 1
    return counts


def _shortest(rest: str, owners: Mapping[str, int]) -> str:
    parts = rest.split(".")
    suffixes = (".".join(parts[k:]) for k in reversed(range(len(parts))))
    return next((suffix for suffix in suffixes if owners[suffix] == 1), rest)


def by_pattern(pattern: str, path: str) -> Coordinates | None:
    """Coordinates by a pattern with named fields, `encoder.layer.{layer}.attention.self.{role}`; None where it does not match."""
    names = re.findall(r"\{(\w*)\}", pattern)
    unknown = sorted(set(names) - {"layer", "role", "stack", "expert", "task"})
    if unknown or len(set(names)) < len(names):
        raise SpecError(
            "a pattern's fields are coordinates, each once",
            got=pattern,
            expected="{layer}, {role}, {stack}, {expert}, {task}",
        )
    pieces = re.split(r"\{\w*\}", pattern)
    fields = [r"(?P<layer>\d+)" if n == "layer" else rf"(?P<{n}>.+?)" for n in names]
    regex = "".join(re.escape(a) + b for a, b in zip(pieces, [*fields, ""], strict=True))
    match = re.fullmatch(rf"(?:.*\.)?{regex}", path)
    return {n: int(v) if v.isdigit() else v for n, v in match.groupdict().items()} if match else None


def from_mapping(shapes: Mapping[str, Sequence[int]], **known: Any) -> SiteMap:
    """Sites of a mapping `{path: (out, in)}`, convolutions as `(out, in, kh, kw)`."""
    located = locate(list(shapes))
    sites = []
    for path, shape in shapes.items():
        if len(shape) not in (2, 4) or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ShapeError(
                f"the shape of {path} is no weight's", got=tuple(shape), expected="(out, in) or (out, in, kh, kw)"
            )
        kind = "conv" if len(shape) == 4 else "linear"
        sites.append(Site(path, tuple(shape), located[path], owner=path, tensor=path, kind=kind))
    return SiteMap(tuple(sites), **known)


def from_headers(path: Path) -> SiteMap:
    """Sites of a safetensors file or a folder of shards: headers only, no tensor is read."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileError(
            f"no .safetensors file in {path}", hint="give a safetensors file, a folder of shards, or a config.json"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        entries = read_header(file)
        doubled = sorted(set(shapes) & set(entries))
        if doubled:
            raise FileError(f"{doubled[0]} is in two files of {path}", hint="remove the file that does not belong")
        shapes |= {k: tuple(v["shape"]) for k, v in entries.items() if k != "__metadata__"}
    weights = {
        k.removesuffix(".weight"): s
        for k, s in shapes.items()
        if len(s) in (2, 4) and min(s) > 0 and k.endswith("weight")
    }
    return from_mapping(weights, name=str(path.name), parameters=shapes)


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name to dtype, shape and offsets. Raises FileError."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            text = stream.read(size) if size <= MAX_HEADER_BYTES else b""
        header = json.loads(text) if len(text) == size else None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileError(f"{file} cannot be read as safetensors", got=str(error)) from None
    if not isinstance(header, dict):
        raise FileError(f"{file} is no safetensors file, or truncated", hint="download or save it again")
    return header


def select(sites: Sequence[Site], rule: Rule) -> list[Site]:
    """The sites that a rule's targets match and its excludes do not, with the rule's pattern and parts applied.

    Raises SiteError where a target matches nothing: it names the nearest roles.
    """
    if not rule.targets:
        raise SiteError(
            "a rule has no targets", hint="write targets=['query', 'value'], or a glob such as '*.attention.*'"
        )
    sites = [part for site in sites for part in split_rows(site, rule.parts)]
    for target in rule.targets:
        if not any(matches(target, site.path) for site in sites):
            raise _no_match(target, sites)
    chosen = [s for s in sites if _any(rule.targets, s.path) and not _any(rule.exclude, s.path)]
    return [_relocate(_turned(site, rule.layout), rule.pattern) for site in chosen]


def _turned(site: Site, layouts: Mapping[str, str]) -> Site:
    """The site in the layout that a rule states for it: parameters of no known module class do not tell theirs."""
    layout = next((value for target, value in layouts.items() if matches(target, site.path)), site.layout)
    if layout == site.layout:
        return site
    if site.kind != "parameter":
        raise SpecError(
            f"{site.path} is a {site.kind} module, whose layout is known",
            got=layout,
            expected=site.layout,
            hint="remove it from layout",
        )
    return replace(site, layout=layout, shape=site.shape[::-1])


def refuse(model: SiteMap, rule: Rule) -> None:
    """Raise SiteError where a rule's targets mean a module that cannot be adapted, with the reason."""
    for path, reason in model.refused.items():
        if _any(rule.targets, path) and not _any(rule.exclude, path):
            raise SiteError(f"{path} cannot be adapted: {reason}", hint=f"exclude=[{path!r}]")


def _relocate(site: Site, pattern: str) -> Site:
    if not pattern:
        return site
    found = by_pattern(pattern, site.path)
    if found is None:
        raise SiteError(
            f"the pattern does not match {site.path}", got=pattern, hint="mend the pattern, or exclude the site"
        )
    return replace(site, coordinates=found)


def _any(patterns: Sequence[str], path: str) -> bool:
    return any(matches(pattern, path) for pattern in patterns)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SpecError(f"the target 're:{pattern}' is no regular expression", got=str(error)) from None


def matches(target: str, path: str) -> bool:
    """Whether a target (exact path, suffix of whole components, glob, or `re:` expression) means a path."""
    if target.startswith("re:"):
        return _compiled(target[3:]).fullmatch(path) is not None
    if any(c in target for c in "*?"):
        return fnmatchcase(path, target) or fnmatchcase(path, f"*.{target}")
    base = path.partition("[")[0]
    return target in (path, base) or path.endswith(f".{target}") or base.endswith(f".{target}")


def _no_match(target: str, sites: Sequence[Site]) -> SiteError:
    names = sorted(
        {str(site.coordinates.get("role", site.path)) for site in sites} | {s.path.rpartition(".")[2] for s in sites}
    )
    close = get_close_matches(target, names, n=3)
    return SiteError(
        f"target {target!r} matches no site",
        expected=f"one of the roles {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}",
        hint=f"did you mean {' or '.join(map(repr, close))}?"
        if close
        else "targets are paths, suffixes, globs or 're:' expressions",
    )


def split_rows(site: Site, parts: Mapping[str, list[str] | dict[str, int]]) -> list[Site]:
    """The site, or its row ranges where a rule's `parts` names it: `h.0.attn.c_attn` becomes `...c_attn[q]`, `[k]`, `[v]`."""
    found = next((value for target, value in parts.items() if matches(target, site.path)), None)
    if found is None or site.rows is not None:
        return [site]
    sizes = _part_sizes(site, found)
    if sum(sizes.values()) != site.out:
        raise ShapeError(
            f"the parts of {site.path} do not add up to its rows", got=sizes, expected=f"a sum of {site.out}"
        )
    result, start = [], 0
    for name, size in sizes.items():
        coords = {**site.coordinates, "role": f"{site.coordinates.get('role', '')}[{name}]"}
        rows = (start, start + size)
        result.append(
            replace(site, path=f"{site.path}[{name}]", shape=(size, *site.shape[1:]), rows=rows, coordinates=coords)
        )
        start += size
    return result


def _part_sizes(site: Site, parts: list[str] | dict[str, int]) -> dict[str, int]:
    if not hasattr(parts, "keys"):
        if site.out % len(parts):
            raise ShapeError(
                f"{site.path} has {site.out} rows, not {len(parts)} equal parts", hint="give sizes: {'q': 64, 'k': 16}"
            )
        return dict.fromkeys(parts, site.out // len(parts))
    return dict(parts)
