"""Recipes: how one site's delta is contracted with its input, decided in names and integers before any tensor exists.

Every network has four candidate lowerings: a *sandwich* `B . M . A` (whenever `out` and `in` sit on different nodes),
*stages* `I (x) W (x) I` (each node consumes neighbouring axes of the activation), one *einsum* with the activation as
an operand, and *dense*. The cheapest wins. Invariant: only `dense` ever forms a tensor of out x in entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import permutations

from tensoradapt.contraction import TOKENS, Contraction, Indices, Problem
from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError

# An einsum permutes what it contracts: it has to promise more than a quarter less work to be chosen.
HANDICAP = {"sandwich": 1.0, "stages": 1.0, "einsum": 1.25, "dense": 1.0}


@dataclass(frozen=True)
class Stage:
    """One map `I_before (x) W (x) I_after` of the activation; W is `(rows, cols)`, or a diagonal of `rows` entries."""

    weight: Contraction
    before: int
    rows: int
    cols: int
    after: int
    diagonal: bool = False
    kernel: bool = False  # consumes the kernel of a convolution
    pointwise: bool = False  # on a convolution's channels: once for a position, though `after` has its kernel still

    @property
    def flops(self) -> int:
        """Floating-point operations per token, a multiply-add counted as two."""
        if self.diagonal:
            return self.rows * self.before
        return 2 * self.before * self.rows * self.cols * (1 if self.pointwise else self.after)


_Step = tuple[Indices, tuple[str, ...]]  # the axes of an activation, and the nodes that are still to be applied
_Walk = tuple[int, tuple[Stage, ...], Indices]  # operations, stages, and the axes at the end


@dataclass(frozen=True)
class Recipe:
    """The lowering of one site: what is selected, what is contracted, and what it costs.

    `selected` gives every node's indices once the site's coordinates are picked (a slotted axis becomes `slot_out
    slot_in`). `stages` is empty for an einsum, whose `weight` then has the activation as its first operand.
    """

    kind: str
    selected: tuple[tuple[str, Indices], ...]
    stages: tuple[Stage, ...]
    einsum: Contraction | None
    order: tuple[int, ...]  # a last permutation of the activation's axes, empty where none is needed
    sizes: tuple[int, ...]  # the sizes of those axes
    inputs: tuple[int, ...]  # the sizes of the activation's axes on entry
    flops: int  # per token, what is contracted without an input apart
    build: int  # per step, whatever the number of tokens
    dense_flops: int = field(default=0, compare=False)  # per token of a step, with the delta formed once and multiplied

    @property
    def per_token(self) -> int:
        """Floating-point operations per token of a step of `TOKENS`, contractions of factors alone shared among them.

        An embedding's first stage is a look-up and multiplies nothing.
        """
        return self.flops - -self.build // TOKENS

    @property
    def cost(self) -> int:
        """The cost of a step of `TOKENS` tokens."""
        return self.flops * TOKENS + self.build


@lru_cache(maxsize=4096)
def recipe(
    diagram: Diagram,
    slots: tuple[int, int] = (1, 1),
    kind: str = "linear",
    *,
    transpose: bool = False,
    code: bool = False,
) -> Recipe:
    """The cheapest lowering of one site of a group: of `slots` (rows, columns of them), for a kind of module.

    `transpose` swaps the sides, for a tied module that uses the same tensor the other way round. `code` keeps to the
    lowerings that have a code before `out`, for dropout there; raises SpecError where none has.
    """
    problem = _problem(diagram, slots, kind, transpose=transpose)
    found = candidates(problem)
    found = [made for made in found if made.kind == "sandwich"] if code else found
    if not found:
        raise SpecError(
            "dropout at the code needs a network with a code: `out` and `in` on different nodes",
            got=str(diagram),
            hint="use dropout_at: in",
        )
    chosen = min(found, key=lambda candidate: candidate.cost * HANDICAP[candidate.kind])
    return replace(chosen, dense_flops=_dense(problem).per_token)


@lru_cache(maxsize=4096)
def formed(diagram: Diagram, slots: tuple[int, int] = (1, 1)) -> int:
    """The operations per token of a step that forming a site's delta takes."""
    return -(-_dense(_problem(diagram, slots, "linear", transpose=False)).build // TOKENS)


def candidates(problem: Problem) -> list[Recipe]:
    """Every lowering of a site's network; `dense` always is one."""
    single = (_staged(problem), _einsum(problem), _dense(problem))
    return [*_sandwich(problem), *(made for made in single if made is not None)]


def _problem(diagram: Diagram, slots: tuple[int, int], kind: str, *, transpose: bool) -> Problem:
    picked = set(diagram.coordinates)
    slotted = ("slot" if "slot" in picked else "site") if slots != (1, 1) else ""
    operands = {
        node: tuple(
            j for i in indices for j in (("slot_out", "slot_in") if i == slotted else () if i in picked else (i,))
        )
        for node, indices in diagram.nodes.items()
    }
    out = (*(("slot_out",) if slotted else ()), *diagram.fold("out"))
    inp = (*(("slot_in",) if slotted else ()), *diagram.fold("in"), *diagram.fold("kernel"))
    sizes = {"token": TOKENS, "slot_out": slots[0], "slot_in": slots[1]} | {
        i: s for i, s in diagram.sizes.items() if i not in picked
    }
    return Problem(operands, inp if transpose else out, out if transpose else inp, sizes, kind, diagram.fold("kernel"))


def _finish(
    problem: Problem, kind: str, stages: Sequence[Stage], order: Sequence[int] = (), state: Indices = ()
) -> Recipe:
    return Recipe(
        kind=kind,
        selected=tuple(problem.operands.items()),
        stages=tuple(stages),
        einsum=None,
        order=tuple(order),
        sizes=tuple(problem.sizes[i] for i in state),
        inputs=tuple(problem.sizes[i] for i in problem.inp),
        flops=sum(stage.flops for stage in stages[problem.kind == "embedding" :]),
        build=sum(stage.weight.flops for stage in stages),
    )


def _dense(problem: Problem) -> Recipe:
    weight = problem.contract(list(problem.operands), (*problem.out, *problem.inp))
    rows, cols = problem.numel(problem.out), problem.numel(problem.inp)
    return _finish(problem, "dense", [Stage(weight, 1, rows, cols, 1, kernel=problem.kind == "conv")])


def _einsum(problem: Problem) -> Recipe | None:
    """One einsum with the activation as an operand; None where its path would form the dense matrix on the way."""
    if problem.kind != "linear":
        return None
    x, y = ("token", *problem.inp), ("token", *problem.out)
    found = problem.contract(list(problem.operands), y, activation=x)
    letters = {letter: index for index, letter in problem.letters.items()}
    for _, equation in found.steps:
        made = [letters[c] for c in equation.partition("->")[2]]
        if "token" not in made and problem.numel(made) >= problem.numel(problem.out) * problem.numel(problem.inp):
            return None
    base = _finish(problem, "einsum", [])
    return Recipe(**{**vars(base), "einsum": found, "flops": -(-found.flops // TOKENS)})


def _sandwich(problem: Problem) -> Iterator[Recipe]:
    """`B . M . A`: what hangs on `out`, what hangs on `in`, and what joins them; none where a node carries both."""
    slots = {"slot_out", "slot_in"}
    outer = [n for n, i in problem.operands.items() if set(i) & (set(problem.out) - slots)]
    inner = [n for n, i in problem.operands.items() if set(i) & (set(problem.inp) - slots)]
    if not outer or not inner or set(outer) & set(inner) or _carried(problem, [*outer, *inner]) & slots:
        return
    middle: list[str] = []
    for part in _components(problem, [n for n in problem.operands if n not in outer and n not in inner]):
        touched = _carried(problem, part)
        to_out, to_in = touched & _carried(problem, outer), touched & _carried(problem, inner)
        (middle if touched & slots or (to_out and to_in) else inner if to_in else outer).extend(part)
    code_out = _ordered(problem, _carried(problem, outer) & _carried(problem, [*inner, *middle]))
    code_in = _ordered(problem, _carried(problem, inner) & _carried(problem, [*outer, *middle]))
    found = _sandwiches(problem, outer, middle, inner, code_out, code_in)
    # an embedding's row is looked up whole: its first stage cannot be repeated over slots
    yield from (made for made in found if problem.kind != "embedding" or made.stages[0].before == 1)


def _sandwiches(
    problem: Problem, outer: list[str], middle: list[str], inner: list[str], code_out: Indices, code_in: Indices
) -> Iterator[Recipe]:
    """The ways to place what joins the sides: as a stage of its own where it factors, else within either side."""
    slot_out, slot_in = problem.out[: problem.out[0] == "slot_out"], problem.inp[: problem.inp[0] == "slot_in"]
    out, inp = problem.out[len(slot_out) :], problem.inp[len(slot_in) :]
    last = _stage(problem, outer, out, code_out, before=problem.numel(slot_out))
    first = _stage(problem, inner, code_in, inp, before=problem.numel(slot_in))
    shared = set(code_out) & set(code_in)
    if not middle:
        yield _finish(problem, "sandwich", [first, last])
    elif not shared:
        yield _finish(
            problem, "sandwich", [first, _stage(problem, middle, (*slot_out, *code_out), (*slot_in, *code_in)), last]
        )
    elif not slot_out and set(code_out) == set(code_in) == _carried(problem, middle):
        weight = problem.contract(middle, code_in)
        size = problem.numel(code_in)
        last = _stage(problem, outer, out, code_in)
        yield _finish(problem, "sandwich", [first, Stage(weight, 1, size, size, 1, diagonal=True), last])
    else:
        rows, cols = (*slot_out, *out), (*slot_in, *code_in)
        yield _finish(problem, "sandwich", [first, _stage(problem, [*outer, *middle], rows, cols)])
        rows, cols = (*slot_out, *code_out), (*slot_in, *inp)
        yield _finish(problem, "sandwich", [_stage(problem, [*middle, *inner], rows, cols), last])


def _stage(problem: Problem, nodes: Sequence[str], rows: Indices, cols: Indices, before: int = 1) -> Stage:
    weight = problem.contract(nodes, (*rows, *cols))
    kernel = problem.kind == "conv" and bool(set(cols) & set(problem.inp))
    return Stage(weight, before, problem.numel(rows), problem.numel(cols), 1, kernel=kernel)


def _carried(problem: Problem, nodes: Iterable[str]) -> set[str]:
    return {index for node in nodes for index in problem.operands[node]}


def _ordered(problem: Problem, indices: set[str]) -> Indices:
    return tuple(index for index in problem.sizes if index in indices - {"slot_out", "slot_in"})


def _components(problem: Problem, nodes: Sequence[str]) -> list[list[str]]:
    """The nodes in connected parts: two nodes that share an index are in one."""
    parts: list[list[str]] = []
    for node in nodes:
        joined = [part for part in parts if _carried(problem, part) & set(problem.operands[node])]
        parts = [part for part in parts if part not in joined] + [[*(n for part in joined for n in part), node]]
    return parts


def _staged(problem: Problem) -> Recipe | None:
    """Every node applied to the activation in turn, each to neighbouring axes: no transpose but perhaps a last one."""
    counts = [sum(index in indices for indices in problem.operands.values()) for index in problem.sizes]
    if (
        problem.kind == "embedding"
        or max(counts) > 2
        or problem.sizes["slot_out"] * problem.sizes["slot_in"] > 1
        or len(problem.operands) > 7
    ):
        return None
    best = _walk(problem, problem.inp, tuple(problem.operands), {})
    if best is None:
        return None
    _, stages, state = best
    order = () if state == problem.out else tuple(state.index(axis) for axis in problem.out)
    return _finish(problem, "stages", stages, order, state)


def _walk(problem: Problem, state: Indices, left: tuple[str, ...], known: dict[_Step, _Walk | None]) -> _Walk | None:
    """The cheapest order in which the nodes left can be applied to an activation with the axes `state`, if any.

    `known` holds what was found for other ways to the same step: of seven nodes there are five thousand orders.
    """
    if not left:
        fits = state == problem.out if problem.kind == "conv" else set(state) == set(problem.out)  # channels stay put
        return (0 if state == problem.out else 2 * problem.numel(state), (), state) if fits else None
    if (state, left) not in known:
        best: _Walk | None = None
        for node in left:
            rest = tuple(n for n in left if n != node)
            for stage, after in _applications(problem, state, node):
                found = _walk(problem, after, rest, known)
                if found is not None and (best is None or stage.flops + found[0] < best[0]):
                    best = (stage.flops + found[0], (stage, *found[1]), found[2])
        known[state, left] = best
    return known[state, left]


def _applications(problem: Problem, state: Indices, node: str) -> Iterator[tuple[Stage, Indices]]:
    """One node applied to the activation, in the orders of the axes that it makes; none where its inputs lie apart."""
    indices = problem.operands[node]
    taken = tuple(axis for axis in state if axis in indices)
    start = state.index(taken[0]) if taken else 0
    if not taken or state[start : start + len(taken)] != taken:
        return
    made = tuple(index for index in indices if index not in taken)
    for rows in permutations(made) if len(made) <= 3 else [made]:
        before, after = state[:start], state[start + len(taken) :]
        conv = problem.kind == "conv"
        if conv and (before or after not in ((), problem.kernel)):
            continue  # on a convolution's channels only plain 1 x 1 and k x k stages are served
        sizes = (problem.numel(before), problem.numel(rows), problem.numel(taken), problem.numel(after))
        kernel = conv and bool(set(taken) & set(problem.kernel or problem.inp))
        weight = problem.contract([node], (*rows, *taken))
        yield Stage(weight, *sizes, kernel=kernel, pointwise=conv and not kernel), (*before, *rows, *after)
