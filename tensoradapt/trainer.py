"""The Hugging Face `Trainer`: checkpoints that hold the adapter alone, and training that goes on from them.

Invariant: whatever is trained stands in the checkpoint, or training does not begin.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from tensoradapt.adapter import Adapter
from tensoradapt.errors import AdapterError
from tensoradapt.handover import SAVE, WEIGHTS, stand_in, state_keys, write_checkpoint


class AdapterCallback:
    """A callback of the `Trainer` for one adapter: its checkpoints hold that adapter, not the model.

    `Trainer(..., callbacks=[AdapterCallback(adapter)])`. A checkpoint's folder is an adapter's folder, which `load`
    reads, with the trainer's own files beside it: `train(resume_from_checkpoint=...)` goes on from it,
    `load_best_model_at_end` loads it, `save_model` writes the same. Raises AdapterError where training begins and
    something is trained that no such checkpoint holds.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._reader = _Reader(adapter)
        self._seen = False
        saver = stand_in(adapter._model[0], adapter._host())
        if saver is not None:
            saver.only = adapter

    def __getattr__(self, event: str) -> Callable[..., None]:
        """Nothing, at all other events."""
        if not event.startswith("on_"):
            raise AttributeError(event)
        return _nothing

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Raise AdapterError where a checkpoint would not hold all that is trained, or one was not read."""
        if not any(module is self.adapter for module in model.modules()):
            raise AdapterError(
                f"adapter {self.adapter.name!r} is not on the model that is trained",
                hint="give Trainer the model that the adapter is attached to (model=, not model_init=)",
            )
        mine = {id(parameter) for parameter in self.adapter.parameters()}
        others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in mine]
        if others:
            raise AdapterError(
                f"{len(others)} trained parameters are no part of adapter {self.adapter.name!r}: its checkpoints lack "
                "them",
                got=", ".join(others[:4]),
                hint="name their modules at attach, train=['classifier'], or freeze them",
            )
        sharded = bool(getattr(args, "fsdp", None) or getattr(args, "deepspeed", None))  # which read their own files
        if state.global_step and not self._reader.has_read and not sharded:
            raise AdapterError(
                f"training goes on at step {state.global_step} from a checkpoint that holds no adapter",
                hint="train without resume_from_checkpoint, or give a checkpoint of this adapter",
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Warn, before the first step, of factors that no gradient has reached: what adapts there is not trained."""
        if self._seen or getattr(args, "deepspeed", None):  # which keeps gradients elsewhere
            return
        self._seen = True
        held = self.adapter.tensors().items()
        missed = [key for key, tensor in held if tensor.requires_grad and tensor.grad is None]
        if missed:
            warnings.warn(
                f"no gradient has reached {len(missed)} tensors of adapter {self.adapter.name!r} in the first step: "
                f"{', '.join(missed[:4])}{' ...' if len(missed) > 4 else ''}. Either a trainer reads these weights "
                "without calling their modules (TRL does so with lm_head), or the base passes no gradient on",
                stacklevel=2,
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the adapter in the place of a model that has no `save_pretrained` to write it by."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        written = hasattr(type(self.adapter._model[0]), SAVE) or not (folder / WEIGHTS).is_file()
        if state.is_world_process_zero and not written:
            write_checkpoint(self.adapter, folder)


def _nothing(*args: Any, **options: Any) -> None:
    """Nothing."""


class _Reader:
    """Lets a model's `load_state_dict` take the tensors of an adapter file for those of the attached adapter."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.has_read = self._mine = False
        model = adapter._model[0]
        before = model.register_load_state_dict_pre_hook(self.rename)
        after = model.register_load_state_dict_post_hook(self.report)
        adapter._handles += [before, after]

    def rename(self, module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        """Give the tensors the keys that they have in the model. Raises AdapterError on another adapter's."""
        keys = state_keys(self.adapter)
        self._mine = set(state) == set(keys)
        if self._mine:
            self._check_shapes(state)
            for key, name in keys.items():
                state[name] = state.pop(key)
        elif not set(state) & set(module.state_dict()):
            raise self._other(sorted(state)[:4], sorted(keys)[:4])
        self.has_read |= set(keys.values()) <= set(state)

    def _check_shapes(self, state: dict[str, Any]) -> None:
        for key, tensor in self.adapter.tensors().items():
            if state[key].shape != tensor.shape:
                raise self._other(f"{key} {tuple(state[key].shape)}", tuple(tensor.shape))

    def _other(self, got: object, expected: object) -> AdapterError:
        return AdapterError(
            f"the checkpoint holds another adapter than {self.adapter.name!r}",
            got=got,
            expected=expected,
            hint="attach the checkpoint's own: ta.load(checkpoint, model)",
        )

    def report(self, module: nn.Module, found: Any) -> None:
        """Say nothing of the base's weights, which no adapter file has."""
        if self._mine:
            found.missing_keys.clear()
