"""The adapter: the module that owns the factors of one plan on one model. The only thing with state.

Invariant: the base model keeps every parameter name and value; `detach` leaves no trace; each factor exists once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from tensoradapt.dry_run import Reach, dry_run
from tensoradapt.errors import AdapterError
from tensoradapt.factors import Factors
from tensoradapt.hooks import unhook
from tensoradapt.host import Host, carrier, copied, host_of, slashed
from tensoradapt.io.saved import Saved
from tensoradapt.merged import Merge, check_place
from tensoradapt.merging import Target, admit, targets_of, with_copies
from tensoradapt.offload import check_here
from tensoradapt.parts import laid_out
from tensoradapt.passes import Passes
from tensoradapt.plan import Plan
from tensoradapt.scan import owner_of
from tensoradapt.sharded import gathered, shard_again, written_once
from tensoradapt.switch import Switch


class Adapter(Factors):
    """The factors of one plan on one model, and what they do to it: add, merge, be switched, be saved.

    `scale` multiplies every group's own scale; `enabled` switches the adapter on and off. Neither can be set while the
    adapter is merged.
    """

    def __init__(self, plan: Plan, name: str, model: nn.Module) -> None:
        super().__init__(plan, name)
        self.base: Mapping[str, Any] = {}  # what is known of the model that it was attached to
        self._model = [model]  # in a list: no registered reference to the model, which would recurse
        self._handles: list[Any] = []
        self._merge: Merge | None = None
        self.switch = Switch()
        self._weighted: dict[str, list[str]] = {}  # parameters delivered by weight, and the sites on them
        self._callers: dict[str, list[str]] = {}  # replaced parameters, and the modules around whose calls
        self.passes = Passes()

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        """A copy, on the model's copy where that is made too; else of the tensors, with no hook on the same model."""
        return copied(self, memo)

    @property
    def scale(self) -> float:
        """What every delta is multiplied by, beside its group's own scale; 1 after attach."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self.check_unmerged()
        if not isinstance(value, SupportsFloat) or not math.isfinite(value):
            raise AdapterError("a scale is a finite number", got=repr(value)[:40])
        self._scale = float(value)

    @property
    def enabled(self) -> bool:
        """Whether the adapter adds anything in this context; what is set is for all but those inside `disabled()`."""
        return self.switch.adds

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.check_unmerged()
        self.switch.on = bool(value)

    @property
    def active(self) -> bool:
        """Whether hooks add anything: enabled, and not merged into the weights.

        Raises AdapterError where a merge was interrupted: the base is no base then.
        """
        if self._merge is not None:
            self._merge.check_ended()
            return False
        return self.switch.adds

    @property
    def merged(self) -> bool:
        """Whether the deltas stand in the base's weights."""
        return self._merge is not None and self._merge.complete

    @property
    def stalled(self) -> bool:
        """Whether training would change nothing: merged, and no other parameter of the model is trained."""
        return self.merged and not self._host().trains_on(self._model[0])

    def check_unmerged(self) -> None:
        """Raise AdapterError where the base holds deltas, or after an interrupt a part of them: of what was merged."""
        if self._merge is not None:
            self._merge.check_ended()
            raise AdapterError(f"adapter {self.name!r} is merged into the weights", hint="unmerge() first")

    def set_factors(self, group: str, tensors: Mapping[str, Any], *, start: bool = False) -> None:
        """As of any factors. Raises AdapterError where the adapter is merged: the base would keep the old deltas."""
        self.check_unmerged()
        super().set_factors(group, tensors, start=start)

    def in_place_of(self, key: str, parameter: Tensor) -> Tensor:
        """What a call reads in a parameter's place: it, or its trained copy, and the deltas of its sites."""
        if key in self.plan.extras:
            self.check_drawn()
            parameter = self.extra[slashed(key)].to(parameter.dtype)
        if key not in self._weighted:
            return parameter
        paths = self._weighted[key]
        if parameter.is_meta:
            check_here(key, next(self.parameters()))
        self.passes.reach(*paths)
        changed = parameter + laid_out([(self._lines[path][1], self.delta(path)) for path in paths], parameter)
        return self.passes.made(key, changed)

    def check(self, batch: Any, *, train: bool = False, grad: bool = False) -> Reach:
        """What a pass on a batch (a mapping, a tuple, one argument) reaches; the model's state is kept.

        Raises AdapterError where nothing is added.
        """
        return dry_run(self._model[0], self, batch, train=train, grad=grad)

    def _replicate_for_data_parallel(self) -> Any:
        """A copy as `nn.DataParallel` makes for its threads. Raises AdapterError in `disabled()`, which is for one."""
        if self.switch.on and not self.switch.adds:
            raise AdapterError(
                f"nn.DataParallel runs the model in threads of its own, where adapter {self.name!r} is not disabled",
                hint="set adapter.enabled = False, which is for all threads",
            )
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the adapter off inside a `with` block, for the thread or the task that runs it and for no other.

        Raises AdapterError where it is merged.
        """
        self.check_unmerged()
        with self.switch.off():
            yield

    def save(self, path: str | Path) -> Path:
        """Write the adapter file (a folder with `adapter.safetensors`, or that file), atomically; returns its path.

        The scale that was set is written into every group's own, so that a loaded adapter has the same deltas.
        Raises FileError where the path cannot be written or a factor is not finite: an older file stays as it is;
        AdapterError where a forward pass read weights past the adapter.
        """
        self.passes.check(self.name)
        saved = self.as_saved()
        made = partial(saved.save, path, made="ta.attach(model, spec), and training")
        return written_once(self.parameters(), made)

    def as_saved(self) -> Saved:
        """The adapter without its model: its tensors, gathered where they are sharded, and the scale in every group."""
        self._settle()
        self.check_drawn()
        groups = tuple(replace(group, scale=group.scale * self._scale) for group in self.plan.groups)
        tensors = {key: gathered(tensor, key).detach() for key, tensor in self.tensors().items()}
        return Saved(replace(self.plan, groups=groups), tensors, self.base)

    # -- merging ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, keep: str | None = "cpu", *, untie: bool = False) -> None:
        """Write W + delta into the base: float32 arithmetic in row blocks; `keep` says where the originals are kept.

        One that is interrupted is undone, or ended by the next call: at once, where that keeps no originals either.
        Raises AdapterError when merged already or switched off, on results that are not finite (nothing is changed
        then), on weights that are quantised or on the meta device, and on tied weights without `untie=True`.
        """
        check_place(keep)
        with self._host().alone("merging"):
            self._merge_alone(keep, untie=untie)

    def _merge_alone(self, keep: str | None, *, untie: bool) -> None:
        if self.merged:
            self.check_unmerged()
        if not self.enabled:
            raise AdapterError(f"adapter {self.name!r} is switched off", hint="set adapter.enabled = True first")
        self.passes.check(self.name)
        order = self._host().next_merge(self.name)
        if self._merge is not None and keep is not None:
            self._merge.check_kept()
        if self._merge is not None and self._merge.keep is not None:
            self.unmerge()
        self._settle()
        targets = self._targets()
        apart = admit(self._model[0], targets, untie=untie)
        if self._merge is None:
            for target in targets if keep is None else ():
                target.check()
            self._merge = Merge(self.name, keep, order)
        try:
            self._merge.run(self._model[0], targets, apart)
        except BaseException:
            if keep is not None:
                self.unmerge()
            raise
        self._merge.complete = True

    def _settle(self) -> None:
        shard_again(self._model[0])

    def _targets(self) -> list[Target]:
        """The parameters that a merge changes, each with all of its sites."""
        model, sites = self._model[0], {path: site for path, (_, site, _) in self._lines.items()}
        planned = [sites[path] for group in self.plan.groups for path in group.paths]
        extras = {path: self.extra[slashed(path)] for path in self.plan.extras}
        found = targets_of(model, planned, sites, lambda path: partial(self._rows, path))
        return with_copies(found, {path: (owner_of(model, path), copy) for path, copy in extras.items()})

    def unmerge(self) -> None:
        """Put the kept originals back, bit for bit; after an interrupt the next call goes on.

        Raises AdapterError where nothing was merged or kept.
        """
        with self._host().alone("unmerging"):
            if self._merge is None:
                raise AdapterError(f"adapter {self.name!r} is not merged", hint="merge() first")
            self._merge.check_kept()
            self._settle()
            self._merge.check_plain()
            self._merge.check_last(self._host().merged[-1] if self.merged else self.name)
            self._merge.undo()
            self._merge = None

    def merge_and_detach(self, *, untie: bool = False) -> nn.Module:
        """Make the deltas, and the modules trained with them, part of the base for good; returns the plain model.

        W <- W + delta. Raises AdapterError as `merge` does; nothing is changed then.
        """
        if not self.merged:
            self.merge(keep=None, untie=untie)
        self._merge.keep = None  # type: ignore[union-attr]
        self.detach()
        return self._model[0]

    def detach(self) -> None:
        """Take the adapter off the model: hooks, registration and frozen flags go, merged weights are restored."""
        with self._host().alone("detaching") as host:
            self._detach(host)

    def _detach(self, host: Host) -> None:
        if self._merge is not None and self._merge.keep is None:
            self._merge.check_ended()
        elif self._merge is not None:
            self.unmerge()
            warnings.warn(
                f"detach() of the merged adapter {self.name!r} takes its change out of the weights again: "
                "adapter.merge_and_detach() leaves it in; unmerge() first says that this is meant",
                stacklevel=3,
            )
        try:
            self.leave(host)
        except BaseException:  # Ctrl-C: a model that lost half of its hooks is neither the one nor the other
            self.leave(host)
            raise

    def leave(self, host: Host) -> None:
        """Take every hook off the model, and the registration; once more, where it was interrupted."""
        for handle in self._handles:
            handle.remove()
        unhook(self._model[0], self)
        host.dismiss(self._model[0], self.name)
        self._handles.clear()

    def alone(self, act: str) -> AbstractContextManager[Any]:
        """Let no pass of the model begin meanwhile, where it is attached. Raises AdapterError where one runs."""
        host = host_of(self._model[0])
        return host.alone(act) if host is not None and host._modules.get(self.name) is self else nullcontext()

    def _host(self) -> Host:
        return carrier(self._model[0], self.name, self)

    def __str__(self) -> str:
        state = "merged" if self.merged else "attached" if self.enabled else "switched off"
        head = f"adapter {self.name!r} on {type(self._model[0]).__name__}: {state}\n"
        return f"{head}{self.plan.in_words}\n{self.plan.trained}"

    def extra_repr(self) -> str:
        """What `print(model)` shows of the adapter."""
        return f"{self.name!r}, {self.plan.num_sites} sites, {self.plan.num_trainable:,} trainable"
