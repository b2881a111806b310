"""GaLore: its published properties, the faults of its first implementation, and what surrounds an optimiser."""

import copy
import io
import pickle

import numpy as np
import pytest
import tensorly as tl
import tiny
import torch
from tensorly.decomposition import partial_tucker
from torch import nn
from transformers import Trainer, TrainingArguments

from tensoradapt.errors import AdapterError, RankError, ShapeError, SpecError
from tensoradapt.optim import GaLore
from tensoradapt.optim.projectors import Subspace

WIDE, TALL, SQUARE, KERNEL = (7, 12), (12, 7), (8, 8), (6, 5, 3, 3)
SIDES = ("std", "reverse_std", "left", "right", "full")
PROJECTORS = ("svd", "rsvd", "tucker", "group")
every = pytest.mark.parametrize("projector", PROJECTORS)


def weight(shape, seed=0, dtype=torch.float64):
    return nn.Parameter(tiny.noise(*shape, seed=seed).to(dtype))


def gradients(shape, steps, seed=100):
    """Gradients of one step after another, with a spectrum that falls."""
    found = []
    for step in range(steps):
        g = np.random.default_rng(seed + step).standard_normal(shape)
        for axis, n in enumerate(shape):
            g = np.moveaxis(np.moveaxis(g, axis, -1) * 0.7 ** np.arange(n), -1, axis)
        found.append(g)
    return found


def feed(optimizer, weights, grads):
    for w, g in zip(weights, grads, strict=True):
        w.grad = None if g is None else torch.as_tensor(g).to(w)
    optimizer.step()


def bases(optimizer, w):
    return {int(k[6:]): t.double().numpy() for k, t in optimizer.state[w].items() if k.startswith("basis_")}


def times(tensor, axis, matrix):
    """T x_axis M, by numpy."""
    return np.moveaxis(np.tensordot(matrix, np.moveaxis(tensor, axis, 0), axes=1), 0, axis)


def project(tensor, held):
    for axis, u in held.items():
        tensor = times(tensor, axis, u.T)
    return tensor


def back(tensor, held):
    for axis, u in held.items():
        tensor = times(tensor, axis, u)
    return tensor


def tails(tensor, ranks):
    """The norm beyond the rank of every unfolding."""
    found = []
    for axis, r in ranks.items():
        unfolded = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
        found.append(np.linalg.norm(np.linalg.svd(unfolded, compute_uv=False)[r:]))
    return found


def model(seed=0, dtype=torch.float64):
    """Two equal matrices, one of another shape, biases."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 9)).to(dtype)


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)).double()


def loss(net, step, size=16):
    """Another batch at every step."""
    dtype = next(net.parameters()).dtype
    x = tiny.noise(size, 6, seed=step).to(dtype)
    return (net(x) - x.sum(1, keepdim=True).sin()).square().mean()


def train(net, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss(net, step).backward()
        optimizer.step()


# -- a: the subspaces -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("projector", ["svd", "rsvd"])
def test_a_matrix_loses_the_tail_of_its_spectrum(projector, side, shape):
    w, g = weight(shape), gradients(shape, 1)[0]
    optimizer = GaLore([w], rank=3, side=side, projector=projector)
    feed(optimizer, [w], [g])
    held = bases(optimizer, w)
    assert set(held) == {
        "left": {0}, "right": {1}, "full": {0, 1},
        "std": {1} if shape[0] >= shape[1] else {0}, "reverse_std": {0} if shape[0] >= shape[1] else {1},
    }[side]  # fmt: skip
    for u in held.values():
        np.testing.assert_allclose(u.T @ u, np.eye(3), atol=1e-13)
    error = np.linalg.norm(g - back(project(g, held), held))
    np.testing.assert_allclose(error, tails(g, {0: 3})[0], rtol=1e-10)


def test_the_randomised_projector_of_a_large_matrix_is_near_the_exact_one():
    g = gradients((300, 200), 1)[0] + 0.01 * np.random.default_rng(0).standard_normal((300, 200))
    w = weight(g.shape)
    optimizer = GaLore([w], rank=8, projector="rsvd")
    feed(optimizer, [w], [g])
    held = bases(optimizer, w)
    np.testing.assert_allclose(held[1].T @ held[1], np.eye(8), atol=1e-13)
    least = tails(g, {0: 8})[0]
    assert least * (1 + 1e-9) < np.linalg.norm(g - back(project(g, held), held)) <= 1.002 * least


def test_a_tensor_loses_no_more_than_the_bound_of_hosvd_and_as_little_as_tensorly():
    w, g = weight(KERNEL), np.random.default_rng(1).standard_normal(KERNEL)
    optimizer = GaLore([w], rank=2, projector="tucker")
    feed(optimizer, [w], [g])
    held = bases(optimizer, w)
    assert {k: u.shape for k, u in held.items()} == {0: (6, 2), 1: (5, 2), 2: (3, 2), 3: (3, 2)}
    for u in held.values():
        np.testing.assert_allclose(u.T @ u, np.eye(2), atol=1e-13)
    error, lost = np.linalg.norm(g - back(project(g, held), held)), tails(g, dict.fromkeys(range(4), 2))
    assert max(lost) <= error <= np.linalg.norm(lost)
    core, factors = partial_tucker(g, rank=[2, 2, 2, 2], modes=[0, 1, 2, 3], n_iter_max=200, tol=1e-9)[0]
    assert error <= 1.002 * np.linalg.norm(g - tl.tenalg.multi_mode_dot(core, factors))


def test_a_stack_shares_the_bases_of_its_partial_tucker_decomposition():
    weights = [weight(WIDE, k) for k in range(3)]
    grads = [gradients(WIDE, 1, seed=k)[0] for k in range(3)]
    optimizer = GaLore(weights, rank=(2, 4), projector="group")
    feed(optimizer, weights, grads)
    held, stack = bases(optimizer, weights[0]), np.stack(grads)
    assert {k: u.shape for k, u in held.items()} == {0: (7, 2), 1: (12, 4)}
    moved = {k + 1: u for k, u in held.items()}
    for u in held.values():
        np.testing.assert_allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-13)
    error, lost = np.linalg.norm(stack - back(project(stack, moved), moved)), tails(stack, {1: 2, 2: 4})
    assert max(lost) <= error <= np.linalg.norm(lost)
    core, factors = partial_tucker(stack, rank=[2, 4], modes=[1, 2], n_iter_max=200, tol=1e-9)[0]
    assert error <= 1.002 * np.linalg.norm(stack - tl.tenalg.multi_mode_dot(core, factors, modes=[1, 2]))
    for w, g in zip(weights, grads, strict=True):  # the first moments after one step
        np.testing.assert_allclose(optimizer.state[w]["exp_avg"].numpy(), 0.1 * project(g, held), atol=1e-13)


# -- b: full rank ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "gap"), [("std", 4), ("right", 4), *((side, 1) for side in SIDES)])
@every
def test_sgd_at_full_rank_is_sgd(projector, side, gap):
    """With bases of the longer side only where they are found at every step: later gradients leave their span."""
    one, two = model(), model()
    options = {"rank": 9, "gap": gap, "scale": 1.0, "projector": projector, "side": side, "lr": 0.1}
    train(one, GaLore(one.parameters(), torch.optim.SGD, **options), 15)
    train(two, torch.optim.SGD(two.parameters(), lr=0.1), 15)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


def test_sgd_of_a_tensor_at_full_rank_is_sgd():
    one, two = weight(KERNEL), weight(KERNEL)
    first = GaLore([one], torch.optim.SGD, rank=(6, 4, 3, 3), gap=2, scale=1.0, projector="tucker", lr=0.1)
    second = torch.optim.SGD([two], lr=0.1)
    for g in gradients(KERNEL, 5):
        g[:, 4] = 0.0  # rank 4 is full
        feed(first, [one], [g])
        feed(second, [two], [g])
    torch.testing.assert_close(one, two, rtol=0, atol=1e-13)
    assert set(bases(first, one)) == {1}  # an axis that keeps its size needs no basis


# -- c: the rank of the update --------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", ["svd", "group"])
def test_the_update_has_the_rank_of_its_projectors(projector):
    weights = [weight((20, 16), k) for k in range(2)]
    optimizer = GaLore(weights, rank=2, gap=5, projector=projector, lr=0.1, weight_decay=0.0)
    begun, before = [w.detach().clone() for w in weights], [w.detach().clone() for w in weights]
    for step in range(15):
        feed(optimizer, weights, [gradients((20, 16), 1, seed=10 * step + k)[0] for k in range(2)])
        if step % 5 == 4:
            for w, last, first in zip(weights, before, begun, strict=True):
                assert torch.linalg.matrix_rank(w.detach() - last, rtol=1e-10) == 2
                assert torch.linalg.matrix_rank(w.detach() - first, rtol=1e-10) == 2 * (step // 5 + 1)
            before = [w.detach().clone() for w in weights]


# -- d: memory ------------------------------------------------------------------------------------------------------


def numbers(optimizer):
    held = {id(t): t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()}
    return sum(t.numel() for t in held.values())


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_the_state_of_a_matrix_has_the_published_size(shape, rank):
    w = weight(shape)
    optimizer = GaLore([w], rank=rank)
    for g in gradients(shape, 3):
        feed(optimizer, [w], [g])
    r = min(rank, *shape)
    assert numbers(optimizer) == 2 * r * max(shape) + r * min(shape)
    assert sum(p.numel() for group in optimizer.base.param_groups for p in group["params"]) == 0


def test_the_state_of_a_stack_is_that_of_its_cores_and_one_pair_of_bases():
    weights = [weight(WIDE, k) for k in range(5)]
    optimizer = GaLore(weights, rank=(3, 4), projector="group")
    for step in range(3):
        feed(optimizer, weights, [gradients(WIDE, 1, seed=9 * step + k)[0] for k in range(5)])
    assert numbers(optimizer) == 2 * 5 * 3 * 4 + 7 * 3 + 12 * 4


def test_the_state_of_a_tensor_is_that_of_its_core_and_bases():
    w = weight(KERNEL)
    optimizer = GaLore([w], rank=(4, 2, 3, 3), projector="tucker")
    feed(optimizer, [w], gradients(KERNEL, 1))
    assert numbers(optimizer) == 2 * 4 * 2 * 9 + 6 * 4 + 5 * 2


# -- e: back and anew -----------------------------------------------------------------------------------------------


def test_going_back_is_linear_in_what_is_taken_back():
    frames = {k: torch.linalg.qr(tiny.noise(n, r, seed=k).double())[0] for k, (n, r) in {0: (6, 2), 2: (3, 2)}.items()}
    subspace = Subspace(frames)
    x, y = tiny.noise(2, 5, 2, 3, seed=5).double(), tiny.noise(2, 5, 2, 3, seed=6).double()
    torch.testing.assert_close(
        subspace.back(2 * x - 3 * y), 2 * subspace.back(x) - 3 * subspace.back(y), rtol=0, atol=1e-13
    )
    held = {k: u.numpy() for k, u in frames.items()}
    np.testing.assert_allclose(subspace.back(x).numpy(), back(x.numpy(), held), atol=1e-13)
    torch.testing.assert_close(subspace.project(subspace.back(x)), x, rtol=0, atol=1e-13)


CASES = {"svd": (WIDE,), "rsvd": (TALL,), "tucker": (KERNEL,), "group": (WIDE, WIDE)}


@every
def test_bases_are_found_anew_every_gap_steps_and_at_no_other(projector):
    """The first implementation never found those of a tensor anew."""
    weights = [weight(shape, k) for k, shape in enumerate(CASES[projector])]
    optimizer = GaLore(weights, rank=2, gap=3, projector=projector, lr=0.01)
    before, found = {}, []
    for step in range(10):
        grads = [gradients(w.shape, 1, seed=20 * step + k)[0] for k, w in enumerate(weights)]
        feed(optimizer, weights, grads)
        now = bases(optimizer, weights[0])
        found.append(any(not np.array_equal(now[k], before.get(k)) for k in now))
        if step % 3 == 0:  # they are of the gradients of this very step
            stack = np.stack(grads)
            moved = {k + 1: u for k, u in now.items()}
            lost = tails(stack, {k: u.shape[1] for k, u in moved.items()})
            assert np.linalg.norm(stack - back(project(stack, moved), moved)) <= np.linalg.norm(lost) * (1 + 1e-9)
        before = now
    assert found == [step % 3 == 0 for step in range(10)]


@every
def test_the_step_is_that_of_adam_on_projected_gradients(projector):
    """By numpy: moments, bias corrections, decoupled decay. The first implementation's way back for tensors ignored its
    argument and gave the projected gradient, so that Adam was passed by."""
    weights = [weight(shape, k) for k, shape in enumerate(CASES[projector])]
    optimizer = GaLore(weights, rank=2, gap=3, scale=0.5, projector=projector, lr=0.02, weight_decay=0.1)
    expected = [w.detach().numpy().copy() for w in weights]
    first, second = [0.0] * len(weights), [0.0] * len(weights)
    for step in range(1, 9):
        grads = [gradients(w.shape, 1, seed=20 * step + k)[0] for k, w in enumerate(weights)]
        feed(optimizer, weights, grads)
        held = bases(optimizer, weights[0])
        for k, g in enumerate(grads):
            r = project(g, held)
            first[k] = 0.9 * first[k] + 0.1 * r
            second[k] = 0.999 * second[k] + 0.001 * r**2
            adam = first[k] / (1 - 0.9**step) / (np.sqrt(second[k] / (1 - 0.999**step)) + 1e-8)
            expected[k] = expected[k] * (1 - 0.02 * 0.1) - 0.02 * 0.5 * back(adam, held)
            np.testing.assert_allclose(weights[k].detach().numpy(), expected[k], rtol=1e-9, atol=1e-12)


def test_tensors_of_more_than_two_axes_train():
    """The first implementation raised TypeError for them. Matrices beside them keep the projector of matrices."""
    net = conv_net()
    optimizer = GaLore(net.parameters(), rank=4, gap=5, scale=1.0, projector="tucker", lr=0.02)
    x, y = tiny.noise(8, 4, 4, 4).double(), tiny.noise(8, 5, seed=1).double()
    found = []
    for _ in range(40):
        optimizer.zero_grad()
        value = (net(x) - y).square().mean()
        value.backward()
        optimizer.step()
        found.append(value.item())
    assert found[-1] < 0.3 * found[0]
    assert optimizer.state[net[0].weight]["exp_avg"].shape == (4, 4, 3, 3)
    assert optimizer.state[net[3].weight]["exp_avg"].shape == (4, 24)


@pytest.mark.parametrize("shape", [(6, 6), (6, 4), (4, 6)])
@pytest.mark.parametrize("rank", [3, 4, 6])
@pytest.mark.parametrize("side", SIDES)
def test_the_way_back_is_the_way_there_at_every_shape(side, rank, shape):
    """Also where the projected gradient is square, or as large as the weight: the first implementation asked its shape
    for the side, and took `reverse_std` back on the wrong one."""
    w, g = weight(shape), np.random.default_rng(3).standard_normal(shape)
    before = w.detach().numpy().copy()
    feed(GaLore([w], torch.optim.SGD, rank=rank, scale=1.0, side=side, lr=1.0), [w], [g])
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    np.testing.assert_allclose(before - w.detach().numpy(), best, atol=1e-12)


# -- what surrounds it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_weight_decay_is_decoupled_and_not_scaled_whatever_the_base(base):
    w, g = weight(WIDE), gradients(WIDE, 5)
    before = w.detach().clone()
    optimizer = GaLore([w], base, rank=2, scale=0.0, lr=0.1, weight_decay=0.5)
    for grad in g:
        feed(optimizer, [w], [grad])
    torch.testing.assert_close(w.detach(), before * 0.95**5, rtol=1e-14, atol=0)


def test_what_is_not_projected_is_the_inner_optimisers_alone():
    one, two = model(), model()
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99)}
    train(one, GaLore([{"params": one[0].parameters(), "rank": 2}, {"params": one[2].parameters(), "lr": 0.05}],
                      **options), 1)  # fmt: skip
    groups = [{"params": two[0].parameters()}, {"params": two[2].parameters(), "lr": 0.05}]
    train(two, torch.optim.AdamW(groups, **options), 1)
    assert torch.equal(one[0].bias, two[0].bias)
    assert torch.equal(one[2].weight, two[2].weight) and torch.equal(one[2].bias, two[2].bias)
    assert not torch.equal(one[0].weight, two[0].weight)


def test_a_group_has_its_own_rank_side_scale_and_gap():
    one, two = weight(WIDE), weight(WIDE)
    groups = [
        {"params": [one], "rank": 2, "gap": 1, "scale": 0.0, "weight_decay": 0.0},
        {"params": [two], "side": "full"},
    ]
    optimizer = GaLore(groups, rank=3)
    before = bases_one = None
    for g in gradients(WIDE, 2):
        start = one.detach().clone()
        feed(optimizer, [one, two], [g, g])
        assert torch.equal(one, start)
        before, bases_one = bases_one, bases(optimizer, one)
    assert not np.array_equal(before[0], bases_one[0])
    assert optimizer.state[one]["exp_avg"].shape == (2, 12) and optimizer.state[two]["exp_avg"].shape == (3, 3)


@every
def test_learning_rate_schedulers_reach_the_inner_optimiser(projector):
    w, *rest = [weight(shape) for shape in CASES[projector]]
    optimizer = GaLore([w, *rest], torch.optim.SGD, rank=2, scale=1.0, projector=projector, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    g = gradients(w.shape, 1)[0]
    for step in range(4):
        before = w.detach().numpy().copy()
        feed(optimizer, [w, *rest], [g, *(None for _ in rest)])
        scheduler.step()
        held = bases(optimizer, w)
        moved = before - w.detach().numpy()
        np.testing.assert_allclose(moved, 0.5**step * back(project(g, held), held), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@every
def test_training_goes_on_from_a_checkpoint_as_if_there_had_been_none(projector, dtype):
    def made(seed):
        net = model(seed, dtype)
        return net, GaLore(net.parameters(), rank=2, gap=4, scale=1.0, projector=projector, lr=0.01, amsgrad=True)

    one, first = made(0)
    train(one, first, 6)
    file = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    two, second = made(1)
    saved = torch.load(file, weights_only=True)
    two.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    for net, optimizer in ((one, first), (two, second)):
        train(net, optimizer, 7, first=6)
    assert tiny.same(one.state_dict(), two.state_dict())
    moments = second.state[two[0].weight]
    wide = torch.promote_types(dtype, torch.float32)
    assert {t.dtype for name, t in moments.items() if name.startswith(("exp", "max", "basis"))} == {wide}
    assert numbers(first) == numbers(second)


@pytest.mark.parametrize(
    ("groups", "options", "says"),
    [
        (1, {"rank": 3}, r"6 by projector=svd, rank=2(.|\n)*6 by projector=svd, rank=3"),
        (1, {"rank": 2, "projector": "group"}, "projector=group"),
        (1, {"rank": 2, "side": "left"}, "side=left"),
        (2, {"rank": 2}, r"6 by(.|\n)*2 by(.|\n)*2 by"),
    ],
)
def test_a_state_of_other_groups_or_projectors_is_refused(groups, options, says):
    one, two = model(), model()
    first = GaLore(one.parameters(), rank=2)
    train(one, first, 1)
    mine = two.parameters() if groups == 1 else [{"params": two[0].parameters()}, {"params": two[2].parameters()}]
    second = GaLore(mine, **options)
    with pytest.raises(AdapterError, match=says):
        second.load_state_dict(first.state_dict())
    assert not second.state


def test_a_state_of_before_the_first_step_begins_anew():
    w, g = weight(WIDE), gradients(WIDE, 4)
    optimizer = GaLore([w], rank=2, gap=10)
    fresh = copy.deepcopy(optimizer.state_dict())
    feed(optimizer, [w], g[:1])
    before = bases(optimizer, w)[0]
    optimizer.load_state_dict(fresh)
    assert not optimizer.state
    feed(optimizer, [w], g[1:2])
    assert not np.allclose(np.abs(before), np.abs(bases(optimizer, w)[0])) and optimizer.state[w]["step"] == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_alone(copied):
    net = model()
    optimizer = GaLore(net.parameters(), rank=2, gap=3, lr=0.01)
    train(net, optimizer, 4)
    other, second = copied((net, optimizer))
    train(net, optimizer, 4)
    assert not tiny.same(net.state_dict(), other.state_dict())
    train(other, second, 4)
    assert tiny.same(net.state_dict(), other.state_dict())


def test_accumulated_gradients_make_the_step_of_the_whole_batch():
    one, two = model(), model()
    first, second = (GaLore(net.parameters(), rank=2, gap=2, lr=0.01) for net in (one, two))
    for step in range(5):
        for net, optimizer, parts in ((one, first, [16]), (two, second, [8, 8])):
            optimizer.zero_grad()
            x = tiny.noise(16, 6, seed=step).double()
            for part in x.split(parts):
                (net(part).square().mean() * len(part) / 16).backward()
            optimizer.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_gradient_scaler_changes_no_step_and_skips_the_infinite_ones():
    one, two = model(dtype=torch.float32), model(dtype=torch.float32)
    first, second = (GaLore(net.parameters(), rank=2, gap=2, lr=0.01) for net in (one, two))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train(one, first, 4)
    for step in range(4):
        second.zero_grad()
        scaler.scale(loss(two, step)).backward()
        scaler.unscale_(second)
        scaler.step(second)
        scaler.update()
    assert tiny.same(one.state_dict(), two.state_dict())
    scaler.scale(loss(two, 9)).backward()
    two[0].weight.grad[0, 0] = float("inf")
    scaler.step(second)
    scaler.update()
    assert tiny.same(one.state_dict(), two.state_dict()) and scaler.get_scale() == 2.0**9


def test_gradients_are_the_callers_own_after_a_step():
    net = model()
    optimizer = GaLore(net.parameters(), rank=2)
    loss(net, 0).backward()
    before = {n: p.grad.clone() for n, p in net.named_parameters()}
    optimizer.step()
    assert all(torch.equal(p.grad, before[n]) for n, p in net.named_parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_a_closure_is_called_with_gradients():
    one, two = model(), model()
    first, second = (GaLore(net.parameters(), rank=2) for net in (one, two))

    def closure():
        second.zero_grad()
        value = loss(two, 0)
        value.backward()
        return value

    expected = loss(one, 0)
    train(one, first, 1)
    assert second.step(closure) == expected
    assert tiny.same(one.state_dict(), two.state_dict())


def test_a_weight_of_a_stack_without_a_gradient_stays_where_it_is():
    weights = [weight(WIDE, k) for k in range(3)]
    optimizer = GaLore(weights, rank=2, gap=2, projector="group", lr=0.1)
    g = gradients(WIDE, 5)
    start = weights[0].detach().clone()
    feed(optimizer, weights, [None, g[0], None])
    assert bases(optimizer, weights[1]) and weights[0] not in optimizer.state
    feed(optimizer, weights, [None, None, None])
    feed(optimizer, weights, [None, g[1], g[2]])
    assert torch.equal(weights[0], start)
    feed(optimizer, weights, [g[3], None, g[4]])  # the third step with gradients: bases anew, kept where they were
    held = bases(optimizer, weights[1])
    assert not bases(optimizer, weights[0])
    np.testing.assert_allclose(optimizer.state[weights[0]]["exp_avg"].numpy(), 0.1 * project(g[3], held), atol=1e-13)


def test_a_group_can_be_added_later():
    one, two = weight(WIDE), weight(WIDE)
    optimizer = GaLore([one], rank=2, lr=0.1)
    feed(optimizer, [one], gradients(WIDE, 1))
    optimizer.add_param_group({"params": [two], "rank": 4, "side": "right"})
    feed(optimizer, [one, two], gradients(WIDE, 2))
    assert optimizer.state[two]["exp_avg"].shape == (7, 4) and optimizer.state[two]["step"] == 1
    with pytest.raises(SpecError, match="no side 'up'"):
        optimizer.add_param_group({"params": [weight(WIDE)], "side": "up"})
    assert len(optimizer.param_groups) == 2


class Twice(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, k):
        return {"input_ids": tiny.tokens(1, 6, seed=k)[0], "labels": k % 3}


def trainer(folder, net, steps):
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=steps, save_steps=3,
        report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant_with_warmup", warmup_steps=2,
    )  # fmt: skip
    groups = [
        {"params": [p for p in net.parameters() if p.dim() == 2], "rank": 2},
        {"params": [p for p in net.parameters() if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizer = GaLore(groups, gap=2, projector="group", lr=1e-2)
    return Trainer(net, arguments, train_dataset=Twice(), optimizers=(optimizer, None)), optimizer


def test_a_trainer_trains_and_goes_on_from_its_checkpoint(tmp_path):
    whole, again = tiny.bert_classifier(), tiny.bert_classifier()
    begun = tiny.base_of(whole)
    one, optimizer = trainer(tmp_path, whole, 6)
    one.train()
    assert not tiny.same(begun, tiny.base_of(whole))
    query = whole.bert.encoder.layer[0].attention.self.query.weight
    assert optimizer.state[query]["exp_avg"].shape == (2, 2) and optimizer.param_groups[0]["lr"] == 1e-2
    two, _ = trainer(tmp_path, again, 6)
    two.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tiny.same(tiny.base_of(whole), tiny.base_of(again))


# -- edges ----------------------------------------------------------------------------------------------------------


@every
def test_a_gradient_of_zero_moves_nothing(projector):
    weights = [weight(shape, k) for k, shape in enumerate(CASES[projector])]
    before = [w.detach().clone() for w in weights]
    optimizer = GaLore(weights, rank=3, projector=projector, weight_decay=0.0)
    for _ in range(2):
        feed(optimizer, weights, [np.zeros(w.shape) for w in weights])
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    for u in bases(optimizer, weights[0]).values():
        np.testing.assert_allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-13)


def test_the_randomised_projector_of_few_directions_is_orthonormal():
    w = weight((200, 300))
    optimizer = GaLore([w], rank=6, projector="rsvd", side="right")
    u, v = np.random.default_rng(0).standard_normal((2, 300))
    feed(optimizer, [w], [np.outer(u[:200], v)])
    held = bases(optimizer, w)[1]
    np.testing.assert_allclose(held.T @ held, np.eye(6), atol=1e-12)


@every
def test_a_gradient_that_is_not_finite_is_refused_before_anything_moves(projector):
    weights = [weight(shape, k) for k, shape in enumerate(CASES[projector])]
    bias = weight((3,))
    before = [w.detach().clone() for w in (*weights, bias)]
    optimizer = GaLore([*weights, bias], rank=2, projector=projector)
    bad = gradients(weights[-1].shape, 1)[0]
    bad.flat[0] = np.nan
    grads = [gradients(w.shape, 1)[0] for w in weights[:-1]]
    with pytest.raises(ShapeError, match="1 of"):
        feed(optimizer, [*weights, bias], [*grads, bad, np.ones(3)])
    assert all(torch.equal(w, b) for w, b in zip((*weights, bias), before, strict=True))


@pytest.mark.parametrize(
    ("shapes", "options", "small"),
    [
        ([WIDE], {"rank": 50}, (7, 12)),
        ([TALL], {"rank": 50, "side": "full"}, (7, 7)),
        ([WIDE], {"rank": 50, "side": "reverse_std"}, (7, 7)),
        ([WIDE], {"rank": (2, 4), "side": "full"}, (2, 2)),
        ([(1, 5)], {"rank": 3, "side": "right"}, (1, 1)),
        ([WIDE, WIDE], {"rank": 50, "projector": "group"}, (7, 12)),
        ([WIDE, WIDE], {"rank": (6, 1), "projector": "group"}, (2, 1)),
        ([WIDE, WIDE], {"rank": 8, "projector": "group", "side": "right"}, (7, 8)),
        ([KERNEL], {"rank": 50, "projector": "tucker"}, KERNEL),
        ([KERNEL], {"rank": (50, 1, 1, 2), "projector": "tucker"}, (2, 1, 1, 2)),
    ],
)
def test_ranks_above_what_the_axes_can_use_are_cut(shapes, options, small):
    weights = [weight(shape, k) for k, shape in enumerate(shapes)]
    optimizer = GaLore(weights, **options)
    feed(optimizer, weights, [gradients(shape, 1, seed=k)[0] for k, shape in enumerate(shapes)])
    assert optimizer.state[weights[0]]["exp_avg"].shape == small


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"rank": 0}, RankError, "positive integer"),
        ({"rank": 2.0}, RankError, "positive integer"),
        ({"rank": True}, RankError, "positive integer"),
        ({"rank": (2, 2, 2)}, RankError, r"\(7, 12\)"),
        ({"rank": 2, "gap": 0}, SpecError, "gap"),
        ({"rank": 2, "scale": float("nan")}, SpecError, "scale"),
        ({"rank": 2, "projector": "qr"}, SpecError, "svd, rsvd, tucker, group"),
        ({"rank": 2, "side": "up"}, SpecError, "std, reverse_std, left, right, full"),
        ({}, SpecError, "nothing would be projected"),
    ],
)
def test_options_out_of_range_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        GaLore([weight(WIDE), weight((3,))], **options)


def test_nothing_to_project_is_refused():
    with pytest.raises(SpecError, match="nothing would be projected"):
        GaLore([weight(KERNEL), weight((3,))], rank=2)


def test_equal_seeds_give_equal_bytes():
    made = []
    for _ in range(2):
        net = model()
        train(net, GaLore(net.parameters(), rank=2, gap=2, projector="rsvd"), 6)
        made.append(net.state_dict())
    assert tiny.same(*made)
