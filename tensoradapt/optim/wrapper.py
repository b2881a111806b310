"""An optimiser around another one: what becomes of the factors' gradients before its step, and of the factors after it.

Invariant: learning rates, parameter groups and state are the inner optimiser's own, so that schedulers, trainers,
gradient scalers and checkpoints see one optimiser; the gradients are the caller's own again after a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tensoradapt.adapter import Adapter
from tensoradapt.change.install import parameters_of
from tensoradapt.change.targets import attached
from tensoradapt.errors import AdapterError, SpecError
from tensoradapt.plan import Plan

_PASSING = ("step", "_opt_called")  # what schedulers leave on an optimiser: a bound closure cannot be pickled


class Wrapper(Optimizer):
    """An adapter's optimiser: `base` makes the step, from the gradients that `directions` gives; `finish` ends it.

    `params` are what is trained: by default the adapter's trainable parameters, those of `train:` modules among them;
    else parameters or parameter groups, as torch's optimisers take them. What is no factor of the adapter is left to
    `base` alone. Clip gradients, and unscale those of a gradient scaler, before `step`. Raises SpecError where
    `base` is no optimiser's class, AdapterError where `adapter` is no attached adapter or none of its factors is
    trained; `step` does so where factors were replaced by `ta.resize` or `ta.truncate` without this optimiser.
    """

    adapter: Adapter
    base: Optimizer
    _seen: tuple[Plan, frozenset[str]]  # the plan at the last step, and which of its factors are trained

    def __init__(
        self,
        adapter: Adapter,
        base: Callable[..., Optimizer] = torch.optim.AdamW,
        params: Iterable[Any] | None = None,
        **options: Any,
    ) -> None:
        attached(adapter, f"{type(self).__name__} needs an attached adapter")
        _require_optimizer(type(self).__name__, base)
        trained = [p for p in adapter.parameters() if p.requires_grad] if params is None else list(params)
        super().__setstate__({"adapter": adapter, "base": base(trained, **options)})  # torch's hooks begin here too
        self._seen = adapter.plan, self._trained()
        if not self._seen[1]:
            raise AdapterError(
                f"the optimiser holds none of the factors of {adapter.name!r}",
                got=f"{len(parameters_of(self.base))} parameters",
                hint="pass params=adapter.parameters(), or leave params out",
            )

    def _trained(self) -> frozenset[str]:
        """The names of the adapter's factors that this optimiser holds."""
        held = parameters_of(self.base)
        return frozenset([name for name, p in self.adapter.stored.named_parameters() if p in held])

    def _look(self) -> None:
        """See that factors that were trained are so still, after any change of the adapter's plan."""
        plan, before = self._seen
        if plan is self.adapter.plan:
            return
        now = self._trained()
        lost = sorted(name for name, _ in self.adapter.stored.named_parameters() if name in before - now)
        if lost:
            raise AdapterError(
                f"the adapter {self.adapter.name!r} has other factors than this optimiser holds",
                got=f"{lost[0]} and {len(lost) - 1} others were replaced" if lost[1:] else f"{lost[0]} was replaced",
                hint="pass optimizer= to ta.resize, ta.truncate and ta.orthogonalize, or make a new optimiser",
            )
        self._seen = self.adapter.plan, now

    def directions(self) -> Mapping[Tensor, Tensor]:
        """What stands in the place of which parameters' gradients for this step; called without autograd."""
        return {}

    def finish(self) -> None:
        """What happens to the factors after the step; called without autograd."""

    def undo(self) -> None:
        """What is put back where `directions` or the step failed."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of `base` along the directions; parameters without gradients stay. Returns the closure's loss."""
        loss = evaluated(closure)
        self._look()
        kept: dict[Tensor, Tensor | None] = {}
        try:
            replaced = self.directions()
            kept |= {parameter: parameter.grad for parameter in replaced}
            for parameter, direction in replaced.items():
                parameter.grad = direction
            self.base.step()
        except BaseException:
            self.undo()
            raise
        finally:
            for parameter, gradient in kept.items():
                parameter.grad = gradient
        self.finish()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or fill them with zeros."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters, with options of their own."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's state, with what this one keeps for each parameter."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.base.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _PASSING}

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.adapter.name!r} around {self.base!r}"

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimiser's parameter groups."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimiser's state."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimiser's defaults."""
        return self.base.defaults


def _require_optimizer(name: str, base: Any) -> None:
    if not callable(base):
        raise SpecError(
            f"{name} goes around an optimiser",
            got=repr(base),
            expected="a class such as torch.optim.AdamW",
            hint=f"write {name}(adapter, torch.optim.AdamW, lr=1e-3), or leave it out and write lr=",
        )


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What a step's closure returns, called with autograd; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
