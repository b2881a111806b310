"""Quantised bases: which parameters hold the entries of a weight, and a model's word on whether it can be trained.

Invariant: a parameter that is not plain is never added to, decomposed or copied as if its entries were the weight's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tensoradapt.io.weights import FLOATS


def is_plain(weight: Tensor | None) -> bool:
    """Whether a parameter's entries are the weight's own: not packed, scaled by another tensor, or wrapped."""
    return weight is not None and weight.dtype in FLOATS and not _wraps(weight)


def _wraps(tensor: Any) -> bool:
    """Whether a tensor only stands for others that hold its numbers, as torchao's do, and DTensor."""
    return bool(is_traceable_wrapper_subclass(tensor))


def kind_of(weight: Tensor | None) -> str:
    """What stands in a plain weight's place, for errors: a wrapper's class, or the dtype and the shape."""
    if weight is None:
        return "no parameter"
    if _wraps(weight):
        return f"{type(weight).__name__}, which wraps the weight"
    return f"{str(weight.dtype)[6:]} of shape {tuple(weight.shape)}"


def admit_training(model: nn.Module) -> bool:
    """Clear `is_quantized` of a model that can be trained; returns whether there was something to clear.

    The Trainer of transformers refuses models that say so and carry no adapter of PEFT's ("purely quantized models").
    Where transformers says that the method of quantisation cannot be trained, the model stays as it is.
    """
    if not _says_quantised(model) or not _trainable(model):
        return False
    model.is_quantized = False  # type: ignore[assignment]
    return True


def untrainable(model: nn.Module) -> str:
    """Why transformers' Trainer will refuse a quantised model in spite of its adapter; empty where it will not."""
    if not _says_quantised(model) or _trainable(model):
        return ""
    config = getattr(model.hf_quantizer, "quantization_config", None)
    method = getattr(config, "quant_method", type(model.hf_quantizer).__name__)
    method = getattr(method, "value", method)
    return (
        f"transformers says that a base quantised with {method} in this way cannot be trained, "
        "and its Trainer will refuse it"
    )


def _trainable(model: nn.Module) -> bool:
    """Whether transformers says so, or nothing is packed: a GGUF file's weights are plain once they are read."""
    return getattr(model.hf_quantizer, "is_trainable", False) or all(map(is_plain, model.parameters()))


def _says_quantised(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False)) and getattr(model, "hf_quantizer", None) is not None
