"""GaLore: an optimiser of dense weights whose state lives in a low-rank subspace of their gradients.

The inner optimiser never sees a projected weight: it moves a stand-in of the projected shape, which is zero before its
step and the step itself after it. Invariant: parameter groups are the user's own, and the state of a weight is one
dictionary, the inner optimiser's own, with the bases beside its moments; schedulers, trainers, gradient scalers and
checkpoints see one optimiser.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tensoradapt.errors import AdapterError, RankError, SpecError
from tensoradapt.optim.projectors import PROJECTORS, SIDES, Subspace, axes_of, find, ranks_of
from tensoradapt.optim.wrapper import evaluated

OWN = ("rank", "gap", "scale", "projector", "side")  # what a parameter group holds beside the inner optimiser's options
BASIS, STEPS = "basis_", "projected_steps"


@dataclass
class Family:
    """Weights of one shape that share their bases: one weight, or a stack; with the stand-ins of their steps."""

    group: int
    weights: list[nn.Parameter]
    stand_ins: list[nn.Parameter]
    ranks: dict[int, int]
    keeper: nn.Parameter | None = None  # the weight in whose state the bases are

    def pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Every weight that has a gradient, with its stand-in."""
        return ((w, s) for w, s in zip(self.weights, self.stand_ins, strict=True) if w.grad is not None)


class GaLore(Optimizer):
    """An optimiser around `base` that projects gradients: R = G x_k U_k^T, W += scale * (step of base on R) x_k U_k.

    `params` are weights or parameter groups; a group may have its own `rank`, `gap`, `scale`, `projector` and `side`
    beside the options of `base`. Matrices are projected, with `tucker` tensors of more axes too; what else there is,
    and groups without a rank, goes to `base` untouched. U_k are found from the gradients of the first step and of every
    `gap`-th after it; moments are not turned with them, as published.

    `projector`: `svd`, exact; `rsvd`, by randomised iteration; `tucker`, which is `svd` for matrices; `group`, which
    shares one basis per axis among all weights of one shape in a parameter group, from the partial Tucker decomposition
    of their stacked gradients (layer, out, in), as LoTR shares its factors. `side` says which axes of a matrix have a
    basis: `std` the shorter (the second of a square), `reverse_std` the longer, `left`, `right`, or both with `full`;
    `full` for `group` where it is left out, else `std`. `rank` is one number, or one for each axis; what a weight's
    axes cannot use is cut to what they can: min(m, n) for a matrix.

    Weight decay of projected weights is decoupled whatever `base` is: W *= 1 - lr * weight_decay before the step, not
    scaled and not projected. Stand-ins, moments and bases of half-precision weights are float32. A `base` whose step
    depends on the weights sees zeros. State per matrix with AdamW and `std`: 2 r max(m, n) + r min(m, n) numbers.
    Unscale and clip gradients before `step`, as for any optimiser; they are left as they were.

    Raises RankError or SpecError on options out of range and where nothing would be projected, ShapeError in a step
    that finds bases from gradients that are not finite. Source: arXiv 2403.03507, arXiv 2501.02379 (tensors).
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: Callable[..., Optimizer] = torch.optim.AdamW,
        *,
        rank: int | Sequence[int] | None = None,
        gap: int = 200,
        scale: float = 0.25,
        projector: str = "svd",
        side: str | None = None,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "gap": gap, "scale": scale, "projector": projector, "side": side}
        defaults = base([nn.Parameter(torch.zeros(1))], **options).defaults
        self.families: list[Family] = []
        self.base: Any = None
        super().__init__(params, {**defaults, **own})
        inner = [self._enrol(index) for index in range(len(self.param_groups))]
        if not self.families:
            raise SpecError(
                "nothing would be projected",
                got=f"{sum(len(g['params']) for g in self.param_groups)} parameters, none in a group with a rank",
                expected="matrices (with projector='tucker' tensors of more axes too) in groups with a rank",
            )
        self.base = base(inner, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group. Raises RankError or SpecError on its options; nothing is added then."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self.base is not None:
            self.base.add_param_group(self._enrol(len(self.param_groups) - 1))

    def _enrol(self, index: int) -> dict[str, Any]:
        """The inner optimiser's group for one of the user's: in the place of what is projected its stand-ins."""
        group = self.param_groups[index]
        projected = [p for p in group["params"] if _is_projected(p, group)]
        families = [_family(index, weights, group) for weights in _alike(projected, group["projector"])]
        self.families += families
        stand_ins = _stand_ins(families)
        return {"params": [stand_ins.get(p, p) for p in group["params"]], **_options(group)}

    # -- the step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of `base` on projected gradients, taken back to the weights. Returns what the closure returns."""
        loss = evaluated(closure)
        for group, inner in zip(self.param_groups, self.base.param_groups, strict=True):
            inner.update(_options(group))  # what schedulers have set
        active = [family for family in self.families if any(w.grad is not None for w in family.weights)]
        found = [self._subspace(family) for family in active]
        for family, (subspace, _) in zip(active, found, strict=True):
            for weight, stand_in in family.pairs():
                small = subspace.project(weight.grad)  # type: ignore[arg-type]
                stand_in.data = torch.zeros_like(small)
                stand_in.grad = small
        self.base.step()
        for family, (subspace, steps) in zip(active, found, strict=True):
            self._move(family, subspace)
            self._keep(family, subspace, steps)
        self._share()
        return loss

    def _subspace(self, family: Family) -> tuple[Subspace, int]:
        """The bases of this step, found anew where `gap` steps have been made with them, and the steps made so far."""
        group = self.param_groups[family.group]
        state = self.state[family.keeper] if family.keeper is not None else {}
        steps = state.get(STEPS, 0)
        if steps % group["gap"] == 0:
            gradients = [weight.grad for weight, _ in family.pairs()]
            method = "krylov" if group["projector"] == "rsvd" else "exact"
            return find(gradients, family.ranks, method), steps  # type: ignore[arg-type]
        return Subspace({axis: state[f"{BASIS}{axis}"] for axis in family.ranks}), steps

    def _move(self, family: Family, subspace: Subspace) -> None:
        """Decay the weights, add what the stand-ins hold now, and empty those: between steps they take no memory."""
        group = self.param_groups[family.group]
        for weight, stand_in in family.pairs():
            weight.mul_(1 - group["lr"] * group.get("weight_decay", 0.0))
            weight.add_(subspace.back(stand_in.detach()).to(weight.dtype), alpha=group["scale"])
            stand_in.grad = None
            stand_in.data = stand_in.data.new_empty(0)

    def _keep(self, family: Family, subspace: Subspace, steps: int) -> None:
        """Put the bases into the state of the first weight that had a gradient: a stack has them once."""
        if family.keeper is None:
            family.keeper = next(weight for weight, _ in family.pairs())
        state = self.base.state[family.stand_ins[_place(family.weights, family.keeper)]]
        state |= {f"{BASIS}{axis}": basis for axis, basis in subspace.bases.items()}
        state[STEPS] = steps + 1

    def _share(self) -> None:
        """Show the inner optimiser's states as those of the weights."""
        stand_ins = _stand_ins(self.families)
        for weight in (p for group in self.param_groups for p in group["params"]):
            held = stand_ins.get(weight, weight)
            if held in self.base.state:
                self.state[weight] = self.base.state[held]

    # -- checkpoints --------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the groups' options and the states of `state_dict()`. Raises AdapterError where they do not fit."""
        saved = state_dict["param_groups"]
        theirs, mine = _layout(saved), _layout(self.param_groups)
        if theirs != mine:
            raise AdapterError("the saved state has other parameter groups or projectors", got=theirs, expected=mine)
        inner, states = self.base.state_dict(), state_dict["state"]
        keys = [key for group in saved for key in group["params"]]
        inner["state"] = {place: states[key] for place, key in enumerate(keys) if key in states}
        self.base.load_state_dict(inner)
        for group, other in zip(self.param_groups, saved, strict=True):
            group.update(copy.deepcopy({name: value for name, value in other.items() if name != "params"}))
        self.state.clear()
        self._share()
        for family in self.families:
            family.keeper = next((w for w in family.weights if STEPS in self.state.get(w, {})), None)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)  # torch's keeps state and groups alone, without which `base` would be lost


def _layout(groups: Sequence[dict[str, Any]]) -> list[str]:
    """What the shapes of a state follow from, for every parameter group."""
    return [
        f"{len(g['params'])} by projector={g.get('projector')}, rank={g.get('rank')}, side={g.get('side')}"
        for g in groups
    ]


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """What the inner optimiser is told of a group: all but what is ours. It decays stand-ins too, which are zero."""
    return {name: value for name, value in group.items() if name not in (*OWN, "params", "param_names")}


def _stand_ins(families: Iterable[Family]) -> dict[nn.Parameter, nn.Parameter]:
    """The stand-in of every projected weight."""
    return {w: s for family in families for w, s in zip(family.weights, family.stand_ins, strict=True)}


def _is_projected(parameter: Tensor, group: dict[str, Any]) -> bool:
    most = parameter.dim() if group["projector"] == "tucker" else 2
    return group["rank"] is not None and parameter.is_floating_point() and 2 <= parameter.dim() <= most


def _alike(weights: Sequence[nn.Parameter], projector: str) -> list[list[nn.Parameter]]:
    """Weights that share their bases: with `group` those of one shape, each alone with the others."""
    found: dict[Any, list[nn.Parameter]] = {}
    for k, weight in enumerate(weights):
        key = (tuple(weight.shape), weight.dtype, weight.device) if projector == "group" else k
        found.setdefault(key, []).append(weight)
    return list(found.values())


def _family(index: int, weights: list[nn.Parameter], group: dict[str, Any]) -> Family:
    shape = tuple(weights[0].shape)
    axes = axes_of(shape, group["side"] or ("full" if group["projector"] == "group" else "std"))
    ranks = ranks_of(shape, axes, group["rank"], len(weights))
    small = [ranks.get(axis, size) for axis, size in enumerate(shape)]
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    zeros = [torch.zeros(small, dtype=wide, device=weight.device) for weight in weights]
    return Family(index, weights, [nn.Parameter(z) for z in zeros], ranks)


def _place(weights: Sequence[nn.Parameter], weight: nn.Parameter) -> int:
    return next(k for k, other in enumerate(weights) if other is weight)  # == compares entries


def _check(group: dict[str, Any]) -> None:
    """Raise RankError or SpecError on options of a parameter group that are out of range."""
    rank, gap, scale = group["rank"], group["gap"], group["scale"]
    ranks = list(rank) if isinstance(rank, Sequence) else [] if rank is None else [rank]
    if not all(type(r) is int and r > 0 for r in ranks):
        raise RankError("a rank of GaLore is a positive integer", got=repr(rank), expected="one, or one for each axis")
    if type(gap) is not int or gap < 1:
        raise SpecError("gap is the number of steps between two projectors", got=repr(gap), expected="1 or more")
    if type(scale) not in (int, float) or not math.isfinite(scale):
        raise SpecError("scale is a finite number", got=repr(scale))
    if group["projector"] not in PROJECTORS:
        raise SpecError(f"no projector {group['projector']!r}", expected=", ".join(PROJECTORS))
    if group["side"] is not None and group["side"] not in SIDES:
        raise SpecError(f"no side {group['side']!r}", expected=", ".join(SIDES))
