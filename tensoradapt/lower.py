"""Lowering: a group's factors and one site's coordinates -> the weights of its chain.

Invariant: gradients reach every selected factor; nothing of out x in entries is formed unless the recipe is `dense`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tensoradapt.chain import Chain, Pair, contract, contract_pairs
from tensoradapt.diagram import Diagram
from tensoradapt.grouping import Group
from tensoradapt.placing import Placement
from tensoradapt.recipe import Recipe, Stage, recipe

Pick = tuple[int, int, tuple[int, int] | None]


@dataclass(frozen=True)
class Line:
    """What one site takes of its group's factors, and what is done with it: fixed at attach, holding no tensor.

    `picks` lists, for every node, the dimensions to index, last first: (dimension, position, grid of slots or None).
    """

    recipe: Recipe
    nodes: tuple[str, ...]
    picks: tuple[tuple[Pick, ...], ...]


def line(group: Group, placement: Placement, kind: str | None = None, *, transpose: bool = False) -> Line:
    """The line of one site of a group; `transpose` for a tied module that uses the tensor the other way round."""
    diagram = group.diagram
    made = recipe(diagram, placement.slots, kind or placement.site.kind, transpose=transpose, code=group.drops_code)
    picks = tuple(_picks(diagram, indices, placement) for indices in diagram.nodes.values())
    return Line(made, tuple(diagram.nodes), picks)


def _picks(diagram: Diagram, indices: tuple[str, ...], placement: Placement) -> tuple[Pick, ...]:
    slotted = ("slot" if "slot" in placement.index else "site") if placement.slots != (1, 1) else ""
    coordinates = set(diagram.coordinates)
    found = [
        (dim, placement.index[i], placement.slots if i == slotted else None)
        for dim, i in enumerate(indices)
        if i in coordinates
    ]
    return tuple(reversed(found))


def pick(tensor: Tensor, picks: tuple[Pick, ...]) -> Tensor:
    """A node's tensor at one site's coordinates; a slotted axis becomes (slot_out, slot_in)."""
    for dim, position, slots in picks:
        if slots is None:
            tensor = tensor.select(dim, position)
        else:
            tensor = tensor.narrow(dim, position, slots[0] * slots[1]).unflatten(dim, slots)
    return tensor


def chain(
    line: Line, factors: Mapping[str, Tensor], starts: Mapping[str, Tensor] | None = None, like: Tensor | None = None
) -> Chain:
    """A site's chain: factors selected and contracted in their own dtype, then cast to that of `like`.

    `starts` are the frozen copies that a difference subtracts.
    """
    picked = _picked(line, factors)
    recipe = line.recipe
    if starts is not None:
        begun = _picked(line, starts)
        pairs = {node: (begun[node], tensor - begun[node]) for node, tensor in picked.items()}
        made = (
            [pairs[n] for n in recipe.einsum.nodes]
            if recipe.einsum
            else [_pair(stage, pairs) for stage in recipe.stages]
        )
        return Chain(recipe, start=tuple((_cast(start, like), _cast(change, like)) for start, change in made))
    tensors = (
        [picked[n] for n in recipe.einsum.nodes]
        if recipe.einsum
        else [_weight(stage, picked) for stage in recipe.stages]
    )
    return Chain(recipe, tuple(_cast(tensor, like) for tensor in tensors))


def _picked(line: Line, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {node: pick(factors[node], picks) for node, picks in zip(line.nodes, line.picks, strict=True)}


def _cast(tensor: Tensor, like: Tensor | None) -> Tensor:
    return tensor if like is None else tensor.to(device=like.device, dtype=like.dtype)


def _shape(stage: Stage) -> tuple[int, ...]:
    return (stage.rows,) if stage.diagonal else (stage.rows, stage.cols)


def _weight(stage: Stage, picked: Mapping[str, Tensor]) -> Tensor:
    return contract(stage.weight, [picked[node] for node in stage.weight.nodes]).reshape(_shape(stage))


def _pair(stage: Stage, pairs: Mapping[str, Pair]) -> Pair:
    start, change = contract_pairs(stage.weight, [pairs[node] for node in stage.weight.nodes])
    assert change is not None
    return start.reshape(_shape(stage)), change.reshape(_shape(stage))


def lower(group: Group, placement: Placement, factors: Mapping[str, Tensor]) -> Chain:
    """The chain of one site.  Shapes: (.., in) -> (.., out)."""
    return chain(line(group, placement), factors)


def dense(diagram: Diagram, factors: Mapping[str, Tensor]) -> Tensor:
    """The whole tensor of a group by one einsum over the diagram.  Shape: the sizes of `diagram.open`, in order."""
    return torch.einsum(diagram.equation, *[factors[node] for node in diagram.nodes])
