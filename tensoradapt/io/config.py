"""Configs of transformers: the model that one describes, on the meta device, built by transformers' own classes alone.

Invariant: no code that a folder names or holds runs, nothing is asked on standard input, and nothing is downloaded.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from tensoradapt.errors import FileError
from tensoradapt.sites import read_object

# How attention and experts are computed, which their weights do not depend on: by torch, or by kernels to be fetched.
COMPUTED = ("_attn_implementation", "_experts_implementation", "attn_implementation", "experts_implementation")
PLAIN = ("eager", "sdpa")
ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:", "local_dir:")  # of timm's models: read from there when they are made
MAX_MODULES = 1 << 17  # the largest models of experts that are modules each have half as many
COUNTED = {  # fields that say how many of something are made, and the most of it that any model comes near to
    re.compile(r"^n(um)?_.*(layer|block|stage|repeat|depth)|(layers|depths?|blocks|stages|repeats)$"): 1024,
    re.compile(r"^n(um)?_.*expert|experts$"): 1 << 14,
    re.compile(r"^n(um)?_.*label"): 1 << 16,
}
FIT = "give the model's own config.json, or its safetensors files"


def config_in(path: Path) -> Path | None:
    """The config that a path means: a .json file itself, or a folder's, unless that is a library's that builds modules
    by class (diffusers), which transformers does not know.
    """
    config = path if path.suffix == ".json" else path / "config.json"
    if not config.is_file():
        return None
    return None if path != config and "_class_name" in _fields(config) else config


def _fields(config: Path) -> dict[str, Any]:
    """What a config says; nothing where it cannot be read."""
    with suppress(OSError, ValueError, RecursionError):
        return read_object(config.read_bytes())
    return {}


def built(path: Path) -> nn.Module:
    """The model that a config describes, on the meta device. Raises FileError."""
    try:
        import transformers
    except ImportError:
        raise FileError(
            "reading a config needs transformers", hint='pip install "tensoradapt[hf]", or give the safetensors file'
        ) from None
    for file in (path, *path.parent.glob("config.*.json")):  # a config can name one of another version beside it
        _check_counts(file, _read(file))
    try:
        folder = path.parent if path.name == "config.json" else path
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        _disarm(config)
        classes = list(_classes(transformers, config.architectures))
        with _bounded(), torch.device("meta"):
            made = (
                classes[0](config) if classes else transformers.AutoModel.from_config(config, trust_remote_code=False)
            )
    except Exception as error:  # whatever a model's constructor makes of sizes that do not fit
        raise _refusal(path, error, transformers.CONFIG_MAPPING) from None
    experts = sum(p.shape[0] for name, p in made.named_parameters() if p.dim() == 3 and "expert" in name)
    if experts > MAX_MODULES:
        raise FileError(
            f"{path} describes too many experts", got=experts, expected=f"at most {MAX_MODULES:,}", hint=FIT
        )
    return made  # type: ignore[no-any-return]


def _read(file: Path) -> Any:
    """A config's JSON as transformers reads it: of a key that is there twice the last; nothing where it is none."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _check_counts(path: Path, fields: Any, name: str = "") -> None:
    """Raise FileError where a config counts more layers, experts or labels than any model has, made one by one."""
    inner = fields.items() if isinstance(fields, dict) else [(name, one) for one in fields]
    for key, value in inner:
        if isinstance(value, dict | list):
            _check_counts(path, value, key)
        elif type(value) is int and (most := _most(key)) is not None and value > most:
            raise FileError(f"{path} counts too many of {key}", got=value, expected=f"at most {most:,}", hint=FIT)


def _most(key: str) -> int | None:
    """The most of what a field counts; None where it counts nothing that is made one by one."""
    return next((most for kind, most in COUNTED.items() if kind.search(key)), None)


@contextmanager
def _bounded() -> Iterator[None]:
    """Raise ValueError in this thread where more modules are made than any model has."""
    here, made = get_ident(), count()

    def see(*_: object) -> None:
        if get_ident() == here and next(made) > MAX_MODULES:
            raise ValueError(f"it describes more than {MAX_MODULES:,} modules")

    handle = register_module_module_registration_hook(see)
    try:
        yield
    finally:
        handle.remove()


def _classes(transformers: Any, names: Any) -> Iterator[Any]:
    """The models among what a config calls its architectures: transformers has other things of such names too."""
    for name in names if isinstance(names, list | tuple) else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            yield found


def _disarm(part: Any) -> None:
    """Take out of a config, and of those within it, what would fetch or run something when the model is made.

    Raises ValueError on a part that lies elsewhere.
    """
    own = part if isinstance(part, dict) else part.__dict__
    own.pop("auto_map", None)
    for name in COMPUTED:
        for key in (name, f"{name}_internal"):
            if own.get(key) not in (None, *PLAIN):
                own[key] = None
    for value in list(own.values()):
        for inner in value if isinstance(value, list | tuple) else [value]:
            if isinstance(inner, str) and inner.startswith(ELSEWHERE):
                raise ValueError(f"a part of it lies elsewhere: {inner}")
            if isinstance(inner, dict) or hasattr(inner, "to_dict"):
                _disarm(inner)


def _refusal(path: Path, error: Exception, known: Container[str]) -> FileError:
    """The error on a config that no class of transformers can be built of."""
    fields = _fields(path)
    kind = fields.get("model_type")
    if "auto_map" in fields and not (isinstance(kind, str) and kind in known):
        return FileError(
            f"{path} describes a model by code of its own, which is never run",
            got=f"auto_map, and model_type {kind!r}",
            expected="a model_type that transformers knows",
            hint="load the model where you trust its code, and give the module; or give its safetensors files",
        )
    if sys.flags.optimize > 1:
        return FileError(
            "transformers builds no model where Python leaves docstrings out",
            got=f"PYTHONOPTIMIZE={sys.flags.optimize}",
            expected="PYTHONOPTIMIZE=1 or less",
            hint=f"give the safetensors files of {path.parent.name} in place of its config",
        )
    said = next(iter(str(error).splitlines()), type(error).__name__)
    return FileError(f"{path} is no config of a model that transformers can build", got=said, hint=FIT)
