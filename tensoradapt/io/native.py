"""The adapter file: one safetensors file with every factor once, under `group.node`, and the plan in its header.

Trained copies of other modules stand under `extra.<parameter>`, the frozen start of a difference under
`group.node__start`. Invariant: what is written can be read; what is read is complete, finite and of the plan's shapes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tensoradapt.errors import FileError
from tensoradapt.io.base import identity, shapes_of
from tensoradapt.io.card import card, carded, command
from tensoradapt.paths import check_regular, expand
from tensoradapt.plan import BYTES, START, Plan
from tensoradapt.schema import base_row
from tensoradapt.sites import read_header, read_object
from tensoradapt.spec import LARGEST_SCALE
from tensoradapt.writing.atomic import atomic

FILE = "adapter.safetensors"
PLAN = "tensoradapt"  # the name of the plan in the metadata
VERSION = 1


@dataclass(frozen=True)
class Contents:
    """What an adapter file holds: its plan, its tensors by key, and the identity of the base model."""

    plan: Plan
    tensors: Mapping[str, Tensor]
    base: Mapping[str, Any]
    path: Path


def expected(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor that a plan's file holds."""
    keys = {key: factor.shape for key, factor in plan.factors.items()}
    keys |= {f"{key}{START}": factor.shape for key, factor in plan.factors.items() if factor.copied}
    return keys | {f"extra.{path}": shape for path, shape in plan.extras.items()}


def file_of(path: str | Path) -> Path:
    """The file that an adapter's path means: itself, or `adapter.safetensors` in the folder."""
    path = expand(path)
    return path if path.suffix == ".safetensors" else path / FILE


def write(
    path: str | Path,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Any] | None = None,
    *,
    made: str = "",
) -> Path:
    """Write an adapter file atomically, and the card of its folder, which says what `made` it.

    `base` is what is known of the base beside the plan; of its folder nothing is written but the folder's own name.

    Raises FileError on tensors that are not finite, empty or not there (meta).
    """
    for key, tensor in tensors.items():
        if tensor.is_meta or not tensor.numel():
            raise FileError(
                f"{key} has no values to save",
                got="the meta device" if tensor.is_meta else tuple(tensor.shape),
                hint="gather the parameters before saving",
            )
        _check_finite(key, tensor, "the adapter")
    file = file_of(path)
    if file.parent.exists() and not file.parent.is_dir():
        raise FileError(
            f"{file.parent} is a file, not a folder", hint="give a folder, or a path that ends in .safetensors"
        )
    for group in plan.groups:
        if not abs(group.scale) <= LARGEST_SCALE:
            raise FileError(
                f"the scale of group {group.name!r} is none",
                got=group.scale,
                expected=f"at most {LARGEST_SCALE:g}",
                hint="set adapter.scale, and give the factors a part of it",
            )
    whole = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    of = identity(plan, base or {})
    plan = replace(plan, model=of["name"])
    text = json.dumps(plan.to_dict())
    checksums = {PLAN: zlib.crc32(text.encode())} | {key: checksum(tensor) for key, tensor in whole.items()}
    metadata = {
        "format": "pt",
        "version": str(VERSION),
        PLAN: text,
        "base": json.dumps(of),
        "crc32": json.dumps(checksums),
    }
    said = card(plan, of, command(made))
    with carded(file.parent, said) if file.name == FILE else nullcontext(), atomic(file) as temporary:
        write_tensors(whole, temporary, metadata)
        _settle(temporary)
    return file


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Raises OSError where the disk is full, say, as all other writing does."""
    try:
        save_file(dict(tensors), file, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _settle(file: Path) -> None:
    """Sort the metadata, whose order safetensors changes from run to run: equal adapters have equal bytes."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            stream.seek(8)
            stream.write(text.ljust(size))


def checksum(tensor: Tensor) -> int:
    """The CRC-32 of a tensor's bytes as they are stored."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def read(path: str | Path) -> Contents:
    """Read an adapter file. Raises FileError naming the file and what in it is missing, extra, damaged or too new."""
    file = file_of(path)
    if not file.is_file():
        raise FileError(f"no adapter at {path}", expected=f"a folder with {FILE} in it, or that file")
    check_regular(file)
    try:
        with safe_open(file, framework="pt") as opened:
            read_header(file)  # which refuses a key that is there twice: safe_open takes the last
            metadata = opened.metadata() or {}
            plan, base, checksums = _header(file, metadata)
            check_keys(file, expected(plan), {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{file} is damaged or no safetensors file", got=str(error), hint="copy or save it again"
        ) from None
    for key, tensor in tensors.items():
        if str(tensor.dtype)[6:] not in BYTES:
            raise FileError(f"{key!r} in {file} holds {str(tensor.dtype)[6:]}", expected=f"one of {', '.join(BYTES)}")
        _check_finite(key, tensor, str(file))
        if key in checksums and checksums[key] != checksum(tensor):
            raise _changed(f"{key!r} in {file}")
    return Contents(plan, tensors, base, file)


def _header(file: Path, metadata: Mapping[str, str]) -> tuple[Plan, dict[str, Any], dict[str, int]]:
    """The plan, the base's identity and the checksums (none where another tool wrote the file)."""
    if PLAN not in metadata:
        raise FileError(
            f"{file} holds no tensoradapt plan",
            got=f"metadata {sorted(metadata)}",
            hint="an adapter of another library is imported with import_peft",
        )
    version = metadata.get("version", "unknown")
    if version not in map(str, range(1, VERSION + 1)):
        raise FileError(
            f"{file} has format version {version}", expected=f"at most {VERSION}", hint="install a newer tensoradapt"
        )
    checksums = _parsed(file, "crc32", metadata.get("crc32", "{}"))
    if checksums.get(PLAN, zlib.crc32(metadata[PLAN].encode())) != zlib.crc32(metadata[PLAN].encode()):
        raise _changed(f"the plan in {file}")
    try:
        plan = Plan.from_dict(_parsed(file, "plan", metadata[PLAN]))
    except FileError as error:
        raise FileError(f"the plan in {file} is damaged: {error}") from None
    return plan, _base(file, plan, metadata.get("base", "{}")), checksums


def _base(file: Path, plan: Plan, text: str) -> dict[str, Any]:
    """What a file says of the base model. Raises FileError where that is not what its plan says."""
    base = base_row(_parsed(file, "base", text))
    shapes = shapes_of(plan)
    if base.get("shapes", shapes) != shapes:
        raise FileError(
            f"{file} is of weights of other shapes than its plan",
            got=base["shapes"],
            expected=shapes,
            hint="copy or save it again",
        )
    return base


def _parsed(file: Path, name: str, text: str) -> dict[str, Any]:
    try:
        return read_object(text.encode())
    except (ValueError, RecursionError) as error:
        raise FileError(f"the {name} in {file} is damaged", got=str(error), hint="copy or save it again") from None


def _changed(what: str) -> FileError:
    return FileError(
        f"{what} is not what was saved: its checksum differs",
        hint="copy or save it again; a tool that changes a factor on purpose removes crc32 from the metadata",
    )


def check_keys(where: str | Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise FileError on a key that is missing or unknown, or of another shape than wanted."""
    for key in sorted(set(wanted) ^ set(found)):
        raise FileError(
            f"{where} {'lacks' if key in wanted else 'has an unknown'} key {key!r}",
            hint="the file was changed after it was saved",
        )
    for key, shape in wanted.items():
        if found[key] != shape:
            raise FileError(f"{key!r} in {where} has another shape than its plan", got=found[key], expected=shape)


def _check_finite(key: str, tensor: Tensor, where: str) -> None:
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = tensor.numel() - int(finite.sum())
        raise FileError(
            f"{key!r} of {where} is not finite",
            got=f"{bad} of {tensor.numel()} entries are NaN or infinite",
            hint="use an earlier checkpoint",
        )
