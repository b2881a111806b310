"""Range: weights and deltas of any size that their dtype has are fitted, measured and merged as those near one are.

A square of 1e25 is no number of float32, nor is one of 1e-25: every oracle here is the same work on the same numbers
near one, or float64.
"""

import math

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import tensoradapt as ta

T = tiny.noise(6, 5, 8, seed=1) + 2 * tiny.noise(6, 1, 8, seed=2) * tiny.noise(1, 5, 8, seed=3)
POWERS = (-100, -83, -50, -20, 20, 50, 83, 100)
FORMATS = {
    "tt": {"rank": 2},
    "tucker": {"rank": 2},
    "tucker by error": {"error": 0.3},
    "tt by budget": {"max_parameters": 60},
    "cp": {"rank": 2},
    "cp by error": {"error": 0.5},
    "axis_0 a, axis_1 a b, axis_2 b a -> axis_0 axis_1 axis_2": {"rank": 2},
    "axis_0 axis_1 a, axis_2 axis_1 a -> axis_0 axis_1 axis_2": {"rank": 2},
    "w: axis_0 axis_1, v: axis_2 -> axis_0 axis_1 axis_2": {},
}


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_fit_of_a_multiple_is_the_multiple_of_the_fit(name, power):
    format, options = name.partition(" by ")[0], FORMATS[name]
    plain, far = ta.fit(T, format, **options), ta.fit(T * 2.0**power, format, **options)
    assert far.rank == plain.rank and far.relative_error == pytest.approx(plain.relative_error, rel=1e-4)
    whole = (T * 2.0**power).double()
    network = _dense(far)
    left = float((whole - network).norm() / whole.norm())
    assert left == pytest.approx(far.relative_error, rel=1e-3, abs=1e-6)
    assert far.total == pytest.approx(float(whole.square().sum()), rel=1e-5)
    for bond, s in plain.spectra.items():
        assert torch.allclose(far.spectra[bond].double() / 2.0**power, s.double(), rtol=1e-4, atol=1e-5)


def _dense(fit):
    """The network by numpy's einsum, in float64."""
    operands = [x for node in fit.factors for x in (fit.factors[node].double().numpy(), _places(fit, node))]
    return torch.from_numpy(np.einsum(*operands, [list(fit.diagram.sizes).index(a) for a in fit.diagram.open]))


def _places(fit, node):
    return [list(fit.diagram.sizes).index(i) for i in fit.diagram.nodes[node]]


@pytest.mark.parametrize("power", [-100, -83, 83, 100])
@pytest.mark.parametrize("options", [{"rank": 2}, {"error": 0.3}, {"max_parameters": 60}])
def test_a_stream_of_slices_is_fitted_at_any_size(power, options):
    far = [part * 2.0**power for part in T]
    plain, made = ta.fit(list(T), "tucker", **options), ta.fit(far, "tucker", **options)
    assert made.rank == plain.rank and made.relative_error == pytest.approx(plain.relative_error, rel=1e-4)
    left = float((T.double() - _dense(made) / 2.0**power).norm() / T.double().norm())
    assert left == pytest.approx(plain.relative_error, rel=1e-3)


@pytest.mark.parametrize("power", [-1000, -600, 600, 1000])
def test_float64_has_its_own_range(power):
    far = T.double() * 2.0**power
    plain, made = ta.fit(T.double(), "tucker", rank=2), ta.fit(far, "tucker", rank=2)
    assert made.relative_error == pytest.approx(plain.relative_error, rel=1e-6)
    assert float((T.double() - _dense(made) / 2.0**power).norm() / T.norm()) == pytest.approx(
        plain.relative_error, rel=1e-6
    )


def test_a_tensor_of_the_smallest_numbers_is_no_zero():
    made = ta.fit(torch.full((4, 4), 1e-44), "tt", rank=1)
    assert made.relative_error < 0.2 and all(float(t.abs().max()) > 0 for t in made.factors.values())
    assert ta.fit(torch.zeros(4, 4), "tt", rank=1).total == 0.0


ROLES = ("query", "value")
NAMES = [f"layer.{k}.{role}.weight" for k in range(3) for role in ROLES]


def pair(power=0, dtype=torch.float32, *, powers=None):
    """A base, and a tuned side that differs by rank 3, all times a power of two: by name, or one for all."""
    base = {name: 0.3 * tiny.noise(24, 16, seed=k) for k, name in enumerate(NAMES)}
    low = [0.1 * tiny.noise(24, 3, seed=20 + k) @ tiny.noise(3, 16, seed=40 + k) for k in range(len(NAMES))]
    tuned = {name: base[name] + low[k] for k, name in enumerate(NAMES)}
    by = {name: 2.0 ** (power if powers is None else powers[k % len(powers)]) for k, name in enumerate(NAMES)}
    return tuple({n: (w.to(dtype).double() * by[n]).to(dtype) for n, w in side.items()} for side in (base, tuned))


JOBS = {
    "lora": {"rank": 2},
    "lotr_by_role": {"rank": 3},
    "tt_lora": {"rank": 2},
    "loha": {"rank": 2},
    "vera": {"rank": 8},
    "lora_xs": {"rank": 2},
    "dota": {},
    "krona": {},
    "fact_tk": {"rank": 4},
    "lorta": {"rank": 3, "heads": 2},
}
GOALS = {
    "lora": [{"error": 0.2}, {"error": "noise"}, {"max_parameters": 700}],
    "lotr_by_role": [{"error": 0.2}, {"error": "noise"}, {"max_parameters": 900}],
    "loha": [{"error": 0.2}],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", [-83, 83, 120])
@pytest.mark.parametrize("name", JOBS)
def test_an_extraction_is_the_same_at_any_size(name, power, dtype, tmp_path):
    spec = ta.preset(name, targets=list(ROLES), **JOBS[name])
    for number, goal in enumerate([{}, *GOALS.get(name, [])]):
        if dtype is torch.bfloat16 and goal:
            continue
        plain = ta.extract(*pair(0, dtype), spec, tmp_path / f"plain{number}", **goal)
        base, tuned = pair(power, dtype)
        far = ta.extract(base, tuned, spec, tmp_path / f"far{number}", **goal)
        assert far.num_parameters == plain.num_parameters
        assert far.relative_error == pytest.approx(plain.relative_error, rel=1e-2, abs=2e-5)
        left = ta.verify(tmp_path / f"far{number}", base, tuned).relative_error
        assert left == pytest.approx(far.relative_error, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("powers", [(-83,), (83,), (120,), (-83, 0), (83, 0, 0)], ids=str)
def test_a_report_has_the_same_ranks_at_any_size(powers, dtype):
    """Also where sites of unlike size lie in one stack: a site's ranks are its own."""
    plain, far = ta.analyze(*pair(0, dtype)), ta.analyze(*pair(0, dtype, powers=powers))
    for number, name in enumerate(NAMES):
        path, by = name.removesuffix(".weight"), 2.0 ** powers[number % len(powers)]
        one, two = plain.sites[path], far.sites[path]
        assert (two.ranks, two.noise["scaled"]) == (one.ranks, one.noise["scaled"])
        assert [s / by for s in two.singular_values] == pytest.approx(list(one.singular_values), rel=1e-3, abs=1e-6)
        assert two.noise["edge"] / by == pytest.approx(one.noise["edge"], rel=1e-5)
        assert two.effective_rank == pytest.approx(one.effective_rank, rel=1e-4)
    if len(powers) == 1:
        for name, one in plain.groups.items():
            two, by = far.groups[name], 2.0 ** powers[0]
            assert two.multilinear_rank == one.multilinear_rank
            assert two.norm / by == pytest.approx(one.norm, rel=1e-5)
        assert [c.label for c in far.candidates] == [c.label for c in plain.candidates]
        errors = [c.relative_error for c in plain.candidates]
        assert [c.relative_error for c in far.candidates] == pytest.approx(errors, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("powers", [(-83, 0), (83, 0), (-83, 83)], ids=str)
def test_sites_of_unlike_size_are_each_as_good_as_alone(powers, tmp_path):
    base, tuned = pair(powers=powers)
    made = ta.extract(base, tuned, ta.preset("lora", rank=2, targets=list(ROLES)), tmp_path / "lora")
    plain = ta.extract(*pair(), ta.preset("lora", rank=2, targets=list(ROLES)), tmp_path / "plain")
    for path, row in plain.report["sites"].items():
        assert made.report["sites"][path]["relative_error"] == pytest.approx(row["relative_error"], rel=1e-4)
    shared = ta.extract(base, tuned, ta.preset("lotr", rank=8, targets=list(ROLES)), tmp_path / "lotr")
    assert shared.relative_error < 1 and ta.verify(tmp_path / "lotr", base, tuned).relative_error == pytest.approx(
        shared.relative_error, rel=1e-3
    )


def test_factors_that_their_dtype_cannot_hold_are_refused_by_name_and_nothing_stays(tmp_path):
    base, tuned = pair(60)
    spec = ta.preset("lora", rank=2, targets=list(ROLES), dtype="float16")
    with pytest.raises(ta.ShapeError, match="core_out(?s:.*)layer0_query(?s:.*)float16(?s:.*)float32"):
        ta.extract(base, tuned, spec, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [math.nan, math.inf, "far"])
def test_a_weight_that_is_refused_after_others_were_fitted_leaves_nothing_behind(bad, tmp_path):
    base, tuned = pair()
    spec = ta.preset("lora", rank=2, targets=list(ROLES))
    broken = {name: weight.clone() for name, weight in tuned.items()}
    if bad == "far":
        base[NAMES[-1]], broken[NAMES[-1]] = torch.full((24, 16), -3e38), torch.full((24, 16), 3e38)
    else:
        broken[NAMES[-1]][3, 4] = bad
    with pytest.raises(ta.FileError, match="layer.2.value is not finite"):
        ta.extract(base, broken, spec, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert ta.extract(*pair(), spec, tmp_path / "out").relative_error < 1


@pytest.mark.parametrize("power", [-83, 83])
def test_adapters_of_any_size_are_changed_merged_and_begun_as_others(power, tmp_path):
    base, tuned = pair(power)
    ta.extract(base, tuned, ta.preset("lora", rank=3, targets=list(ROLES)), tmp_path / "far")
    ta.extract(*pair(), ta.preset("lora", rank=3, targets=list(ROLES)), tmp_path / "near")
    for spec, goal in ((ta.preset("lotr_by_role", rank=4), {}), (ta.preset("lora"), {"error": 0.3})):
        made = [ta.convert(tmp_path / side, spec, **goal).relative_error for side in ("far", "near")]
        assert made[0] == pytest.approx(made[1], rel=1e-3)
    for act in (lambda a: ta.truncate(a, rank=2), lambda a: ta.truncate(a, error=0.3), ta.orthogonalize):
        errors = []
        for side, p in (("far", power), ("near", 0)):
            adapter = ta.load(tmp_path / side, _model(pair(p)[0]))
            act(adapter)
            errors.append(ta.verify(adapter.as_saved(), *pair(p)).relative_error)
        assert errors[0] == pytest.approx(errors[1], rel=1e-3, abs=1e-5)
    model = _model(base)
    ta.load(tmp_path / "far", model).merge_and_detach()
    for name, weight in model.state_dict().items():
        change = (tuned[name].double() - base[name].double()).norm()
        assert float((weight.double() - tuned[name].double()).norm() / change) < 1e-5
    for method in ("pissa", "minor", "olora"):
        model, near = _model(base), _model(pair()[0])
        sizes = []
        for one in (model, near):
            adapter = ta.attach(one, ta.preset("lotr_by_role", rank=2, targets=list(ROLES)))
            ta.initialize(adapter, method)
            shown = adapter.factors("query").values()
            sizes.append(math.prod(float(t.detach().double().norm()) for t in shown))
        assert sizes[0] / 2.0**power == pytest.approx(sizes[1], rel=1e-3)


def _model(weights):
    model = nn.Module()
    model.layer = nn.ModuleList()
    for k in range(3):
        block = nn.Module()
        for role in ROLES:
            setattr(block, role, nn.Linear(16, 24, bias=False))
            getattr(block, role).weight.data = weights[f"layer.{k}.{role}.weight"].clone()
        model.layer.append(block)
    return model


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)])
def test_a_merge_beyond_the_base_s_dtype_names_the_weight_and_changes_nothing(dtype, size):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).to(dtype)
    for layer in model:
        layer.weight.data.fill_(size)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = ta.attach(model, ta.preset("lora", rank=1, targets="1", alpha=1.0))
    half = math.sqrt(size / 2)
    adapter.set_factors(*adapter.groups, {"core_out": torch.full((4, 1), half), "core_in": torch.full((1, 4), half)})
    with pytest.raises(ta.AdapterError, match=f"merging 1(?s:.*){str(dtype)[6:]}"):
        adapter.merge()
    assert tiny.same(before, {n: p for n, p in model.named_parameters() if n in before})
