"""The rounding noise of stored dtypes: measured against rounding itself, and planted ranks found above it."""

import math

import numpy as np
import pytest
import tiny
import torch

import tensoradapt as ta
from tensoradapt.analysis.floors import floors_of
from tensoradapt.analysis.noise import Noise, edge, noise_of, uneven_edge
from tensoradapt.plan import make_plan
from tensoradapt.sites import from_mapping
from tensoradapt.spec import Rule, Spec

HALVES = (torch.bfloat16, torch.float16)


def planted(rows: int, cols: int, rank: int, rms: float, seed: int = 1) -> torch.Tensor:
    """A delta of a rank and a root mean square, in float64."""
    a, b = tiny.noise(rows, rank, seed=seed).double(), tiny.noise(rank, cols, seed=seed + 1).double()
    return rms / math.sqrt(rank) * (a @ b)


def weights(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return 0.02 * tiny.noise(rows, cols, seed=seed).double()


def pair(kind: str, master: torch.Tensor, delta: torch.Tensor, dtype=torch.bfloat16):
    """Base and tuned in a dtype: the tuned side made from the rounded base, or both rounded from one master."""
    base = master.to(dtype)
    return (
        (base, (base.double() + delta).to(dtype))
        if kind == "from the rounded base"
        else (base, (master + delta).to(dtype))
    )


def rank_of(base: torch.Tensor, tuned: torch.Tensor) -> int | None:
    name = "layers.0.q"
    return ta.analyze({f"{name}.weight": base}, {f"{name}.weight": tuned}, candidates=False).sites[name].ranks["noise"]


# -- the variance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scale", [0.02, 3.0, 1e-6])
def test_the_variance_is_that_of_rounding(dtype, scale):
    """A column spread over one binade, so that every place of the mantissa is as likely."""
    exact = scale * torch.exp2(torch.rand(400, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    stored = exact.to(dtype)
    error = (stored.double() - exact).square()
    found = noise_of(stored, torch.zeros(400, 300))
    assert found.variance == pytest.approx(float(error.mean()), rel=0.02)
    assert found.sigma == pytest.approx(math.sqrt(found.variance))
    assert found.rows.numpy() == pytest.approx(error.mean(1).numpy(), rel=0.3)
    assert found.cols.numpy() == pytest.approx(error.mean(0).numpy(), rel=0.3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_unit_in_the_last_place_is_that_of_every_value(dtype):
    """Against the gap to the next number of the dtype, value by value: powers of two, subnormals, zero, both signs."""
    info = torch.finfo(dtype)
    values = torch.tensor([[1.0, -1.5, 2.0 - info.eps, 0.0, 1e4, info.tiny, info.tiny / 4, -3e-4]], dtype=dtype)
    gap = torch.nextafter(values.abs(), torch.full_like(values, math.inf)).double() - values.abs().double()
    wanted = gap.square() / 12
    wanted[0, 3] = 0.0
    found = noise_of(values, torch.zeros(1, 8)).cols
    seen = wanted[0] > 1e-70  # the square of a bfloat16's smallest is below what float32 holds
    assert found[seen].numpy() == pytest.approx(wanted[0][seen].numpy(), rel=1e-6)
    assert found[3] == 0 and float(found[~seen].sum()) < 1e-70


def test_both_sides_add_each_by_its_own_dtype():
    one, two = weights(50, 40).to(torch.bfloat16), weights(50, 40, seed=1).to(torch.float16)
    zero = torch.zeros(50, 40)
    both, first, second = noise_of(one, two), noise_of(one, zero), noise_of(zero, two)
    assert both.variance == pytest.approx(first.variance + second.variance)
    assert first.variance > 10 * second.variance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float32_and_float64_count_as_exact(dtype):
    found = noise_of(weights(8, 6).to(dtype), weights(8, 6, seed=3).to(dtype))
    assert (found.variance, found.sigma, found.edge) == (0.0, 0.0, 0.0)
    assert (found.single > 0) == (dtype == torch.float32)


def test_rows_that_one_side_lacks():
    """Added tokens: an embedding is (width, rows), so that the sides differ in either dimension."""
    base, tuned = weights(6, 4).to(torch.bfloat16), weights(9, 4).to(torch.bfloat16)
    for turn in (lambda t: t, lambda t: t.mT):
        found = noise_of(turn(base), turn(tuned))
        long = found.rows if len(found.rows) == 9 else found.cols
        alone = noise_of(tuned, tuned)
        assert len(long) == 9 and {len(found.rows), len(found.cols)} == {9, 4}
        assert float(long[7]) == pytest.approx(float(alone.rows[7]) / 2)


# -- the edge -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 60), (200, 40), (30, 300)])
def test_noise_alone_ends_at_the_edge(shape):
    tops = [float(np.linalg.svd(tiny.noise(*shape, seed=k).numpy(), compute_uv=False)[0]) for k in range(40)]
    assert max(tops) < 1.03 * edge(1.0, *shape)
    assert np.mean(tops) > 0.9 * edge(1.0, *shape)
    assert sum(top > edge(1.0, *shape) for top in tops) <= 3


def test_uneven_noise_is_not_underrated():
    rows = torch.linspace(0.1, 3, 80)
    for k in range(10):
        noise = rows[:, None] * tiny.noise(80, 50, seed=k)
        found = uneven_edge(3.0, float(rows.square().mean().sqrt()), 1.0, 80, 50)
        assert float(torch.linalg.svdvals(noise)[0]) < found
    assert uneven_edge(2.0, 2.0, 2.0, 30, 20) == edge(2.0, 30, 20)


def unfolded(tensor: np.ndarray, axes: list[str], rows: set[str]) -> np.ndarray:
    left = [k for k, a in enumerate(axes) if a in rows]
    right = [k for k in range(len(axes)) if k not in left]
    return tensor.transpose(*left, *right).reshape(math.prod(tensor.shape[k] for k in left), -1)


FLOORS = {
    "layers of one shape": {"axes": ("layer", "role", "out", "in")},
    "folded sides": {
        "axes": ("layer", "role", "out_0", "out_1", "in_0", "in_1"),
        "folds": {"out": [4, 3], "in": [2, 4]},
    },
    "one axis of sites": {"axes": ("site", "out", "in")},
}


@pytest.mark.parametrize("case", FLOORS)
def test_floors_are_the_largest_rows_and_columns_of_every_unfolding(case):
    rule = FLOORS[case]
    sites = from_mapping({f"layers.{i}.{r}": (12, 8) for i in range(2) for r in "qv"})
    (group,) = make_plan(Spec(rules=(Rule(targets=("q", "v"), rank=1, start="nonzero", **rule),)), sites).groups
    rng = np.random.default_rng(0)
    noises, variance = {}, np.zeros([group.diagram.sizes[a] for a in group.diagram.open])
    for placement in group.placements:
        rows, cols = rng.uniform(0.5, 2, 12), rng.uniform(0.5, 2, 8)
        cols *= rows.mean() / cols.mean()
        noises[placement.site.path] = Noise(torch.tensor(rows), torch.tensor(cols))
        where = tuple(placement.index[a] for a in group.diagram.coordinates)
        variance[where] = (rows[:, None] * cols / rows.mean()).reshape(variance.shape[len(where) :])
    floors = floors_of(group, lambda site: noises[site.path])
    axes = list(group.diagram.open)
    for cut in ({axes[0]}, {axes[-1]}, set(axes[:2]), {axes[-1], axes[-2]}, {axes[0], axes[-1]}):
        matrix = unfolded(variance, axes, cut)
        row, col = math.sqrt(matrix.sum(1).max()), math.sqrt(matrix.sum(0).max())
        assert row + col <= floors.edge(cut) < (row + col) * 1.3, cut


def test_floors_of_slots():
    """A site of two by three slots: every slot has the noise of its own rows and columns."""
    sites = from_mapping({"layers.0.q": (4, 4), "layers.0.up": (8, 12)})
    slots = {"axes": ("site", "out", "in"), "shapes": "slots", "slot": (4, 4)}
    rule = Rule(targets=("q", "up"), rank=1, start="nonzero", **slots)
    (group,) = make_plan(Spec(rules=(rule,)), sites).groups
    rows = torch.tensor([1.0] * 4 + [9.0] * 4).double()
    noises = {"layers.0.q": Noise(torch.ones(4).double(), torch.ones(4).double())}
    noises["layers.0.up"] = Noise(rows, torch.full((12,), 5.0).double())
    floors = floors_of(group, lambda site: noises[site.path])
    # a slot's row: 4 columns of variance 9; a column of (slots, out | in): 28 entries per column, all sites
    flat = math.sqrt(4 * 9) + math.sqrt(4 * 1 + 3 * (4 * 1 + 4 * 9))
    assert flat <= floors.edge({"site", "out"}) < 1.5 * flat


# -- ranks above it -------------------------------------------------------------------------------------------------


KINDS = ("from the rounded base", "both from a master")


@pytest.mark.parametrize(("kind", "rms"), [(KINDS[0], 3e-5), (KINDS[1], 3e-5), (KINDS[1], 1e-4)])
def test_a_planted_rank_comes_out_of_bfloat16(kind, rms):
    """The table of the design: at 3e-5 only a third of the entries differ, and every relative rule is fooled."""
    base, tuned = pair(kind, weights(1024, 1024), planted(1024, 1024, 8, rms))
    found = ta.analyze({"q.weight": base}, {"q.weight": tuned}, candidates=False, values=32).sites["q"]
    assert found.ranks["noise"] == 8
    if rms == 3e-5:
        assert found.ranks["energy_0.9"] is None


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96, 160), (40, 300), (128, 32)])
def test_planted_ranks_of_other_shapes(dtype, kind, shape):
    base, tuned = pair(kind, weights(*shape), planted(*shape, 3, 1e-3), dtype)
    assert rank_of(base, tuned) == 3


def test_noise_alone_has_rank_zero():
    """One master in two dtypes: all that differs is rounding."""
    master = weights(120, 90)
    assert rank_of(master.to(torch.bfloat16), master.to(torch.float16)) == 0
    assert rank_of(master.to(torch.float16), master.float()) == 0
    assert rank_of(master.to(torch.bfloat16), master.to(torch.bfloat16)) == 0


@pytest.mark.parametrize("side", ["rows", "cols"])
def test_uneven_weights_are_scaled_first(side):
    """A few rows a hundred times larger drown the delta of the others, unless their noise is brought to theirs."""
    scale = torch.ones(256, 1).double()
    scale[:8] = 100.0
    scale = scale if side == "rows" else scale.mT
    master = weights(256, 256) * scale
    delta = planted(256, 256, 4, 2e-4)
    base, tuned = pair("both from a master", master, delta)
    report = ta.analyze({"q.weight": base}, {"q.weight": tuned}, candidates=False).sites["q"]
    assert report.noise["scaled"]
    assert report.ranks["noise"] == 4


@pytest.mark.parametrize("rms", [1e-3, 1e-5, 1e-6])
def test_float32_rounding_is_no_rank(rms):
    """A change of a ten-thousandth of the weights: what float32 rounds is no signal, though it counts as zero."""
    base, tuned = pair("from the rounded base", weights(128, 128), planted(128, 128, 4, rms), torch.float32)
    report = ta.analyze({"q.weight": base}, {"q.weight": tuned}, candidates=False)
    assert report.sites["q"].ranks["noise"] == 4
    assert report.sites["q"].noise == {"sigma": 0.0, "edge": 0.0, "scaled": False}
    assert report.groups["q"].multilinear_rank["noise"] == {"out": 4, "in": 4}


def test_one_side_in_float32():
    """The base alone is coarse: its rounding counts."""
    master, delta = weights(128, 128), planted(128, 128, 3, 1e-3)
    assert rank_of(master.to(torch.bfloat16), (master + delta).float()) == 3


def test_a_stack_over_layers_and_roles():
    """The ranks of a stack's modes, above noise that is larger at some sites than at others."""
    roots = planted(96, 5, 5, 1.0, seed=40), planted(5, 96, 5, 1.0, seed=41)
    base, tuned = {}, {}
    for k, (layer, role) in enumerate((i, r) for i in range(3) for r in "qv"):
        master = weights(96, 96, seed=k) * (8 if role == "v" else 1)
        delta = 4e-3 * roots[0] @ tiny.noise(5, 5, seed=60 + k).double() @ roots[1]
        name = f"layers.{layer}.{role}.weight"
        base[name], tuned[name] = pair("both from a master", master, delta)
    (group,) = ta.analyze(base, tuned, candidates=False).groups.values()
    assert group.multilinear_rank["noise"] == {"layer": 3, "role": 2, "out": 5, "in": 5}
