"""A GPU beside the CPU's threads: the Tucker-2 of a stack in bfloat16, and the analysis of a model's shape.

`pytest tests/benchmarks/test_on_a_gpu.py -n 0 -s` on a machine with CUDA. TENSORADAPT_STACK=32,4096,4096 and
TENSORADAPT_SHAPE=layers,width,inner,vocabulary set other sizes; the defaults are a 7B model's. Weights are random: a
layer of both sides is drawn at a time, and analysed, so that neither model is ever whole.
"""

import os
import time
from collections.abc import Iterator

import pytest
import torch
from harness import hardware

import tensoradapt as ta

STACK = (32, 4096, 4096)
SHAPE = (32, 4096, 11008, 32000)
RANK = 16
ROLES = {"q_proj": (1, 1), "k_proj": (1, 1), "v_proj": (1, 1), "o_proj": (1, 1)}
ROLES |= {"gate_proj": (2, 1), "up_proj": (2, 1), "down_proj": (1, 2)}


def sizes(name, default):
    return tuple(int(part) for part in os.environ.get(name, "").split(",") if part) or default


def needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: the times of a CPU are in the other benchmarks")


def planted(shape, device, seed=0):
    """A stack of Tucker-2 structure and a little noise, made a layer at a time."""
    layers, out, inp = shape
    torch.manual_seed(seed)
    normal = lambda *size: torch.randn(*size, device=device)  # noqa: E731
    left, right = (torch.linalg.qr(normal(n, RANK).cpu())[0].to(device) for n in (out, inp))
    made = torch.empty(shape, dtype=torch.bfloat16, device=device)
    for layer in made:
        layer.copy_(left @ normal(RANK, RANK) @ right.mT + 0.1 * RANK * normal(out, inp) / (out * inp) ** 0.5)
    return made


def timed(device, run):
    run()
    waits = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    waits()
    begun = time.perf_counter()
    result = run()
    waits()
    return time.perf_counter() - begun, result


def fitted(shape, device):
    """Seconds of the Tucker-2, and what it leaves of the stack."""
    stack = planted(shape, device)
    seconds, fit = timed(device, lambda: ta.fit(stack, "tucker", axes="layer out in", rank={"out": RANK, "in": RANK}))
    assert {factor.device.type for factor in fit.factors.values()} == {torch.device(device).type}
    return seconds, fit.relative_error


def layers_of(shape) -> Iterator[dict[str, tuple[int, int]]]:
    """The shapes of the weights of a model, those outside the layers first."""
    layers, width, inner, vocabulary = shape
    yield dict.fromkeys(("model.embed_tokens", "lm_head"), (vocabulary, width))
    side = width, inner
    for layer in range(layers):
        yield {f"model.layers.{layer}.{role}": (side[out - 1], side[inp - 1]) for role, (out, inp) in ROLES.items()}


def drawn(shapes, device, seed):
    """Random weights in bfloat16, and the same with a change of low rank."""
    torch.manual_seed(seed)
    sides = {}, {}
    for name, (out, inp) in shapes.items():
        base = 0.02 * torch.randn(out, inp, device=device)
        low = [torch.randn(n, RANK, device=device) for n in (out, inp)]
        for side, made in zip(sides, (base, base + 3e-3 * low[0] @ low[1].mT), strict=True):
            side[f"{name}.weight"] = made.bfloat16()
    return sides


def analysed(shape, device):
    """Seconds of the reports of all weights, the median rank above the noise, and how many weights there are."""
    seconds, ranks = 0.0, []
    for seed, shapes in enumerate(layers_of(shape)):
        base, tuned = drawn(shapes, device, seed)
        begun = time.perf_counter()
        report = ta.analyze(base, tuned, device=device, candidates=False)
        seconds += time.perf_counter() - begun
        ranks += [row.ranks["noise"] or 999 for row in report.sites.values()]
    return seconds, sorted(ranks)[len(ranks) // 2], len(ranks)


@pytest.mark.benchmark
@pytest.mark.gpu
def test_tucker_of_a_stack_in_bfloat16():
    needs_cuda()
    shape = sizes("TENSORADAPT_STACK", STACK)
    seconds, error = fitted(shape, "cuda")
    print(
        f"\n{hardware()}; Tucker-2 of rank {RANK} of {shape} in bfloat16: {seconds:.2f} s, relative error {error:.4f}"
    )
    print(f"peak of the GPU's memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    assert error < 0.5


@pytest.mark.benchmark
@pytest.mark.gpu
def test_analysis_of_a_model_of_seven_billion_weights():
    needs_cuda()
    shape = sizes("TENSORADAPT_SHAPE", SHAPE)
    seconds, rank, count = analysed(shape, "cuda")
    print(f"\n{hardware()}; analysis of {count} weights of the shape {shape} in bfloat16: {seconds:.1f} s, rank {rank}")
    print(f"peak of the GPU's memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    assert rank == RANK


@pytest.mark.benchmark
def test_the_same_at_small_sizes_on_the_cpu():
    """What runs on a GPU runs here, so that it is known to."""
    assert fitted((3, 96, 64), "cpu")[1] < 0.5
    seconds, rank, count = analysed((2, 64, 96, 128), "cpu")
    assert (rank, count) == (RANK, 16)
