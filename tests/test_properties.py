"""What holds for any size: folds multiply out, ranks are those of the cut, every lowering is the dense delta."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cases import Case, draw
from hypothesis import assume, given
from hypothesis import strategies as st
from truth import Truth, candidates, line_of

from tensoradapt.errors import RankError, ShapeError
from tensoradapt.folds import balanced, fold, two_factors
from tensoradapt.formats import FORMATS
from tensoradapt.formats.build import Shape
from tensoradapt.formats.network import network
from tensoradapt.init import evaluate

PRIMES = [2, 3, 5, 7, 97, 997, 7919, 65537, 104729]
sizes = st.one_of(st.integers(1, 20000), st.sampled_from([*PRIMES, 768, 3072, 4096, 11008, 53248, 151936]))


# -- folds ---------------------------------------------------------------------------------------------------------


@given(sizes, st.integers(1, 6))
def test_balanced_folds_multiply_out(size, count):
    found = balanced(size, count)
    assert len(found) == count and math.prod(found) == size
    assert list(found) == sorted(found, reverse=True) and min(found) >= 1


def factorisations(size: int, count: int):
    if count == 1:
        yield (size,)
        return
    for first in range(1, size + 1):
        if size % first == 0:
            yield from ((first, *rest) for rest in factorisations(size // first, count - 1))


@given(st.integers(1, 120), st.integers(1, 4))
def test_balanced_folds_have_the_least_sum(size, count):
    assert sum(balanced(size, count)) == min(map(sum, factorisations(size, count)))


@pytest.mark.parametrize("prime", PRIMES)
def test_a_prime_is_filled_up_with_ones(prime):
    assert fold("out", prime, "auto:3", {}) == {"out_0": prime, "out_1": 1, "out_2": 1}


def lycoris(size: int, factor: int) -> tuple[int, int]:
    """LyCORIS's own search: the factor where it divides, else the most even pair whose smaller part is not above it."""
    if factor > 0 and size % factor == 0:
        return tuple(sorted((factor, size // factor)))
    small, large = 1, size
    while small < large:
        step = small + 1
        while size % step:
            step += 1
        if step + size // step > small + large or (factor > 0 and step > factor):
            break
        small, large = step, size // step
    return tuple(sorted((small, large)))


@given(st.integers(1, 3000), st.one_of(st.just(-1), st.integers(1, 64)))
def test_factors_of_lokr(size, factor):
    assert two_factors(size, factor) == lycoris(size, factor)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_listed_folds_are_kept(parts):
    size = math.prod(parts)
    assert tuple(fold("in", size, parts, {}).values()) == tuple(parts)
    assert tuple(fold("in", size, ["head", "head_dim"], {"head": parts[0]}).values()) == (parts[0], size // parts[0])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 500))
def test_folds_that_do_not_multiply_out_are_refused(parts, size):
    assume(math.prod(parts) != size)
    with pytest.raises(ShapeError, match=f"(?s)multiply out.*{size}"):
        fold("out", size, parts, {})


# -- ranks ---------------------------------------------------------------------------------------------------------

dims = st.lists(st.integers(1, 5), min_size=2, max_size=4)


def shape_of(numbers, **more) -> Shape:
    axes = tuple(f"axis{k}" for k in range(len(numbers)))
    return Shape(axes, dict(zip(axes, numbers, strict=True)), {}, **more)


def tensor_of(diagram) -> np.ndarray:
    """The dense tensor of generic factors, by numpy's einsum."""
    names = list(diagram.sizes)
    arguments = []
    for node, values in draw(diagram).items():
        arguments += [values, [names.index(i) for i in diagram.nodes[node]]]
    return np.einsum(*arguments, [names.index(i) for i in diagram.open], optimize=True)


def cut_rank(tensor: np.ndarray, left: list[int]) -> int:
    right = [k for k in range(tensor.ndim) if k not in left]
    rows = math.prod(tensor.shape[k] for k in left)
    return int(np.linalg.matrix_rank(tensor.transpose(*left, *right).reshape(rows, -1), rtol=1e-9))


@given(dims, st.integers(1, 9))
def test_a_capped_tensor_train_has_the_ranks_of_its_cuts(numbers, rank):
    """No bond is larger than the cut needs, and none is smaller than asked for without need."""
    shape = shape_of(numbers)
    diagram = FORMATS["tt"](shape, rank, "cap")
    tensor = tensor_of(diagram)
    for k in range(len(numbers) - 1):
        bond = diagram.sizes[f"r_axis{k}"]
        assert bond == cut_rank(tensor, list(range(k + 1)))
        assert bond == min(rank, math.prod(numbers[: k + 1]), math.prod(numbers[k + 1 :]))


@given(dims, st.integers(1, 9))
def test_a_capped_tucker_has_the_ranks_of_its_unfoldings(numbers, rank):
    diagram = FORMATS["tucker"](shape_of(numbers), rank, "cap")
    tensor = tensor_of(diagram)
    for k in range(len(numbers)):
        assert diagram.sizes[f"r_axis{k}"] == cut_rank(tensor, [k])


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3), st.integers(1, 20))
def test_a_capped_tt_matrix_has_the_ranks_of_its_cuts(pairs, rank):
    outs, ins = (tuple(f"{side}_{k}" for k in range(len(pairs))) for side in ("out", "in"))
    given_sizes = {f"out_{k}": a for k, (a, _) in enumerate(pairs)} | {f"in_{k}": b for k, (_, b) in enumerate(pairs)}
    diagram = FORMATS["ttm"](Shape((*outs, *ins), given_sizes, {"out": outs, "in": ins}), rank, "cap")
    tensor, count = tensor_of(diagram), len(pairs)
    for k in range(count - 1):
        left = [*range(k + 1), *range(count, count + k + 1)]
        assert diagram.sizes[f"r_{k}"] == cut_rank(tensor, left)


@given(st.tuples(*[st.integers(1, 6)] * 3), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_a_capped_chain_of_a_users_own_has_the_ranks_of_its_cuts(numbers, a, b, c):
    shape = shape_of(numbers)
    text = "axis0 a, a b, b axis1 c, c axis2 -> axis0 axis1 axis2"
    diagram = network(text, shape, {"a": a, "b": b, "c": c}, "cap")
    tensor = tensor_of(diagram)
    assert (
        diagram.sizes["a"]
        == diagram.sizes["b"]
        == cut_rank(tensor, [0])
        == min(a, b, numbers[0], numbers[1] * c, numbers[1] * numbers[2])
    )
    assert diagram.sizes["c"] == cut_rank(tensor, [2])


@given(st.sampled_from(["tt", "tucker", "cp"]), dims, st.integers(1, 200))
def test_cap_keep_and_error_agree_on_what_is_above_a_limit(form, numbers, rank):
    shape = shape_of(numbers)
    capped, kept = FORMATS[form](shape, rank, "cap"), FORMATS[form](shape, rank, "keep")
    assert {kept.sizes[bond] for bond in kept.bonds} == {rank}
    limits = {capped.sizes[bond] for bond in capped.bonds}
    assert max(limits) <= rank
    if min(limits) == rank:
        assert FORMATS[form](shape, rank, "error") == kept == capped
    else:
        with pytest.raises(RankError, match="above its limit"):
            FORMATS[form](shape, rank, "error")


@given(dims, st.integers(1, 30))
def test_a_capped_cp_still_holds_every_tensor(numbers, rank):
    """The limit of CP is the number of fibres along the longest axis: one term for each."""
    found = FORMATS["cp"](shape_of(numbers), rank, "cap").sizes["r"]
    assert found == min(rank, math.prod(numbers) // max(numbers))


# -- networks ------------------------------------------------------------------------------------------------------


def all_reach_an_axis(nodes, axes) -> bool:
    """Whether no part of a network is a mere number: specs refuse those."""
    parts = [set(node) for node in nodes]
    for part in parts * len(parts):
        for other in parts:
            if part & other:
                part |= other
    return all(part & set(axes) for part in parts)


@st.composite
def networks(draw_from):
    """Networks of up to five nodes: axes scattered over them, and bonds that join two of them, or three."""
    outs, ins = draw_from(st.integers(1, 2)), draw_from(st.integers(1, 2))
    sides = {
        name: [name] if count == 1 else [f"{name}_{k}" for k in range(count)]
        for name, count in (("out", outs), ("in", ins))
    }
    coordinates = draw_from(st.lists(st.sampled_from(["layer", "role"]), unique=True, max_size=2))
    count = draw_from(st.integers(1, 5))
    nodes: list[list[str]] = [[] for _ in range(count)]
    for axis in (*sides["out"], *sides["in"], *coordinates):
        for node in draw_from(
            st.lists(st.integers(0, count - 1), unique=True, min_size=1, max_size=2 if count > 1 else 1)
        ):
            nodes[node].append(axis)
    for bond in "abcd"[: draw_from(st.integers(0, 4)) if count > 1 else 0]:
        for node in draw_from(st.lists(st.integers(0, count - 1), unique=True, min_size=2, max_size=min(3, count))):
            nodes[node].append(bond)
    nodes = [draw_from(st.permutations(node)) for node in nodes if node]
    axes = draw_from(st.permutations([*coordinates, *sides["out"], *sides["in"]]))
    folds = {"out": [[6], [3, 2], [2, 3]], "in": [[4], [2, 2]]}
    chosen = {
        name: draw_from(st.sampled_from([f for f in folds[name] if len(f) == len(sides[name])]))
        for name in sides
        if len(sides[name]) > 1
    }
    assume(all_reach_an_axis(nodes, axes))
    text = f"{', '.join(' '.join(node) for node in nodes)} -> {' '.join(axes)}"
    return {
        "format": "network",
        "network": text,
        "folds": chosen,
        "rank": draw_from(st.integers(1, 3)),
        "excess": "keep",
    }


@given(networks(), st.booleans())
def test_every_lowering_of_any_network_is_its_dense_delta(rule, turned):
    group = Case("", rule).groups()[0]
    placement = group.placements[-1]
    truth = Truth(group, placement, turned=turned)
    for candidate in candidates(group, placement, transpose=turned):
        truth.check(line_of(group, placement, candidate))


@given(networks(), st.sampled_from(["embedding", "conv"]))
def test_every_lowering_of_any_network_serves_embeddings_and_convolutions(rule, kind):
    shape = {"h.0.q": (6, 4)} if kind == "embedding" else {"h.0.q": (6, 4, 1, 1)}
    group = Case("", rule, shape, kind=kind).groups()[0]
    (placement,) = group.placements
    truth = Truth(group, placement)
    for candidate in candidates(group, placement):
        truth.check(line_of(group, placement, candidate))


# -- laws ----------------------------------------------------------------------------------------------------------

numbers = st.integers(1, 9).map(str)
expressions = st.recursive(
    st.one_of(numbers, st.sampled_from(["in", "out", "r_in"])),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda e: f"-{e}"),
        inner.map(lambda e: f"sqrt({e})"),
    ),
    max_leaves=6,
)


@given(expressions)
def test_laws_are_arithmetic(text):
    known = {"in_": 5, "out": 7, "r_in": 3, "sqrt": math.sqrt}
    python = text.replace("r_in", "RANK").replace("in", "in_").replace("RANK", "r_in")
    try:
        expected = eval(python, {"__builtins__": {}}, known)
    except (ValueError, ZeroDivisionError):
        assume(False)
    assert evaluate(text, {"in": 5, "out": 7, "r_in": 3}) == pytest.approx(expected)
