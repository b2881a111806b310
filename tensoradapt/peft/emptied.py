"""A model's own class with weights that take no memory, for libraries that do things by class and config.

Invariant: the model that is given, its weights and its flags stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tensoradapt.errors import AdapterError
from tensoradapt.host import HOST
from tensoradapt.quantised import is_plain

MAPS = ("hf_device_map", "_hf_hook")  # by which a reader would move what is not there


def emptied(model: nn.Module, filled: Collection[str] = ()) -> nn.Module:
    """A copy of a model without its adapters: every plain parameter one zero seen from all sides.

    Those that are `filled` have memory of their own, to be written to. Raises AdapterError on what cannot be copied.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or not is_plain(parameter):
            memo[id(parameter)] = parameter
        else:
            memo[id(parameter)] = _zero(parameter, filled=name in filled)
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:  # whatever an attribute of a user's module does not allow
        raise AdapterError(
            f"the {type(model).__name__} cannot be copied, to re-open the export on it",
            got=f"{type(error).__name__}: {error}",
            hint="give its config or folder as model=",
        ) from error
    for module in made.modules():
        module._modules.pop(HOST, None)
        for name in MAPS:
            module.__dict__.pop(name, None)
    return made


def _zero(parameter: nn.Parameter, *, filled: bool) -> nn.Parameter:
    """A parameter of the shape and dtype on the CPU, one number large unless it is to be written to."""
    shape = tuple(parameter.shape)
    zeros = torch.zeros(shape if filled else (), dtype=parameter.dtype)
    return nn.Parameter(zeros.expand(shape), requires_grad=False)
