"""CP networks of less than their rank: cut to fewer components, they stay what they are and can still be trained."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from cases import BY_NAME, draw
from test_gauge import torches, whole

import tensoradapt as ta
from tensoradapt.change import combine, resize, truncate
from tensoradapt.gauge import truncated
from tensoradapt.optim import RankSchedule

LORTA = ta.preset("lorta", rank=4, targets=["query", "value"])
CP = BY_NAME["cp-out-in-layer-role-r3"].groups()[0].diagram
WIDE = replace(CP, sizes={**CP.sizes, "r": 5})
FIRST, SECOND, *_ = CP.nodes

CUTS = {
    "truncate": lambda adapter: truncate(adapter, rank=2).adapter,
    "error": lambda adapter: truncate(adapter, error=0.1).adapter,
    "resize": lambda adapter: resize(adapter, 2).adapter,
    "combine": lambda adapter: ta.load(combine([adapter, adapter], rank=2), tiny.bert()),
}


def fresh(spec=LORTA):
    model = tiny.bert()
    return model, ta.attach(model, spec)


def columns(diagram, factors):
    """The norms of the columns of every component, by node."""
    found = {}
    for node, indices in diagram.nodes.items():
        dim = indices.index(*diagram.bonds)
        found[node] = factors[node].detach().double().movedim(dim, -1).flatten(0, -2).norm(dim=0).numpy()
    return found


def gradients(adapter):
    """Gradients of a sum of all deltas' entries, differently weighted, by node."""
    (group,) = adapter.plan.groups
    held = adapter.factors(group.name)
    loss = sum((adapter.delta(path) * tiny.noise(*adapter.delta(path).shape)).sum() for path in group.paths)
    return dict(zip(held, torch.autograd.grad(loss, list(held.values())), strict=True))


# -- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", CUTS)
def test_a_fresh_adapter_that_is_cut_is_still_one(how):
    """The zero node stays that, the others keep columns that they had, the delta stays zero, bit for bit."""
    _, adapter = fresh()
    (group,) = adapter.plan.groups
    (zero,) = (node for node, law in group.laws.items() if law == "zero")
    old = {node: tensor.detach().clone() for node, tensor in adapter.factors(group.name).items()}
    made = CUTS[how](adapter)
    (group,) = made.plan.groups
    assert group.rank["r"] <= 2
    for node, norms in columns(group.diagram, made.factors(group.name)).items():
        assert (norms == 0).all() if node == zero else (norms > 0).all()
        kept = columns(replace(group.diagram, sizes={**group.diagram.sizes, "r": 4}), old)[node]
        assert all(np.isclose(kept, norm, rtol=1e-6).any() for norm in norms)
    assert not any(made.delta(path).any() for path in group.paths)
    found = gradients(made)
    assert [node for node, grad in found.items() if grad.any()] == [zero]
    assert (columns(group.diagram, found)[zero] > 0).all()


def test_a_schedule_of_ranks_from_step_0_leaves_something_to_train():
    model, adapter = fresh()
    optimizer = torch.optim.Adam(adapter.parameters(), 0.05)
    schedule = RankSchedule(adapter, optimizer, rank=type("Two", (), {"end": 1, "__call__": lambda self, step: 2})())
    schedule.step()
    assert adapter.plan.groups[0].rank["r"] == 2
    for _ in range(3):
        optimizer.zero_grad()
        y = model(tiny.tokens())[0]
        (y * tiny.noise(*y.shape)).sum().backward()
        optimizer.step()
    assert all(adapter.delta(path).any() for path in adapter.plan.groups[0].paths)


def test_a_zero_delta_of_factors_that_are_not_is_cut_and_lost_nothing():
    """Twins of opposite sign: what is there of them is rounding, and the error of a zero tensor is none."""
    for seed in (2, 41):
        adapter = ta.attach(tiny.bert(), LORTA, seed=seed)
        ta.initialize(adapter, "orthogonal", seed=seed)
        for rank in (1, 2, 3):
            made = truncate(adapter.as_saved(), rank=rank)
            assert 0 <= made.relative_error < float("inf")


def test_an_error_of_nothing_is_none(monkeypatch):
    _, adapter = fresh()
    monkeypatch.setattr("tensoradapt.change.error.squared_error", lambda turn: 1e-30)  # rounding
    assert truncate(adapter, rank=2).relative_error == 0


# -- networks -----------------------------------------------------------------------------------------------------


def spoiled(seed, *dead, diagram=WIDE):
    """Factors with columns of zeros at (node, component)."""
    factors = draw(diagram, seed)
    for node, component in dead:
        factors[node][..., component] = 0
    return factors


@pytest.mark.parametrize("dead", [((FIRST, 0), (SECOND, 3)), ((FIRST, 1), (SECOND, 1), (FIRST, 4))])
def test_components_beyond_the_rank_have_one_column_of_zeros(dead):
    for seed in range(5):
        factors = spoiled(seed, *dead)
        made = truncated(WIDE, torches(factors), {"r": 4})
        tensor = whole(WIDE, factors)
        assert np.linalg.norm(whole(made.diagram, made.factors) - tensor) <= 1e-9 * np.linalg.norm(tensor)
        zeros = sum((norms == 0).astype(int) for norms in columns(made.diagram, made.factors).values())
        assert sorted(zeros) == [0] * (4 - len({r for _, r in dead}) + 1) + [1] * (len({r for _, r in dead}) - 1)


def test_a_component_that_cancels_in_part_is_kept_as_one_zero():
    """a - a + b: at rank 2 the tensor is b, and the other component waits with a column of zeros at one node."""
    factors = {node: np.concatenate([v[:, :1], v[:, :1], v[:, 1:2]], axis=1) for node, v in draw(CP).items()}
    factors[FIRST][:, 1] *= -1
    made = truncated(CP, torches(factors), {"r": 2})
    assert np.linalg.norm(whole(made.diagram, made.factors) - whole(CP, factors)) <= 1e-9
    for node, norms in columns(made.diagram, made.factors).items():
        assert (norms == 0).sum() == (node == FIRST)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_network_of_nothing_but_zeros_gets_columns(dtype):
    factors = {node: torch.zeros(WIDE.shape(node), dtype=dtype) for node in WIDE.nodes}
    made = truncated(WIDE, factors, {"r": 3})
    for node, norms in columns(made.diagram, made.factors).items():
        assert made.factors[node].dtype == dtype
        assert (norms == (0 if node == FIRST else 1)).all()


def test_every_value_of_a_batch_has_its_own_zeros():
    """One value of an axis on all nodes is zero: its components stay trainable, the other values' are fitted."""
    nodes = {node: ("stack", *indices) for node, indices in CP.nodes.items()}
    batched = replace(CP, sizes={"stack": 2, **CP.sizes}, nodes=nodes, open=("stack", *CP.open))
    factors = draw(batched)
    factors[SECOND][1] = 0
    made = truncated(batched, torches(factors), {"r": 2})
    alone = truncated(CP, torches({node: value[0] for node, value in factors.items()}), {"r": 2})
    np.testing.assert_allclose(
        whole(made.diagram, made.factors)[0], whole(alone.diagram, alone.factors), rtol=0, atol=1e-9
    )
    for node, tensor in made.factors.items():
        norms = tensor.movedim(batched.nodes[node].index("r"), -1).flatten(1, -2).norm(dim=1)
        assert (norms[0] > 0).all() and (norms[1] == 0).all() == (node == SECOND)
