"""Shared bases of stacks of slices, against numpy's SVDs of the unfolded stack; what they read, and how often."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from tensoradapt.linalg import Dense, Product, Stack, Team, find_ranges, range_of, ranges

OUT, INP, COUNT = 150, 120, 5


def stacked(kind, seed=0, count=COUNT, out=OUT, inp=INP):
    """Slices D[l, out, in] that share 6 directions on either side, or have none of their own."""
    draw = np.random.default_rng(seed)
    noise = draw.standard_normal((count, out, inp))
    left, right = (np.linalg.qr(draw.standard_normal((n, 6)))[0] for n in (out, inp))
    shared = np.einsum("oa,lab,ib->loi", left, draw.standard_normal((count, 6, 6)), right)
    decay = np.einsum("o,loi,i->loi", np.arange(1.0, out + 1) ** -0.4, noise, np.arange(1.0, inp + 1) ** -0.4)
    made = {"noise": noise, "planted": shared + 1e-3 * noise, "exact": shared, "power law": decay}
    return made[kind].astype(np.float32)


@dataclass
class Reader:
    """A stack that counts how often every slice was read."""

    slices: list
    seen: list = field(default_factory=list)

    def stack(self, share=slice(None)):
        first = self.slices[0]
        return Stack(lambda: self.read(share), len(self.slices), first.shape, torch.zeros(()))

    def read(self, share):
        for position in range(len(self.slices))[share]:
            self.seen.append(position)
            yield position, self.slices[position]


def dense(stack):
    return Reader([Dense(torch.from_numpy(part)) for part in stack])


def tails(stack, rank):
    """The best shared bases of one rank on either side leave out so much, one side at a time."""
    for mode in (1, 2):
        unfolded = np.moveaxis(stack, mode, 0).reshape(stack.shape[mode], -1).astype(np.float64)
        yield np.linalg.norm(np.linalg.svd(unfolded, compute_uv=False)[rank:])


def beyond(stack, found, rank):
    """What the leading directions of the bases that were found leave out, one side at a time."""
    wide = stack.astype(np.float64)
    for mode, basis in ((1, found.out), (2, found.inp)):
        q = basis.double().numpy()
        held = np.linalg.svd(q.T @ np.moveaxis(wide, mode, 0).reshape(len(q), -1), compute_uv=False)[:rank]
        yield np.sqrt(max(0.0, np.sum(wide**2) - np.sum(held**2)))


@pytest.mark.parametrize("kind", ["noise", "planted", "exact", "power law"])
@pytest.mark.parametrize("seed", range(2))
def test_the_bases_hold_the_leading_directions_within_a_thousandth(kind, seed):
    stack = stacked(kind, seed)
    found = find_ranges(dense(stack).stack(), (6, 6), seed=seed)
    norm = np.linalg.norm(stack)
    for left, best in zip(beyond(stack, found, 6), tails(stack, 6), strict=True):
        assert left <= 1.001 * best + 1e-4 * norm


@pytest.mark.parametrize("kind", ["noise", "planted", "exact"])
def test_the_core_and_what_is_lost_are_exact(kind):
    stack = stacked(kind)
    found = find_ranges(dense(stack).stack(), (6, 4))
    out, inp = found.out.double().numpy(), found.inp.double().numpy()
    np.testing.assert_allclose(out.T @ out, np.eye(out.shape[1]), atol=1e-5)
    core = np.einsum("op,loi,iq->lpq", out, stack.astype(np.float64), inp)
    np.testing.assert_allclose(found.core, core, atol=1e-5 * np.abs(core).max())
    rebuilt = np.einsum("op,lpq,iq->loi", out, found.core.double().numpy(), inp)
    lost = np.sum((stack - rebuilt) ** 2)
    assert found.lost == pytest.approx(lost, rel=1e-3, abs=1e-6 * found.total)
    assert found.total == pytest.approx(np.sum(stack.astype(np.float64) ** 2), rel=1e-6)


def test_every_slice_is_read_once_per_pass():
    reader = dense(stacked("power law"))
    found = find_ranges(reader.stack(), (6, 6))
    assert reader.seen == list(range(COUNT)) * found.passes
    assert found.passes <= 2 + 6


def test_a_gap_needs_few_passes():
    """A sketch, two steps, and the core."""
    assert find_ranges(dense(stacked("planted")).stack(), (6, 6)).passes == 4


def test_directions_that_hold_next_to_nothing_are_left_out():
    assert find_ranges(dense(stacked("exact")).stack(), (6, 6)).core.shape == (COUNT, 6, 6)
    assert find_ranges(dense(stacked("exact")).stack(), (3, 3)).core.shape == (COUNT, 6, 6)
    dusty = stacked("exact") + 0.1 * (stacked("planted") - stacked("exact"))
    assert find_ranges(dense(dusty).stack(), (3, 3)).core.shape == (COUNT, 6, 6)
    wide = find_ranges(dense(stacked("noise")).stack(), (6, 6)).core.shape
    assert 16 <= wide[1] <= 32 and 16 <= wide[2] <= 32


def test_a_side_that_a_basis_would_not_make_smaller_is_kept_whole():
    stack = stacked("power law")
    found = find_ranges(dense(stack).stack(), (70, 5))
    assert found.out is None and found.inp is not None and found.core.shape[1] == OUT
    whole = find_ranges(dense(stack).stack(), (150, 120))
    assert whole.out is None and whole.inp is None and whole.lost == 0.0 and whole.passes == 2
    np.testing.assert_array_equal(whole.core, stack)


def test_slices_that_cancel_are_seen():
    part = stacked("exact", count=1)[0]
    assert find_ranges(dense(np.stack([part, -part])).stack(), (6, 6)).lost <= 1e-6 * 2 * np.sum(part**2)


def test_products_are_what_they_are_dense():
    draw = np.random.default_rng(1)
    made = [[torch.from_numpy(draw.standard_normal(s).astype(np.float32)) for s in ((OUT, 3), (3, INP))] for _ in "abc"]
    pairs = [Product(outer, inner) for outer, inner in made]
    for pair, (outer, inner) in zip(pairs, made, strict=True):
        matrix = outer.numpy().astype(np.float64) @ inner.numpy()
        assert pair.shape == matrix.shape and pair.square == pytest.approx(np.sum(matrix**2), rel=1e-6)
        np.testing.assert_allclose(pair.dense(), matrix, atol=1e-4)
        x, y = draw.standard_normal((INP, 2)), draw.standard_normal((OUT, 2))
        np.testing.assert_allclose(pair.right(torch.from_numpy(x).float()), matrix @ x, atol=1e-3)
        np.testing.assert_allclose(pair.left(torch.from_numpy(y).float()), matrix.T @ y, atol=1e-3)
    one = find_ranges(Reader(pairs).stack(), (9, 9))
    two = find_ranges(Reader([Dense(pair.dense()) for pair in pairs]).stack(), (9, 9))
    assert one.lost <= 1e-6 * one.total and two.total == pytest.approx(one.total, rel=1e-6)


def test_a_product_is_not_formed(monkeypatch):
    monkeypatch.setattr(Product, "dense", lambda self: pytest.fail("the product was formed"))
    pairs = [Product(torch.randn(OUT, 3), torch.randn(3, INP)) for _ in range(3)]
    assert find_ranges(Reader(pairs).stack(), (5, 5)).core.shape[0] == 3


def test_equal_seeds_give_equal_bytes():
    made = [find_ranges(dense(stacked("noise")).stack(), (4, 4), seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(made[0].out, made[1].out) and torch.equal(made[0].core, made[1].core)
    assert not torch.equal(made[0].out, made[2].out)


def test_the_zero_stack():
    found = find_ranges(dense(np.zeros((2, OUT, INP), np.float32)).stack(), (4, 4))
    assert found.total == 0.0 and found.lost == 0.0 and not found.core.any()


class Half(Team):
    """One of two threads that add up what they have."""

    def meet(self, barrier, held):
        object.__setattr__(self, "barrier", barrier)
        object.__setattr__(self, "held", held)
        return self

    def add(self, tensor):
        self.held[self.rank] = tensor.clone()
        self.barrier.wait()
        tensor.copy_(self.held[0] + self.held[1])
        self.barrier.wait()
        return tensor


def test_a_team_finds_what_one_finds():
    stack = stacked("planted")
    barrier, held, found = threading.Barrier(2, timeout=60), {}, {}

    def work(rank):
        team = Half(rank, 2).meet(barrier, held)
        found[rank] = find_ranges(dense(stack).stack(slice(rank, None, 2)), (6, 6), team=team)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = find_ranges(dense(stack).stack(), (6, 6))
    for rank in range(2):
        torch.testing.assert_close(found[rank].core, found[0].core)
        assert found[rank].total == pytest.approx(alone.total) and found[rank].core.shape[0] == COUNT
        assert found[rank].lost == pytest.approx(alone.lost, rel=1e-2)


# -- matrices in memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["noise", "planted", "exact", "power law"])
@pytest.mark.parametrize("mode", [1, 2])
def test_the_basis_of_a_matrix_holds_its_leading_directions(kind, mode):
    stack = stacked(kind)
    matrix = np.moveaxis(stack, mode, 0).reshape(stack.shape[mode], -1)
    found = range_of(torch.from_numpy(matrix.copy()), 6)
    basis = found.basis.double().numpy()
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)
    np.testing.assert_allclose(found.image, matrix.T @ basis, atol=1e-5 * np.linalg.norm(matrix))
    held = np.linalg.svd(basis.T @ matrix, compute_uv=False)[:6]
    norm = np.linalg.norm(matrix.astype(np.float64))
    best = np.linalg.norm(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[6:])
    assert np.sqrt(max(0.0, norm**2 - np.sum(held**2))) <= 1.001 * best + 1e-4 * norm


def test_a_failure_to_find_a_basis_is_tried_once_more_in_float64_and_recorded(monkeypatch):
    works, seen = ranges.krylov_space, []

    def failing(a, *args, **options):
        seen.append(a.dtype)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return works(a, *args, **options)

    monkeypatch.setattr(ranges, "krylov_space", failing)
    found = range_of(torch.randn(60, 90), 4)
    assert seen == [torch.float32, torch.float64]
    assert found.retried == "CUDA out of memory" and found.basis.dtype == torch.float32
