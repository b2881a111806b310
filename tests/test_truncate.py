"""Truncation of networks: the error is what the spectra said, budgets hold, sums and wider bonds are exact."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from cases import BY_NAME, CASES, draw
from test_gauge import TREE as BRANCHES
from test_gauge import torches, unfolding, whole

from tensoradapt.diagram import Diagram
from tensoradapt.errors import RankError, ShapeError, SpecError
from tensoradapt.gauge import Network, added, ladder, moved, squeezed, truncated, widened

THIN = [
    c
    for c in (BRANCHES, BY_NAME["ttm2-layer-out-in-r2"], *CASES[::37])
    if c.groups()[0].diagram.is_tree and max(c.groups()[0].rank.values(), default=1) > 1
]
trees = pytest.mark.parametrize("case", THIN, ids=lambda case: case.name)
TREE = BRANCHES.groups()[0].diagram
TRAIN = BY_NAME["tt-out-in-layer-role-r3"].groups()[0].diagram
CP = BY_NAME["cp-out-in-layer-role-r3"].groups()[0].diagram


def tail(diagram, factors, bond, rank):
    """The norm of the singular values that a bond of a rank discards; over a batch, of all of its matrices."""
    return np.linalg.norm(np.linalg.svd(unfolding(diagram, factors, bond), compute_uv=False)[..., rank:])


def error(diagram, factors, made):
    return np.linalg.norm(whole(diagram, factors) - whole(made.diagram, made.factors))


# -- the error ----------------------------------------------------------------------------------------------------


@trees
def test_the_error_of_one_bond_is_its_discarded_spectrum(case):
    diagram = case.groups()[0].diagram
    factors = draw(diagram)
    norm = np.linalg.norm(whole(diagram, factors))
    for bond in diagram.bonds:
        for rank in range(1, diagram.sizes[bond] + 1):
            made = truncated(diagram, torches(factors), {bond: rank})
            assert made.diagram.sizes[bond] <= rank
            assert abs(error(diagram, factors, made) - tail(diagram, factors, bond, rank)) <= 1e-12 * norm


@trees
def test_the_error_of_many_bonds_is_within_the_bound(case):
    diagram = case.groups()[0].diagram
    for seed in range(3):
        factors = draw(diagram, seed)
        for rank in range(1, max(diagram.sizes[b] for b in diagram.bonds)):
            made = truncated(diagram, torches(factors), dict.fromkeys(diagram.bonds, rank))
            tails = [tail(diagram, factors, bond, rank) for bond in diagram.bonds]
            found = error(diagram, factors, made)
            assert max(tails) * (1 - 1e-12) <= found <= np.linalg.norm(tails) * (1 + 1e-12)


def test_no_bond_is_left_above_what_its_ends_can_use():
    """With rank 1 to its left, the bond between `in` and `layer` can use 4 of its values, and loses nothing by it."""
    sizes = {"out": 6, "in": 4, "layer": 8, "r_out": 5, "r_in": 7}
    nodes = {"core_out": ("out", "r_out"), "core_in": ("r_out", "in", "r_in"), "core_layer": ("r_in", "layer")}
    diagram = Diagram(sizes, nodes, ("out", "in", "layer"))
    factors = draw(diagram)
    made = truncated(diagram, torches(factors), {"r_out": 1})
    assert {b: made.diagram.sizes[b] for b in made.diagram.bonds} == {"r_out": 1, "r_in": 4}
    assert error(diagram, factors, made) == pytest.approx(tail(diagram, factors, "r_out", 1), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_zero_tensor_can_be_truncated(dtype):
    factors = {node: torch.zeros(TREE.shape(node), dtype=dtype) for node in TREE.nodes}
    made = truncated(TREE, factors, dict.fromkeys(TREE.bonds, 1))
    assert all(t.isfinite().all() and t.dtype == dtype for t in made.factors.values())
    assert not whole(made.diagram, {n: t.double() for n, t in made.factors.items()}).any()


# -- CP -----------------------------------------------------------------------------------------------------------


def test_a_cp_that_repeats_itself_loses_nothing():
    factors = draw(CP)
    doubled = {node: np.concatenate([value, value[:, :1]], axis=1) for node, value in factors.items()}
    wide = replace(CP, sizes={**CP.sizes, "r": 4})
    made = truncated(wide, torches(doubled), {"r": 3})
    assert made.diagram.sizes["r"] == 3 and error(wide, doubled, made) < 1e-8 * np.linalg.norm(whole(wide, doubled))


@pytest.mark.parametrize("rank", [1, 2])
def test_a_cp_is_fitted_again_after_components_are_dropped(rank):
    for seed in range(5):
        factors = draw(CP, seed)
        made = truncated(CP, torches(factors), {"r": rank})
        norms = np.prod([np.linalg.norm(value, axis=0) for value in factors.values()], axis=0)
        kept = np.sort(np.argsort(norms)[::-1][:rank])
        dropped = whole(CP, factors) - whole(made.diagram, {n: v[:, kept] for n, v in factors.items()})
        assert error(CP, factors, made) < 0.999 * np.linalg.norm(dropped)
        costs = ladder(CP, torches(factors)).costs["r"]
        assert error(CP, factors, made) <= np.sqrt(sum(costs[rank:])) * (1 + 1e-9)
        best = min(np.linalg.norm(residual(CP, factors, kept)) for kept in combinations(range(3), rank))
        assert np.sqrt(sum(costs[rank:])) == pytest.approx(best, rel=1e-6) or rank == 1


def residual(diagram, factors, kept):
    """The dense tensor less its least-squares fit by some of the components."""
    parts = [whole(diagram, {n: v[:, [k]] for n, v in factors.items()}).ravel() for k in range(3)]
    basis = np.stack([parts[k] for k in kept], axis=1)
    return sum(parts) - basis @ np.linalg.lstsq(basis, sum(parts))[0]


# -- which bond next ----------------------------------------------------------------------------------------------


def brute(ladders, sizes, allowed):
    """Drop the value that costs least per entry saved, one by one, looking at all bonds every time."""
    spent, done = 0.0, set()
    while True:
        best = None
        for k, rung in enumerate(ladders):
            for bond, costs in rung.costs.items():
                if sizes[k][bond] > 1 and (k, bond) not in done:
                    smaller = replace(rung.diagram, sizes={**sizes[k], bond: sizes[k][bond] - 1})
                    saved = replace(rung.diagram, sizes=sizes[k]).num_parameters - smaller.num_parameters
                    price = costs[sizes[k][bond] - 1] / saved
                    best = min(best, (price, k, bond)) if best else (price, k, bond)
        if best is None:
            return sizes
        _, k, bond = best
        if spent + ladders[k].costs[bond][sizes[k][bond] - 1] > allowed:
            done.add((k, bond))
            continue
        spent += ladders[k].costs[bond][sizes[k][bond] - 1]
        sizes[k][bond] -= 1


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.5])
def test_the_bond_that_costs_least_goes_next(share):
    diagrams = [TREE, TRAIN, CP, BY_NAME["tucker-sides-r3"].groups()[0].diagram]
    ladders = [ladder(d, torches(draw(d, k)), scale=1 + k) for k, d in enumerate(diagrams)]
    allowed = share * sum(sum(costs) for rung in ladders for costs in rung.costs.values())
    wanted = brute(ladders, [dict(rung.diagram.sizes) for rung in ladders], allowed)
    found = squeezed(ladders, squared_error=allowed)
    assert found == [{bond: sizes[bond] for bond in rung.costs} for rung, sizes in zip(ladders, wanted, strict=True)]


@pytest.mark.parametrize("diagram", [TREE, TRAIN, CP], ids=["tree", "train", "cp"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.9])
def test_ranks_for_an_error_keep_it(diagram, share):
    for seed in range(3):
        factors = draw(diagram, seed)
        norm = np.linalg.norm(whole(diagram, factors))
        (ranks,) = squeezed([ladder(diagram, torches(factors))], squared_error=(share * norm) ** 2)
        made = truncated(diagram, torches(factors), ranks)
        assert error(diagram, factors, made) <= share * norm + 1e-12 * norm


def test_a_budget_is_never_exceeded_and_the_cheapest_values_went():
    diagrams = [TREE, TRAIN]
    networks = [draw(d) for d in diagrams]
    ladders = [ladder(d, torches(f)) for d, f in zip(diagrams, networks, strict=True)]
    full = sum(rung.diagram.num_parameters for rung in ladders)
    smallest = sum(replace(d, sizes={**d.sizes, **dict.fromkeys(d.bonds, 1)}).num_parameters for d in diagrams)
    for budget in range(smallest, full + 2):
        ranks = squeezed(ladders, max_parameters=budget)
        sized = [replace(d, sizes={**d.sizes, **r}) for d, r in zip(diagrams, ranks, strict=True)]
        assert sum(d.num_parameters for d in sized) <= budget
        if budget >= full:
            assert ranks == [{b: rung.diagram.sizes[b] for b in rung.costs} for rung in ladders]
    with pytest.raises(RankError, match=rf"below rank 1 on every bond\n.*\n  expected: at least {smallest:,}"):
        squeezed(ladders, max_parameters=smallest - 1)


def test_the_ladder_of_a_tree_holds_its_spectra():
    factors = draw(TREE)
    costs = ladder(TREE, torches(factors), scale=3.0).costs
    for bond, found in costs.items():
        exact = np.linalg.svd(unfolding(TREE, factors, bond)[0], compute_uv=False)[: len(found)]
        np.testing.assert_allclose(found, np.pad(9 * exact**2, (0, len(found) - len(exact))), atol=1e-10)


# -- sums, wider bonds, steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tt-out-in-layer-role-r2", "outer-core-r2", "cp-heads-r2", "ring-r2", "one-node-r2"])
def test_a_sum_is_exact_with_weights_of_either_sign_and_unequal_ranks(name):
    diagram = BY_NAME[name].groups()[0].diagram
    wider = replace(diagram, sizes={i: n + (i in diagram.bonds) for i, n in diagram.sizes.items()})
    one, two = draw(diagram), draw(wider, 1)
    made = added([Network(diagram, torches(one)), Network(wider, torches(two))], [2.0, -0.5])
    exact = 2 * whole(diagram, one) - 0.5 * whole(wider, two)
    np.testing.assert_allclose(whole(made.diagram, made.factors), exact, atol=1e-12 * np.abs(exact).max())
    assert all(made.diagram.sizes[b] == 2 * diagram.sizes[b] + 1 for b in diagram.bonds)


def test_a_sum_of_separate_parts_is_no_network_of_them():
    diagram = BY_NAME["hadamard-r2"].groups()[0].diagram
    network = Network(diagram, torches(draw(diagram)))
    with pytest.raises(SpecError, match="needs bonds that join all nodes"):
        added([network, network], [1, 1])


def test_networks_of_other_axes_have_no_sum():
    one, two = Network(TREE, torches(draw(TREE))), Network(TRAIN, torches(draw(TRAIN)))
    with pytest.raises(ShapeError, match="other nodes or axes"):
        added([one, two], [1, 1])


@pytest.mark.parametrize("name", ["tt-out-in-layer-role-r2", "outer-core-r2", "cp-heads-r2", "ring-r2", "gates-r2"])
@pytest.mark.parametrize("spoiled", [False, True])
def test_wider_bonds_keep_the_tensor_and_can_be_trained(name, spoiled):
    diagram = BY_NAME[name].groups()[0].diagram
    factors = draw(diagram)
    if spoiled:
        last = list(diagram.nodes)[-1]
        factors[last] = np.zeros_like(factors[last])
    wide = replace(diagram, sizes={i: n + 2 * (i in diagram.bonds) for i, n in diagram.sizes.items()})
    made = widened(diagram, torches(factors), torches(draw(wide, 7)))
    exact = whole(diagram, factors)
    np.testing.assert_allclose(whole(made.diagram, made.factors), exact, atol=1e-13 * np.abs(exact).max())
    assert not spoiled or not made.factors[last].any()  # a start at zero stays one
    held = {node: t.clone().requires_grad_() for node, t in made.factors.items()}
    equation = torch.einsum(made.diagram.equation, *held.values())
    grads = torch.autograd.grad((equation * torch.randn_like(equation)).sum(), list(held.values()))
    for bond, ends in diagram.bonds.items():
        new = []
        for node, grad in zip(held, grads, strict=True):
            if node in ends:
                dim = diagram.nodes[node].index(bond)
                new.append(grad.narrow(dim, diagram.sizes[bond], 2).abs().sum())
        assert spoiled or max(new) > 0, bond


def test_a_step_along_tangent_vectors_is_exact():
    for diagram in (TREE, TRAIN, BY_NAME["ttm3-layer-out-in-r2"].groups()[0].diagram):
        factors, directions = draw(diagram), draw(diagram, 1)
        exact = whole(diagram, factors)
        for node in diagram.nodes:
            exact = exact + whole(diagram, {**factors, node: directions[node]})
        made = moved(diagram, torches(factors), torches(directions))
        np.testing.assert_allclose(whole(made.diagram, made.factors), exact, atol=1e-12 * np.abs(exact).max())
        assert all(made.diagram.sizes[b] == 2 * diagram.sizes[b] for b in diagram.bonds)


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "says"), [({"r_out": 0}, "to rank 0"), ({"r_x": 1}, "'r_x' is no bond")])
def test_ranks_that_are_none_are_refused(ranks, says):
    with pytest.raises(RankError, match=says):
        truncated(TRAIN, torches(draw(TRAIN)), ranks)


@pytest.mark.parametrize(("name", "says"), [("ring-r2", "close a cycle"), ("vera-r2", "on 3 nodes")])
def test_networks_that_are_no_tree_are_refused_with_the_reason(name, says):
    diagram = BY_NAME[name].groups()[0].diagram
    for refused in (lambda: truncated(diagram, {}, {}), lambda: ladder(diagram, {})):
        with pytest.raises(SpecError, match=f"truncation needs a tree, and here .*{says}"):
            refused()
