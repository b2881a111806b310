"""The TT-LoRA delta, forward and backward: ours beside core by core on the activations, and beside the dense delta."""

import pytest
import torch
from harness import hardware, interleave, ratio, table

import tensoradapt as ta
from tensoradapt.lower import lower

TOKENS, WIDTH, RANK, REPEATS = 1024, 768, 8, 31
INS, OUTS = [12, 8, 8], [8, 8, 12]


def setting():
    torch.manual_seed(0)
    spec = ta.preset("tt_lora", rank=RANK, targets=["w"], folds={"in": INS, "out": OUTS})
    group = ta.plan(spec, {"w": (WIDTH, WIDTH)}).groups[0]
    factors = {node: torch.randn(group.diagram.shape(node)).mul_(0.3).requires_grad_() for node in group.diagram.nodes}
    return group, factors, torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)


def core_by_core(cores, x):
    """x contracted with one core after the other, as the paper's code does."""
    g1, g2, g3, k1, k2, k3 = cores
    t = torch.einsum("nabc,ar->nrbc", x.view(-1, *INS), g1)
    t = torch.einsum("nrbc,rbs->nsc", t, g2)
    t = torch.einsum("nsc,sct->nt", t, g3)
    t = torch.einsum("nt,tou->nou", t, k1)
    t = torch.einsum("nou,upv->nopv", t, k2)
    return torch.einsum("nopv,vq->nopq", t, k3).reshape(-1, WIDTH)


def through_dense(cores, x):
    dense = torch.einsum("ar,rbs,sct,tou,upv,vq->opqabc", *cores).reshape(WIDTH, WIDTH)
    return x @ dense.T


def runs():
    group, factors, x, gradient = setting()
    cores = list(factors.values())

    def timed(apply):
        def run():
            y = apply()
            return y, torch.autograd.grad(y, [x, *cores], gradient)

        return run

    ours = timed(lambda: lower(group, group.placements[0], factors)(x))
    return {
        "ours": ours,
        "core by core": timed(lambda: core_by_core(cores, x)),
        "dense delta": timed(lambda: through_dense(cores, x)),
    }


@pytest.mark.benchmark
def test_tt_lora():
    made = runs()
    results = {name: run() for name, run in made.items()}
    for name in ("core by core", "dense delta"):
        torch.testing.assert_close(results[name][0], results["ours"][0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(results[name][1], results["ours"][1], rtol=1e-3, atol=1e-2)
    timings = interleave(made, REPEATS, warmup=5)
    print(f"\n{hardware()}; {TOKENS} tokens, width {WIDTH}, folds {INS} | {OUTS}, rank {RANK}")
    print(table(timings, "ours"))
    assert ratio(timings["core by core"], timings["ours"])[0] >= 2
    assert ratio(timings["dense delta"], timings["ours"])[0] >= 4
