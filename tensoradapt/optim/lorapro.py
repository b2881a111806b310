"""LoRA-Pro for every network: the step of the deltas is the gradient's projection on what the factors can reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from tensoradapt.adapter import Adapter
from tensoradapt.errors import SpecError
from tensoradapt.gauge import implied, pseudo_inverse
from tensoradapt.gauge.environment import Blocks
from tensoradapt.gauge.metric import Metric
from tensoradapt.grouping import Group
from tensoradapt.lower import dense
from tensoradapt.optim.batches import Batch, Nodes, doubled, gathered, halves, wide
from tensoradapt.optim.moments import Betas, energy, spread, transported
from tensoradapt.optim.preconditioned import Preconditioned, checked_damping

Gauge = Literal["min_norm", "zero"]
Moments = Literal["factors", "dense"]
WIDE = ("projected_sq", "dense_avg", "dense_sq")  # at least in float32, whatever the factors are in
KEPT = ("direction_avg", "gradient_avg", *WIDE, "directions")


class LoRAPro(Preconditioned):
    """J^+ of the gradient: among all steps of the factors, that whose effect on the deltas is closest to the gradient.

        d = (s J)^+ g = s^-2 (J^T J)^+ (g_u, g_v, ..)
        s J d = P g,    delta_new = delta - lr P g + O(lr^2)

    with J the Jacobian of the network in its trained factors, s its scale, g_u what autograd gives for the factor u and
    P the projection on the tangent space. LoRA: P g = g - (1 - B B^+) g (1 - A^+ A).

    `gauge` says which of the d with that effect: `min_norm` the shortest (two nodes in closed form, others by conjugate
    gradients), `zero` that in which all nodes but one move orthogonally to themselves (the paper's
    X = 0; a closed form for every tree, with matrices as wide as a bond). None takes min_norm for two nodes, zero for
    other trees, min_norm for the rest.
    `moments`: `factors` keeps a first moment in the factors' space and one second moment per group, the mean square of
    P g over the deltas' entries, v = beta2 v + (1 - beta2) <g_u, d_u> / entries; the step is mhat / (sqrt vhat + eps),
    bias corrected from the first step, so that the learning rate is the root mean square by which entries of deltas
    change. Without damping it does not depend on the gauge of the factors. Under min_norm the first moment is carried
    over to new factors as the change it meant, J_new^T J_old m, by overlaps; under zero, as factors turn. `dense` is
    the paper's: Adam's moments of P g, entry by entry, projected again. None hands d to `base`: with AdamW, that
    depends on the gauge. Weight decay of `base` decays factors.

    `damping` is relative: delta = damping * tr(J^T J) / entries, one for all nodes of a network. A zero node (B = 0)
    gets gB (A A^T + delta)^-1, the others none; in an all-zero network nothing moves.

    State, beside that of `base`: as many entries as the factors have and one number per group; for `dense` two entries
    per entry of the stacked deltas; for None nothing. After `ta.resize(adapter, optimizer=..)` moments are carried over
    where they are gradients (min_norm) or dense, and begin anew otherwise. Clip gradients, and unscale those of a
    gradient scaler, before `step`. Parameters that are no factors of the adapter are left to `base`.

    Raises SpecError where groups share a bank of slices, and for gauge='zero' on what is no tree.
    Source: arXiv:2407.18242; the closed forms are derived in the geometry page of the documentation.
    """

    max_iterations = 200  # of conjugate gradients in one step; damping keeps them far below

    def __init__(
        self,
        adapter: Adapter,
        base: Callable[..., Optimizer] = torch.optim.SGD,
        params: Iterable[Any] | None = None,
        *,
        damping: float = 1e-4,
        gauge: Gauge | None = None,
        moments: Moments | None = "factors",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Any,
    ) -> None:
        self.damping = checked_damping(damping)
        self.gauge, self.moments, self.betas = gauge, moments, _betas(betas, eps)
        _check(gauge, moments)
        super().__init__(adapter, base, params, **options)
        if gauge == "zero":
            for group, owner in self.groups:
                _check_tree(group, owner)
        self._taken: dict[Tensor, dict[str, Any]] = {}  # of one step: what was kept before it, and what is after it
        self._kept: dict[Tensor, dict[str, Any]] = {}
        self._moved: list[tuple[Batch, dict[str, Tensor]]] = []

    def directions(self) -> Mapping[Tensor, Tensor]:
        """J^+ of the gradients, or of their moments, of every group."""
        self._take()
        move = {"factors": self._by_factors, "dense": self._by_tensor, None: self._plain}[self.moments]
        found: dict[Tensor, Tensor] = {}
        for batch in self.batches(self._steps):
            found |= batch.spread(move(batch))
        return found

    def finish(self) -> None:
        """Carry moments over to the factors of after the step, and put them into the state."""
        for batch, moment in self._moved:
            made = transported(batch.diagram, batch.factors, moment, batch.now)
            self._keep(batch, "gradient_avg", {n: t * batch.kind.scale**2 for n, t in made.items()})
        self._put(self._taken, self._kept)

    def undo(self) -> None:
        """Put the moments back as they were before the step."""
        self._put(self._taken)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`: second moments stay in the precision that they were kept in."""
        super().load_state_dict(state_dict)
        held = [parameter for group in self.param_groups for parameter in group["params"]]
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for parameter, name in zip(held, names, strict=True):  # torch casts all state to the dtype of its parameter
            entries = state_dict["state"].get(name, {})
            wide = {entry: entries[entry] for entry in WIDE if torch.is_tensor(entries.get(entry))}
            self.state[parameter].update({entry: t.to(parameter.device, copy=True) for entry, t in wide.items()})

    # -- what is kept -------------------------------------------------------------------------------------------

    def _take(self) -> None:
        """Take the moments out of the inner optimiser's state, which takes an empty one for a first step."""
        self._clear()
        for _, owner in self.groups:
            for parameter in owner.values():
                state = self.state.get(parameter)
                if state:
                    self._taken[parameter] = {name: state.pop(name) for name in KEPT if name in state}

    def _put(self, *kept: dict[Tensor, dict[str, Any]]) -> None:
        """Put moments into the inner optimiser's state; what stands last holds."""
        for one in kept:
            for parameter, entries in one.items():
                self.state[parameter].update(entries)
        self._clear()

    def _clear(self) -> None:
        self._moved.clear()
        self._taken.clear()
        self._kept.clear()

    def _steps(self, owner: Nodes, moving: Sequence[str]) -> tuple[int, tuple[str, ...]]:
        """The steps that a group has moments of, and which: groups of one batch have the same."""
        states = [self._taken.get(owner[node], {}) for node in moving]
        first = states[0] if states else {}
        names = tuple([name for name in KEPT[:2] if all([name in state for state in states])])
        return (first.get("directions", 0), names) if names or "dense_avg" in first else (0, ())

    def _held(self, batch: Batch, name: str) -> dict[str, Tensor]:
        return gathered([{n: wide(self._taken[owner[n]][name]) for n in batch.kind.moving} for owner in batch.owners])

    def _one(self, batch: Batch, name: str) -> Any:
        """What is kept once for a group, with its first node."""
        held = [self._taken[owner[batch.kind.moving[0]]][name] for owner in batch.owners]
        return held[0] if len(held) == 1 else torch.stack(held)

    def _keep(self, batch: Batch, name: str, made: Nodes) -> None:
        for parameter, part in batch.spread(made):
            self._kept.setdefault(parameter, {})[name] = part

    def _keep_one(self, batch: Batch, step: int, **made: Any) -> None:
        for k, owner in enumerate(batch.owners):
            parts = {name: held if len(batch.owners) == 1 else held[k] for name, held in made.items()}
            self._kept.setdefault(owner[batch.kind.moving[0]], {}).update(parts, directions=step)

    # -- directions ---------------------------------------------------------------------------------------------

    def _zero(self, metric: Metric | Blocks) -> bool:
        """Whether directions are those of the gauge in which J^T J is block diagonal."""
        if self.gauge == "zero" or (metric.connected and len(metric.nodes) == 1):
            return True
        return self.gauge is None and metric.connected and not metric.pair

    def _solved(self, batch: Batch, grads: Nodes) -> dict[str, Tensor]:
        """The direction (s J)^+ g of gradients of the factors."""
        metric, scale = self.metric(batch), batch.kind.scale
        if self._zero(metric):
            return metric.directions(batch.factors, grads, self.damping, scale)
        how = {
            "tolerance": torch.finfo(next(iter(grads.values())).dtype).eps ** 0.75,
            "max_iterations": self.max_iterations,
        }
        return pseudo_inverse(batch.diagram, batch.factors, grads, self.damping, scale, **how).factors

    def _plain(self, batch: Batch) -> dict[str, Tensor]:
        return self._solved(batch, batch.grads)

    def _by_factors(self, batch: Batch) -> dict[str, Tensor]:
        step = batch.tag[0] + 1
        made, moment = self._blended(batch) if self._zero(self.metric(batch)) else self._carried(batch)
        second = energy(batch.diagram, batch.grads, made) * (1 - self.betas.second)
        if step > 1:
            second = second + self.betas.second * self._one(batch, "projected_sq")
        self._keep_one(batch, step, projected_sq=second)
        factor = self.betas.factor(second, step)
        return {node: tensor * spread(batch.diagram, node, factor) for node, tensor in moment.items()}

    def _blended(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The direction, and the moment in the factors themselves: both turn with the gauge as the factors do."""
        made = self._solved(batch, batch.grads)
        weight = 1 - self.betas.first
        if "direction_avg" in batch.tag[1]:
            held = self._held(batch, "direction_avg")
            moment = {node: held[node].lerp(tensor, weight) for node, tensor in made.items()}
        else:
            moment = {node: tensor * weight for node, tensor in made.items()}
        self._keep(batch, "direction_avg", moment)
        return made, moment

    def _carried(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The direction, and the moment as J^+ of the change that it meant, projected on what is tangent now."""
        if "gradient_avg" in batch.tag[1]:
            both = doubled(batch, self._held(batch, "gradient_avg"))
            made, before = halves(batch, self._solved(both, both.grads))
        else:
            made, before = self._solved(batch, batch.grads), {}
        moment = {node: tensor * (1 - self.betas.first) for node, tensor in made.items()}
        for node, tensor in before.items():
            moment[node].add_(tensor, alpha=self.betas.first)
        old = {node: tensor.clone() for node, tensor in batch.factors.items()}
        self._moved.append((batch.at(old), moment))
        return made, moment

    def _by_tensor(self, batch: Batch) -> dict[str, Tensor]:
        """The paper's moments: Adam's of the dense implied gradient, projected again."""
        step, scale = batch.tag[0] + 1, batch.kind.scale
        change = implied(batch.diagram, batch.factors, self._solved(batch, batch.grads)) * scale
        first, second = (1 - self.betas.first) * change, (1 - self.betas.second) * change.square()
        if step > 1:
            first += self.betas.first * self._one(batch, "dense_avg")
            second += self.betas.second * self._one(batch, "dense_sq")
        self._keep_one(batch, step, dense_avg=first, dense_sq=second)
        return self._solved(batch, _pulled(batch, first * self.betas.factor(second, step) * scale))


def _pulled(batch: Batch, tensor: Tensor) -> dict[str, Tensor]:
    """J^T of a tensor."""
    with torch.enable_grad():
        held = {n: t.detach().requires_grad_(n in batch.kind.moving) for n, t in batch.factors.items()}
        made = dense(batch.diagram, held)
        found = torch.autograd.grad(made, [held[n] for n in batch.kind.moving], tensor)
    return dict(zip(batch.kind.moving, found, strict=True))


def _check(gauge: str | None, moments: str | None) -> None:
    if gauge not in (None, "min_norm", "zero"):
        raise SpecError("unknown gauge", got=repr(gauge), expected="min_norm, zero, or None for the cheaper one")
    if moments not in (None, "factors", "dense"):
        raise SpecError("unknown moments", got=repr(moments), expected="factors, dense or None")


def _betas(betas: Any, eps: Any) -> Betas:
    pair = tuple(betas) if isinstance(betas, Sequence) else (betas,)
    given = (*pair, eps)
    if len(given) != 3 or not all(type(n) in (int, float) and n >= 0 for n in given) or max(pair) >= 1:
        raise SpecError(
            "betas are from 0 up to 1, and eps is not negative", got=(betas, eps), expected="(0.9, 0.999) and 1e-8, say"
        )
    return Betas(*given)


def _check_tree(group: Group, owner: Nodes) -> None:
    moving = [node for node, p in owner.items() if p.requires_grad]
    if not group.diagram.is_tree or not Metric(group.diagram, moving).connected:
        raise SpecError(
            f"group {group.name!r}: gauge='zero' needs a tree whose trained nodes hang together",
            got=str(group.diagram),
            hint="use gauge='min_norm'",
        )
