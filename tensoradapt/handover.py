"""Handing over: what `save_pretrained` writes of a model that carries adapters.

Invariant: no folder that `from_pretrained` opens lacks a change that the model had without a word of it.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tensoradapt.adapter import Adapter
from tensoradapt.host import Host, host_of, slashed
from tensoradapt.writing.atomic import atomic

SAVE = "save_pretrained"
WEIGHTS = "model.safetensors"  # the name under which loaders look for a model's weights


class Save:
    """A model's method that writes it, while adapters are attached: its own, with a warning where one is not merged."""

    def __init__(self, model: nn.Module, method: str) -> None:
        self._model = [model]  # in a list: no registered reference
        self._method = method

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The model's own method, whose signature this one has."""
        model = self._model[0]
        return getattr(type(model), self._method).__get__(model)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Write the model."""
        _warn(self._model[0], self._method)
        return self.__wrapped__(*args, **options)


class SavePretrained(Save):
    """A model's `save_pretrained` while adapters are attached.

    `only` is the adapter that is written in the model's place, as a `Trainer`'s checkpoints want it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, SAVE)
        self.only: Adapter | None = None

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        """Write the model, or the adapter alone."""
        if self.only is None or self.only.merged:
            _warn(self._model[0], SAVE)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="save writes the base")  # by which some models do it
                return self.__wrapped__(save_directory, *args, **options)
        if args[0] if args else options.get("is_main_process", True):
            write_checkpoint(self.only, Path(save_directory), options.get("state_dict"))
        return None


def stand_in(model: nn.Module, host: Host) -> SavePretrained | None:
    """Put methods in the place of the model's own, once; None where it has none of the name."""
    if hasattr(type(model), SAVE) and SAVE not in host.shadowed:
        host.shadow(model, SAVE, SavePretrained(model))
        if callable(getattr(type(model), "save", None)):  # a SentenceTransformer
            host.shadow(model, "save", Save(model, "save"))
    return model.__dict__.get(SAVE)


def _warn(model: nn.Module, method: str) -> None:
    """Warn where an adapter is not merged into what is about to be written."""
    adapters = host_of(model)._modules.items()  # type: ignore[union-attr]
    unmerged = [name for name, adapter in adapters if not adapter.merged]  # type: ignore[union-attr]
    if unmerged:
        warnings.warn(_says(method, unmerged), stacklevel=3)


def _says(method: str, names: list[str]) -> str:
    return (
        f"{method} writes the base: {', '.join(map(repr, names))} is not merged, and loading the folder will not "
        "bring it back. Call adapter.merge_and_detach() first for a model of its own, adapter.save(path) for the "
        "adapter; with the Trainer, pass callbacks=[tensoradapt.trainer.AdapterCallback(adapter)]"
    )


def state_keys(adapter: Adapter) -> dict[str, str]:
    """Every tensor's key in the adapter file, and the one in the model's state dictionary."""
    prefix = next(name for name, module in adapter._model[0].named_modules() if module is adapter)
    extras = {f"extra.{path}": f"{prefix}.extra.{slashed(path)}" for path in adapter.plan.extras}
    return {key: extras.get(key, f"{prefix}.stored.{key}") for key in adapter.tensors()}


def write_checkpoint(adapter: Adapter, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write an adapter's file and, under the name where trainers look for weights, a link to it.

    Tensors come from `state`, a model's state dictionary, where it has them: gathered ones, say. The file is never
    changed in place, so that the link may be a hard one.
    """
    saved = adapter.as_saved()
    gathered = {key: state[name] for key, name in state_keys(adapter).items() if name in state} if state else {}
    file = replace(saved, tensors={**saved.tensors, **gathered}).save(
        folder, made="ta.attach(model, spec), and training with the Trainer of transformers"
    )
    with atomic(folder / WEIGHTS) as temporary:
        try:
            os.link(file, temporary)
        except OSError:  # the file system has none
            shutil.copyfile(file, temporary)
