"""Truncated SVDs beside numpy's full one and torch's `svd_lowrank`: time per matrix on one thread, and how far from
the optimum."""

import math

import numpy as np
import pytest
import torch
from harness import hardware, interleave, ratio

from tensoradapt.linalg import truncated_svd

RANK = 32
SHAPES = [(1024, 1024), (2816, 1024), (768, 3072)]


def planted(shape, rank=16):
    """A planted rank below the one asked for, so that the rank ends in a flat tail: the hard case."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, rank, generator=generator) for n in shape)
    return left @ right.mT / math.sqrt(shape[0]) + 0.3 * torch.randn(*shape, generator=generator)


def left_out(matrix, u, s, v):
    return float((matrix.double() - (u.double() * s.double()) @ v.double().mT).norm())


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd_against_exact(shape, one_thread):
    matrix = planted(shape)
    runs = {
        "truncated_svd": lambda: truncated_svd(matrix, RANK),
        "full SVD (numpy)": lambda: np.linalg.svd(matrix.numpy(), full_matrices=False),
        "torch.svd_lowrank, two steps": lambda: torch.svd_lowrank(matrix, RANK + 10, niter=2),
    }
    s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    best = np.linalg.norm(s[RANK:])
    found = runs["truncated_svd"]()
    torch.manual_seed(0)
    plain = [t[..., :RANK] for t in runs["torch.svd_lowrank, two steps"]()]
    excess = {
        "truncated_svd": left_out(matrix, found.u, found.s, found.v) / best,
        "full SVD (numpy)": 1.0,
        "torch.svd_lowrank, two steps": left_out(matrix, *plain) / best,
    }
    timings = interleave(runs, 5, warmup=1)
    print(f"\n{hardware()}; rank {RANK} of {shape}, planted rank 16 under noise; {found.method}, {found.steps} steps")
    print("| run | median ms | ratio to ours | residual, of the optimum |\n| --- | --: | --: | --: |")
    for who, timing in timings.items():
        middle, _, _ = ratio(timing, timings["truncated_svd"])
        print(f"| {who} | {timing.median * 1e3:.1f} | {middle:.2f} | {excess[who]:.5f} |")
    assert excess["truncated_svd"] <= 1.001
    assert ratio(timings["full SVD (numpy)"], timings["truncated_svd"])[0] >= 3
