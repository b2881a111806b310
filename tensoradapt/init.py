"""Initial factors: laws stated as bounds and standard deviations, and factors taken from the weights.

Invariant: a random law's bytes depend on the seed and the factor's key alone: not on the machine, the number of
threads, the order of creation, or other rules. Global generators are neither read nor written.
"""

from __future__ import annotations

import ast
import hashlib
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorly
import torch
from tensorly.decomposition import tensor_train_matrix
from torch import Tensor

from tensoradapt.errors import AdapterError, RankError, SpecError
from tensoradapt.grouping import Group
from tensoradapt.laws import BALANCED
from tensoradapt.linalg import home_of
from tensoradapt.linalg.lapack import svd
from tensoradapt.rows import Factor

Random = np.random.Generator
_OPERATORS: dict[type, Callable[..., float]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.Pow: operator.pow, ast.USub: operator.neg},
}


def evaluate(text: str, sizes: Mapping[str, int]) -> float:
    """A law's argument as a number: arithmetic, `sqrt`, and axes and bonds by name. Raises SpecError."""
    try:
        # `in` is a keyword of Python: it is renamed on both sides
        renamed = {"in_" if name == "in" else name: size for name, size in sizes.items()}
        value = _value(ast.parse(re.sub(r"\bin\b", "in_", text), mode="eval").body, renamed)
        if not math.isfinite(value):  # a TypeError where a root of a negative number made it complex
            raise ValueError(f"it is {value}")
        return value
    except (SyntaxError, KeyError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise SpecError(
            f"cannot evaluate {text!r}",
            got=repr(error),
            expected=f"numbers, + - * / **, sqrt(), and {', '.join(sizes)}",
        ) from None


def _value(node: ast.AST, sizes: Mapping[str, int]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name):
            return float(sizes[name])
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.UnaryOp(op=op, operand=operand):
            return _OPERATORS[type(op)](_value(operand, sizes))
        case ast.Call(func=ast.Name(id="sqrt"), args=[argument]):
            return math.sqrt(_value(argument, sizes))
    raise ValueError(ast.dump(node))


def _uniform(rng: Random, factor: Factor, bound: float) -> Any:
    return rng.uniform(-bound, bound, factor.shape)


def _normal(rng: Random, factor: Factor, std: float) -> Any:
    return std * rng.standard_normal(factor.shape)


def _constant(rng: Random, factor: Factor, value: float) -> Any:
    return np.full(factor.shape, value)


def _zero(rng: Random, factor: Factor) -> Any:
    return np.zeros(factor.shape)


def _eye(rng: Random, factor: Factor) -> Any:
    """Identity between the first and the last index, for every value of those between."""
    first, *between, last = factor.shape if len(factor.shape) > 1 else (1, *factor.shape)
    eye = np.eye(first, last).reshape(first, *[1 for _ in between], last)
    return np.broadcast_to(eye, (first, *between, last)).reshape(factor.shape)


def _orthogonal(rng: Random, factor: Factor) -> Any:
    """Orthonormal columns (rows, where they are fewer) of the factor as a matrix (all but the last index, last)."""
    rows, cols = math.prod(factor.shape[:-1]), factor.shape[-1]
    q, r = np.linalg.qr(rng.standard_normal((max(rows, cols), min(rows, cols))))
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    return (q if rows >= cols else q.T).reshape(factor.shape)


def _unit_norm(rng: Random, factor: Factor) -> Any:
    values = rng.uniform(-1, 1, factor.shape)
    return values / math.sqrt(math.fsum(np.square(values).ravel()))  # a threaded sum would depend on the machine


def _balanced(rng: Random, factor: Factor) -> Any:
    """Standard deviation that leaves a sum over the factor's bonds as large as its terms: (prod bonds)^(-1/4)."""
    return rng.standard_normal(factor.shape) / math.prod(factor.sizes[bond] for bond in factor.bonds) ** 0.25


LAWS: dict[str, tuple[Callable[..., Any], int]] = {
    **{
        "uniform": (_uniform, 1),
        "normal": (_normal, 1),
        "constant": (_constant, 1),
        "zero": (_zero, 0),
        "eye": (_eye, 0),
    },
    **{"orthogonal": (_orthogonal, 0), "unit_norm": (_unit_norm, 0), BALANCED: (_balanced, 0)},
}
WEIGHT = "weight"


def parse_law(factor: Factor) -> tuple[Callable[..., Any], tuple[float, ...]]:
    """The function and the argument of a factor's law. Raises SpecError on one that does not exist."""
    name, bracket, rest = factor.law.partition("(")
    if name not in LAWS or LAWS[name][1] != bool(bracket) or (bracket and not rest.endswith(")")):
        spelled = ", ".join(f"{law}(...)" if takes else law for law, (_, takes) in LAWS.items())
        raise SpecError(f"{factor.key} has no law {factor.law!r}", expected=f"one of {spelled}, {WEIGHT}")
    return LAWS[name][0], (evaluate(rest[:-1], factor.sizes),) if bracket else ()


def draw(factor: Factor, seed: int) -> Tensor:
    """The initial tensor of a factor under its law."""
    make, arguments = parse_law(factor)
    own = int.from_bytes(hashlib.sha256(factor.key.encode()).digest(), "little")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, own])))
    return torch.from_numpy(np.array(make(rng, factor, *arguments), order="C")).to(getattr(torch, factor.dtype))


def from_weight(group: Group, weight: Tensor) -> dict[str, Tensor]:
    """The factors whose law is `weight`, from a site's own weight (out, in).

    Two nodes on either side: W = U S V^T, `out` gets U and `in` gets S V^T (LoRA-XS). Every node of a TT-matrix: its
    truncated TT-SVD (DoTA). Raises AdapterError on the meta device, SpecError where neither is meant.
    """
    if weight.is_meta:
        raise AdapterError(
            f"group {group.name!r} starts from the weights, and the model is on the meta device",
            hint="load the weights first",
        )
    if len(group.placements) != 1:
        raise SpecError(
            f"law 'weight' needs a tensor for every site, and group {group.name!r} has {len(group.placements)}"
        )
    nodes = [node for node, law in group.laws.items() if law == WEIGHT]
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if group.rule.format == "ttm" and len(nodes) == len(group.diagram.nodes):
        return _typed(group, _tt_matrix(group, weight))
    sides = {axis: [n for n in nodes if axis in group.diagram.nodes[n]] for axis in ("out", "in")}
    if len(nodes) != 2 or any(len(found) != 1 for found in sides.values()):
        raise SpecError("law 'weight' serves two nodes, on out and on in, or all nodes of a TT-matrix", got=nodes)
    return _typed(group, _two_sides(group, sides["out"][0], sides["in"][0], weight))


def _typed(group: Group, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Factors in the shapes and dtype of the group's nodes. Raises RankError where the weight holds no such rank."""
    diagram, dtype = group.diagram, getattr(torch, group.rule.dtype)
    for node, factor in factors.items():
        if factor.numel() != diagram.numel(node):
            raise RankError(
                f"node {node!r} of group {group.name!r} asks the weight for a rank that it does not have",
                got=diagram.shape(node),
                expected=tuple(factor.shape),
                hint="use a smaller rank, or excess: cap",
            )
    return {node: factor.reshape(diagram.shape(node)).to(dtype).contiguous() for node, factor in factors.items()}


def _two_sides(group: Group, outer: str, inner: str, weight: Tensor) -> dict[str, Tensor]:
    nodes = group.diagram.nodes
    if len(nodes[outer]) != 2 or len(nodes[inner]) != 2:
        raise SpecError("law 'weight' serves nodes with one bond each", got={n: nodes[n] for n in (outer, inner)})
    u, s, vh = svd(weight)
    signs = torch.where(
        u.abs().argmax(0, keepdim=True).eq(torch.arange(u.shape[0], device=u.device)[:, None]), u.sign(), 0
    ).sum(0)
    columns = {outer: u * signs, inner: ((s * signs)[:, None] * vh).mT}
    ranks = {node: group.diagram.numel(node) // matrix.shape[0] for node, matrix in columns.items()}
    return {
        node: matrix[:, : ranks[node]] if nodes[node][0] in ("out", "in") else matrix[:, : ranks[node]].mT
        for node, matrix in columns.items()
    }


def _tt_matrix(group: Group, weight: Tensor) -> dict[str, Tensor]:
    diagram = group.diagram
    sizes = [diagram.sizes[axis] for axis in (*diagram.fold("out"), *diagram.fold("in"))]
    ranks = [1, *(diagram.sizes[bond] for bond in diagram.bonds), 1]
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        cores = tensor_train_matrix(weight.to(home_of(weight.device)).reshape(sizes), ranks).factors
    return dict(zip(diagram.nodes, cores, strict=True))


def require_seed(seed: int) -> None:
    """Raise SpecError on what is no seed."""
    if type(seed) is not int or seed < 0:
        raise SpecError("a seed is an integer, and not negative", got=repr(seed))
