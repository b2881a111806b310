"""Fits beside TensorLy's decompositions: time, and the residual in float64. Two threads, as in the issue's figures."""

import math
import statistics

import pytest
import tensorly
import torch
from harness import hardware, interleave
from tensorly.decomposition import parafac, partial_tucker, tensor_train, tensor_train_matrix

import tensoradapt as ta

RANK, AXES = 32, ("layer", "out", "in")


def planted(layers, width, rank=RANK, noise=0.01):
    """A Tucker-2 tensor T[layer, out, in] of a rank, and noise of a share of its norm."""
    generator = torch.Generator().manual_seed(0)
    out, inp = (torch.linalg.qr(torch.randn(width, rank, generator=generator))[0] for _ in range(2))
    tensor = out @ torch.randn(layers, rank, rank, generator=generator) @ inp.mT
    dust = torch.randn(tensor.shape, generator=generator)
    return tensor + noise * tensor.norm() / dust.norm() * dust


def residual(tensor, made):
    return math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(tensor, made, strict=True)))


def theirs(run, dense):
    def timed():
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            return run()

    return timed, dense


def tucker(tensor, **options):
    return theirs(
        lambda: partial_tucker(tensor, [RANK, RANK], modes=[1, 2], n_iter_max=10, random_state=0, **options)[0],
        lambda found: found[1][0] @ found[0] @ found[1][1].mT,
    )


def ours(tensor, form, **options):
    return lambda: ta.fit(tensor, form, **options), lambda fit: fit.dense()


def tuckers(layers, width):
    tensor = planted(layers, width)
    return tensor, {
        "ours": ours(tensor, "tucker", axes=AXES, rank={"out": RANK, "in": RANK}),
        "partial_tucker": tucker(tensor),
        'partial_tucker, svd="randomized_svd"': tucker(tensor, svd="randomized_svd"),
    }


def trains():
    tensor = planted(12, 768).transpose(0, 1).contiguous()
    run, _ = theirs(lambda: tensor_train(tensor, [1, RANK, RANK, 1]), None)
    return tensor, {
        "ours": ours(tensor, "tt", axes=("out", "layer", "in"), rank=RANK),
        "tensor_train": (run, lambda found: torch.einsum("aor,rls,sib->oli", *found.factors)),
    }


def sums():
    tensor = planted(24, 1024)
    run, _ = theirs(lambda: parafac(tensor, 16, n_iter_max=50, init="svd", tol=0), None)
    return tensor, {
        "ours": ours(tensor, "cp", axes=AXES, rank=16),
        "parafac": (run, lambda found: torch.einsum("r,lr,or,ir->loi", found.weights, *found.factors)),
    }


def matrices():
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    folds = {"out": [4, 4, 8, 8], "in": [4, 4, 8, 8]}
    folded = weight.reshape(4, 4, 8, 8, 4, 4, 8, 8)
    run, _ = theirs(lambda: tensor_train_matrix(folded, [1, 16, 16, 16, 1]), None)
    fitted, _ = ours(weight, "ttm", axes=("out", "in"), rank=16, folds=folds)
    return weight, {
        "ours": (fitted, lambda fit: fit.dense().reshape(1024, 1024)),
        "tensor_train_matrix": (run, lambda found: found.to_matrix()),
    }


CASES = {
    "Tucker rank 32 of (12, 768, 768)": (lambda: tuckers(12, 768), (15, 2), 1.0005, 3),
    "Tucker rank 32 of (24, 1024, 1024)": (lambda: tuckers(24, 1024), (15, 2), 1.0005, 3),
    "TT rank 32 of (768, 12, 768)": (trains, (5,), 1.0005, 5),
    "CP rank 16 of (24, 1024, 1024)": (sums, (10,), 1.0, 3),
    "TT-matrix rank 16 of 1024 x 1024 in four folds": (matrices, (1,), 1.005, 9),
}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark
@pytest.mark.parametrize("name", CASES)
def test_fit_against_tensorly(name, two_threads):
    make, factors, allowed, repeats = CASES[name]
    tensor, runs = make()
    found = {who: dense(run()) for who, (run, dense) in runs.items()}
    residuals = {who: residual(tensor, made) for who, made in found.items()}
    timings = interleave({who: run for who, (run, _) in runs.items()}, repeats, warmup=0)
    print(f"\n{hardware()}; {name}")
    print("| run | median ms | ratio to ours | residual, of ours |\n| --- | --: | --: | --: |")
    ratios = {}
    for who, timing in timings.items():
        pairs = zip(timing.seconds, timings["ours"].seconds, strict=True)
        ratios[who] = statistics.median(one / two for one, two in pairs)
        share = residuals[who] / residuals["ours"]
        print(f"| {who} | {timing.median * 1e3:.1f} | {ratios[who]:.1f} | {share:.5f} |")
    for (who, ratio), least in zip(list(ratios.items())[1:], factors, strict=True):
        assert ratio >= least, who
        assert residuals["ours"] <= allowed * residuals[who], who
