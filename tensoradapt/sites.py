"""Sites: the adaptable weights of a model, and where they lie in it (coordinates).

Invariant: within one model a site's coordinates follow from its path alone. No tensor is needed: paths and shapes come
from a mapping, a checkpoint's header, or (in `scan`) a live module.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tensoradapt.coordinates import Coordinates, locate
from tensoradapt.errors import FileError, ShapeError, SpecError
from tensoradapt.paths import check_regular, origin

Heads = tuple[int | None, int | None, int | None]  # of queries, of keys and values, and the size of one
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
ZIPPED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")  # what torch.save writes, now and formerly
OTHERS = {
    b"GGUF": "a GGUF file",
    b"version ": "a pointer of git lfs: fetch the file itself with git lfs pull",
}
PLACED = ("data_offsets", "dtype")
BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16},
    **{"U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
MAX_DIMS = 64  # of one tensor
MAX_NAMED = 10_000  # experts of a header whose tensors are not there; behind it, one for every kilobyte
MAX_NAME = 8192  # characters of a tensor's name
NO_NUMBER = re.compile(r"\d{1000}")
MAX_HEADER_BYTES = 100_000_000
LISTED = 12  # subfolders in an error


@dataclass(frozen=True)
class Site:
    """One adaptable weight.

    `path` is the module's path (or the parameter's, where no module stands for it). `shape` is the delta's, `(out, in)`
    or `(out, in, kh, kw)`, where the `layout` says how the weight is stored, `out in` or `in out`, and where that is
    not known, `either`; that of the stored tensor where it is not known which side is `out`, `as stored`. `index` picks
    an expert of a 3-D parameter and `rows` a range of `out`; `delivery` says how the delta reaches the output.
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
    joined_kinds: tuple[str, ...] = ()  # their kinds, as `kind`
    everywhere: bool = False  # the delta is a tensor's of no known model: of all modules that turn out to hold it
    tensor: str = ""  # the parameter's own name in the model: equal for tied modules
    kind: str = "linear"  # linear, embedding, conv, parameter: which module applies the delta
    dims: int = 0  # of the kernel of a plain convolution, 1 or 2; 0 of another module, or where it is not known

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
    heads_at: Mapping[str, Heads] = field(default_factory=dict)  # of the attention around a module, by its path
    name: str = ""
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # every parameter's shape, by path
    refused: Mapping[str, str] = field(default_factory=dict)  # path -> why this module cannot be adapted
    ties: Mapping[str, str] = field(default_factory=dict)  # further names of tied parameters -> their first one
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # parameter -> other modules that read it
    packed: Mapping[str, str] = field(default_factory=dict)  # path -> why its weight cannot be replaced at use
    num_parameters: int = 0  # entries of the model's parameters, tied ones once; 0 where they are not known


def by_pattern(pattern: str, path: str) -> Coordinates | None:
    """Coordinates by a pattern with named fields, `encoder.layer.{layer}.self.{role}`; None where it does not match."""
    names = re.findall(r"\{(\w*)\}", pattern)
    unknown = sorted(set(names) - {"layer", "role", "stack", "expert", "task"})
    if unknown or len(set(names)) < len(names):
        known = "{layer}, {role}, {stack}, {expert}, {task}"
        raise SpecError("a pattern's fields are coordinates, each once", got=pattern, expected=known)
    fields = [r"(?P<layer>\d+)" if n == "layer" else rf"(?P<{n}>.+?)" for n in names]
    regex = "".join(re.escape(a) + b for a, b in zip(re.split(r"\{\w*\}", pattern), [*fields, ""], strict=True))
    match = re.fullmatch(rf"(?:.*\.)?{regex}", path)
    return {n: int(v) if v.isdecimal() else v for n, v in match.groupdict().items()} if match else None


def expert_sites(tensor: str, shape: Sequence[int], layout: str = "as stored") -> list[Site]:
    """The experts of a 3-D parameter, (expert, out, in) or (expert, in, out): one site each."""
    side = tuple(shape[:0:-1] if layout == "in out" else shape[1:])
    path = tensor.removesuffix(".weight")
    return [
        Site(f"{path}[{k}]", side, {}, layout, "weight", k, owner=path, tensor=tensor, kind="parameter")
        for k in range(shape[0])
    ]


def placed(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites with their coordinates: by the paths of all of them, and by the index of an expert."""
    located = locate({site.owner: site.shape for site in sites})
    experts = [{} if site.index is None else {"expert": site.index} for site in sites]
    return tuple(replace(s, coordinates={**located[s.owner], **e}) for s, e in zip(sites, experts, strict=True))


def from_mapping(shapes: Mapping[str, Sequence[int]], **known: Any) -> SiteMap:
    """Sites of a mapping `{path: (out, in)}`, stored so, convolutions as `(out, in, kh, kw)`. Raises ShapeError."""
    return SiteMap(placed([_mapped(path, shape) for path, shape in shapes.items()]), **known)


def _mapped(path: str, shape: Any) -> Site:
    if not isinstance(path, str):
        raise ShapeError(
            "a mapping of shapes is from path to shape", got=repr(path), expected="{'layer.0.query': (8, 8)}"
        )
    sizes = tuple(shape) if hasattr(shape, "__iter__") else ()
    if len(sizes) not in (2, 4) or not all(type(n) is int and n > 0 for n in sizes):
        raise ShapeError(
            f"the shape of {path} is no weight's",
            got=" ".join(repr(shape).split())[:60],
            expected="(out, in) or (out, in, kh, kw)",
        )
    return Site(path, sizes, owner=path, tensor=path, kind="conv" if len(sizes) == 4 else "linear")


def from_headers(path: Path, names: Callable[[Iterable[str]], Mapping[str, str]]) -> SiteMap:
    """Sites of a safetensors file or a folder, by headers alone, under the `names` of the stored ones."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise no_weights(path, "a safetensors file, a folder of shards, or a config.json")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        found = read_shapes(file)
        if doubled := sorted(set(shapes) & set(found)):
            raise FileError(f"{doubled[0]} is in two files of {path}", hint="remove the file that does not belong")
        shapes |= found
    shapes = {name: shapes[stored] for stored, name in names(shapes).items()}
    total = sum(map(math.prod, shapes.values()))
    _check_experts(path, shapes, sum(file.stat().st_size for file in files))
    return SiteMap(placed(_weights(shapes)), name=str(origin(path)), parameters=shapes, num_parameters=total)


def no_weights(folder: Path, sources: str) -> FileError:
    """The error on a folder that holds no safetensors file itself; subfolders that do are named, as a pipeline's."""
    inside = sorted(file.name for file in folder.iterdir() if file.is_dir() and any(file.glob("*.safetensors")))
    pipeline = (folder / "model_index.json").is_file()
    if not inside and not pipeline:
        return FileError(f"no .safetensors file in {folder}", hint=f"give {sources}")
    return FileError(
        f"{folder} is a pipeline of several models" if pipeline else f"no .safetensors file in {folder} itself",
        got=f"safetensors files in {', '.join(inside[:LISTED]) or 'none of its subfolders'}",
        expected="one model",
        hint=f"give one of its subfolders: {folder / inside[0]}" if inside else f"give {sources}",
    )


def _weights(shapes: Mapping[str, tuple[int, ...]]) -> list[Site]:
    """What in a header is a weight: matrices, convolutions, and experts in one tensor."""
    found: list[Site] = []
    for name, shape in shapes.items():
        if len(shape) in (2, 4) and min(shape) > 0 and name.endswith("weight"):
            layout = "as stored" if len(shape) == 2 else "out in"  # convolutions are stored alike everywhere
            found.append(replace(_mapped(name.removesuffix(".weight"), shape), layout=layout))
        elif _holds_experts(name, shape):
            found += expert_sites(name, shape)
    return found


def _holds_experts(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and min(shape) > 0 and "expert" in name and not name.endswith("bias")


def _check_experts(path: Path, shapes: Mapping[str, tuple[int, ...]], size: int) -> None:
    """Raise FileError on more experts than a header may name, or its tensors can hold: naming them costs nothing."""
    named = sum(shape[0] for name, shape in shapes.items() if _holds_experts(name, shape))
    if named > (most := MAX_NAMED + size // 1024):
        raise FileError(
            f"{path} names more experts than its {size:,} bytes hold", got=named, expected=f"at most {most:,}"
        )


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a safetensors file, by name, from its header. Raises FileError."""
    entries = {name: entry for name, entry in read_header(file).items() if name != "__metadata__"}
    return {name: _shape(file, name, entry) for name, entry in entries.items()}


def _shape(file: Path, name: str, entry: Any) -> tuple[int, ...]:
    """The shape of a header's entry. Raises FileError where it has no place, or one of another number of bytes.

    Whether the file goes on so far is not asked: a header alone is planned too.
    """
    known: Any = entry if isinstance(entry, dict) else {}
    shape, place, dtype = (known.get(key) for key in ("shape", *PLACED))
    if not _are_sizes(shape):
        raise FileError(f"{file} has no shape for {name!r}", got=shape, hint="download or save it again")
    if not _are_sizes(place) or len(place) != 2 or place[0] > place[1]:
        raise FileError(
            f"{file} has no place for {name!r}", got=place, expected="two numbers, the first byte and the end"
        )
    held, bits = 8 * (place[1] - place[0]), BITS.get(str(dtype))
    wanted = math.prod(shape) * (bits or 1)
    if held != wanted if bits else held < wanted:
        raise FileError(
            f"{file} has another number of bytes for {name!r} than its shape takes",
            got=f"{shape} of {dtype!r} in {held // 8:,} bytes",
            hint="download or save it again",
        )
    return tuple(shape)


def _are_sizes(found: Any) -> bool:
    return (
        isinstance(found, list) and len(found) <= MAX_DIMS and all(type(n) is int and 0 <= n < 1 << 48 for n in found)
    )


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name to dtype, shape and offsets. Raises FileError."""
    check_regular(file)
    try:
        with file.open("rb") as stream:
            first = stream.read(8)
            size, rest = int.from_bytes(first, "little"), file.stat().st_size - 8
            whole = 0 < size <= min(rest, MAX_HEADER_BYTES)
            header = read_object(stream.read(size)) if whole else None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{file} cannot be read as safetensors", got=str(error)) from None
    if header is None:
        raise _headless(file, first, rest)
    if long := next((name for name in header if len(name) > MAX_NAME), None):
        raise FileError(f"{file} has a name of {len(long):,} characters", expected=f"at most {MAX_NAME:,}")
    if odd := next((name for name in header if NO_NUMBER.search(name)), None):
        raise FileError(f"{file} has a name with a number that counts nothing", got=f"{odd[:80]!r}")
    return header


def _headless(file: Path, first: bytes, rest: int) -> FileError:
    """The error on a file with no safetensors header, by what it begins with."""
    if file.suffix in PICKLES or first.startswith(ZIPPED):
        return pickled(str(file))
    if other := next((name for begin, name in OTHERS.items() if first.startswith(begin)), None):
        return FileError(f"{file} is no safetensors file", got=other, expected="safetensors")
    size = int.from_bytes(first, "little")
    found = f"{f'{size:,} bytes of' if 0 < size <= MAX_HEADER_BYTES else 'no'} header and {max(rest, 0):,} bytes behind"
    return FileError(f"{file} is no safetensors file, or truncated", got=found, hint="download or save it again")


def pickled(what: str) -> FileError:
    """The error on a pickle, which is never opened."""
    return FileError(
        f"{what} is a pickle, which can run code when it is opened: not opened",
        expected="safetensors",
        hint="load it where you trust it, and save it again: save_pretrained writes safetensors",
    )


def read_object(text: bytes) -> dict[str, Any]:
    """The JSON object in UTF-8 text. Raises ValueError on a key that is there twice, NaN, Infinity; RecursionError."""
    found = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_number)
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, times = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} is there {times} times")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON's")
