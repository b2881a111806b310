"""Fits against oracles: numpy's SVDs, TensorLy's decompositions and dense sums; by rank, error and budget; streams."""

import math
import weakref
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import tensorly
import torch
from cases import CASES, draw
from tensorly import decomposition as oracle
from test_linalg import devices

import tensoradapt as ta
from tensoradapt.diagram import Diagram
from tensoradapt.errors import RankError, ShapeError, SpecError
from tensoradapt.fit.als import als
from tensoradapt.fit.frames import Frame, halves
from tensoradapt.fit.places import Place
from tensoradapt.fit.policy import Above, Given, Within, relative
from tensoradapt.fit.reach import reach_of
from tensoradapt.fit.tree import bond_spectra, linked, tree_svd
from tensoradapt.formats.network import parse
from tensoradapt.interchange import from_tensorly
from tensoradapt.linalg import svd

AXES = ("layer", "out", "in")


def summed(diagram, factors):
    """The network by one plain einsum, in float64."""
    letters = {index: chr(97 + k) for k, index in enumerate(diagram.sizes)}
    spell = ["".join(letters[i] for i in indices) for indices in (*diagram.nodes.values(), diagram.open)]
    arrays = [np.asarray(factors[n].detach().cpu().double()) for n in diagram.nodes]
    return np.einsum(",".join(spell[:-1]) + "->" + spell[-1], *arrays, optimize=True)


def distance(tensor, fit):
    """The relative error of a fit's own factors."""
    made = summed(fit.diagram, fit.factors).reshape(tensor.shape)
    return np.linalg.norm(tensor - made) / np.linalg.norm(tensor)


def noisy(shape=(5, 30, 26), rank=4, noise=0.05, seed=0):
    """A Tucker-2 tensor under noise."""
    random = np.random.default_rng(seed)
    core = random.standard_normal((shape[0], rank, rank))
    sides = [np.linalg.qr(random.standard_normal((n, rank)))[0] for n in shape[1:]]
    tensor = np.einsum("lab,oa,ib->loi", core, *sides)
    dust = random.standard_normal(shape)
    return (tensor + noise * np.linalg.norm(tensor) / np.linalg.norm(dust) * dust).astype(np.float32)


def decaying(shape, power=0.8, seed=0):
    """Entries that fall off along every axis, in random bases."""
    random = np.random.default_rng(seed)
    tensor = random.standard_normal(shape)
    for axis, size in enumerate(shape):
        falls = np.arange(1.0, size + 1) ** -power
        turn = np.linalg.qr(random.standard_normal((size, size)))[0]
        tensor = np.moveaxis(np.tensordot(turn * falls, tensor, axes=(1, axis)), 0, axis)
    return tensor.astype(np.float32)


def unfolded(tensor, diagram, bond):
    """The tensor as a matrix across a bond of a tree."""
    whole = linked(diagram)
    side, grown = set(), {whole.bonds[bond][0]}
    while side != grown:
        side = set(grown)
        grown |= {n for b, pair in whole.bonds.items() if b != bond and side & set(pair) for n in pair}
    rows = [k for k, a in enumerate(diagram.open) if any(a in whole.nodes[n] for n in side)]
    cols = [k for k in range(len(diagram.open)) if k not in rows]
    return tensor.transpose(*rows, *cols).reshape(math.prod(tensor.shape[k] for k in rows), -1).astype(np.float64)


def tail(tensor, diagram, bond):
    values = np.linalg.svd(unfolded(tensor, diagram, bond), compute_uv=False)
    return np.linalg.norm(values[diagram.sizes[bond] :])


# -- trees --------------------------------------------------------------------------------------------------------

TREES = [c for c in CASES[::11] if c.groups()[0].diagram.is_tree and not c.groups()[0].diagram.batch]
trees = pytest.mark.parametrize("case", TREES, ids=lambda case: case.name)


@trees
def test_the_error_of_a_tree_is_what_its_cuts_discarded(case):
    diagram = case.groups()[0].diagram
    tensor = decaying([diagram.sizes[a] for a in diagram.open])
    found = tree_svd(torch.from_numpy(tensor).double(), diagram, Given(diagram.sizes))
    error = np.linalg.norm(tensor - summed(found.diagram, found.factors))
    assert error == pytest.approx(math.sqrt(found.lost), rel=1e-6, abs=1e-6)
    tails = [tail(tensor, found.diagram, bond) for bond in found.diagram.bonds]
    assert max(tails, default=0) * (1 - 1e-6) <= error + 1e-6 and error <= np.linalg.norm(tails) * (1 + 1e-6) + 1e-6


@trees
def test_a_tree_that_holds_the_tensor_is_recovered(case):
    diagram = case.groups()[0].diagram
    tensor = summed(diagram, {n: torch.from_numpy(a) for n, a in draw(diagram).items()})
    fit = ta.fit(tensor, diagram)
    assert fit.relative_error <= 1e-7 and distance(tensor, fit) <= 1e-7
    assert {n: tuple(t.shape) for n, t in fit.factors.items()} == {n: diagram.shape(n) for n in diagram.nodes}


@trees
def test_the_spectra_across_bonds_are_those_of_the_unfoldings(case):
    diagram = case.groups()[0].diagram
    tensor = decaying([diagram.sizes[a] for a in diagram.open])
    for bond, s in bond_spectra(torch.from_numpy(tensor), diagram).items():
        true = np.linalg.svd(unfolded(tensor, diagram, bond), compute_uv=False)
        np.testing.assert_allclose(s[0], true, rtol=1e-5, atol=1e-6 * true[0])


def test_a_batch_axis_makes_every_slice_a_fit_of_its_own():
    tensor = decaying((3, 20, 16))
    fit = ta.fit(tensor, "B: layer out r, A: layer r in -> layer out in", axes=AXES, rank=4)
    made = fit.dense().numpy()
    for part, own in zip(tensor, made, strict=True):
        s = np.linalg.svd(part.astype(np.float64), compute_uv=False)
        assert np.linalg.norm(part - own) == pytest.approx(np.linalg.norm(s[4:]), rel=1e-4)


@pytest.mark.parametrize("shape", [(200, 150), (150, 200), (300, 40), (1, 9), (9, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("form", ["tt", "tucker", "cp"])
def test_matrices_are_fitted_as_well_as_by_the_svd(shape, form):
    tensor = decaying(shape)
    s = np.linalg.svd(tensor.astype(np.float64), compute_uv=False)
    fit = ta.fit(tensor, form, rank=6)
    best = np.linalg.norm(s[6:]) / np.linalg.norm(s)
    assert best * (1 - 1e-5) <= fit.relative_error <= best * (1.001 if form != "cp" else 1.01) + 1e-5
    assert distance(tensor, fit) == pytest.approx(fit.relative_error, rel=1e-4, abs=1e-5)
    if form == "tt":
        assert fit.optimal <= best * (1 + 1e-5) + 1e-6 and fit.relative_error <= fit.bound


# -- beside TensorLy ----------------------------------------------------------------------------------------------


TUCKER = [
    (noisy, 4, 1.0005),
    (lambda: noisy((6, 100, 90), 5, 0.01), 5, 1.0005),
    (lambda: decaying((5, 90, 80), 0.5), 3, 1.0005),
    (lambda: decaying((5, 90, 80), 0.5), 6, 1.0005),
    (lambda: noisy((6, 100, 90), 5, 0.01), 6, 1.002),  # the sixth direction is noise: there are many optima
    (lambda: np.random.default_rng(0).standard_normal((6, 100, 90)).astype(np.float32), 6, 1.002),
]


@devices
@pytest.mark.parametrize(("make", "rank", "factor"), TUCKER, ids=range(len(TUCKER)))
def test_tucker_is_as_good_as_tensorlys(make, rank, factor, device):
    tensor = make()
    fit = ta.fit(tensor, "tucker", axes=AXES, rank={"out": rank, "in": rank}, device=device)
    with tensorly.backend_context("numpy", local_threadsafe=True):
        (core, sides), _ = oracle.partial_tucker(tensor, [rank, rank], modes=[1, 2], n_iter_max=10, tol=1e-9)
    theirs = np.linalg.norm(tensor - np.einsum("lab,oa,ib->loi", core, *sides)) / np.linalg.norm(tensor)
    assert fit.relative_error <= factor * theirs
    assert distance(tensor, fit) == pytest.approx(fit.relative_error, rel=1e-4)
    assert fit.relative_error <= fit.bound and fit.optimal <= fit.relative_error * (1 + 1e-4)


@pytest.mark.parametrize("axes", [("out", "layer", "in"), ("layer", "out", "in"), ("in", "out", "layer")])
@pytest.mark.parametrize("rank", [3, 8, [4, 6]])
def test_tensor_trains_are_as_good_as_tensorlys(axes, rank):
    tensor = decaying([{"out": 60, "layer": 6, "in": 52}[a] for a in axes], 0.6)
    fit = ta.fit(tensor, "tt", axes=axes, rank=rank)
    sizes = list(fit.rank.values())
    with tensorly.backend_context("numpy", local_threadsafe=True):
        theirs = oracle.tensor_train(tensor, [1, *sizes, 1]).to_tensor()
    assert fit.relative_error <= 1.002 * np.linalg.norm(tensor - theirs) / np.linalg.norm(tensor)
    tails = [tail(tensor, fit.diagram, bond) for bond in fit.diagram.bonds]
    assert distance(tensor, fit) * np.linalg.norm(tensor) <= np.linalg.norm(tails) * 1.001
    assert fit.optimal <= max(max(tails), np.linalg.norm(tails) / math.sqrt(len(tails))) / np.linalg.norm(tensor)
    assert fit.optimal <= fit.relative_error <= fit.bound


def test_tt_matrices_are_as_good_as_tensorlys():
    weight = decaying((36, 48), 0.4)
    fit = ta.fit(weight, "ttm", axes=("out", "in"), rank=5, folds={"out": [3, 4, 3], "in": [4, 3, 4]})
    folded = weight.reshape(3, 4, 3, 4, 3, 4)
    with tensorly.backend_context("numpy", local_threadsafe=True):
        theirs = oracle.tensor_train_matrix(folded, [1, *fit.rank.values(), 1]).to_matrix()
    assert fit.relative_error <= 1.005 * np.linalg.norm(weight - theirs) / np.linalg.norm(weight)
    assert distance(weight, fit) == pytest.approx(fit.relative_error, rel=1e-4)


@pytest.mark.parametrize("make", [noisy, lambda: decaying((6, 70, 60), 0.7), lambda: noisy((6, 80, 70), 12, 0.01)])
def test_cp_is_as_good_as_tensorlys(make):
    tensor = make()
    fit = ta.fit(tensor, "cp", axes=AXES, rank=5)
    with tensorly.backend_context("numpy", local_threadsafe=True):
        found = oracle.parafac(tensor.astype(np.float64), 5, n_iter_max=100, init="svd", tol=1e-7)
    theirs = np.linalg.norm(tensor - np.einsum("r,lr,or,ir->loi", found.weights, *found.factors))
    assert fit.relative_error <= 1.002 * theirs / np.linalg.norm(tensor)
    assert distance(tensor, fit) == pytest.approx(fit.relative_error, rel=1e-3)


def test_tensorlys_backend_is_left_as_it_was():
    before = tensorly.get_backend()
    ta.fit(noisy(), "cp", axes=AXES, rank=2, sweeps=2).to_tensorly()
    assert tensorly.get_backend() == before


SHAPE = (4, 6, 5)
INTO = {
    "tt": (lambda x: oracle.tensor_train(x, [1, 3, 2, 1]), {}),
    "tucker": (lambda x: oracle.tucker(x, [2, 3, 3]), {}),
    "tucker, one axis whole": (lambda x: tensorly.tucker_tensor.TuckerTensor(_partial(x)), {}),
    "cp": (lambda x: oracle.parafac(x, 3, n_iter_max=5, random_state=0), {}),
    "cp with weights": (lambda x: oracle.parafac(x, 3, n_iter_max=5, normalize_factors=True, random_state=0), {}),
    "ttm": (lambda x: oracle.tensor_train_matrix(x[..., :4].reshape(2, 2, 2, 3, 2, 2), [1, 3, 2, 1]), {}),
}


def _partial(x):
    (core, sides), _ = oracle.partial_tucker(x, [3, 2], modes=[1, 2])
    return core, [torch.eye(4, dtype=x.dtype), *sides]


def parts(tensor):
    """All tensors of a TensorLy object, in its order."""
    found = [getattr(tensor, "weights", None), getattr(tensor, "core", None), *tensor.factors]
    return [part for part in found if part is not None]


@pytest.mark.parametrize("name", INTO)
def test_tensorlys_tensors_come_and_go_unchanged(name):
    x = torch.from_numpy(decaying(SHAPE)).double()
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        theirs = INTO[name][0](x)
        dense = (theirs.to_tensor() if hasattr(theirs, "to_tensor") else theirs).numpy()
    diagram, factors = from_tensorly(theirs)
    np.testing.assert_allclose(summed(diagram, factors).ravel(), _in_order(dense, name).ravel(), atol=1e-13)
    form = name.split(",")[0].split()[0]
    assert ("factor_axis_0" in factors) == (form == "cp" or name == "tucker")  # an identity is no factor
    back = ta.Fit(diagram, factors, 0.0, 1.0, "", format=form)
    for one, two in zip(parts(back.to_tensorly()), parts(theirs), strict=True):
        assert torch.equal(one, two)


def _in_order(dense, name):
    return dense if name != "ttm" else dense.reshape(2, 2, 2, 3, 2, 2)


@pytest.mark.parametrize("form", ["tt", "tucker", "cp", "ttm"])
def test_fits_go_to_tensorly_and_come_back_unchanged(form):
    tensor = decaying((4, 6, 6) if form != "ttm" else (12, 12))
    folds = {"out": [3, 4], "in": [4, 3]} if form == "ttm" else {}
    fit = ta.fit(tensor, form, axes=AXES[-tensor.ndim :], rank=3, folds=folds)
    diagram, factors = from_tensorly(fit.to_tensorly(), fit.diagram.open)
    np.testing.assert_array_equal(summed(diagram, factors), summed(fit.diagram, fit.factors))


@pytest.mark.parametrize("axes", [("a", "b"), ("a", "a", "b")])
def test_axes_that_do_not_fit_are_refused(axes):
    with pytest.raises(ShapeError, match="axes name the tensor's dimensions"):
        from_tensorly(ta.fit(decaying(SHAPE), "tt", axes=AXES, rank=2).to_tensorly(), axes)


def test_what_is_no_tensor_of_tensorlys_is_refused():
    with pytest.raises(SpecError, match="got: Tensor"):
        from_tensorly(torch.ones(3, 3))


# -- by error and by budget ---------------------------------------------------------------------------------------

FORMS = {
    "tt": "tt",
    "tucker": "tucker",
    "cp": "cp",
    "lora": "B: layer out r, A: layer r in -> layer out in",
    "shared": "B: out r, d: layer r, A: r in -> layer out in",
    "ring": "B: t out r, M: r layer s, A: s in t -> layer out in",
}
forms = pytest.mark.parametrize("form", FORMS)


@forms
@pytest.mark.parametrize("error", [0.5, 0.1])
def test_by_error_the_error_is_met_and_one_rank_less_would_not_do(form, error):
    tensor = noisy((4, 14, 12), 3, 0.02)
    fit = ta.fit(tensor, FORMS[form], axes=AXES, error=error)
    assert distance(tensor, fit) <= error * (1 + 1e-5)
    if form in ("lora", "shared", "cp") and min(fit.rank.values()) > 1:
        small = ta.fit(tensor, FORMS[form], axes=AXES, rank=fit.rank["r"] - 1)
        assert small.relative_error > error


def test_by_error_the_rank_may_lie_between_the_rungs_that_are_tried_first():
    diagram = replace(literal("lora with a diagonal"), sizes={"layer": 6, "out": 24, "in": 18, "r": 5})
    random = np.random.default_rng(0)
    tensor = summed(diagram, {n: torch.from_numpy(random.standard_normal(diagram.shape(n))) for n in diagram.nodes})
    assert ta.fit(tensor, FORMS["shared"], axes=AXES, error=1e-2, sweeps=300).rank == {"r": 5}


@pytest.mark.parametrize("form", ["tt", "tucker", "lora"])
def test_an_error_of_zero_keeps_the_tensor(form):
    tensor = decaying((3, 12, 10))
    assert distance(tensor, ta.fit(tensor, FORMS[form], axes=AXES, error=0.0)) <= 1e-5


@pytest.mark.parametrize("error", [0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
def test_by_error_a_stream_meets_it_with_what_its_bases_lose(error):
    tensor = decaying((4, 120, 100), 0.6)
    assert distance(tensor, ta.fit(list(tensor), "tt", axes=AXES, error=error)) <= error


@forms
@pytest.mark.parametrize("budget", [150, 400, 1000, 4000])
def test_by_budget_the_budget_is_never_exceeded_and_more_is_never_worse(form, budget):
    tensor = noisy((4, 14, 12), 3, 0.2)
    fit = ta.fit(tensor, FORMS[form], axes=AXES, max_parameters=budget, sweeps=20)
    stored = sum(t.numel() for t in fit.factors.values())
    assert stored == fit.num_parameters <= budget
    less = ta.fit(tensor, FORMS[form], axes=AXES, max_parameters=max(104, budget // 2), sweeps=20)
    assert fit.relative_error <= less.relative_error * 1.05 + 1e-6


def test_a_budget_is_spent_where_it_saves_most():
    """Of all ranks of a train within the budget, none is much better than those that were chosen."""
    tensor = decaying((4, 14, 12), 0.9)
    fit = ta.fit(tensor, "tt", axes=AXES, max_parameters=300)
    best = min(
        trial.relative_error
        for a in range(1, 5)
        for b in range(1, 13)
        if (trial := ta.fit(tensor, "tt", axes=AXES, rank=[a, min(b, 14 * a)])).num_parameters <= 300
    )
    assert fit.relative_error <= 1.05 * best


def test_a_network_without_ranks_cannot_meet_an_error():
    with pytest.raises(SpecError, match="no rank to choose"):
        ta.fit(decaying((3, 4, 5)), "a: layer out, b: out in -> layer out in", axes=AXES, error=0.1)


def test_policies():
    s = torch.tensor([[2.0, 1.0, 0.5]])
    assert Within(0.3).keep("b", s, 0.0) == 2 and Within(0.3).keep("b", s, 0.1) == 3
    assert Within(10.0).keep("b", s, 0.0) == 0 and Above({"b": 0.7}).keep("b", s, 0.0) == 2
    assert Above({}, default=3.0).keep("b", s, 0.0) == 0
    assert relative(0.1, 100.0, 2).allowed == pytest.approx(0.5)


# -- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tt", "tucker", "cp", "lora", "shared"])
@pytest.mark.parametrize(
    "how", [{"rank": 4}, {"error": 0.2}, {"max_parameters": 1500}], ids=lambda how: next(iter(how))
)
def test_a_stream_is_fitted_about_as_well_as_the_tensor(form, how):
    tensor = noisy((5, 64, 60), 4, 0.1)
    whole = ta.fit(tensor, FORMS[form], axes=AXES, **how)
    stream = ta.fit(list(torch.from_numpy(tensor)), FORMS[form], axes=AXES, **how)
    called = ta.fit(lambda: iter(tensor), FORMS[form], axes=AXES, **how)
    assert distance(tensor, stream) == pytest.approx(stream.relative_error, rel=2e-3)
    assert stream.relative_error <= max(1.02 * whole.relative_error, how.get("error", 0.0))
    assert called.relative_error == stream.relative_error and called.rank == stream.rank


def test_a_stream_in_folds():
    tensor = decaying((3, 48, 40), 0.6)
    folds = {"out": [8, 6], "in": [5, 8]}
    stream = ta.fit(list(tensor), "tt", axes=AXES, folds=folds, rank=6)
    whole = ta.fit(tensor, "tt", axes=AXES, folds=folds, rank=6)
    assert stream.relative_error == pytest.approx(whole.relative_error, rel=1e-3)
    assert distance(tensor, stream) == pytest.approx(stream.relative_error, rel=1e-3)


def test_an_error_that_only_the_whole_tensor_meets_is_met():
    tensor = np.random.default_rng(0).standard_normal((2, 80, 70)).astype(np.float32)
    fit = ta.fit(list(tensor), "tt", axes=("layer", "out", "in"), error=0.02)
    assert distance(tensor, fit) <= 0.02


def test_slices_are_not_kept():
    """However many slices there are, and however often they are read, few are there at a time."""
    alive, most = weakref.WeakSet(), []

    def slices():
        for part in noisy((12, 60, 60)):
            made = torch.from_numpy(part.copy())
            alive.add(made)
            most.append(len(alive))
            yield made

    ta.fit(slices, "tucker", axes=AXES, rank={"out": 4, "in": 4})
    assert len(most) > 4 * 12 and max(most) <= 3


# -- any network --------------------------------------------------------------------------------------------------

NETWORKS = {
    "mpo_shared": ("A: out r, M: r layer s, N: s role t, B: t in -> layer role out in", {"layer": 4, "role": 3}, 3),
    "mpo": ("A: layer out a, C: a b, B: role b in -> layer role out in", {"layer": 4, "role": 3}, 3),
    "lora with a diagonal": ("A: out r, d: layer r, B: r in -> layer out in", {"layer": 6}, 3),
    "ring": ("A: t out r, M: r layer s, B: s in t -> layer out in", {"layer": 6}, 2),
    "triangle": ("A: out a b, B: in b c, C: layer c a -> layer out in", {"layer": 8}, 2),
    "loha": ("U: out r, V: in r, W: out s, X: in s -> out in", {}, 2),
    "two gates": ("A: out x role, B: layer x in -> layer role out in", {"layer": 3, "role": 4}, 3),
}


def literal(name):
    text, more, rank = NETWORKS[name]
    shape = {"out": 24, "in": 18, **more}
    nodes, axes = parse(text)
    bonds = {i for indices in nodes.values() for i in indices if i not in axes}
    return Diagram(shape | dict.fromkeys(sorted(bonds), rank), nodes, axes)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(2))
def test_a_network_that_holds_the_tensor_is_recovered(name, seed):
    diagram = literal(name)
    random = np.random.default_rng(seed)
    planted = {n: torch.from_numpy(random.standard_normal(diagram.shape(n))) for n in diagram.nodes}
    tensor = summed(diagram, planted)
    fit = ta.fit(tensor, diagram, sweeps=400, restarts=24)
    assert fit.relative_error <= 1e-6 and distance(tensor, fit) <= 1e-6 and fit.converged


def test_nodes_that_all_but_depend_do_not_hold_the_error_up():
    """A Tucker network by alternating least squares: its nodes are ill conditioned after the first sweep."""
    text = "A: out a, B: in b, C: layer c, D: a b c -> layer out in"
    nodes, axes = parse(text)
    diagram = Diagram({"layer": 6, "out": 20, "in": 15, "a": 3, "b": 3, "c": 3}, nodes, axes)
    for seed in range(4):
        random = np.random.default_rng(seed)
        planted = {n: torch.from_numpy(random.standard_normal(diagram.shape(n))) for n in nodes}
        assert als(torch.from_numpy(summed(diagram, planted)), diagram, seed=seed).history[-1] <= 1e-6


def test_several_starts_find_what_one_misses():
    diagram = literal("loha")
    recovered = {1: 0, None: 0}
    for seed in range(4):
        random = np.random.default_rng(seed)
        planted = {n: torch.from_numpy(random.standard_normal(diagram.shape(n))) for n in diagram.nodes}
        tensor = torch.from_numpy(summed(diagram, planted))
        for restarts in recovered:
            more = {} if restarts is None else {"restarts": restarts}
            recovered[restarts] += ta.fit(tensor, diagram, sweeps=100, **more).relative_error <= 1e-4
    assert recovered[None] > recovered[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_no_sweep_makes_the_error_larger(name):
    diagram = literal(name)
    random = np.random.default_rng(1)
    tensor = random.standard_normal([diagram.sizes[a] for a in diagram.open])
    found = als(torch.from_numpy(tensor), diagram, sweeps=30, restarts=2)
    steps = np.array(found.history)
    assert (np.diff(steps) <= 1e-9).all() and 0 < len(steps) <= 30
    made = summed(diagram, found.factors)
    assert steps[-1] == pytest.approx(np.linalg.norm(tensor - made) / np.linalg.norm(tensor), rel=1e-6)


@pytest.mark.parametrize("name", [*NETWORKS, "vera"])
def test_nodes_that_are_held_show_the_others_all_that_they_need(name):
    """A step of a node is the same whichever of the other nodes are contracted with the tensor beforehand."""
    diagram = Diagram(*VERA) if name == "vera" else literal(name)
    random = np.random.default_rng(0)
    factors = {n: torch.from_numpy(random.standard_normal(diagram.shape(n))) for n in diagram.nodes}
    tensor = torch.from_numpy(random.standard_normal([diagram.sizes[a] for a in diagram.open]))
    for node in diagram.nodes:
        plain = Frame(diagram)
        found, explained = Place(plain, node).solved(plain.seen(tensor, factors), factors)
        for held in [(n,) for n in diagram.nodes if n != node] + [p for p in halves(diagram) or () if node not in p]:
            frame = Frame(diagram, (held,))
            step, held_back = Place(frame, node).solved(frame.seen(tensor, factors), factors)
            torch.testing.assert_close(step, found, rtol=1e-7, atol=1e-8)
            assert held_back == pytest.approx(explained, rel=1e-9)


VERA = (
    {"site": 3, "out": 20, "in": 16, "r": 5},
    {"b": ("site", "out"), "B": ("out", "r"), "d": ("site", "r"), "A": ("r", "in")},
    ("site", "out", "in"),
)


def test_the_halves_of_a_hadamard_product_are_its_sides():
    large = replace(literal("loha"), sizes={"out": 240, "in": 180, "r": 2, "s": 2})
    assert set(map(frozenset, halves(large))) == {frozenset("UW"), frozenset("VX")}
    small = replace(large, sizes={"out": 8, "in": 6, "r": 2, "s": 2})
    assert halves(small) is None  # nothing would be much smaller than the tensor


@pytest.mark.parametrize("name", NETWORKS)
def test_a_rank_that_is_ruled_out_has_no_fit_within_the_error(name):
    diagram = literal(name)
    random = np.random.default_rng(3)
    planted = {n: torch.from_numpy(random.standard_normal(diagram.shape(n))) for n in diagram.nodes}
    exact = summed(diagram, planted)
    assert reach_of(torch.from_numpy(exact), diagram).lost(diagram) <= 1e-10 * (exact**2).sum()
    tensor = decaying([diagram.sizes[a] for a in diagram.open], power=0.3)
    least = reach_of(torch.from_numpy(tensor), diagram).lost(diagram)
    assert 0 < least <= ta.fit(tensor, diagram).relative_error ** 2 * (tensor.astype(float) ** 2).sum()


def test_what_a_low_rank_at_least_loses_is_the_tail_of_the_spectrum():
    diagram = literal("loha")
    tensor = decaying((24, 18))
    s = np.linalg.svd(tensor.astype(float), compute_uv=False)
    assert reach_of(torch.from_numpy(tensor), diagram).lost(diagram) == pytest.approx((s[4:] ** 2).sum(), rel=1e-6)


def test_large_systems_are_solved_without_their_matrix(monkeypatch):
    diagram = literal("lora with a diagonal")
    tensor = torch.from_numpy(decaying([diagram.sizes[a] for a in diagram.open])).double()
    direct = als(tensor, diagram, sweeps=12, restarts=1)
    monkeypatch.setattr(import_module("tensoradapt.fit.places"), "DIRECT", 1)
    assert als(tensor, diagram, sweeps=12, restarts=1).history[-1] == pytest.approx(direct.history[-1], rel=1e-3)


def test_sweeps_of_a_long_axis_form_no_matrix_of_its_square(monkeypatch):
    """An embedding in folds: 3,000 rows beside factors of few columns."""
    seen = []
    module = import_module("tensoradapt.fit.tucker")
    gram = module.gram_matrix
    monkeypatch.setattr(module, "gram_matrix", lambda a: seen.append(len(a)) or gram(a))
    tensor = decaying((800, 6, 5, 4))
    fit = ta.fit(tensor, "tucker", axes=("in", "head", "head_dim", "layer"), rank=3, sweeps=0)
    _, lost = module.hooi(torch.from_numpy(tensor), fit.diagram, module.tucker_core(fit.diagram), fit.factors)
    assert lost <= fit.relative_error**2 * fit.total and seen and max(seen) <= 6


@pytest.mark.parametrize("rank", [4, 50])
def test_fixed_bases_are_kept_and_the_rest_is_the_least_squares_solution(rank):
    """LoRA-XS: delta = B C A with B and A given, C = B^+ T A^+; no system of rank squared unknowns is solved."""
    random = np.random.default_rng(2)
    b, a, tensor = (random.standard_normal(s) for s in ((5 * rank, rank), (rank, 4 * rank), (5 * rank, 4 * rank)))
    fixed = {"B": torch.from_numpy(b), "A": torch.from_numpy(a)}
    fit = ta.fit(tensor, "B: out r, C: r s, A: s in -> out in", axes=("out", "in"), rank=rank, fixed=fixed)
    np.testing.assert_allclose(fit.factors["C"], np.linalg.pinv(b) @ tensor @ np.linalg.pinv(a), atol=1e-7)
    assert torch.equal(fit.factors["B"], fixed["B"]) and torch.equal(fit.factors["A"], fixed["A"])
    assert fit.converged and len(fit.history) == 1


def test_vectors_between_fixed_random_matrices_are_recovered():
    """VeRA: delta = diag(b) B diag(d) A."""
    random = np.random.default_rng(3)
    frozen = {n: torch.from_numpy(random.standard_normal(s)) for n, s in (("B", (18, 7)), ("A", (7, 15)))}
    b, d = random.standard_normal(18), random.standard_normal(7)
    tensor = np.einsum("o,or,r,ri->oi", b, frozen["B"], d, frozen["A"])
    text = "b: out, B: out r, d: r, A: r in -> out in"
    fit = ta.fit(tensor, text, axes=("out", "in"), rank=7, fixed=frozen, sweeps=200)
    assert fit.relative_error <= 1e-6
    np.testing.assert_allclose(np.outer(fit.factors["b"], fit.factors["d"]), np.outer(b, d), atol=1e-5)


def test_kronecker_products_and_sums_of_them():
    random = np.random.default_rng(4)
    terms = [(random.standard_normal((3, 4)), random.standard_normal((5, 6))) for _ in range(2)]
    tensor = sum(np.kron(a, b) for a, b in terms)
    folds = {"out": [3, 5], "in": [4, 6]}
    assert ta.fit(tensor, "ttm", axes=("out", "in"), rank=2, folds=folds).relative_error <= 1e-7
    one = ta.fit(tensor, "ttm", axes=("out", "in"), rank=1, folds=folds)
    turned = tensor.reshape(3, 5, 4, 6).transpose(0, 2, 1, 3).reshape(12, 30)
    s = np.linalg.svd(turned, compute_uv=False)
    assert one.relative_error == pytest.approx(s[1] / np.linalg.norm(s), rel=1e-6)


def test_equal_seeds_give_equal_bytes():
    tensor = decaying((4, 30, 28))
    for form in ("tucker", "cp", "ring"):
        one, two = (ta.fit(tensor, FORMS.get(form, form), axes=AXES, rank=2, seed=5, sweeps=9) for _ in range(2))
        assert all(torch.equal(one.factors[n], two.factors[n]) for n in one.factors)


# -- bad and extreme input ----------------------------------------------------------------------------------------


@forms
def test_zero_has_a_fit_of_zeros(form):
    fit = ta.fit(np.zeros((3, 40, 30)), FORMS[form], axes=AXES, rank=2)
    assert fit.relative_error == 0.0 and not summed(fit.diagram, fit.factors).any()
    small = ta.fit(np.zeros((3, 40, 30)), FORMS[form], axes=AXES, error=0.1)
    assert small.relative_error == 0.0 and set(small.rank.values()) == {1}


@pytest.mark.parametrize("form", ["tt", "tucker", "cp"])
def test_one_number_for_all_ranks_is_a_ceiling(form):
    tensor = decaying((3, 8, 6))
    fit = ta.fit(tensor, form, axes=AXES, rank=1000)
    assert distance(tensor, fit) <= (1e-5 if form != "cp" else 0.05)
    assert max(fit.rank.values()) <= 3 * 8


@pytest.mark.parametrize("scale", [2.0**-50, 1e-6, 1e12])
@pytest.mark.parametrize("form", ["tucker", "cp", "ring"])
def test_the_unit_of_the_entries_does_not_matter(form, scale):
    tensor = noisy((4, 30, 28))
    one, two = (ta.fit(t, FORMS[form], axes=AXES, rank=3, sweeps=10) for t in (tensor, tensor * np.float32(scale)))
    assert two.relative_error == pytest.approx(one.relative_error, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_fitted_in_float32_and_float64_as_it_is(dtype):
    tensor = torch.from_numpy(noisy()).to(dtype)
    fit = ta.fit(tensor, "tucker", axes=AXES, rank={"out": 4, "in": 4})
    assert {t.dtype for t in fit.factors.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert distance(tensor.double().numpy(), fit) == pytest.approx(fit.relative_error, rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stream", [False, True])
def test_entries_that_are_no_numbers_are_refused(bad, stream):
    tensor = noisy((3, 6, 5))
    tensor[1, 2, 3] = bad
    with pytest.raises(ShapeError, match="the tensor is not finite\n.*1 of (90|30) entries are NaN or infinite"):
        ta.fit(list(tensor) if stream else tensor, "tt", axes=AXES, rank=2)


GOOD = np.ones((3, 4, 5))
REFUSED = [
    (lambda: ta.fit(GOOD, "tt", axes=AXES, rank=0), RankError, "positive whole number"),
    (lambda: ta.fit(GOOD, "tt", axes=AXES, rank=-1), RankError, "positive whole number"),
    (lambda: ta.fit(GOOD, "tt", axes=AXES, rank=[2]), RankError, "does not fit the bonds"),
    (lambda: ta.fit(GOOD, "tt", axes=AXES, rank=[2, 9]), RankError, "above its limit"),
    (lambda: ta.fit(GOOD, "tt", axes=AXES, rank=2, error=0.1), RankError, "one of rank, error and max_parameters"),
    (lambda: ta.fit(GOOD, "tt", axes=AXES, error=1.5), RankError, "relative error"),
    (lambda: ta.fit(GOOD, "tt", axes=AXES, error=-0.1), RankError, "relative error"),
    (lambda: ta.fit(GOOD, "tt", axes=AXES, max_parameters=3), RankError, "expected: at least 12"),
    (lambda: ta.fit(GOOD, "tt", axes=("out", "in"), rank=2), ShapeError, "3 names"),
    (lambda: ta.fit(GOOD, "tt", axes=("out", "out", "in"), rank=2), ShapeError, "each once"),
    (lambda: ta.fit(GOOD, "ttx", axes=AXES, rank=2), SpecError, "no format 'ttx'"),
    (lambda: ta.fit(GOOD, "out a, a in -> out in", axes=AXES, rank=2), SpecError, "axes are not the tensor's"),
    (lambda: ta.fit(GOOD, "tt", axes=AXES, rank=2, wings=3), SpecError, "no option 'wings'"),
    (lambda: ta.fit(GOOD + 1j, "tt", axes=AXES, rank=2), ShapeError, "real numbers"),
    (lambda: ta.fit(np.ones((3, 0, 5)), "tt", axes=AXES, rank=2), ShapeError, "real numbers"),
    (lambda: ta.fit(iter(GOOD), "tt", axes=AXES, rank=2), ShapeError, "read several times"),
    (lambda: ta.fit([], "tt", axes=AXES, rank=2), ShapeError, "matrices of one shape"),
    (lambda: ta.fit([np.ones((2, 3)), np.ones((3, 2))], "tt", axes=AXES, rank=2), ShapeError, "of one shape"),
    (lambda: ta.fit(GOOD, literal("ring")), ShapeError, "does not fit the diagram"),
    (lambda: ta.fit(GOOD, "ttm", axes=AXES, folds={"out": [2, 2]}, rank=2), ShapeError, "pairs every fold"),
    (
        lambda: ta.fit(GOOD, FORMS["lora"], axes=AXES, rank=2, fixed={"B": torch.ones(2, 2)}),
        ShapeError,
        "expected: .3, 4, 2.",
    ),
    (lambda: ta.fit(GOOD, FORMS["lora"], axes=AXES, rank=2, fixed={"C": torch.ones(2, 2)}), SpecError, "no node 'C'"),
]


@pytest.mark.parametrize(("call", "kind", "says"), REFUSED, ids=[str(k) for k in range(len(REFUSED))])
def test_bad_input_is_refused_with_the_reason(call, kind, says):
    with pytest.raises(kind, match=says):
        call()


def test_a_failure_of_an_svd_is_recorded(monkeypatch):
    works, seen = torch.linalg.svd, []

    def failing(a, *args, **options):
        seen.append(a.dtype)
        if len(seen) == 1:
            raise torch.linalg.LinAlgError("linalg.svd: did not converge")
        return works(a, *args, **options)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    fit = ta.fit(decaying((20, 18)), "tt", rank=3)
    assert fit.retried == ("linalg.svd: did not converge",) and seen[1] == torch.float64
    assert svd.truncated_svd(torch.ones(3, 3), 1).retried == ""
    assert replace(fit, retried=()).retried == ()
