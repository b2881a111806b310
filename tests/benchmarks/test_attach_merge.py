"""Attaching to a 7B-shaped model on the meta device, and merging into a 1B-shaped one in bfloat16."""

import time

import pytest
import torch
import transformers
from harness import Timing, hardware, ratio, table

import tensoradapt as ta

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
ONE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}


def llama(vocabulary=32000, **shape):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocabulary, **shape))


@pytest.mark.benchmark
@pytest.mark.parametrize("name", ["lora", "lotr", "metatt_4d"])
def test_attach(name):
    with torch.device("meta"):
        model = llama(**SEVEN)
    spec = ta.preset(name, rank=8, targets=TARGETS)
    seconds = []
    for turn in range(5):
        begin = time.perf_counter()
        adapter = ta.attach(model, spec, name=f"a{turn}")
        seconds.append(time.perf_counter() - begin)
        adapter.detach()
    median = Timing(name, tuple(seconds)).median
    print(f"\n{hardware()}; attach {name} to {adapter.plan.num_sites} sites: {median:.3f} s")
    assert median < 1.0


@pytest.mark.benchmark
@pytest.mark.parametrize("name", ["lora", "lotr"])
def test_merge(name):
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = llama(vocabulary=128, num_key_value_heads=8, **ONE)
    finally:
        torch.set_default_dtype(torch.float32)
    adapter = ta.attach(model, ta.preset(name, rank=16, targets=TARGETS))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    weights = [model.get_submodule(path).weight for group in adapter.groups.values() for path in group.paths]

    def merge():
        adapter.merge(keep="cpu")

    def copy():
        """Read every touched weight once, keep the original, and write it once."""
        with torch.no_grad():
            for weight in weights:
                weight.copy_(weight.clone())

    timings = {"merge": [], "read and write once": []}
    for _ in range(6):
        for title, run in (("merge", merge), ("read and write once", copy)):
            begin = time.perf_counter()
            run()
            timings[title].append(time.perf_counter() - begin)
        adapter.unmerge()
    found = {title: Timing(title, tuple(seconds[1:])) for title, seconds in timings.items()}
    touched = sum(weight.numel() for weight in weights)
    print(f"\n{hardware()}; {name} r=16, {touched:,} weights in bfloat16\n{table(found, 'read and write once')}")
    assert ratio(found["merge"], found["read and write once"])[0] <= 3
