"""Gauge: every form keeps the tensor, is the form that it says, and spectra need no dense tensor."""

import numpy as np
import pytest
import torch
from cases import BY_NAME, CASES, Case, draw

from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.gauge import FORMS, norms, orthogonalized, spectra
from tensoradapt.gauge.cp import is_cp

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
# A tree with branches, and a bond above what its ends can use.
BRANCHES = "hub: a b c, left: out a, stem: b layer d, right: d in, top: c role -> layer role out in"
TREE = Case("branches", {"format": "network", "network": BRANCHES, "rank": 4, "excess": "keep"})
THIN = [TREE, BY_NAME["ttm2-layer-out-in-r2"], *(case for case in CASES[::37] if case.groups()[0].diagram.is_tree)]
CP = [case for case in CASES[::37] if is_cp(case.groups()[0].diagram)]
trees = pytest.mark.parametrize("case", THIN, ids=lambda case: case.name)
cps = pytest.mark.parametrize("case", CP, ids=lambda case: case.name)


def whole(diagram, factors):
    """The dense tensor, by numpy."""
    names = list(diagram.sizes)
    arguments = [
        part for n, i in diagram.nodes.items() for part in (np.asarray(factors[n]), [names.index(k) for k in i])
    ]
    return np.einsum(*arguments, [names.index(k) for k in diagram.open], optimize=True)


def torches(factors, dtype=torch.float64, device="cpu"):
    return {node: torch.as_tensor(value, dtype=dtype, device=device) for node, value in factors.items()}


def behind(diagram, node, bond):
    """The nodes behind a bond, seen from across it: from `node` on, without crossing the bond."""
    reached = {node}
    for _ in diagram.nodes:
        reached |= {n for b, ends in diagram.bonds.items() if b != bond and reached & set(ends) for n in ends}
    return reached


def unfolding(diagram, factors, bond):
    """The dense tensor as matrices across a bond, one for each value of the batch.  Shape: (batch, rows, rest)."""
    side = behind(diagram, diagram.bonds[bond][0], bond)
    batch = diagram.batch
    rows = [a for a in diagram.open if a not in batch and any(a in diagram.nodes[n] for n in side)]
    cols = [a for a in diagram.open if a not in batch and a not in rows]
    moved = whole(diagram, factors).transpose([diagram.open.index(a) for a in (*batch, *rows, *cols)])
    sizes = [int(np.prod([diagram.sizes[a] for a in axes])) for axes in (batch, rows, cols)]
    return moved.reshape(sizes)


def towards(diagram, node, center):
    """The bond of a node that leads to the centre."""
    return next(b for b, ends in diagram.bonds.items() if node in ends and center not in behind(diagram, node, b))


def gram(diagram, factors, node, bond):
    """sum over the rows of node[.., b] node[.., c], for each value of the batch."""
    indices = diagram.nodes[node]
    names = list(diagram.sizes)
    one = [names.index(i) for i in indices]
    two = [len(names) if i == bond else names.index(i) for i in indices]
    result = [*(names.index(a) for a in diagram.batch), names.index(bond), len(names)]
    value = np.asarray(factors[node], np.float64)
    return np.einsum(value, one, value, two, result)


def assert_same(found, expected, relative=1e-12):
    norm = np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) <= relative * norm


# -- the tensor is kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", THIN + CP, ids=lambda case: case.name)
def test_every_form_keeps_the_tensor(case, dtype, relative, device):
    diagram = case.groups()[0].diagram
    factors = draw(diagram)
    lined = all(sum(b in i for b in diagram.bonds) < 3 for i in diagram.nodes.values())
    for form in FORMS if lined and diagram.is_tree else FORMS[:3] if diagram.is_tree else ("canonical", "symmetric"):
        made = orthogonalized(diagram, torches(factors, dtype, device), form)
        assert {t.dtype for t in made.factors.values()} == {dtype}
        assert {t.device.type for t in made.factors.values()} == {device}
        held = {node: tensor.double().cpu() for node, tensor in made.factors.items()}
        assert_same(whole(made.diagram, held), whole(diagram, factors), relative)


SPOILS = {
    "zero tensor": lambda factors, node: {n: v * 0 for n, v in factors.items()},
    "a zero node": lambda factors, node: factors | {node: factors[node] * 0},
    "rank one": lambda factors, node: factors | {node: np.ones_like(factors[node])},
    "tiny": lambda factors, node: factors | {node: factors[node] * 1e-150},
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name", ["tt-layer-out-in-role-r3", "tucker-layer-out-in-role-r3", "cp-layer-out-in-role-r3"])
def test_every_form_keeps_tensors_that_lack_rank(name, spoil):
    diagram = BY_NAME[name].groups()[0].diagram
    for node in diagram.nodes:
        factors = SPOILS[spoil](draw(diagram), node)
        for form in ("canonical", "symmetric") if is_cp(diagram) else ("canonical", "hosvd", "symmetric"):
            made = orthogonalized(diagram, torches(factors), form)
            assert all(t.isfinite().all() for t in made.factors.values())
            assert_same(whole(made.diagram, made.factors), whole(diagram, factors))


def test_a_zero_tensor_can_be_trained_from_every_form():
    """Forms that divide by singular values would leave both ends of a bond zero, and no gradient anywhere."""
    diagram = BY_NAME["tt-out-in-layer-role-r3"].groups()[0].diagram
    factors = draw(diagram) | {"core_out": np.zeros(diagram.shape("core_out"))}
    for form in FORMS:
        held = orthogonalized(diagram, torches(factors), form).factors
        zero = [node for node, tensor in held.items() if not tensor.any()]
        assert len(zero) == 1, form


# -- the form is what it says -------------------------------------------------------------------------------------


@trees
def test_a_canonical_form_is_isometric_towards_any_centre(case):
    diagram = case.groups()[0].diagram
    for center in diagram.nodes:
        made = orthogonalized(diagram, torches(draw(diagram), torch.float32), "canonical", center)
        for node in set(diagram.nodes) - {center}:
            bond = towards(diagram, node, center)
            found = gram(made.diagram, made.factors, node, bond)
            assert np.abs(found - np.eye(found.shape[-1])).max() <= 1e-6


@trees
def test_a_hosvd_form_is_all_orthogonal_and_sorted(case):
    diagram = case.groups()[0].diagram
    factors = draw(diagram)
    for center in diagram.nodes:
        made = orthogonalized(diagram, torches(factors), "hosvd", center)
        for bond in (i for i in diagram.nodes[center] if i in diagram.bonds):
            found = gram(made.diagram, made.factors, center, bond)
            exact = np.linalg.svd(unfolding(diagram, factors, bond), compute_uv=False)[..., : found.shape[-1]]
            exact = np.pad(exact, [(0, 0), (0, found.shape[-1] - exact.shape[-1])])
            wanted = exact[..., None] ** 2 * np.eye(found.shape[-1])
            np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1e-11 * exact.max() ** 2)
        for node in set(diagram.nodes) - {center}:
            found = gram(made.diagram, made.factors, node, towards(diagram, node, center))
            assert np.abs(found - np.eye(found.shape[-1])).max() <= 1e-12


@trees
def test_a_symmetric_form_does_not_depend_on_the_centre_and_splits_the_singular_values(case):
    """At either end of a bond, what lies behind it weighs what the bond's singular values do: their square roots."""
    diagram = case.groups()[0].diagram
    factors = draw(diagram)
    for bond, ends in diagram.bonds.items():
        leaves = [node for node in ends if sum(i in diagram.bonds for i in diagram.nodes[node]) == 1]
        exact = np.linalg.svd(unfolding(diagram, factors, bond), compute_uv=False)
        for center in diagram.nodes:
            made = orthogonalized(diagram, torches(factors), "symmetric", center)
            size = made.diagram.sizes[bond]
            wanted = np.pad(exact, [(0, 0), (0, max(0, size - exact.shape[-1]))])[..., :size]
            for leaf in leaves:
                found = np.diagonal(gram(made.diagram, made.factors, leaf, bond), axis1=-2, axis2=-1)
                kept = wanted > 1e-9 * wanted.max()
                np.testing.assert_allclose(found.reshape(kept.shape)[kept], wanted[kept], rtol=1e-7)


@pytest.mark.parametrize("form", ["left", "right"])
def test_left_and_right_forms_are_those_of_a_train(form):
    diagram = BY_NAME["tt-layer-out-in-role-r2"].groups()[0].diagram
    cores = [orthogonalized(diagram, torches(draw(diagram)), form).factors[f"core_{a}"].numpy() for a in diagram.open]
    cores = [cores[0][None], *cores[1:-1], cores[-1][..., None]]
    for core in cores[:-1] if form == "left" else cores[1:]:
        matrix = core.reshape(-1, core.shape[2]) if form == "left" else core.reshape(core.shape[0], -1).T
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(matrix.shape[1]), atol=1e-13)


def test_a_bond_above_its_limit_shrinks():
    diagram = BY_NAME["tt-keep"].groups()[0].diagram
    made = orthogonalized(diagram, torches(draw(diagram)), "canonical", "core_role")
    assert diagram.sizes["r_layer"] == 7 and made.diagram.sizes["r_layer"] == diagram.sizes["layer"] == 3


# -- CP -----------------------------------------------------------------------------------------------------------


@cps
def test_a_cp_is_normalised_sorted_and_signed(case):
    diagram = case.groups()[0].diagram
    (bond,) = diagram.bonds
    for center in diagram.nodes:
        held = orthogonalized(diagram, torches(draw(diagram)), "canonical", center).factors
        columns = {n: np.moveaxis(t.numpy(), diagram.nodes[n].index(bond), -1) for n, t in held.items()}
        norms = {n: np.linalg.norm(c.reshape(-1, c.shape[-1]), axis=0) for n, c in columns.items()}
        assert (np.diff(norms[center]) <= 1e-12).all()
        for node in set(columns) - {center}:
            np.testing.assert_allclose(norms[node], 1)
            flat = columns[node].reshape(-1, columns[node].shape[-1])
            assert (flat[np.abs(flat).argmax(0), range(flat.shape[1])] > 0).all()
        balanced = orthogonalized(diagram, torches(draw(diagram)), "symmetric", center).factors
        for node, tensor in balanced.items():
            flat = np.moveaxis(tensor.numpy(), diagram.nodes[node].index(bond), -1).reshape(-1, norms[center].size)
            np.testing.assert_allclose(np.linalg.norm(flat, axis=0), norms[center] ** (1 / len(diagram.nodes)))


def test_the_weights_of_a_cp_go_where_it_keeps_weights():
    diagram = Diagram({"a": 3, "b": 4, "r": 2}, {"lam": ("r",), "A": ("a", "r"), "B": ("b", "r")}, ("a", "b"))
    held = orthogonalized(diagram, torches(draw(diagram))).factors
    np.testing.assert_allclose(held["A"].norm(dim=0), 1)
    assert held["lam"].abs().min() > 1e-3


# -- spectra and norms --------------------------------------------------------------------------------------------


@trees
def test_spectra_are_those_of_the_unfoldings(case):
    diagram = case.groups()[0].diagram
    factors = draw(diagram)
    for bond, found in spectra(diagram, torches(factors)).items():
        exact = np.linalg.svd(unfolding(diagram, factors, bond), compute_uv=False)
        found = found.numpy().reshape(len(exact), -1)
        size = min(found.shape[1], exact.shape[1])
        np.testing.assert_allclose(found[:, :size], exact[:, :size], atol=1e-12 * exact.max())
        assert (exact[:, size:] <= 1e-12 * exact.max()).all() and (found[:, size:] <= 1e-12 * exact.max()).all()


@pytest.mark.parametrize("case", THIN + CP + [BY_NAME["ring-r2"], BY_NAME["gates-r1"]], ids=lambda case: case.name)
def test_norms_of_slices_are_those_of_the_dense_tensor(case):
    diagram = case.groups()[0].diagram
    factors = draw(diagram)
    dense = whole(diagram, factors)
    for keep in ((), diagram.coordinates, diagram.coordinates[::-1], diagram.open[-1:]):
        found = norms(diagram, torches(factors), keep).numpy()
        rest = tuple(k for k, axis in enumerate(diagram.open) if axis not in keep)
        exact = np.sqrt((dense**2).sum(rest))
        kept = [axis for axis in diagram.open if axis in keep]
        np.testing.assert_allclose(found, exact.transpose([kept.index(a) for a in keep]), rtol=1e-9, atol=1e-12)


# -- shared cores, and what has no form ---------------------------------------------------------------------------

SHARED = Diagram(
    {"layer": 3, "o0": 4, "i0": 3, "a": 5, "o1": 2, "i1": 3, "b": 4, "o2": 3, "i2": 2},
    {"core_0": ("layer", "o0", "i0", "a"), "core_1": ("a", "o1", "i1", "b"), "core_2": ("layer", "b", "o2", "i2")},
    ("layer", "o0", "o1", "o2", "i0", "i1", "i2"),
)


@pytest.mark.parametrize("center", ["core_0", "core_2"])
def test_a_shared_core_is_an_isometry_towards_the_nodes_that_carry_the_axis(center):
    factors = draw(SHARED)
    made = orthogonalized(SHARED, torches(factors), "canonical", center)
    assert_same(whole(made.diagram, made.factors), whole(SHARED, factors))
    bond = "a" if center == "core_0" else "b"
    found = gram(made.diagram, made.factors, "core_1", bond)
    np.testing.assert_allclose(found, np.eye(len(found)), atol=1e-13)


def test_a_shared_core_cannot_be_the_centre():
    with pytest.raises(SpecError, match="'core_1' cannot be the centre: it is shared across the axis 'layer'"):
        orthogonalized(SHARED, torches(draw(SHARED)), "canonical", "core_1")


def test_spectra_of_networks_with_a_shared_core_are_those_of_each_layer():
    factors = draw(SHARED)
    dense = whole(SHARED, factors)
    for bond, rows in (("a", ("o0", "i0")), ("b", ("o0", "i0", "o1", "i1"))):
        order = ["layer", *rows, *(a for a in SHARED.open if a not in ("layer", *rows))]
        matrices = dense.transpose([SHARED.open.index(a) for a in order]).reshape(
            3, np.prod([SHARED.sizes[a] for a in rows]), -1
        )
        exact = np.linalg.svd(matrices, compute_uv=False)
        found = spectra(SHARED, torches(factors))[bond].numpy()
        np.testing.assert_allclose(found, exact[:, : found.shape[1]], atol=1e-12 * exact.max())


BAD = [
    ("tt-layer-out-in-role-r2", "diagonal", None, "no form is called 'diagonal'"),
    ("tt-layer-out-in-role-r2", "canonical", "core_x", "the centre 'core_x' is no node"),
    ("tucker-layer-out-in-role-r2", "left", None, "'core' has 4 bonds"),
    ("tt-layer-out-in-role-r2", "left", "core_in", "leave the centre out"),
    ("cp-layer-out-in-role-r2", "hosvd", None, "a CP has no hosvd form"),
    ("ring-r2", "canonical", None, "its bonds close a cycle"),
    ("vera-r2", "canonical", None, "bond 'r' is on 3 nodes"),
    ("hadamard-r2", "hosvd", None, "no bond joins"),
]


@pytest.mark.parametrize(("name", "form", "center", "says"), BAD, ids=[f"{b[0]}-{b[1]}" for b in BAD])
def test_what_has_no_form_is_refused_with_the_reason(name, form, center, says):
    diagram = BY_NAME[name].groups()[0].diagram
    with pytest.raises(SpecError, match=says):
        orthogonalized(diagram, torches(draw(diagram)), form, center)


def test_a_shared_core_has_no_singular_basis():
    with pytest.raises(SpecError, match="'core_1' is shared across the axis 'layer'"):
        orthogonalized(SHARED, torches(draw(SHARED)), "hosvd")
    with pytest.raises(SpecError, match="close a cycle"):
        spectra(BY_NAME["ring-r2"].groups()[0].diagram, {})
