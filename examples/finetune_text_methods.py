"""The methods of `finetune_text.py`: full fine-tuning, PEFT's LoRA, and tensoradapt's adapters, all with one head."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

import tensoradapt as ta
from tensoradapt.errors import SpecError

HEAD = ("pooler", "pre_classifier", "classifier", "score")  # what transformers calls the parts of a classification head
SPEC_FILES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Method:
    """One row of the table: `name` is `full`, `peft-lora`, a preset or a spec file; `rates` are its learning rates."""

    name: str
    options: dict[str, Any]
    rates: tuple[float, ...]

    @property
    def label(self) -> str:
        """Name and options as they are written on the command line, without the rate."""
        options = ",".join(f"{k}={'+'.join(v) if isinstance(v, list) else v}" for k, v in self.options.items())
        return f"{self.name}:{options}" if options else self.name


def parse_rates(text: str) -> tuple[float, ...]:
    """Read learning rates separated by `/` or `,`."""
    try:
        rates = tuple(float(part) for part in re.split("[/,]", text))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise SpecError("a learning rate cannot be read", got=text, expected="2e-3, or 1e-3/2e-3 to choose from")
    return rates


def parse_value(text: str) -> Any:
    """Read `16`, `2e-3` and `true` as JSON does, `query+value` as a list, and anything else as itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text.split("+") if "+" in text else text


def parse_method(text: str, rates: tuple[float, ...]) -> Method:
    """Read `NAME[:key=value,...]`; `lr=` overrides `rates`, every other key is the method's own."""
    name, _, tail = text.partition(":")
    parts = tail.split(",") if tail else []
    pairs = dict(part.partition("=")[::2] for part in parts)
    if not name or len(pairs) < len(parts) or not all(key and value for key, value in pairs.items()):
        raise SpecError("a method cannot be read", got=text, expected="NAME:key=value,... as in lotr:rank=16,lr=2e-3")
    rates = parse_rates(pairs.pop("lr")) if "lr" in pairs else rates
    options = {key: parse_value(value) for key, value in pairs.items()}
    if name != "full" and not name.endswith(SPEC_FILES):
        targets = options.get("targets", ["query", "value"])
        options["targets"] = [targets] if isinstance(targets, str) else targets
    return Method(name, options, rates)


def head_of(model: nn.Module) -> list[str]:
    """Return the paths of the head's modules, which every method trains in full."""
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in HEAD]
    if not paths:
        raise SpecError("no classification head found", got=type(model).__name__, expected=" or ".join(HEAD))
    return paths


def use_full(model: nn.Module, method: Method, seed: int) -> tuple[nn.Module, None]:
    """Train every weight."""
    if method.options:
        raise SpecError("full fine-tuning has no option but lr", got=", ".join(method.options))
    return model, None


def use_peft(model: nn.Module, method: Method, seed: int) -> tuple[nn.Module, None]:
    """Wrap the model in PEFT's LoRA."""
    import peft

    names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
    if unknown := ", ".join(method.options.keys() - names):
        raise SpecError("peft-lora lacks an option", got=unknown, expected=", ".join([*names, "lr"]))
    options = {names[key]: value for key, value in method.options.items()}
    try:
        return peft.get_peft_model(model, peft.LoraConfig(modules_to_save=head_of(model), **options)), None
    except (TypeError, ValueError) as error:
        raise SpecError("PEFT refuses the method", got=method.label, hint=str(error)) from error


def use_ours(model: nn.Module, method: Method, seed: int) -> tuple[nn.Module, Any]:
    """Attach the adapter of a preset, or of a spec file, with the head among the modules it trains."""
    if method.name.endswith(SPEC_FILES):
        spec = _with_head(ta.Spec.load(method.name), head_of(model))
    elif method.name not in ta.PRESETS:
        raise SpecError(f"no method {method.name!r}", expected=f"a spec file, or {', '.join([*USE, *ta.PRESETS])}")
    else:
        spec = ta.preset(method.name, train=head_of(model), **method.options)
    return model, ta.attach(model, spec, seed=seed)


def _with_head(spec: ta.Spec, head: list[str]) -> ta.Spec:
    data = spec.to_dict()
    first = data["rules"][0]
    first["train"] = [*first.get("train", []), *(path for path in head if path not in first.get("train", []))]
    return ta.Spec.from_dict(data)


USE = {"full": use_full, "peft-lora": use_peft}


def apply(model: nn.Module, method: Method, seed: int) -> tuple[nn.Module, Any]:
    """Return the model made ready to train by the method, and our adapter where it is one."""
    return USE.get(method.name, use_ours)(model, method, seed)


def num_trainable(module: nn.Module) -> int:
    """Count the numbers that training moves, each once."""
    return sum(value.numel() for value in module.parameters() if value.requires_grad)
