"""Hosts: how a model carries its adapters, and how those hold their tensors.

Invariant: what is registered on a model under `HOST` is never a part of the model itself.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tensoradapt.errors import AdapterError
from tensoradapt.plan import Plan
from tensoradapt.running import Lock

HOST = "tensoradapt"  # the name under which adapters register themselves on a model
NONE = "tensoradapt: no attribute"  # a string, so that it is itself in a copy of the model too


class Host(nn.Module):
    """What a model carries its adapters in, and how it was before the first one came.

    `flags` says which parameters were trainable, `quantised` whether the model said of itself that it is quantised,
    `shadowed` what its attributes were that have been set. The state dictionary has no keys of adapters that are
    merged: their deltas stand in the base's weights.
    """

    def __init__(self, flags: Mapping[str, bool], *, quantised: bool = False) -> None:
        super().__init__()
        self.flags, self.quantised = dict(flags), quantised
        self.lock = Lock()
        self.shadowed: dict[str, Any] = {}
        self.register_state_dict_post_hook(_without_merged)
        self.register_state_dict_post_hook(_without_place)
        self.register_load_state_dict_pre_hook(_check_of_merged)
        self.register_load_state_dict_post_hook(_merged_may_lack)

    @property
    def merged(self) -> list[str]:
        """The adapters whose deltas stand in the base, in the order in which they were merged."""
        adapters: list[Any] = list(self._modules.values())
        merges = [adapter._merge for adapter in adapters if adapter.merged]
        return [merge.name for merge in sorted(merges, key=lambda merge: merge.order)]

    @contextmanager
    def alone(self, act: str) -> Iterator[Host]:
        """Let no pass of the model begin meanwhile, as far as no compiler runs it, and nobody else write it.

        Raises AdapterError where a pass runs.
        """
        with self.lock.held:
            for adapter in self._modules.values():
                if adapter.passes.running.anywhere:  # type: ignore[union-attr]
                    raise AdapterError(
                        f"a forward pass of the model is running: {act} would change what it computes with",
                        hint="let the pass end first, under a lock of your own where threads serve requests",
                    )
            yield self

    def next_merge(self, name: str) -> int:
        """Where a merge stands among others. Raises AdapterError where one of another adapter was interrupted."""
        merges = [adapter._merge for other, adapter in self._modules.items() if other != name]  # type: ignore[union-attr]
        for merge in filter(None, merges):
            merge.check_ended()  # type: ignore[operator,union-attr]
        return 1 + max((merge.order for merge in filter(None, merges)), default=0)  # type: ignore

    def shadow(self, model: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of the model itself, until `restore`."""
        self.shadowed.setdefault(name, model.__dict__.get(name, NONE))
        model.__dict__[name] = value

    def restore(self, model: nn.Module) -> None:
        """Make the model what it was before its first adapter: its flags, its attributes, and no host."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad = self.flags.get(name, parameter.requires_grad)
        if self.quantised:
            model.is_quantized = True  # type: ignore[assignment]
        for name, value in self.shadowed.items():
            model.__dict__[name] = value
            if value == NONE:
                del model.__dict__[name]
        self.shadowed.clear()

    def dismiss(self, model: nn.Module, name: str) -> None:
        """Take an adapter off the model; with the last one the host goes too."""
        if {*self._modules} <= {name}:
            self.restore(model)  # which may be done twice, where an interrupt comes between
            home_of(model)._modules.pop(HOST, None)
        else:
            self._modules.pop(name, None)

    def trains_on(self, model: nn.Module) -> bool:
        """Whether a parameter of the model is trained that is no merged adapter's."""
        merged = {id(p) for name in self.merged for p in self._modules[name].parameters()}  # type: ignore[union-attr]
        return any(p.requires_grad and id(p) not in merged for p in model.parameters())

    def forward(self, x: Any) -> Any:
        """The identity: `nn.Sequential` calls everything that is registered on it."""
        return x

    def __len__(self) -> int:
        return len(self._modules)


def home_of(model: nn.Module) -> nn.Module:
    """The module that a model's adapters are registered on: itself, or where it lists its children, the first of them.

    What is registered on a list is a member of it: it would be called, counted, and saved as if it were a layer.
    """
    while isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        first = next((child for child in model.children() if not isinstance(child, torch.jit.ScriptModule)), None)
        if first is None:
            break
        model = first
    return model


def host_of(model: nn.Module) -> Host | None:
    """What a model carries its adapters in; None where it has none."""
    return home_of(model)._modules.get(HOST)  # type: ignore[return-value]


def carrier(model: nn.Module, name: str, adapter: nn.Module) -> Host:
    """What carries an adapter. Raises AdapterError where it is not attached."""
    host = host_of(model)
    if host is None or host._modules.get(name) is not adapter:
        raise AdapterError(
            f"adapter {name!r} is not attached",
            hint="attach(model, spec) makes a new one, load(path, model) a saved one",
        )
    return host


def _without_merged(host: Host, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [k for k in state if k.startswith(tuple(f"{prefix}{name}." for name in host.merged))]:
        del state[key]


def _without_place(host: Host, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """No adapter, where accelerate asks what a device map has no place for: adapters have theirs, see `Bank`."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "check_device_map":
        frame = frame.f_back  # type: ignore[assignment]
    for key in [k for k in state if k.startswith(prefix)] if frame is not None else ():
        del state[key]


def _check_of_merged(host: Host, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Raise AdapterError on a state dictionary with the factors of a merged adapter: its base lacks their deltas."""
    for name in host.merged:
        if any(key.startswith(f"{prefix}{name}.") for key in state):
            raise AdapterError(
                f"adapter {name!r} is merged, and the state dictionary is of a model where it is not: its base has no "
                "deltas",
                hint="unmerge(), then load it",
            )


def _merged_may_lack(host: Host, found: Any) -> None:
    merged = tuple(f"{HOST}.{name}." for name in host.merged)
    found.missing_keys[:] = [key for key in found.missing_keys if not key[key.find(f"{HOST}.") :].startswith(merged)]


def copied(adapter: nn.Module, memo: dict[int, Any]) -> Any:
    """What `copy.deepcopy` makes of an adapter: with its model's copy, or alone, of the tensors and with no hook."""
    alone = {} if id(adapter._model[0]) in memo else {"_model": [*adapter._model], "_handles": [], "_merge": None}  # type: ignore
    memo[id(adapter)] = made = object.__new__(type(adapter))
    made.__dict__ |= copy.deepcopy({k: v for k, v in adapter.__dict__.items() if k not in alone}, memo) | alone
    return made


class Bank(nn.Module):
    """Tensors, or banks of them, by name. Unlike `nn.ParameterDict` it takes any: `values`, say, or `keys`.

    accelerate loads what it offloads around a module's call, and a bank is never called: its tensors stay themselves,
    and go where the hook says that the module runs.
    """

    def register_forward_hook(self, hook: Any, **options: Any) -> Any:
        """A hook as on any module. Raises AdapterError on Opacus', which would wait for a call that does not come."""
        if type(getattr(hook, "__self__", None)).__module__.partition(".")[0] == "opacus":
            raise AdapterError(
                "Opacus has no gradients of single examples for factors: it takes them from calls of the modules that "
                "hold parameters, and factors are read by other modules' hooks",
                hint="torch.func has them: vmap(grad(loss), (None, 0)), where loss calls torch.func.functional_call",
            )
        return super().register_forward_hook(hook, **options)

    @property
    def _old_forward(self) -> Any:
        raise AttributeError("accelerate has no hook on a bank")

    @_old_forward.setter
    def _old_forward(self, forward: Any) -> None:  # which accelerate sets before it moves the tensors
        self.__dict__["_kept"] = dict(self._parameters)

    @property
    def _hf_hook(self) -> Any:
        raise AttributeError("accelerate has no hook on a bank")

    @_hf_hook.setter
    def _hf_hook(self, hook: Any) -> None:  # and this after it has
        self._parameters.update(self.__dict__.pop("_kept", {}))
        device = getattr(hook, "execution_device", None)
        if device is not None:
            self._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device), recurse=False)

    def __getitem__(self, name: str) -> Any:
        return self._parameters[name] if name in self._parameters else self._modules[name]

    def __setitem__(self, name: str, held: nn.Parameter | Bank) -> None:
        names: dict[str, Any] = self._parameters if isinstance(held, nn.Parameter) else self._modules  # type: ignore[assignment]
        names[name] = held


def slashed(path: str) -> str:
    """A parameter's path as one name: PyTorch takes dots for levels."""
    return path.replace(".", "/")


def sources(plan: Plan) -> dict[str, list[tuple[str, str, str, tuple[int, ...], bool]]]:
    """Where every group's tensors stand: node, bank, name, shape, and whether it is cut from a larger one."""
    banked = _banked(plan)
    return {
        g.name: [(n, *key.rpartition(".")[::2], g.diagram.shape(n), key in banked) for n, key in g.store.items()]
        for g in plan.groups
    }


def _banked(plan: Plan) -> set[str]:
    return (
        {key for key in plan.factors if sum(key in g.store.values() for g in plan.groups) > 1}
        if any(g.rule.shapes == "slices" for g in plan.groups)
        else set()
    )
