"""`adapter_config.json`: what is written, and what is believed of one that is read.

Invariant: a value that PEFT would take for something else, or that changes the delta in a way not known here, is
refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensoradapt.errors import FileError, SpecError
from tensoradapt.expressions import cost
from tensoradapt.paths import check_regular
from tensoradapt.peft.patterns import ends, valued
from tensoradapt.peft.trained import Trained
from tensoradapt.sites import read_object

MAX_STEPS, LONG = 300_000_000, 100  # of all expressions on all modules, a few seconds; characters of a long path
KEY = r"(.*\.)?({})$"
EXPRESSIONS = {
    **dict.fromkeys(("target_modules", "exclude_modules"), "{}"),
    **dict.fromkeys(("layers_pattern", "rank_pattern", "alpha_pattern"), KEY),
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_BYTES, MAX_RANK = 4_000_000, 1 << 20
_FAMILIES = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha", "VERA": ""}  # the name of alpha
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# Read here, or without effect on the delta.
_KNOWN = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("lora_dropout", "vera_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "fan_in_fan_out"),
    *("init_lora_weights", "init_weights", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config"),
    *("use_effective_conv2d", "decompose_both", "decompose_factor", "projection_prng_key", "save_projection"),
    *("target_parameters", "d_initial", "ensure_weight_tying", "enable_lora", "merge_weights"),
}
# Options that make a delta other than the family's.
_REFUSED = {
    "use_dora": "DoRA scales the rows of the tuned weight: its delta depends on the base",
    "lora_bias": "a bias beside B is no change of a weight",
    "use_qalora": "QALoRA pools the input",
    "layer_replication": "layers are repeated",
    "trainable_token_indices": "single rows of the embedding are trained",
    "alora_invocation_tokens": "aLoRA acts on some tokens alone",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow routes between adapters",
    "monteclora_config": "MonteCLoRA samples its factors",
    "kasa_config": "KaSA changes the base weight",
}
# Initialisations that change the base weight, so that B A alone is not the delta.
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Methods that change no weight that PEFT could merge into: prompts, and modules that act beside the model's.
_BY_INPUT = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT", "CARTRIDGE"),
    *("XLORA", "POLY", "LILY", "SHADOW", "alora_invocation_tokens", "arrow_config"),
)
BY_INPUT = "it changes no weight, and PEFT cannot merge it: serve it with PEFT, or train a LoRA"
FROM_PEFT = "imported from a PEFT folder, whose factors an export keeps"
MERGE_FIRST = "merge it with PEFT (merge_and_unload) and extract the delta of the merged model"


@dataclass(frozen=True)
class Config:
    """A config that was believed: its family, and its values as they stand in the file."""

    file: Path
    family: str
    values: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    def rank(self, path: str) -> int:
        """A module's rank under PEFT's rules."""
        return int(self._own("rank_pattern", path, self.values["r"]))

    def alpha(self, path: str) -> float:
        """A module's alpha under PEFT's rules."""
        return float(self._own("alpha_pattern", path, self.values.get(_FAMILIES[self.family], 8)))

    def _own(self, patterns: str, path: str, default: Any) -> Any:
        path = path.partition(".base_layer")[0]
        parameters = self.values.get("target_parameters") or ()
        path = f"{path}.weight" if any(ends(name, f"{path}.weight") for name in parameters) else path
        try:
            return valued(self.values.get(patterns) or {}, path, default)
        except SpecError as error:
            raise FileError(f"{patterns} in {self.file}: {error}") from None

    def check_soon(self, modules: int) -> None:
        """Raise FileError where an expression is none, or all of them would take long on so many modules."""
        steps = 0.0
        for key, wrap in EXPRESSIONS.items():
            found = self.values.get(key) or ()
            texts = (
                [found] if isinstance(found, str) else found if key.endswith("pattern") else ()
            )  # a list is of names
            try:
                steps += sum(cost(text, LONG, wrap) for text in texts)
            except SpecError as error:
                raise FileError(f"{key} in {self.file}: {error}") from None
        if steps * max(modules, 1) > MAX_STEPS:
            raise FileError(
                f"the expressions in {self.file} would take long on {modules} modules",
                hint="write one rank for all, or full module paths under target_modules",
            )


def read_config(folder: Path) -> Config:
    """Read and check a folder's config. Raises FileError naming the file and the key at fault."""
    file = folder / CONFIG
    if not file.exists():
        raise FileError(f"no {CONFIG} in {folder}", expected=f"a PEFT folder: {CONFIG} and {WEIGHTS}")
    check_regular(file)
    try:
        text = file.read_bytes() if file.stat().st_size <= MAX_BYTES else b""
        values = read_object(text)
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{file} cannot be read as JSON", got=str(error)[:200], hint="download it again") from None
    family = values.get("peft_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise FileError(
            f"peft_type in {file} is not served",
            got=repr(family)[:80],
            expected=f"{', '.join(_FAMILIES)}, in capitals as PEFT wants it",
            hint=BY_INPUT if family in _BY_INPUT else MERGE_FIRST,
        )
    _check_values(file, family, values)
    unknown = sorted(key for key, value in values.items() if key not in {*_KNOWN, *_REFUSED} and value)
    notes = (f"{file.name} has options that are not known here: {', '.join(unknown)}",) if unknown else ()
    return Config(file, family, values, notes)


def _check_values(file: Path, family: str, values: Mapping[str, Any]) -> None:
    alpha = _FAMILIES[family]
    checks: list[tuple[str, Any, Callable[[Any], bool], str]] = [
        ("r", values.get("r"), _is_rank, "a positive integer"),
        *([(alpha, values.get(alpha, 8), _is_number, "a finite number")] if alpha else []),
        *(
            (f"rank_pattern[{k!r}]", v, _is_rank, "a positive integer")
            for k, v in _mapping(file, values, "rank_pattern")
        ),
        *((f"alpha_pattern[{k!r}]", v, _is_number, "a number") for k, v in _mapping(file, values, "alpha_pattern")),
        ("target_modules", values.get("target_modules"), _is_names, "a list of names, or one expression"),
        ("exclude_modules", values.get("exclude_modules"), _is_names, "a list of names, or one expression"),
        *(
            (key, values.get(key) or [], _is_list, "a list of names")
            for key in ("modules_to_save", "target_parameters")
        ),
        ("layers_pattern", values.get("layers_pattern"), _is_names, "a name, or a list of names"),
        ("layers_to_transform", values.get("layers_to_transform"), _are_numbers, "a number, or a list of numbers"),
        ("use_rslora", values.get("use_rslora") or False, lambda v: type(v) is bool, "true or false"),
        ("bias", values.get("bias") or "none", lambda v: v in ("none", "all", f"{family.lower()}_only"), "none or all"),
        ("projection_prng_key", values.get("projection_prng_key") or 0, _is_seed, "an integer"),
    ]
    for key, value, good, expected in checks:
        if not good(value):
            raise FileError(f"{key} in {file} is no {key.partition('[')[0]}", got=repr(value)[:80], expected=expected)
    bare = [name for name in values.get("target_parameters") or () if name.rpartition(".")[2] != "weight"]
    if bare:
        raise FileError(
            f"target_parameters in {file} cannot be imported: {bare[0]} is no weight of a module, but experts, say",
            hint=MERGE_FIRST,
        )
    for key, reason in _REFUSED.items():
        if values.get(key):
            raise FileError(
                f"{key} in {file} cannot be imported: {reason}",
                got=repr(values[key])[:80],
                hint=BY_INPUT if key in _BY_INPUT else MERGE_FIRST,
            )
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGING):
        raise FileError(
            f"init_lora_weights in {file} is {start!r}, which changes the base weight: B A is not the delta",
            hint="save it with PEFT's path_initial_model_for_weight_conversion, or " + MERGE_FIRST,
        )


def _mapping(file: Path, values: Mapping[str, Any], key: str) -> Sequence[tuple[str, Any]]:
    found = values.get(key) or {}
    if not hasattr(found, "items"):
        raise FileError(f"{key} in {file} is no mapping", got=repr(found)[:80], expected="module path -> number")
    return list(found.items())


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _is_seed(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 63


def _is_list(value: Any) -> bool:
    return type(value) is list and all(type(name) is str for name in value)


def _are_numbers(value: Any) -> bool:
    return value is None or all(type(number) is int for number in (value if type(value) is list else [value]))


def _is_names(value: Any) -> bool:
    return value is None or type(value) is str or _is_list(value)


def config_of(
    rank: int,
    targets: list[str] | str,
    *,
    patterns: Mapping[str, int],
    base: str | None,
    revision: str | None,
    task: str | None,
    turned: bool,
    trained: Trained,
) -> dict[str, Any]:
    """The config of a LoRA whose scale stands in its factors: alpha equals the rank, everywhere."""
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": trained.bias,
        "fan_in_fan_out": turned,
        "init_lora_weights": True,
        "modules_to_save": list(trained.modules) or None,
        "target_modules": targets,
        "rank_pattern": dict(patterns),
        "alpha_pattern": dict(patterns),
    }
