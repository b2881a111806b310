"""Truncated SVDs against numpy's: on every spectrum and shape, by every method, and what becomes of bad input."""

import threading
import time

import numpy as np
import pytest
import torch

from tensoradapt import linalg
from tensoradapt.errors import RankError, ShapeError, SpecError
from tensoradapt.linalg import choose, each, krylov, singular_values, svd, truncated_svd

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]
devices = pytest.mark.parametrize("device", DEVICES)
SPECTRA = {
    "flat": lambda n: np.linspace(1.05, 0.95, n),
    "power law": lambda n: np.arange(1.0, n + 1) ** -0.5,
    "steep": lambda n: np.arange(1.0, n + 1) ** -2.0,
    "gap": lambda n: np.where(np.arange(n) < 16, 1.0, 0.01),
    "exact low rank": lambda n: np.where(np.arange(n) < 16, 1.0, 0.0),
    "repeated": lambda n: np.repeat([4.0, 2.0, 1.0, 0.5], -(-n // 4))[:n],
    "one": lambda n: np.eye(1, n)[0],
}
SHAPES = [(300, 160), (160, 300), (200, 200), (900, 130)]
METHODS = ("auto", "krylov", "gram", "exact")
spectra = pytest.mark.parametrize("spectrum", SPECTRA)


def planted(shape, spectrum, seed=0, dtype=np.float32):
    """A matrix of random singular vectors and a given spectrum."""
    draw = np.random.default_rng(seed)
    sides = [np.linalg.qr(draw.standard_normal((n, min(shape))))[0] for n in shape]
    return (sides[0] * SPECTRA[spectrum](min(shape)) @ sides[1].T).astype(dtype)


def optimum(matrix, rank):
    """The norm of what the best matrix of a rank leaves out."""
    return np.linalg.norm(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[rank:])


def left_out(matrix, found):
    u, s, v = (t.double().cpu().numpy() for t in (found.u, found.s, found.v))
    return np.linalg.norm(matrix - (u * s) @ v.T)


# -- accuracy -----------------------------------------------------------------------------------------------------


@devices
@spectra
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_residual_is_true_and_within_a_thousandth_of_the_optimal_one(shape, spectrum, method, device):
    matrix = planted(shape, spectrum)
    norm = float(np.linalg.norm(matrix.astype(np.float64)))
    for rank in (1, 20):
        found = truncated_svd(torch.from_numpy(matrix).to(device), rank, method=method)
        best = optimum(matrix, rank)
        assert (1 - 1e-5) * best - 1e-6 * norm <= float(found.residual) <= 1.001 * best + 1e-5 * norm
        assert float(found.residual) == pytest.approx(left_out(matrix, found), rel=1e-4, abs=3e-6 * norm)
        assert float(found.total) == pytest.approx(norm**2, rel=1e-6)


@pytest.mark.parametrize("shape", [(1024, 1024), (2816, 1024)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_krylov_is_within_a_thousandth_where_the_rank_ends_in_a_flat_tail(shape, seed):
    """Planted rank 16 under noise, rank 32 asked: two plain subspace steps leave 0.35 % more than the optimum."""
    draw = np.random.default_rng(seed)
    signal = draw.standard_normal((shape[0], 16)) @ draw.standard_normal((16, shape[1])) / np.sqrt(shape[0])
    matrix = (signal + 0.3 * draw.standard_normal(shape)).astype(np.float32)
    wide = matrix.astype(np.float64)
    squares = np.linalg.eigvalsh(wide.T @ wide)
    best = np.sqrt(squares[:-32].sum())
    found, done = krylov(torch.from_numpy(matrix), 32, seed=linalg.Seed(seed))
    assert done and found.steps <= 6
    assert best * (1 - 1e-6) <= float(found.residual) <= 1.001 * best
    hasty, _ = krylov(torch.from_numpy(matrix), 32, steps=1, seed=linalg.Seed(seed))
    assert float(hasty.residual) > 1.001 * best  # so that the bound says something about the later steps


@pytest.mark.parametrize("spectrum", ["gap", "exact low rank"])
def test_a_gap_behind_the_rank_is_seen_after_two_steps(spectrum):
    found, done = krylov(torch.from_numpy(planted((400, 300), spectrum)), 16)
    assert done and found.steps <= 2


@spectra
@pytest.mark.parametrize("method", METHODS)
def test_singular_values_never_exceed_the_true_ones_and_vectors_are_orthonormal(spectrum, method):
    matrix = planted((220, 260), spectrum)
    found = truncated_svd(torch.from_numpy(matrix), 24, method=method)
    true = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:24]
    assert (found.s.numpy() <= true * (1 + 1e-5) + 1e-5 * true[0]).all()
    assert (np.diff(found.s.numpy()) <= 1e-6 * true[0]).all()
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(24), atol=2e-5)
    sure = int((true > 1e-3 * true[0]).sum())
    np.testing.assert_allclose(found.v[:, :sure].T @ found.v[:, :sure], np.eye(sure), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_every_matrix_on_its_own(method):
    parts = [planted((150, 180), name, seed) for seed, name in enumerate(("power law", "gap", "repeated", "flat"))]
    whole = truncated_svd(torch.from_numpy(np.stack(parts)).reshape(2, 2, 150, 180), 12, method=method)
    assert whole.u.shape == (2, 2, 150, 12) and whole.v.shape == (2, 2, 180, 12) and whole.s.shape == (2, 2, 12)
    for k, matrix in enumerate(parts):
        residual = float(whole.residual[k // 2, k % 2])
        rebuilt = whole.dense()[k // 2, k % 2].numpy()
        assert residual == pytest.approx(np.linalg.norm(matrix - rebuilt), rel=1e-4)
        assert residual <= 1.001 * optimum(matrix, 12)


@pytest.mark.parametrize("method", METHODS)
def test_float64_is_computed_in_float64(method):
    matrix = planted((180, 200), "exact low rank", dtype=np.float64)
    found = truncated_svd(torch.from_numpy(matrix), 16, method=method)
    assert found.u.dtype == torch.float64
    assert left_out(matrix, found) <= 1e-12 * np.linalg.norm(matrix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    matrix = torch.from_numpy(planted((60, 40), "power law")).to(dtype)
    found = truncated_svd(matrix, 5)
    assert found.u.dtype == torch.float32
    assert float(found.residual) == pytest.approx(optimum(matrix.double().numpy(), 5), rel=1e-5)


@spectra
@pytest.mark.parametrize("shape", [(40, 30), (30, 300), (300, 30)], ids=str)
def test_all_singular_values(spectrum, shape):
    matrix = planted(shape, spectrum)
    true = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(singular_values(torch.from_numpy(matrix)), true, rtol=1e-6, atol=1e-7 * true[0])


def test_a_cut_result_is_the_result_of_the_smaller_rank():
    matrix = torch.from_numpy(planted((50, 40), "power law"))
    cut, small = truncated_svd(matrix, 12).cut(5), truncated_svd(matrix, 5)
    torch.testing.assert_close(cut.dense(), small.dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cut.residual, small.residual)


def test_small_singular_values_are_not_lost_in_the_squares_of_large_ones():
    draw = np.random.default_rng(0)
    left, right = (np.linalg.qr(draw.standard_normal((n, 20)))[0] for n in (200, 180))
    matrix = (left * 10.0 ** -np.linspace(0, 5, 20) @ right.T).astype(np.float32)
    true = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:20]
    found = truncated_svd(torch.from_numpy(matrix), 20, method="krylov")
    np.testing.assert_allclose(found.s, true, rtol=2e-7, atol=5e-9)


# -- determinism --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bytes_twice_and_the_largest_entry_of_every_column_positive(method):
    matrix = torch.from_numpy(planted((160, 170), "repeated"))
    one, two = (truncated_svd(matrix, 20, method=method, seed=3) for _ in range(2))
    for name in ("u", "s", "v"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    wide = one.u if method != "gram" else truncated_svd(matrix, 20, method="gram").u
    assert (wide.gather(0, wide.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_seed_is_the_only_source_of_chance():
    matrix = torch.from_numpy(planted((300, 280), "flat"))
    torch.manual_seed(0)
    one, _ = krylov(matrix, 8, steps=1, seed=linalg.Seed(1))
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    two, _ = krylov(matrix, 8, steps=1, seed=linalg.Seed(1))
    other, _ = krylov(matrix, 8, steps=1, seed=linalg.Seed(2))
    assert torch.equal(one.u, two.u) and not torch.equal(one.u, other.u)
    assert torch.equal(state, torch.random.get_rng_state())


# -- the choice of a method ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rank", "method"),
    [
        ((1024, 1024), 32, "krylov"),
        ((2816, 1024), 32, "krylov"),
        ((1024, 1024), 400, "exact"),
        ((64, 64), 4, "exact"),
        ((64, 4096), 4, "gram"),
        ((4096, 64), 60, "gram"),
    ],
)
def test_the_method_is_the_cheapest_for_the_shape(shape, rank, method):
    assert choose(shape, rank) == choose(shape[::-1], rank) == method


def test_auto_says_what_it_chose_and_can_be_overridden():
    matrix = torch.from_numpy(planted((400, 300), "gap"))
    assert truncated_svd(matrix, 16).method == "krylov"
    assert truncated_svd(matrix, 16, method="exact").method == "exact"
    assert truncated_svd(matrix, 200).method == "exact"


def test_where_six_steps_do_not_settle_the_exact_method_does_it(monkeypatch):
    """On the flattest spectrum with an impossible tolerance the iteration gives up."""
    matrix = planted((900, 800), "flat")
    found = truncated_svd(torch.from_numpy(matrix), 2, method="krylov", tolerance=1e-9)
    assert found.method == "exact after krylov" and found.steps == 6
    assert float(found.residual) == pytest.approx(optimum(matrix, 2), rel=1e-5)


# -- edges and faults ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (5, 3)], ids=str)
def test_a_rank_above_the_sides_is_capped(shape, method):
    matrix = planted(shape, "power law")
    found = truncated_svd(torch.from_numpy(matrix), 99, method=method)
    assert found.s.shape == (min(shape),)
    assert left_out(matrix, found) <= 1e-5 and float(found.residual) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "rank"), [((0, 4), 2), ((4, 0), 2), ((4, 5), 0), ((3, 4, 5), 0), ((0, 4, 5), 2)])
def test_nothing_is_left_of_nothing(shape, rank, method):
    found = truncated_svd(torch.ones(shape), rank, method=method)
    kept = min(rank, *shape[-2:])
    assert found.u.shape == (*shape[:-1], kept) and found.v.shape == (*shape[:-2], shape[-1], kept)
    assert found.residual.tolist() == torch.ones(shape).square().sum((-2, -1)).sqrt().tolist()


@pytest.mark.parametrize("method", METHODS)
def test_the_zero_matrix(method):
    found = truncated_svd(torch.zeros(150, 160), 4, method=method)
    assert all(t.isfinite().all() for t in (found.u, found.s, found.v))
    assert not found.dense().any() and not found.residual.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_entries_that_are_no_numbers_are_refused(method, bad):
    matrix = torch.from_numpy(planted((150, 160), "flat"))
    matrix[3, 4] = bad
    with pytest.raises(ShapeError, match="not finite\n.*1 of 24000 entries are NaN or infinite"):
        truncated_svd(matrix, 4, method=method)


@pytest.mark.parametrize("rank", [-1, 2.5, True, "3"])
def test_ranks_that_are_none_are_refused(rank):
    with pytest.raises(RankError, match="a rank is a number, and not negative"):
        truncated_svd(torch.ones(3, 3), rank)


def test_unknown_methods_are_refused():
    with pytest.raises(SpecError, match="no method 'lanczos'"):
        truncated_svd(torch.ones(3, 3), 1, method="lanczos")


@pytest.mark.parametrize(
    "error", [torch.linalg.LinAlgError("did not converge"), torch.OutOfMemoryError("CUDA out of memory\nTried to ..")]
)
@pytest.mark.parametrize(("method", "fails"), [("krylov", "krylov"), ("exact", "svd"), ("gram", "eigh")])
def test_a_failure_is_tried_once_more_on_the_cpu_in_float64_and_recorded(monkeypatch, method, fails, error):
    home = svd if fails == "krylov" else torch.linalg
    works, seen = getattr(home, fails), []

    def failing(a, *args, **options):
        seen.append(a.dtype)
        if len(seen) == 1:
            raise error
        return works(a, *args, **options)

    monkeypatch.setattr(home, fails, failing)
    matrix = planted((150, 160), "power law")
    found = truncated_svd(torch.from_numpy(matrix), 6, method=method)
    assert found.retried == str(error).splitlines()[0] and found.u.dtype == torch.float32
    assert float(found.residual) == pytest.approx(optimum(matrix, 6), rel=1e-5)
    assert seen[1:] in ([], [torch.float64])


def test_a_second_failure_is_the_callers():
    def failing(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.linalg.LinAlgError, match="did not converge"):
        patch.setattr(torch.linalg, "svd", failing)
        truncated_svd(torch.ones(20, 20), 2, method="exact")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_first_of_two_errors_is_told_whichever_comes_first(two_threads):
    """Both tasks run when the second fails: what is said does not depend on the machine's speed."""
    both, failed = threading.Barrier(2), threading.Event()

    def task(name):
        both.wait(60)
        if name == "first":
            assert failed.wait(60)
            time.sleep(0.3)  # the second's error is there by now
        failed.set()
        raise ValueError(name)

    with pytest.raises(ValueError, match="first"):
        list(each(["first", "second"], task))
