"""Preconditioned optimisers: LoRA-Pro's criteria a to f, gauge invariance of steps, and what trainers do to optimisers.

The oracle takes dense Jacobians of the deltas in the factors by autograd, of einsums written here, and numpy's
pseudo-inverse.
"""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from tiny import bert_classifier, shake, tokens
from torch import nn
from toys import Toy

import tensoradapt as ta
from tensoradapt.optim import LoRAPro, ScaledGD, Wrapper

FOLDS = {"in": [4, 3], "out": [3, 4]}
PRESETS = {
    "lora": {"rank": 2},
    "lotr": {"rank": 3},
    "lorta": {"rank": 3},
    "tt_lora": {"rank": 3, "folds": FOLDS},
    "fact_tt": {"rank": 3},
    "fact_tk": {"rank": 3},
    "loretta": {"rank": 2},
    "lora_xs": {"rank": 2},
    "vera": {"rank": 3},
    "loha": {"rank": 2},
}
TREES = ("lora", "lotr", "tt_lora", "fact_tt", "fact_tk")
SGD = {"lr": 1.0}


def adapted(preset="lotr", dtype=torch.float64, seed=0, **more):
    """A toy with an adapter whose factors have left their start, and gradients of a loss."""
    model = Toy(2, 12).to(dtype)
    adapter = ta.attach(model, ta.preset(preset, targets=["q_proj", "v_proj"], **PRESETS[preset], **more), seed=seed)
    adapter.to(dtype)
    shake(adapter)
    return model, adapter


def batch(dtype=torch.float64, seed=0, size=4):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 12, generator=made, dtype=torch.float64).to(dtype) for _ in range(2)]


def loss_of(model, data):
    x, y = data
    return (model(x) - y).square().mean()


def backward(model, optimizer, data):
    optimizer.zero_grad()
    loss = loss_of(model, data)
    loss.backward()
    return float(loss.detach())


def deltas(adapter):
    return torch.cat([adapter.delta(path).flatten() for group in adapter.plan.groups for path in group.paths])


def factors(adapter):
    return [p for p in adapter.parameters() if p.requires_grad]


def jacobian(adapter):
    """d(deltas) / d(factors), row by row of the deltas, by autograd."""
    held = factors(adapter)
    rows = []
    for entry in deltas(adapter):
        made = torch.autograd.grad(entry, held, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(held, made, strict=True)])
        )
    return torch.stack(rows).numpy()


def gradient(model, adapter, data):
    """The gradient of the loss in the deltas themselves: in the weights, which they are added to."""
    sites = [model.get_parameter(f"{path}.weight") for group in adapter.plan.groups for path in group.paths]
    for weight in sites:
        weight.requires_grad_(True)
    made = torch.autograd.grad(loss_of(model, data), sites)
    for weight in sites:
        weight.requires_grad_(False)
    return torch.cat([g.flatten() for g in made]).numpy()


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors]).numpy()


def step_of(adapter, optimizer):
    """The step of the factors, by a learning rate of 1 of SGD."""
    before = flat(factors(adapter))
    optimizer.step()
    return before - flat(factors(adapter))


class Problem:
    """One step of an optimiser, with the dense Jacobian and gradient that it knows nothing of."""

    def __init__(self, preset, make, **more):
        self.model, self.adapter = adapted(preset, **more)
        self.optimizer, data = make(self.adapter), batch()
        self.g, self.j = gradient(self.model, self.adapter, data), jacobian(self.adapter)
        backward(self.model, self.optimizer, data)
        self.raw = flat([p.grad for p in factors(self.adapter)])
        self.step = step_of(self.adapter, self.optimizer)

    @property
    def projected(self):
        return self.j @ np.linalg.lstsq(self.j, self.g, rcond=1e-9)[0]


def assert_near(found, expected, relative=1e-8):
    assert np.linalg.norm(found - expected) <= relative * np.linalg.norm(expected)


def plain(adapter, **more):
    optimizer = LoRAPro(adapter, **({"damping": 0.0, "moments": None} | SGD | more))
    optimizer.max_iterations = 3000  # without damping, some are that ill-conditioned
    return optimizer


# -- a to f -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gauge", [None, "min_norm", "zero"])
@pytest.mark.parametrize("preset", TREES)
def test_a_the_implied_step_is_the_projected_gradient(preset, gauge):
    problem = Problem(preset, lambda adapter: plain(adapter, gauge=gauge))
    np.testing.assert_allclose(problem.raw, problem.j.T @ problem.g, atol=1e-12)  # what autograd gives is J^T g
    assert_near(problem.j @ problem.step, problem.projected)


@pytest.mark.parametrize("preset", ["lorta", "lora_xs", "vera", "loha", "loretta"])
def test_a_of_networks_that_are_no_trees_or_partly_frozen(preset):
    problem = Problem(preset, plain)
    assert_near(problem.j @ problem.step, problem.projected, 1e-6)


@pytest.mark.parametrize("preset", [*TREES, "lorta", "vera"])
def test_b_the_step_is_the_pseudo_inverse(preset):
    problem = Problem(preset, lambda adapter: plain(adapter, gauge="min_norm"))
    assert_near(problem.step, np.linalg.pinv(problem.j, rcond=1e-9) @ problem.g, 1e-6)


def test_b_both_factors_keep_their_balance():
    """dA A^T = B^T dB keeps B^T B - A A^T; X = 0 does not."""
    off = {}
    for gauge in ("min_norm", "zero"):
        model, adapter = adapted("lora")
        optimizer = plain(adapter, gauge=gauge)
        backward(model, optimizer, batch())
        b, a = adapter.factors(adapter.plan.groups[0].name).values()
        before = b.detach().clone(), a.detach().clone()
        optimizer.step()
        db, da = before[0] - b.detach(), before[1] - a.detach()
        off[gauge] = float((da @ before[1].mT - before[0].mT @ db).norm() / (da @ before[1].mT).norm())
    assert off["min_norm"] < 1e-10 < 1e-2 < off["zero"]


@pytest.mark.parametrize("preset", TREES)
def test_c_the_step_descends(preset):
    problem = Problem(preset, plain)
    change = problem.j @ problem.step
    np.testing.assert_allclose(change @ problem.g, change @ change, rtol=1e-9)


@pytest.mark.parametrize("make", [LoRAPro, ScaledGD])
@pytest.mark.parametrize("gauge", ["min_norm", "zero"])
def test_d_a_fresh_adapter_takes_the_documented_step(make, gauge):
    """B = 0: dA = 0, dB = s^-2 gB (A A^T + delta)^-1."""
    model = Toy(2, 12).double()
    adapter = ta.attach(model, ta.preset("lora", rank=2, alpha=6.0, targets=["q_proj"])).double()
    damping = 1e-3
    more = {"moments": None, "gauge": gauge} if make is LoRAPro else {}
    optimizer = make(adapter, torch.optim.SGD, damping=damping, **SGD, **more)
    backward(model, optimizer, batch())
    group = adapter.plan.groups[0]
    b, a = adapter.factors(group.name).values()
    assert not b.any()
    gram, before = (a @ a.mT).detach(), a.detach().clone()
    delta = damping * 12 * gram.trace() / (2 * 24)
    expected = b.grad @ torch.linalg.inv(gram + delta * torch.eye(2)) / group.scale**2
    optimizer.step()
    torch.testing.assert_close(b.detach(), -expected)
    torch.testing.assert_close(a.detach(), before)


def test_e_at_full_rank_the_step_is_the_gradient():
    model = Toy(1, 12).double()
    adapter = ta.attach(model, ta.preset("lora", rank=12, targets=["q_proj"])).double()
    shake(adapter)
    optimizer = plain(adapter)
    g, j = gradient(model, adapter, batch()), jacobian(adapter)
    backward(model, optimizer, batch())
    assert_near(j @ step_of(adapter, optimizer), g, 1e-7)


def test_f_scaled_gradient_descent_counts_twice_what_both_factors_see():
    """The implied step of ScaledGD less that of LoRA-Pro is P_B g P_A."""
    scaled = Problem("lora", lambda adapter: ScaledGD(adapter, torch.optim.SGD, damping=0.0, **SGD))
    other = Problem("lora", plain)
    g = other.g.reshape(-1, 12, 12)
    twice = []
    model, adapter = adapted("lora")
    for part, path in zip(g, (p for group in adapter.plan.groups for p in group.paths), strict=True):
        dense = adapter.delta(path).detach().numpy()
        left, _, right = np.linalg.svd(dense)
        p, q = left[:, :2] @ left[:, :2].T, right[:2].T @ right[:2]
        twice.append((p @ part @ q).ravel())
    assert_near(scaled.j @ scaled.step - other.j @ other.step, np.concatenate(twice))


@pytest.mark.parametrize("preset", PRESETS)
def test_scaled_gradient_descent_inverts_every_nodes_block(preset):
    problem = Problem(preset, lambda adapter: ScaledGD(adapter, torch.optim.SGD, damping=0.0, **SGD))
    expected, place = [], 0
    for parameter in factors(problem.adapter):
        mine = problem.j[:, place : place + parameter.numel()]
        expected.append(np.linalg.pinv(mine, rcond=1e-9) @ problem.g)
        place += parameter.numel()
    assert_near(problem.step, np.concatenate(expected), 1e-7)


def test_a_frozen_factor_is_lora_fa():
    """s^-2 gB (A A^T)^-1, as PEFT's LoRA-FA has it."""
    model = Toy(2, 12).double()
    spec = ta.preset("lora", rank=2, alpha=6.0, targets=["q_proj"], frozen=["core_in"])
    adapter = ta.attach(model, spec).double()
    shake(adapter)
    optimizer = plain(adapter)
    backward(model, optimizer, batch())
    group = adapter.plan.groups[0]
    held = adapter.factors(group.name)
    (name,), (frozen,) = group.trainable, group.rule.frozen
    b, a = held[name].detach().clone(), held[frozen].detach()
    expected = b - held[name].grad @ torch.linalg.inv(a @ a.mT) / group.scale**2
    optimizer.step()
    torch.testing.assert_close(held[name].detach(), expected)


# -- one property for all: whose steps do not depend on the gauge ---------------------------------------------------

INVARIANT = {
    "LoRAPro": lambda a: LoRAPro(a, damping=0.0, lr=1e-2),
    "LoRAPro min_norm": lambda a: LoRAPro(a, gauge="min_norm", damping=0.0, lr=1e-2),
    "LoRAPro zero": lambda a: LoRAPro(a, gauge="zero", damping=0.0, lr=1e-2),
    "LoRAPro dense": lambda a: LoRAPro(a, moments="dense", damping=0.0, lr=1e-2),
    "LoRAPro dense, min_norm": lambda a: LoRAPro(a, moments="dense", gauge="min_norm", damping=0.0, lr=1e-2),
    "LoRAPro without moments": lambda a: LoRAPro(a, moments=None, damping=0.0, lr=1e-1),
    "ScaledGD around SGD": lambda a: ScaledGD(a, torch.optim.SGD, damping=0.0, lr=1e-1),
    "ScaledGD around SGD with momentum": lambda a: ScaledGD(a, torch.optim.SGD, damping=0.0, lr=1e-1, momentum=0.9),
}
DEPENDENT = {
    "SGD": lambda a: torch.optim.SGD(factors(a), lr=1e-1),
    "AdamW": lambda a: torch.optim.AdamW(factors(a), lr=1e-2),
    "ScaledGD around AdamW": lambda a: ScaledGD(a, damping=0.0, lr=1e-2),
    "LoRAPro around AdamW": lambda a: LoRAPro(a, torch.optim.AdamW, moments=None, damping=0.0, lr=1e-2),
}


def turn(adapter, seed=3):
    """Put X X^-1 on every bond of every group: other factors of the same deltas."""
    draw = np.random.default_rng(seed)
    for group in adapter.plan.groups:
        held = {n: t.detach().clone() for n, t in adapter.factors(group.name).items()}
        for bond, ends in group.diagram.bonds.items():
            size = group.diagram.sizes[bond]
            x = torch.from_numpy(draw.standard_normal((size, size)) / 3 + np.eye(size))
            if len(ends) != 2:  # CP: scales alone
                x = torch.diag(torch.from_numpy(draw.uniform(0.5, 2, size)))
                ends = ends[:2]
            for node, matrix in zip(ends, (x, torch.linalg.inv(x).mT), strict=True):
                dim = group.diagram.nodes[node].index(bond)
                held[node] = torch.movedim(torch.tensordot(held[node], matrix, ([dim], [0])), -1, dim)
        adapter.set_factors(group.name, held)


RATE = {"tt_lora": 1e-2}  # its scale is ten times that of the others


def trajectory(preset, make, turned, steps=3):
    model, adapter = adapted(preset)
    if turned:
        before = deltas(adapter).detach()
        turn(adapter)
        torch.testing.assert_close(deltas(adapter).detach(), before)
    optimizer, seen = _slower(make, RATE.get(preset, 1))(adapter), []
    for k in range(steps):
        backward(model, optimizer, batch(seed=k))
        optimizer.step()
        seen.append(deltas(adapter).detach())
    return torch.stack(seen)


def steps_apart(preset, make):
    """How far the paths of two gauges are apart, relative to their length."""
    start = deltas(adapted(preset)[1]).detach()
    one, two = (trajectory(preset, make, turned) for turned in (False, True))
    return float((one - two).norm() / (one - start).norm())


def of_each(name):
    """Conjugate gradients are the same for all, and slow without damping; gauge zero is of trees."""
    left_out = {"tt_lora"} if "min_norm" in name else {"lorta"} if "zero" in name else set()
    return [(name, preset) for preset in ("lora", "lotr", "tt_lora", "lorta") if preset not in left_out]


@pytest.mark.parametrize(("name", "preset"), [pair for name in INVARIANT for pair in of_each(name)])
def test_the_gauge_of_the_factors_does_not_change_the_deltas_path(name, preset):
    """Over several steps, moments among them. A step of finite length is U + dU, G + dG: exactly covariant under zero;
    under min_norm to first order in the rate, and the rest shrinks with it."""
    exact = "ScaledGD" in name or (preset in ("lotr", "tt_lora") and "min_norm" not in name) or "zero" in name
    if exact:
        assert steps_apart(preset, INVARIANT[name]) < 1e-7
        return
    slow = [steps_apart(preset, _slower(INVARIANT[name], factor)) for factor in (1e-1, 1e-3)]
    assert slow[1] < 0.03 * slow[0] < 0.03 or slow[1] < 1e-6


def _slower(make, factor):
    def made(adapter):
        optimizer = make(adapter)
        optimizer.max_iterations = 3000
        for group in optimizer.param_groups:
            group["lr"] *= factor
        return optimizer

    return made


@pytest.mark.parametrize("preset", ["lora", "lotr"])
@pytest.mark.parametrize("name", DEPENDENT)
def test_the_steps_of_others_depend_on_the_gauge(name, preset):
    assert steps_apart(preset, _slower(DEPENDENT[name], 1e-2)) > 0.05


# -- starts at zero -----------------------------------------------------------------------------------------------

ALL = {
    "LoRAPro": LoRAPro,
    "LoRAPro min_norm": lambda a, **more: LoRAPro(a, gauge="min_norm", **more),
    "LoRAPro dense": lambda a, **more: LoRAPro(a, moments="dense", **more),
    "LoRAPro without moments": lambda a, **more: LoRAPro(a, moments=None, **more),
    "ScaledGD": ScaledGD,
    "ScaledGD around SGD": lambda a, **more: ScaledGD(a, torch.optim.SGD, **more),
}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


def fresh(preset="lotr", dtype=torch.float32):
    model = Toy(2, 12).to(dtype)
    more = PRESETS.get(preset, {})
    return model, ta.attach(model, ta.preset(preset, targets=["q_proj", "v_proj"], **more)).to(dtype)


@every
@pytest.mark.parametrize("preset", PRESETS)
def test_fresh_adapters_train_without_a_nan(make, preset):
    model, adapter = fresh(preset)
    optimizer, losses = make(adapter, lr=1e-3), []
    for _ in range(8):
        losses.append(backward(model, optimizer, batch(torch.float32)))
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in adapter.parameters())
    assert losses[-1] < losses[0]


@every
@pytest.mark.parametrize("damping", [0.0, 1e-4])
@pytest.mark.parametrize("preset", TREES)
def test_factors_that_are_all_zero_stay(make, damping, preset):
    model, adapter = fresh(preset)
    for parameter in adapter.parameters():
        nn.init.zeros_(parameter)
    optimizer = make(adapter, lr=1e-2, damping=damping)
    for _ in range(2):
        backward(model, optimizer, batch(torch.float32))
        optimizer.step()
    assert not any(p.any() for p in adapter.parameters())


@pytest.mark.parametrize("preset", ["lora", "lotr"])
@pytest.mark.parametrize("make", [LoRAPro, ScaledGD])
def test_damping_keeps_the_second_step_as_small_as_the_rate(make, preset):
    """Undamped, lr dA is of the order of A at the second step whatever the rate, since B is of the order of lr."""
    more = {"moments": None} if make is LoRAPro else {}

    def moved(rate, damping):
        model, adapter = fresh(preset, torch.float64)
        optimizer = make(adapter, torch.optim.SGD, lr=rate, damping=damping, **more)
        backward(model, optimizer, batch())
        optimizer.step()
        backward(model, optimizer, batch(seed=1))
        return np.linalg.norm(step_of(adapter, optimizer))

    assert moved(1e-5, 0.0) > 100 * moved(1e-5, 1e-3)
    assert moved(1e-5, 1e-3) < 0.05 * moved(1e-3, 1e-3)


# -- moments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gauge", ["min_norm", "zero"])
def test_the_learning_rate_is_the_root_mean_square_of_the_first_step(gauge):
    """Bias correction from the first step on: mhat = d, vhat = the mean square of P g."""
    problem = Problem("lotr", lambda a: LoRAPro(a, gauge=gauge, damping=0.0, **SGD))
    change = problem.j @ problem.step
    np.testing.assert_allclose(np.sqrt(np.mean(change**2)), 1.0, rtol=1e-6)
    assert_near(change / np.linalg.norm(change), problem.projected / np.linalg.norm(problem.projected), 1e-7)


def test_dense_moments_are_adams_of_the_projected_gradient():
    """Two steps of arXiv:2407.18242, algorithm 1, with t from 1."""
    model, adapter = adapted("lora")
    optimizer = LoRAPro(adapter, moments="dense", damping=0.0, gauge="zero", lr=1e-3, betas=(0.8, 0.9), eps=1e-8)
    first = second = 0
    for t in (1, 2):
        data = batch(seed=t)
        g, j = gradient(model, adapter, data), jacobian(adapter)
        onto = j @ np.linalg.pinv(j, rcond=1e-9)
        first, second = 0.8 * first + 0.2 * (onto @ g), 0.9 * second + 0.1 * (onto @ g) ** 2
        expected = onto @ ((first / (1 - 0.8**t)) / (np.sqrt(second / (1 - 0.9**t)) + 1e-8))
        backward(model, optimizer, data)
        assert_near(j @ step_of(adapter, optimizer), 1e-3 * expected, 1e-6)


@pytest.mark.parametrize("preset", ["lora", "lotr"])
def test_a_transported_moment_is_the_projection_of_the_change_that_it_meant(preset):
    """min_norm: m2 = beta P2 m1 + (1 - beta) P2 g2, of dense changes."""
    model, adapter = adapted(preset)
    optimizer = LoRAPro(adapter, gauge="min_norm", damping=0.0, lr=1e-2, betas=(0.7, 0.9), eps=0.0)
    first = second = 0
    for t in (1, 2, 3):
        data = batch(seed=t)
        g, j = gradient(model, adapter, data), jacobian(adapter)
        onto = j @ np.linalg.pinv(j, rcond=1e-9)
        first = onto @ (0.7 * first + 0.3 * g)
        groups = len(adapter.plan.groups)
        squares = ((onto @ g) ** 2).reshape(groups, -1).mean(1, keepdims=True)
        second = 0.9 * second + 0.1 * squares
        expected = (first / (1 - 0.7**t)).reshape(groups, -1) / np.sqrt(second / (1 - 0.9**t))
        backward(model, optimizer, data)
        assert_near(j @ step_of(adapter, optimizer), 1e-2 * expected.ravel(), 1e-6)


@pytest.mark.parametrize("preset", ["lora", "lotr", "lorta"])
def test_state_is_as_wide_as_the_factors_unless_dense_moments_are_asked_for(preset):
    model, adapter = fresh(preset)
    entries, size = sum(p.numel() for p in factors(adapter)), deltas(adapter).numel()
    for make, bound in (
        (ALL["LoRAPro"], entries),
        (ALL["LoRAPro without moments"], 0),
        (ALL["LoRAPro dense"], 2 * size),
    ):
        optimizer = make(adapter, lr=1e-4)
        backward(model, optimizer, batch(torch.float32))
        optimizer.step()
        held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
        assert bound <= held <= bound + len(adapter.plan.groups)


# -- what trainers do to optimisers ---------------------------------------------------------------------------------


@every
def test_half_batches_accumulate_to_the_step_of_the_whole(make):
    found = []
    for parts in (1, 2):
        model, adapter = adapted("lotr")
        optimizer, (x, y) = make(adapter, lr=1e-2), batch()
        for _ in range(2):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loss_of(model, (a, b)) / parts).backward()
            optimizer.step()
        found.append(flat(factors(adapter)))
    np.testing.assert_allclose(found[1], found[0], atol=1e-9)


@every
def test_gradients_are_the_callers_again_after_the_step(make):
    model, adapter = adapted("lotr")
    optimizer = make(adapter, lr=1e-2)
    backward(model, optimizer, batch())
    before = [p.grad for p in factors(adapter)]
    copies = flat(before)
    optimizer.step()
    assert all(p.grad is g for p, g in zip(factors(adapter), before, strict=True))
    np.testing.assert_array_equal(flat(before), copies)


def test_clipping_the_raw_gradients_shortens_the_step_as_much():
    steps = []
    for bound in (None, 1e-3):
        model, adapter = adapted("lotr")
        optimizer = plain(adapter)
        backward(model, optimizer, batch())
        length = float(nn.utils.clip_grad_norm_(factors(adapter), bound or torch.inf))
        steps.append((step_of(adapter, optimizer), length))
    (whole, length), (clipped, _) = steps
    np.testing.assert_allclose(clipped, whole * 1e-3 / (length + 1e-6), rtol=1e-6)


@every
def test_autocast_and_factors_in_half_precision(make):
    for dtype in (torch.float32, torch.bfloat16):
        model, adapter = fresh("lotr")
        adapter.to(dtype)
        optimizer, losses = make(adapter, lr=1e-3), []
        for _ in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch(torch.float32))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert {p.dtype for p in factors(adapter)} == {dtype}
        assert losses[-1] < losses[0]


@every
def test_a_gradient_scaler_is_undone_and_skips_what_overflows(make):
    found = []
    for scaled in (False, True):
        model, adapter = adapted("lotr", torch.float32)
        optimizer = make(adapter, lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch(torch.float32))).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(flat(factors(adapter)))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-6)
    scaler.scale(loss_of(model, batch(torch.float32))).backward()
    factors(adapter)[0].grad[:] = torch.inf
    scaler.step(optimizer)
    np.testing.assert_array_equal(flat(factors(adapter)), found[1])
    assert scaler.get_scale() == 1024.0
    scaler.update()
    assert scaler.get_scale() < 1024.0


@every
def test_schedulers_see_one_optimiser(make):
    model, adapter = adapted("lotr")
    optimizer = make(adapter, lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for schedule in (torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),):
            for _ in range(4):
                backward(model, optimizer, batch())
                optimizer.step()
                schedule.step()
    assert optimizer.param_groups[0]["lr"] < 1e-8 and optimizer.base.param_groups is optimizer.param_groups


@every
@pytest.mark.parametrize("preset", ["lora", "lotr"])
def test_saved_state_goes_on_as_before(make, preset, tmp_path):
    model, adapter = adapted(preset)
    optimizer = make(adapter, lr=1e-2)
    for k in range(3):
        backward(model, optimizer, batch(seed=k))
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other, twin = adapted(preset)
    for group in adapter.plan.groups:
        twin.set_factors(group.name, {n: t.detach() for n, t in adapter.factors(group.name).items()})
    again = make(twin, lr=1.0)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    for k in (3, 4):
        for one, opt in ((model, optimizer), (other, again)):
            backward(one, opt, batch(seed=k))
            opt.step()
    torch.testing.assert_close(deltas(twin), deltas(adapter), rtol=1e-12, atol=1e-14)


@every
def test_pickles_and_copies_are_whole(make):
    model, adapter = adapted("lotr")
    optimizer = make(adapter, lr=1e-2)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    backward(model, optimizer, batch())
    optimizer.step()
    for made in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        held = {p for group in made.param_groups for p in group["params"]}
        assert held == set(factors(made.adapter)) and not held & set(factors(adapter))
        assert len(made.state) == len(optimizer.state)
        for p in held:
            p.grad = torch.ones_like(p)
        made.step()


@every
@pytest.mark.parametrize("preset", ["lora", "lotr", "lorta"])
def test_ranks_change_in_the_middle(make, preset):
    model, adapter = adapted(preset, torch.float32)
    optimizer, losses = make(adapter, lr=1e-3), []
    for rank in (2, 4, 1):
        ta.resize(adapter, rank, optimizer=optimizer)
        for _ in range(3):
            losses.append(backward(model, optimizer, batch(torch.float32)))
            raw = torch.cat([p.grad.flatten() for p in factors(adapter)]).numpy()
            step = step_of(adapter, optimizer)
            assert step @ raw > 0 and not np.allclose(step, 1e-3 * raw, rtol=1e-3)  # no plain SGD on what it lost
        assert set(optimizer.state) <= set(factors(adapter))
        held = {p for group in optimizer.param_groups for p in group["params"]}
        assert held == set(factors(adapter))
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("preset", ["lora", "lotr"])
def test_moments_of_the_shortest_step_follow_into_another_gauge(preset):
    """A form that keeps the deltas keeps the steps that follow: to first order in the rate, so of a small one."""
    paths = []
    for turned in (False, True):
        model, adapter = adapted(preset)
        optimizer = LoRAPro(adapter, gauge="min_norm", damping=1e-10, lr=1e-6)
        for k in range(5):
            if turned and k == 3:
                ta.orthogonalize(adapter, optimizer=optimizer)
            before = deltas(adapter)
            backward(model, optimizer, batch(seed=k))
            optimizer.step()
        paths.append(flat([now - then for now, then in zip(deltas(adapter), before, strict=True)]))
    assert_near(paths[1], paths[0], 1e-4)


@pytest.mark.parametrize("make", [LoRAPro, ScaledGD])
def test_what_is_no_factor_is_left_to_the_base(make):
    """`train:` modules take the plain step of SGD."""
    model = bert_classifier()
    adapter = ta.attach(model, ta.preset("lotr", rank=2, targets=["query", "value"], train=["classifier"]))
    shake(adapter)
    optimizer = make(adapter, torch.optim.SGD, lr=0.1)
    model(input_ids=tokens(), labels=torch.tensor([0, 2])).loss.backward()
    extra = list(adapter.extra.parameters())
    expected = [p.detach() - 0.1 * p.grad for p in extra]
    assert len(extra) == 2
    optimizer.step()
    torch.testing.assert_close([p.detach() for p in extra], expected, rtol=0, atol=0)


def test_factors_that_are_not_passed_stay_and_steps_are_those_of_the_others():
    model, adapter = adapted("lotr")
    (group,) = adapter.plan.groups
    held = adapter.factors(group.name)
    optimizer = plain(adapter, params=[held["factor_out"]])
    backward(model, optimizer, batch())
    before = {n: t.detach().clone() for n, t in held.items()}
    v, cores = before["factor_in"], before["core"]
    seen = sum(core @ v.mT @ v @ core.mT for core in cores)
    expected = before["factor_out"] - held["factor_out"].grad @ torch.linalg.inv(seen) / group.scale**2
    optimizer.step()
    torch.testing.assert_close(held["factor_out"].detach(), expected)
    assert torch.equal(held["core"], cores) and torch.equal(held["factor_in"], v)


def test_moments_of_factors_that_are_passed_alone_go_on():
    model, adapter = adapted("lotr")
    core = adapter.factors(adapter.plan.groups[0].name)["core"]
    optimizer = LoRAPro(adapter, params=[core], lr=1e-3)
    for _ in range(3):
        backward(model, optimizer, batch())
        optimizer.step()
    assert optimizer.state[core]["directions"] == 3


def test_a_closure_is_evaluated_once():
    model, adapter = adapted("lotr")
    optimizer, calls = LoRAPro(adapter, lr=1e-3), []

    def closure():
        calls.append(backward(model, optimizer, batch()))
        return calls[-1]

    assert optimizer.step(closure) == calls[0] and len(calls) == 1


def lose_a_gradient(adapter):
    factors(adapter)[-1].grad = None


def grow_the_scale(adapter):
    adapter.scale = 3.0


CHANGES = {"nothing": lambda adapter: None, "gradient": lose_a_gradient, "scale": grow_the_scale}


@pytest.mark.parametrize("preset", ["lora", "lotr", "loha"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_seen(change, preset):
    """The step is that of an optimiser that knew nothing of the steps before."""
    model, adapter = adapted(preset)
    worn, new = (ScaledGD(adapter, torch.optim.SGD, **SGD) for _ in range(2))
    backward(model, worn, batch())
    worn.step()
    backward(model, worn, batch())
    CHANGES[change](adapter)
    start = [p.detach().clone() for p in factors(adapter)]
    found = step_of(adapter, worn)
    with torch.no_grad():
        for parameter, value in zip(factors(adapter), start, strict=True):
            parameter.copy_(value)
    assert_near(found, step_of(adapter, new), 1e-12)


def test_the_scale_of_the_adapter_is_part_of_the_delta():
    """The step of the deltas is the same however the scale is split between the group and the adapter."""
    found = []
    for alpha, scale in ((6.0, 1.0), (2.0, 3.0)):
        model, adapter = adapted("lora", alpha=alpha)
        adapter.scale = scale
        optimizer = LoRAPro(adapter, lr=1e-2)
        backward(model, optimizer, batch())
        optimizer.step()
        found.append(deltas(adapter).detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("make", [LoRAPro, ScaledGD])
def test_the_trainer_of_transformers(make, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = bert_classifier()
    adapter = ta.attach(model, ta.preset("lotr", rank=2, targets=["query", "value"], train=["classifier"]))
    before = flat(adapter.parameters())
    rows = [{"input_ids": tokens(5, seed=k), "labels": k % 3} for k in range(16)]
    optimizer = make(adapter, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    settings = TrainingArguments(
        str(tmp_path),
        **{"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0},
        **{"report_to": [], "save_strategy": "steps", "save_steps": 2, "use_cpu": True, "disable_tqdm": True},
    )
    trainer = Trainer(model, settings, train_dataset=rows, optimizers=(optimizer, schedule))
    assert np.isfinite(trainer.train().training_loss)
    assert schedule.last_epoch == 4 and not np.allclose(flat(adapter.parameters()), before)
    saved = torch.load(next(tmp_path.glob("checkpoint-4")) / "optimizer.pt")
    optimizer.load_state_dict(saved)


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"gauge": "left"}, "unknown gauge"),
        ({"moments": "full"}, "unknown moments"),
        ({"betas": (0.9, 1.0)}, "betas are from 0 up to 1"),
        ({"damping": -1.0}, "a relative damping is a number from 0 on"),
    ],
)
def test_bad_options_are_refused(how, words):
    _, adapter = fresh()
    with pytest.raises(ta.SpecError, match=words):
        LoRAPro(adapter, lr=1e-3, **how)


def test_slices_of_a_bank_are_refused_by_name():
    model = Toy(2, 12)
    spec = ta.preset("vera", rank=2, targets=["q_proj", "up_proj"])
    adapter = ta.attach(model, spec)
    assert any(group.rule.shapes == "slices" for group in adapter.plan.groups)
    for make in (LoRAPro, ScaledGD):
        with pytest.raises(ta.SpecError, match=f"group '{adapter.plan.groups[0].name}' shares"):
            make(adapter, lr=1e-3)


def test_gauge_zero_is_refused_where_there_is_none():
    _, adapter = fresh("lorta")
    with pytest.raises(ta.SpecError, match="gauge='zero' needs a tree"):
        LoRAPro(adapter, gauge="zero", lr=1e-3)


def test_an_optimiser_of_none_of_the_factors_is_refused():
    model, adapter = fresh()
    with pytest.raises(ta.AdapterError, match="holds none of the factors"):
        Wrapper(adapter, torch.optim.SGD, [nn.Parameter(torch.ones(1))], lr=1e-3)
