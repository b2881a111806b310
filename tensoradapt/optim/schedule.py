"""Budgets that fall while an adapter trains, and what brings the adapter and its optimiser to them.

Invariant: a change keeps the adapter's factors and the optimiser's parameters and state in step; what is refused
changes neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch.optim import Optimizer

from tensoradapt.adapter import Adapter
from tensoradapt.change import Change, resize, truncate
from tensoradapt.change.install import require_trainer
from tensoradapt.change.ranks import Ranks, wider
from tensoradapt.change.targets import attached
from tensoradapt.errors import AdapterError, SpecError


class Schedule(Protocol):
    """What a step number asks for, and the step from which on that stays as it is."""

    @property
    def end(self) -> int:
        """The first step of the last value."""

    def __call__(self, step: int) -> Any:
        """What holds after `step` steps."""


@dataclass(frozen=True)
class CubicSchedule:
    """A number that falls, or grows, from `initial` to `final` as a cube, steeply first.

    b(t) = initial, t < warmup; final, t >= total - tail; between, with n = total - tail - warmup,
    b(t) = final + (initial - final) (1 - (t - warmup) / n)^3, rounded towards `final`.
    arXiv 2303.10512 prints t - warmup - tail for t - warmup, which jumps at both ends; its code has this formula.
    Raises SpecError where the numbers are not whole, not positive, or leave no step between.
    """

    initial: int
    final: int
    total: int
    warmup: int = 0
    tail: int = 0

    def __post_init__(self) -> None:
        given = (self.initial, self.final, self.total, self.warmup, self.tail)
        if not all(type(n) is int for n in given) or min(given[:3]) < 1 or min(given[3:]) < 0:
            raise SpecError("a cubic schedule is of positive integers", got=self)
        if self.warmup >= self.end:
            raise SpecError(
                "a cubic schedule needs steps between its warm-up and its tail",
                got=f"total={self.total}, warmup={self.warmup}, tail={self.tail}",
                expected="warmup + tail < total",
            )

    @property
    def end(self) -> int:
        """The first step of the final value."""
        return self.total - self.tail

    def __call__(self, step: int) -> int:
        """b(step), in whole numbers: no rounding of powers decides about the last parameter."""
        length = self.end - self.warmup
        left = min(max(self.end - step, 0), length)
        span = self.initial - self.final
        fallen = abs(span) * left**3 // length**3
        return self.final + (fallen if span >= 0 else -fallen)


class RankSchedule:
    """Changes of an adapter's ranks while it trains: call `step()` after every `optimizer.step()`.

    After every `every` steps, and after the last one that a schedule tells apart (its `end`), `max_parameters(step)`
    is what `truncate` cuts the adapter's factors to, by their singular values over all groups, or `rank(step)` what
    `resize` gives every group: one of the two. The optimiser gets the new parameters in the places of the old ones,
    their moments carried over. A budget that the factors keep already changes nothing. Gradients of factors that were
    replaced are gone, so step between `optimizer.step()` and the next backward pass. A schedule is a callable with an
    `end`: `CubicSchedule` is one, for parameters as for ranks.
    Raises SpecError on neither or both, and where groups have no truncation; RankError on a budget below rank 1;
    AdapterError where the optimiser holds none of the adapter's factors.
    Source: arXiv 2303.10512.
    """

    def __init__(
        self,
        adapter: Adapter,
        optimizer: Optimizer,
        *,
        max_parameters: Schedule | None = None,
        rank: Schedule | None = None,
        every: int = 1,
    ) -> None:
        if (max_parameters is None) == (rank is None):
            raise SpecError("a schedule is of one thing", expected="max_parameters or rank")
        if type(every) is not int or every < 1:
            raise SpecError("every is the number of steps between two changes", got=repr(every), expected="1 or more")
        self.adapter, self.optimizer, self.every, self.steps = adapter, optimizer, every, 0
        self.max_parameters, self.rank = max_parameters, rank
        self._check()

    def _check(self) -> None:
        """Try the last change on a copy, so that what cannot be done is said now and not after hours of training."""
        attached(self.adapter, "RankSchedule needs an attached adapter")
        _require_schedule(self.max_parameters if self.rank is None else self.rank)
        if self.max_parameters is not None:
            truncate(self.adapter.as_saved(), max_parameters=self.max_parameters(self.max_parameters.end))
        if self.rank is not None:
            resize(self.adapter.as_saved(), self.rank(self.rank.end))
        require_trainer(self.adapter, self.optimizer)

    def step(self) -> Change | None:
        """Count a step; the change that was due, None where there was none."""
        self.steps += 1
        schedule = self.max_parameters or self.rank
        if self.steps % self.every and self.steps != schedule.end:  # type: ignore[union-attr]
            return None
        wanted = schedule(self.steps)  # type: ignore[misc]
        if self.max_parameters is None:
            return self._resized(wanted)
        if sum(group.diagram.num_parameters for group in self.adapter.plan.groups) <= wanted:
            return None
        return truncate(self.adapter, max_parameters=wanted, optimizer=self.optimizer)

    def _resized(self, rank: Ranks) -> Change | None:
        if all(wider(group, rank) == group.diagram for group in self.adapter.plan.groups):
            return None
        return resize(self.adapter, rank, optimizer=self.optimizer)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs to go on: the steps made; the ranks are the adapter's own."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after as many steps. Raises AdapterError on what is no state of a schedule."""
        if type(state_dict.get("steps")) is not int:
            raise AdapterError("this is no state of a rank schedule", got=sorted(state_dict), expected="steps")
        self.steps = state_dict["steps"]


def _require_schedule(schedule: Any) -> None:
    if not (callable(schedule) and type(getattr(schedule, "end", None)) is int):
        raise SpecError(
            "a schedule gives a number for every step, and says with `end` from which one on it stays",
            got=repr(schedule),
            hint="write ta.optim.CubicSchedule(initial, final, total)",
        )
