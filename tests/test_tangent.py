"""Tangent geometry against dense Jacobians: projections, shortest directions, closed forms, damping, retractions.

The oracle writes J column by column with numpy, and takes its pseudo-inverse; letters a-f are the criteria that
LoRA-Pro's definition sets (arXiv:2407.18242).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import BY_NAME, CASES, draw
from test_gauge import TREE, torches, whole

from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.gauge import (
    implied,
    normal,
    pseudo_inverse,
    pseudo_inverse_cg,
    retract_polar,
    retract_qr,
    retract_truncated,
    stiefel_tangent,
)
from tensoradapt.gauge.legs import leg

LORA = Diagram({"out": 7, "in": 6, "r": 3}, {"B": ("out", "r"), "A": ("r", "in")}, ("out", "in"))
LOTR = Diagram(
    {"site": 4, "out": 6, "in": 5, "p": 3, "q": 2},
    {"core": ("site", "p", "q"), "U": ("out", "p"), "V": ("in", "q")},
    ("site", "out", "in"),
)
BATCH = Diagram(
    {"layer": 3, "out": 6, "in": 5, "p": 3, "q": 2, "k": 2},
    {"U": ("out", "layer", "p"), "core": ("p", "layer", "k", "q"), "V": ("q", "in", "layer")},
    ("layer", "out", "k", "in"),
)
PAIRS = Diagram(
    {"layer": 3, "out": 5, "in": 4, "r": 2},
    {"B": ("out", "layer", "r"), "A": ("r", "layer", "in")},
    ("layer", "out", "in"),
)
TRAIN = BY_NAME["tt-out-in-layer-role-r2"].groups()[0].diagram
CP = BY_NAME["cp-out-in-layer-role-r2"].groups()[0].diagram
TUCKER = BY_NAME["tucker-out-in-layer-role-r2"].groups()[0].diagram
MATRIX = BY_NAME["ttm2-layer-out-in-r2"].groups()[0].diagram
BRANCHES = replace(TREE, rule={**TREE.rule, "rank": 2}).groups()[0].diagram
CLOSED = {"lora": LORA, "lotr": LOTR, "batch of lotr": BATCH, "batch of lora": PAIRS}
OTHERS = {"train": TRAIN, "cp": CP, "tucker": TUCKER, "tt-matrix": MATRIX, "tree": BRANCHES}
formats = pytest.mark.parametrize("name", CLOSED | OTHERS)


def jacobian(diagram, factors):
    """dT/dtheta, one column for every entry of every factor: the network with that entry alone in its node's place."""
    columns = []
    for node in diagram.nodes:
        for place in np.ndindex(diagram.shape(node)):
            one = np.zeros(diagram.shape(node))
            one[place] = 1
            columns.append(whole(diagram, {**factors, node: one}).ravel())
    return np.stack(columns, axis=1)


def flat(diagram, held):
    return np.concatenate([np.asarray(held[node]).ravel() for node in diagram.nodes])


def split(diagram, vector):
    sizes = np.cumsum([diagram.numel(node) for node in diagram.nodes])[:-1]
    parts = zip(diagram.nodes, np.split(vector, sizes), strict=True)
    return {node: part.reshape(diagram.shape(node)) for node, part in parts}


class Problem:
    """A network, its Jacobian, a gradient of its tensor, and what autograd gives of that."""

    def __init__(self, diagram, seed=0, factors=None):
        self.diagram, self.factors = diagram, factors or draw(diagram, seed)
        self.jacobian = jacobian(diagram, self.factors)
        self.gradient = np.random.default_rng(seed + 9).standard_normal(self.jacobian.shape[0])
        self.grads = split(diagram, self.jacobian.T @ self.gradient)
        self.projected = self.jacobian @ np.linalg.lstsq(self.jacobian, self.gradient, rcond=1e-10)[0]
        self.shortest = np.linalg.pinv(self.jacobian, rcond=1e-10) @ self.gradient

    def solved(self, solve=pseudo_inverse, **how):
        return solve(self.diagram, torches(self.factors), torches(self.grads), **how)

    def effect(self, direction):
        moved = implied(self.diagram, torches(self.factors), torches(direction))
        return moved.numpy().ravel()


def assert_near(found, expected, relative=1e-8):
    assert np.linalg.norm(found - expected) <= relative * np.linalg.norm(expected)


# -- J, J^T J -----------------------------------------------------------------------------------------------------


@formats
def test_the_effect_of_a_direction_is_the_jacobian_times_it(name):
    problem = Problem((CLOSED | OTHERS)[name])
    direction = draw(problem.diagram, 3)
    assert_near(problem.effect(direction), problem.jacobian @ flat(problem.diagram, direction), 1e-12)


@pytest.mark.parametrize("case", [*CASES[::97], BY_NAME["ring-r2"], BY_NAME["vera-r2"]], ids=lambda case: case.name)
def test_the_normal_operator_needs_no_jacobian(case):
    diagram = case.groups()[0].diagram
    factors, direction = draw(diagram), draw(diagram, 3)
    j = jacobian(diagram, factors)
    found = flat(diagram, normal(diagram, torches(factors))(torches(direction)))
    assert_near(found, j.T @ (j @ flat(diagram, direction)), 1e-11)


def test_nothing_dense_is_formed():
    """The tensor would have 10^13 entries."""
    sizes = {"site": 1000, "out": 100_000, "in": 100_000, "p": 2, "q": 2}
    diagram = Diagram(sizes, dict(LOTR.nodes), LOTR.open)
    factors, grads = torches(draw(diagram)), torches(draw(diagram, 1))
    normal(diagram, factors)(grads)
    pseudo_inverse(diagram, factors, grads, 1e-2)
    pseudo_inverse_cg(diagram, factors, grads, 1e-2, max_iterations=2)


# -- a, b: the projection, the shortest direction -----------------------------------------------------------------


@formats
@pytest.mark.parametrize("solve", [pseudo_inverse, pseudo_inverse_cg])
def test_the_shortest_direction_is_that_of_the_pseudo_inverse(name, solve):
    problem = Problem((CLOSED | OTHERS)[name])
    found = problem.solved(solve)
    assert_near(problem.effect(found.factors), problem.projected)  # a
    assert_near(flat(problem.diagram, found.factors), problem.shortest, 1e-7)  # b
    assert found.residual <= 1e-10


NETWORKS = {"lora": LORA, "lotr": LOTR, "lotr of rank 1": replace(LOTR, sizes={**LOTR.sizes, "p": 1, "q": 1})}
SIZED = [(name, damping) for name in NETWORKS for damping in (0.0, 1e-4)] + [(name, 0.0) for name in CLOSED]


@pytest.mark.parametrize("size", [1e-3, 1e3, 1e5, 1e9])
@pytest.mark.parametrize("name, damping", dict.fromkeys(SIZED))
def test_the_shortest_direction_is_found_whatever_the_sizes_of_the_nodes(name, damping, size):
    """In float32: a node far larger than the others leaves the systems of closed forms all but singular."""
    diagram = (NETWORKS | CLOSED)[name]
    held = {node: t.astype(np.float32).astype(float) for node, t in draw(diagram).items()}
    large = next(iter(diagram.nodes))
    problem = Problem(diagram, factors=held | {large: held[large] * size})
    jacobian, shift = problem.jacobian, damping * np.square(problem.jacobian).sum() / problem.jacobian.shape[1]
    u, s, vt = np.linalg.svd(jacobian, full_matrices=False)
    kept = s > 1e-14 * s[0]
    expected = vt.T[:, kept] @ ((s / (s**2 + shift))[kept] * (u.T @ problem.gradient)[kept])
    single = [torches(each, torch.float32) for each in (problem.factors, problem.grads)]
    found = pseudo_inverse(diagram, *single, damping).factors
    assert_near(flat(diagram, found), expected, 1e-4)


def test_closed_forms_and_conjugate_gradients_are_each_others_oracle():
    for diagram in CLOSED.values():
        for damping in (0.0, 1e-3, 1.0):
            problem = Problem(diagram, 4)
            one, two = problem.solved(damping=damping), problem.solved(pseudo_inverse_cg, damping=damping)
            assert one.iterations == 0 < two.iterations
            assert_near(flat(diagram, one.factors), flat(diagram, two.factors), 1e-8)


def test_the_projection_of_lora_is_what_its_two_spaces_see():
    """a: J J^+ g = g - (I - P_B) g (I - P_A)."""
    problem = Problem(LORA)
    b, a = problem.factors["B"], problem.factors["A"]
    g = problem.gradient.reshape(7, 6)
    unseen = (np.eye(7) - b @ np.linalg.pinv(b)) @ g @ (np.eye(6) - np.linalg.pinv(a) @ a)
    assert_near(problem.effect(problem.solved().factors), (g - unseen).ravel(), 1e-11)


def test_the_shortest_direction_of_lora_keeps_both_factors_in_balance():
    """b: dA A^T = B^T dB keeps B^T B - A A^T; so does X = U^T dU = sum_l dG_l G_l^T for a core."""
    problem = Problem(LORA)
    made = {n: t.numpy() for n, t in problem.solved().factors.items()}
    np.testing.assert_allclose(made["A"] @ problem.factors["A"].T, problem.factors["B"].T @ made["B"], atol=1e-10)
    problem = Problem(LOTR)
    made, held = {n: t.numpy() for n, t in problem.solved().factors.items()}, problem.factors
    x = np.einsum("lac,lbc->ab", made["core"], held["core"])
    y = np.einsum("lac,lad->cd", made["core"], held["core"])
    np.testing.assert_allclose(held["U"].T @ made["U"], x, atol=1e-10)
    np.testing.assert_allclose(held["V"].T @ made["V"], y, atol=1e-10)


# -- c: descent, gauge invariance ---------------------------------------------------------------------------------


@formats
def test_the_effect_descends_as_steeply_as_the_tangent_space_allows(name):
    problem = Problem((CLOSED | OTHERS)[name])
    effect = problem.effect(problem.solved().factors)
    assert problem.gradient @ effect == pytest.approx(effect @ effect, rel=1e-8)


def turned(diagram, factors, bond, matrix):
    """The same tensor in another gauge: u X, X^-1 v on one bond."""
    held = dict(factors)
    for node, change in zip(diagram.bonds[bond], (matrix, np.linalg.inv(matrix).T), strict=True):
        dim = diagram.nodes[node].index(bond)
        held[node] = np.moveaxis(np.tensordot(factors[node], change, (dim, 0)), -1, dim)
    return held


@pytest.mark.parametrize("name", ["lora", "lotr", "train", "tree"])
def test_the_effect_does_not_depend_on_the_gauge(name):
    """c: nor does it change when a gauge direction is added to the factors' own."""
    diagram = (CLOSED | OTHERS)[name]
    problem = Problem(diagram)
    plain = problem.effect(problem.solved().factors)
    factors, loose = problem.factors, {n: t.numpy() for n, t in problem.solved().factors.items()}
    for seed, bond in enumerate(diagram.bonds):
        size = diagram.sizes[bond]
        matrix = np.random.default_rng(seed).standard_normal((size, size)) / 4 + np.eye(size)
        factors = turned(diagram, factors, bond, matrix)
        x = np.random.default_rng(seed + 5).standard_normal((size, size))
        for node, change in zip(diagram.bonds[bond], (x, -x.T), strict=True):
            dim = diagram.nodes[node].index(bond)
            loose[node] = loose[node] + np.moveaxis(np.tensordot(problem.factors[node], change, (dim, 0)), -1, dim)
    assert_near(problem.effect(loose), plain, 1e-10)
    other = Problem(diagram, factors=factors)
    assert_near(other.effect(other.solved().factors), plain, 1e-6)


# -- d: starts at zero --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solve", [pseudo_inverse, pseudo_inverse_cg])
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_a_zero_factor_gets_a_step_and_the_other_none(solve, damping):
    """d: B = 0 gives dA = 0 and dB = gB (A A^T)^-1, without a NaN."""
    factors = draw(LORA) | {"B": np.zeros((7, 3))}
    problem = Problem(LORA, factors=factors)
    made = problem.solved(solve, damping=damping).factors
    gram = factors["A"] @ factors["A"].T
    delta = damping * 7 * np.trace(gram) / (3 * 13)
    np.testing.assert_allclose(made["A"], 0, atol=1e-12)
    np.testing.assert_allclose(made["B"], problem.grads["B"] @ np.linalg.inv(gram + delta * np.eye(3)), rtol=1e-8)


@formats
def test_zero_nodes_and_rank_deficient_ones_give_the_shortest_direction_too(name):
    diagram = (CLOSED | OTHERS)[name]
    for node in diagram.nodes:
        for spoiled in (np.zeros(diagram.shape(node)), np.ones(diagram.shape(node))):
            problem = Problem(diagram, factors=draw(diagram) | {node: spoiled})
            found = problem.solved().factors
            assert_near(flat(diagram, found), problem.shortest, 1e-6)


def test_the_zero_network_gets_no_direction():
    for diagram in (LORA, LOTR, TRAIN):
        zero = {node: torch.zeros(diagram.shape(node)) for node in diagram.nodes}
        for solve in (pseudo_inverse, pseudo_inverse_cg):
            assert not any(t.any() for t in solve(diagram, zero, zero, 1e-2).factors.values())


def test_gradients_that_no_function_of_the_tensor_has_give_no_nan():
    """At the zero network J is zero, and so is every gradient; an optimiser's momentum need not be."""
    for diagram in (LORA, LOTR, TRAIN):
        zero = {node: torch.zeros(diagram.shape(node)) for node in diagram.nodes}
        for solve in (pseudo_inverse, pseudo_inverse_cg):
            assert not any(
                t.any() for t in solve(diagram, zero, torches(draw(diagram), torch.float32)).factors.values()
            )


# -- nodes as matrices --------------------------------------------------------------------------------------------


PLAIN = [(i, "") for i in ("xr", "rx", "xyr", "xry", "rxy", "xryz", "xyrz", "rxyz", "r")]


@pytest.mark.parametrize("indices, batch", [*PLAIN, *((i, "l") for i in ("lxr", "xlr", "rlx", "xlry"))])
def test_every_view_of_a_node_from_a_bond_is_a_matrix(indices, batch):
    sizes = dict(zip("lrxyzw", (2, 3, 4, 5, 6, 7), strict=True))
    nodes = {"node": tuple(indices), "end": (*batch, "r", "w")}
    diagram = Diagram(sizes, nodes, tuple(i for i in "lxyzw" if i in indices + "w"))
    one, two, three = (draw(diagram, seed)["node"] for seed in range(3))
    matrix = np.random.default_rng(0).normal(size=[sizes[i] for i in batch + "rr"])
    view, (a, b, c, m) = leg(diagram, "node", "r"), map(torch.from_numpy, (one, two, three, matrix))
    acted = np.einsum(f"{indices},{batch}rs->{indices.replace('r', 's')}", one, matrix)
    np.testing.assert_allclose(view.act(a, m, 0.5), 0.5 * acted)
    np.testing.assert_allclose(view.less(c, a, m), three - acted)
    twice = np.einsum(f"{indices},{indices.replace('r', 's')}->{batch}rs", one, two)
    np.testing.assert_allclose(view.overlap(a, b), twice)


# -- e, f: full rank, ScaledGD ------------------------------------------------------------------------------------


def test_at_full_rank_the_projection_is_the_gradient():
    """e: r = min(out, in)."""
    full = Diagram({"out": 7, "in": 6, "r": 6}, dict(LORA.nodes), LORA.open)
    problem = Problem(full)
    assert_near(problem.effect(problem.solved().factors), problem.gradient)


def test_scaled_gradient_descent_counts_what_both_factors_see_twice():
    """f: the update of ScaledGD less that of LoRA-Pro is P_B g P_A."""
    problem = Problem(LORA)
    b, a, grads = problem.factors["B"], problem.factors["A"], problem.grads
    scaled = {"B": grads["B"] @ np.linalg.inv(a @ a.T), "A": np.linalg.inv(b.T @ b) @ grads["A"]}
    twice = b @ np.linalg.pinv(b) @ problem.gradient.reshape(7, 6) @ np.linalg.pinv(a) @ a
    assert_near(problem.effect(scaled) - problem.effect(problem.solved().factors), twice.ravel(), 1e-10)


# -- scale and damping --------------------------------------------------------------------------------------------


@formats
def test_the_scale_of_the_delta_is_part_of_the_jacobian(name):
    """grads of a loss of s T are s J^T g; the direction is (s J)^+ g."""
    problem = Problem((CLOSED | OTHERS)[name])
    grads = torches({node: 3.0 * g for node, g in problem.grads.items()})
    for solve in (pseudo_inverse, pseudo_inverse_cg):
        found = solve(problem.diagram, torches(problem.factors), grads, scale=3.0)
        assert_near(flat(problem.diagram, found.factors), problem.shortest / 3, 1e-7)


def networks(diagram):
    """A diagram's Jacobian belongs to every value of the batch alone: the columns of each."""
    batch = diagram.batch
    where = {node: np.indices(diagram.shape(node)) for node in diagram.nodes}
    if not batch:
        return [np.arange(diagram.num_parameters)]
    (axis,) = batch
    ids = np.concatenate([where[n][diagram.nodes[n].index(axis)].ravel() for n in diagram.nodes])
    return [np.flatnonzero(ids == k) for k in range(diagram.sizes[axis])]


@formats
@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_damping_is_relative_to_the_mean_diagonal_of_each_network(name, damping):
    problem = Problem((CLOSED | OTHERS)[name])
    gram = problem.jacobian.T @ problem.jacobian
    expected = np.zeros(len(gram))
    for mine in networks(problem.diagram):
        block = gram[np.ix_(mine, mine)]
        shift = damping * np.trace(block) / len(mine)
        expected[mine] = np.linalg.solve(
            block + shift * np.eye(len(mine)), (problem.jacobian.T @ problem.gradient)[mine]
        )
    for solve in (pseudo_inverse, pseudo_inverse_cg):
        assert_near(flat(problem.diagram, problem.solved(solve, damping=damping).factors), expected, 1e-9)


def test_damping_scales_with_the_network():
    """(c B, c A) with the gradient of the same function takes the step (dB, dA) / c."""
    problem = Problem(LOTR)
    grown = Problem(LOTR, factors={n: 10 * v for n, v in problem.factors.items()})
    one, two = problem.solved(damping=0.1).factors, grown.solved(damping=0.1).factors
    assert_near(flat(LOTR, two) * 100, flat(LOTR, one), 1e-10)


def test_damping_keeps_the_second_step_small():
    """After B = -lr dB from a start at zero, the undamped dA is of order 1 / lr: lr |dA| / |A| does not shrink."""
    sizes = []
    for rate in (1e-2, 1e-4):
        start = Problem(LORA, factors=draw(LORA) | {"B": np.zeros((7, 3))})
        step = start.solved().factors["B"].numpy()
        second = Problem(LORA, 5, factors=start.factors | {"B": -rate * step})
        sizes.append([rate * np.linalg.norm(second.solved(damping=d).factors["A"]) for d in (0.0, 1e-2)])
    (plain, damped), (plain_later, damped_later) = sizes
    assert plain_later > 0.5 * plain and damped_later < 0.05 * damped < plain


def test_more_rank_than_the_closed_form_takes_is_solved_by_iterations():
    wide = Diagram({**LOTR.sizes, "p": 41, "out": 50, "site": 20}, dict(LOTR.nodes), LOTR.open)
    factors, grads = torches(draw(wide)), torches(draw(wide, 1))
    assert pseudo_inverse(wide, factors, grads, 0.1).iterations > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_keep_the_dtype(dtype):
    for diagram in (LORA, LOTR, TRAIN):
        problem = Problem(diagram)
        held, grads = torches(problem.factors, dtype), torches(problem.grads, dtype)
        found = pseudo_inverse(diagram, held, grads, 1e-2).factors
        assert {t.dtype for t in found.values()} == {dtype}
        exact = problem.solved(damping=1e-2).factors
        assert_near(flat(diagram, found), flat(diagram, exact), 1e-3 if dtype == torch.float32 else 1e-12)


# -- retractions --------------------------------------------------------------------------------------------------


def stiefel(dtype=torch.float64):
    x, step = (torch.from_numpy(np.random.default_rng(k).standard_normal((3, 20, 4))).to(dtype) for k in (0, 1))
    x = torch.linalg.qr(x).Q * torch.tensor([1, -1, 1, -1], dtype=dtype)
    return x, stiefel_tangent(x, step)


@pytest.mark.parametrize("retract", [retract_qr, retract_polar])
def test_retractions_keep_columns_orthonormal_and_follow_the_step(retract):
    x, step = stiefel(torch.float32)
    found = retract(x, step)
    torch.testing.assert_close(found.mT @ found, torch.eye(4).expand(3, 4, 4), rtol=0, atol=1e-6)
    x, step = stiefel()
    torch.testing.assert_close(retract(x, 0 * step), x)
    off = [float((retract(x, t * step) - x - t * step).norm()) for t in (1e-2, 1e-3, 1e-4)]
    assert off[0] > 50 * off[1] > 2500 * off[2] > 0  # the square of the step's length


def test_tangents_of_orthonormal_columns():
    x, step = stiefel()
    inner = x.mT @ step
    torch.testing.assert_close(inner, -inner.mT)
    torch.testing.assert_close(stiefel_tangent(x, step), step)
    skew = x @ torch.from_numpy(np.triu(np.ones((4, 4)), 1) - np.tril(np.ones((4, 4)), -1))  # turns in their own plane
    torch.testing.assert_close(stiefel_tangent(x, skew), skew)


@pytest.mark.parametrize("name", ["lora", "lotr", "train", "tree", "tt-matrix"])
def test_truncating_a_step_keeps_the_ranks_and_follows_it(name):
    diagram = (CLOSED | OTHERS)[name]
    factors, direction = draw(diagram), draw(diagram, 1)
    tensor = whole(diagram, factors)
    change = implied(diagram, torches(factors), torches(direction)).numpy()
    off = []
    for t in (0.0, 1e-3, 1e-4):
        made = retract_truncated(diagram, torches(factors), torches({n: t * d for n, d in direction.items()}))
        assert all(made.diagram.sizes[b] <= diagram.sizes[b] for b in diagram.bonds)
        off.append(np.linalg.norm(whole(made.diagram, made.factors) - tensor - t * change))
    assert off[0] <= 1e-12 * np.linalg.norm(tensor) and off[1] > 50 * off[2]


def test_a_step_of_what_is_no_tree_is_refused():
    with pytest.raises(SpecError, match="a step along tangent vectors needs a tree, and here bond 'r' is on 4 nodes"):
        retract_truncated(CP, torches(draw(CP)), torches(draw(CP)))
