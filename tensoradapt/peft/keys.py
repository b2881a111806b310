"""The keys of `adapter_model.safetensors`: which module and which part of its delta a tensor is.

Invariant: every key has a meaning, or the file is refused by the key's name; no module has half of its factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tensoradapt.errors import FileError
from tensoradapt.peft.config import MERGE_FIRST, Config

PREFIX = "base_model.model."
_LOKR_FIRST = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
_LOKR_SECOND = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
# The sets of parts that make one module's delta whole.
WHOLE: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "LORA": (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")),
    "LOHA": (_HADA, (*_HADA, "hada_t1", "hada_t2")),
    "LOKR": tuple((*first, *second) for first in _LOKR_FIRST for second in _LOKR_SECOND),
    "VERA": (("vera_lambda_b", "vera_lambda_d"),),
}
_SHARED = ("base_model.vera_A", "base_model.vera_B")
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "shared")
HEADS = ("lm_head", "embed_out")
IDLE = (".lora_velora_embed",)  # what no delta is made of: VeLoRA's projection in the backward pass
_REASONS = {
    "lora_magnitude_vector": "DoRA scales the rows of the tuned weight: its delta depends on the base",
    "lora_B.bias": "a bias beside B is no change of a weight",
    "token_adapter": "single rows of the embedding are trained",
}


@dataclass(frozen=True)
class Keys:
    """The keys of a file by their meaning: parts of modules, parts shared by all, and parameters trained whole.

    `restored` are weights of the base's own that PEFT puts back when it loads the folder, by their names in the model.
    """

    modules: Mapping[str, Mapping[str, str]]
    shared: Mapping[str, str]
    extras: Mapping[str, str]
    restored: Mapping[str, str]


def sort_keys(file: str, config: Config, keys: Iterable[str]) -> Keys:
    """Give every key its meaning. Raises FileError on keys that are mis-prefixed, unexpected or missing."""
    modules: dict[str, dict[str, str]] = {}
    shared: dict[str, str] = {}
    rest: dict[str, str] = {}
    parts = sorted({part for whole in WHOLE[config.family] for part in whole}, key=len, reverse=True)
    for key in keys:
        path = _within(file, config, key)
        part = next((part for part in parts if path.endswith(f".{part}")), None)
        if path.endswith(IDLE):
            continue
        if not path:
            shared[key.rpartition(".")[2]] = key
        elif part is None:
            rest[path] = key
        else:
            modules.setdefault(path.removesuffix(f".{part}"), {})[part] = key
    for path, held in modules.items():
        _check_whole(file, config, path, held)
    extras, restored = _extras(file, config, modules, rest)
    if not modules:
        raise FileError(f"{file} adapts no module", got=f"{len(rest)} other tensors", expected=f"a {config.family}")
    return Keys(modules, shared, extras, restored)


def _within(file: str, config: Config, key: str) -> str:
    """A key without PEFT's prefix; empty for what all modules share."""
    if key in _SHARED and config.family == "VERA":
        return ""
    if not key.startswith(PREFIX):
        raise FileError(
            f"{key!r} in {file} has no prefix {PREFIX!r}: PEFT would warn at most, and add nothing",
            hint=f"save it with save_pretrained, or rename the key to {PREFIX + key!r}",
        )
    return key.removeprefix(PREFIX)


def _check_whole(file: str, config: Config, path: str, held: Mapping[str, str]) -> None:
    wholes = WHOLE[config.family]
    if any(set(held) == set(whole) for whole in wholes):
        return
    nearest = min(wholes, key=lambda whole: len(set(held) ^ set(whole)))
    missing = [f"{PREFIX}{path}.{part}" for part in nearest if part not in held]
    extra = [held[part] for part in held if part not in nearest]
    raise FileError(
        f"{file} lacks the key {missing[0]!r}" if missing else f"{file} has an unexpected key {extra[0]!r}",
        got=f"of {path}: {', '.join(held)}",
        expected=", ".join(nearest),
        hint="the file is not whole: download or save it again",
    )


def _extras(
    file: str, config: Config, modules: Mapping[str, object], rest: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Parameters that were trained whole, and those of the base's own that PEFT puts back beside its factors."""
    extras, restored = {}, {}
    for path, key in rest.items():
        owner, _, leaf = path.rpartition(".")
        module = owner.removesuffix(".base_layer")
        if _trained(config, module, leaf):
            extras[f"{module}.{leaf}"] = key
        elif module in modules if module != owner else module.rpartition(".")[2] in (*EMBEDDINGS, *HEADS):
            restored[f"{module}.{leaf}"] = key
        else:
            reason = next((why for name, why in _REASONS.items() if name in path), None)
            raise FileError(
                f"{file} has an unexpected key {key!r}{f': {reason}' if reason else ''}",
                expected=f"factors of a {config.family}, or parameters under modules_to_save",
                hint=MERGE_FIRST if reason else "PEFT would drop it without a word: remove it, or mend the config",
            )
    return extras, restored


def _trained(config: Config, module: str, leaf: str) -> bool:
    """Whether PEFT trains a parameter whole: a bias, or within a module whose name ends in one of modules_to_save."""
    names = tuple(config.values.get("modules_to_save") or ())
    parts = module.split(".")
    named = any(".".join(parts[: k + 1]).endswith(names) for k in range(len(parts)))
    return named or (leaf == "bias" and (config.values.get("bias") or "none") != "none")
