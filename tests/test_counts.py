"""Counts of parameters: the published ones, exactly, and those of the tensors that an adapter stores."""

import math

import pytest
import torch
from toys import Convolutions, Toy
from transformers import RobertaConfig, RobertaForSequenceClassification

import tensoradapt as ta
from tensoradapt.sites import from_mapping

QV, QKV = ("query", "value"), ("query", "key", "value")
ATTENTION = (*QKV, "attention.output.dense")
XS = ("query", "value", "attention.output.dense", "output.dense")


def encoder(layers, width, prefix="attention.self.", ff=4):
    """RoBERTa's or ViT's encoder."""
    roles = {f"{prefix}{role}": (width, width) for role in QKV}
    roles |= {"attention.output.dense": (width, width)}
    roles |= {"intermediate.dense": (ff * width, width), "output.dense": (width, ff * width)}
    return {f"encoder.layer.{n}.{role}": shape for n in range(layers) for role, shape in roles.items()}


def llama(layers, width, kv, ff):
    roles = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width)}
    roles |= {"self_attn.o_proj": (width, width), "mlp.gate_proj": (ff, width), "mlp.up_proj": (ff, width)}
    roles |= {"mlp.down_proj": (width, ff)}
    return {f"model.layers.{n}.{role}": shape for n in range(layers) for role, shape in roles.items()}


MODELS = {
    "roberta-base": encoder(12, 768),
    "roberta-large": encoder(24, 1024),
    "vit-b/16": encoder(12, 768, "attention.attention."),
    "llama-3.2-1b": llama(16, 2048, 512, 8192),
    "llama-3.2-3b": llama(28, 3072, 1024, 8192),
    "llama-3-8b": llama(32, 4096, 1024, 14336),
    "llama-2-7b": llama(32, 4096, 4096, 11008),
    "llama-2-13b": llama(40, 5120, 5120, 13824),
}
LLAMA_QV = ("q_proj", "v_proj")
SEVEN = (*LLAMA_QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TT_Q = {"in": [16, 8, 4, 4], "out": [4, 4, 8, 16]}
TT_V = {"in": [16, 16, 4, 2], "out": [2, 16, 16]}
ROBERTA_TT = {"in": [64, 4, 3], "out": [3, 4, 64]}


def one(preset, model, published, **call):
    return pytest.param(ta.preset(preset, **call), model, published, id=f"{preset}-{model}-{published}")


def many(preset, model, published, **call):
    return [one(preset, model, count, rank=rank, **call) for rank, count in published.items()]


def tenslora(rank, att, qkv, depth, att_qkv, att_depth, qkv_depth, att_qkv_depth):
    counts = {k: v for k, v in locals().items() if k != "rank"}
    heads = {name: {"heads": 12} if "att" in name else {} for name in counts}
    return [
        one(f"tenslora_{name}", "roberta-base", count, rank=rank, targets=QKV, **heads[name])
        for name, count in counts.items()
    ]


PUBLISHED = [
    # the table of the LoTR repository, without the 1536 entries of its classifier's last layer
    *many("lotr", "roberta-base", {1: 1560, 2: 3168, 4: 6528, 8: 13824, 16: 30720, 32: 73728}, targets=QV),
    *many("lora", "roberta-base", {1: 36864, 2: 73728, 4: 147456, 8: 294912, 16: 589824, 32: 1179648}, targets=QV),
    one("lora", "roberta-large", 786_432, rank=8, targets=QV),
    one("lora", "llama-2-7b", 4_194_304, rank=8, targets=LLAMA_QV),
    one("lora", "llama-3.2-1b", 1_703_936, rank=16, targets=LLAMA_QV),
    # PEFT's method comparison on Llama-3.2-3B
    *many("lora", "llama-3.2-3b", {32: 9_175_040, 64: 18_350_080}, targets=LLAMA_QV),
    one("lora", "llama-3.2-3b", 9_461_760, rank=10, targets=MLP),
    one("lora", "llama-3.2-3b", 3_670_016, rank=32, targets=LLAMA_QV, frozen="core_in"),  # LoRA-FA
    one(
        *("lora", "llama-3.2-3b", 5_505_024),  # MiCA
        **{"rank": 32, "targets": LLAMA_QV, "frozen": "core_out"},
        init={"core_in": "zero", "core_out": "orthogonal"},
    ),
    one("loha", "llama-3.2-3b", 18_350_080, rank=32, targets=LLAMA_QV),
    one("lokr", "llama-3.2-3b", 2_294_656, rank=32, factor=4, targets=LLAMA_QV),
    one("vera", "llama-3.2-3b", 129_024, rank=256, targets=LLAMA_QV),
    one("vera", "roberta-base", 43_008, rank=1024, targets=QV),
    one("vera", "roberta-large", 61_440, rank=256, targets=QV),
    *many("lorta", "roberta-base", {1: 860, 4: 3440}, heads=12, targets=ATTENTION),
    *many("lorta", "roberta-large", {1: 1132, 8: 9056}, heads=16, targets=ATTENTION),
    *many("lorta", "llama-2-7b", {1: 4292, 235: 1_008_620}, heads=32, targets=[f"{r}_proj" for r in "qkvo"]),
    one("lorta", "llama-2-13b", 5332, rank=1, heads=40, targets=[f"{r}_proj" for r in "qkvo"]),
    one("tt_lora", "llama-3.2-1b", 960 * 16, rank=5, targets="q_proj", folds=TT_Q),
    one("tt_lora", "roberta-base", 23_760, rank=5, targets=QV, folds=ROBERTA_TT),
    one("quanta", "llama-2-7b", 2_752_512, targets=LLAMA_QV, folds=[16, 8, 8, 4]),
    one("quanta", "llama-2-13b", 3_717_120, targets=LLAMA_QV, folds=[16, 8, 8, 5]),
    *many("fact_tk", "vit-b/16", {16: 30_976, 32: 86_528}),
    *many("fact_tt", "vit-b/16", {4: 8_448, 8: 21_504, 16: 61_440}),
    *many("metatt_4d", "roberta-base", {8: 13_184, 24: 44_928, 64: 155_648}, targets=QV),
    *many("metatt_4d", "roberta-large", {8: 18_048, 16: 39_424, 32: 92_160}, targets=QV),
    one("metatt_5d", "roberta-base", 8_320, rank=8, heads=12, targets=QV),
    *tenslora(4, 123_840, 74_640, 18_768, 43_728, 11_040, 6_460, 4_460),
    *tenslora(8, 261_504, 153_888, 38_688, 130_464, 32_832, 16_504, 39_640),
    # the three biases of 4,608 entries apart, which are no weight deltas
    *many("cara", "vit-b/16", {16: 45_024 - 4_608, 32: 85_440 - 4_608}, heads=12),
    *many("lora_xs", "roberta-large", {4: 1536, 8: 6144, 12: 13824, 16: 24576, 20: 38400, 25: 60000}, targets=XS),
    one("lora_xs", "llama-3-8b", 3_670_016, rank=128, targets=SEVEN),
]


@pytest.mark.parametrize(("spec", "model", "published"), PUBLISHED)
def test_published_counts(spec, model, published):
    assert ta.plan(spec, MODELS[model]).num_trainable == published


def test_tt_lora_with_other_folds_for_values_than_for_queries():
    queries = ta.preset("tt_lora", rank=5, targets=["q_proj"], folds=TT_Q)
    values = ta.preset("tt_lora", rank=5, targets=["v_proj"], folds=TT_V)
    plan = ta.plan(queries + values, MODELS["llama-3.2-1b"])
    assert plan.num_trainable == 33_920 and len(plan.groups) == 32


def test_lotr_beside_a_trained_classifier():
    """The docstring of the LoTR repository: 592,130 parameters of the head, 595,298 with LoTR of rank 2."""
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig())
    plan = ta.plan(ta.preset("lotr", rank=2, targets=QV, train=["classifier"]), model)
    assert plan.num_extra == 592_130
    assert plan.num_trainable + plan.num_extra == 595_298


def test_shares_of_the_base():
    """QuanTA's 0.041 and 0.029 % of Llama-2."""
    for model, total, percent in (("llama-2-7b", 6_738_415_616, 0.041), ("llama-2-13b", 13_015_864_320, 0.029)):
        folds = [16, 8, 8, 4] if model == "llama-2-7b" else [16, 8, 8, 5]
        count = ta.plan(ta.preset("quanta", targets=LLAMA_QV, folds=folds), MODELS[model]).num_trainable
        assert round(100 * count / total, 3) == percent


@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("name", [name for name in ta.PRESETS if name.startswith("tenslora")])
def test_tenslora_by_its_own_formula(name, rank):
    """copies * (sum n_k r_k + prod r_k) for Tucker, copies * R * sum n_k for CP."""
    axes = name.removeprefix("tenslora_")
    sizes = [
        768,
        *([64, 12] if "att" in axes else [768]),
        *([3] if "qkv" in axes else []),
        *([12] if "depth" in axes else []),
    ]
    copies = (1 if "qkv" in axes else 3) * (1 if "depth" in axes else 12)
    call = {"rank": rank, "targets": QKV, **({"heads": 12} if "att" in axes else {})}
    tucker = ta.plan(ta.preset(name, **call), MODELS["roberta-base"]).num_trainable
    cp = ta.plan(ta.preset(name, form="cp", **call), MODELS["roberta-base"]).num_trainable
    assert tucker == copies * (rank * sum(sizes) + rank ** len(sizes))
    assert cp == copies * rank * sum(sizes)


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_polar_by_its_own_formula(rank):
    """sum over the weights of r (m + n) + r^2."""
    plan = ta.plan(ta.preset("polar", rank=rank, targets=(*LLAMA_QV, "down_proj")), MODELS["llama-3-8b"])
    shapes = [(4096, 4096), (1024, 4096), (4096, 14336)]
    assert plan.num_trainable == 32 * sum(rank * (m + n) + rank**2 for m, n in shapes)


def test_frozen_parameters_are_counted_apart():
    vera = ta.plan(ta.preset("vera", rank=64, targets=[*QV, "output.dense"]), MODELS["roberta-base"])
    assert vera.num_frozen == 64 * (768 + 3072)
    assert vera.num_trainable == 12 * 4 * (768 + 64)  # `output.dense` is a suffix of the attention's too
    xs = ta.plan(ta.preset("lora_xs", rank=4, targets=QV), MODELS["roberta-base"])
    assert (xs.num_trainable, xs.num_frozen) == (24 * 16, 24 * 2 * 768 * 4)
    quanta = ta.plan(ta.preset("quanta", targets=LLAMA_QV, folds=[16, 8, 8, 4]), MODELS["llama-2-7b"])
    assert quanta.num_frozen == quanta.num_trainable  # the copies that the difference subtracts
    assert quanta.num_parameters == 2 * quanta.num_trainable
    assert quanta.num_bytes == 4 * quanta.num_parameters


@pytest.mark.parametrize("name", ta.PRESETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_counts_what_an_adapter_stores(name, dtype):
    """Sites of several shapes, so that slots, slices of the largest and groups by shape are among them."""
    model = Convolutions() if name == "locon" else Toy(layers=2, kv_heads=2)
    targets = ("conv1", "conv2") if name == "locon" else ("q_proj", "v_proj", "up_proj", "down_proj")
    targets = ("q_proj", "v_proj") if name.startswith(("tenslora", "cara")) else targets
    call = {"projections": ("o_proj", "up_proj", "down_proj")} if name == "cara" else {}
    spec = ta.preset(name, targets=targets, dtype=dtype, **call)
    plan = ta.plan(spec, model)
    adapter = ta.attach(model, spec)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    frozen = [p for p in adapter.parameters() if not p.requires_grad]
    assert len({id(p) for p in adapter.parameters()}) == len(adapter.tensors())
    assert plan.num_trainable == sum(p.numel() for p in trained) > 0
    assert plan.num_frozen == sum(p.numel() for p in frozen)
    assert plan.num_parameters == sum(t.numel() for t in adapter.tensors().values())
    assert plan.num_bytes == sum(t.nbytes for t in adapter.tensors().values())
    assert {key: factor.shape for key, factor in plan.factors.items()} == {
        key: tuple(t.shape) for key, t in adapter.tensors().items() if not key.endswith("__start")
    }


@pytest.mark.parametrize("name", ta.PRESETS)
def test_shares_of_groups_add_up(name):
    """Each stored tensor is counted under one group, a bank shared by several apart."""
    model = Convolutions() if name == "locon" else Toy(layers=2, kv_heads=2)
    targets = ("conv1", "conv2") if name == "locon" else ("q_proj", "v_proj")
    plan = ta.plan(ta.preset(name, targets=targets), model)
    own = {key for group in plan.groups for node, key in group.store.items() if key == f"{group.name}.{node}"}
    banked = set(plan.factors) - own
    assert {plan.factors[key].trainable for key in banked} <= {False}
    listed = sum(row["num_trainable"] for row in plan.to_dict()["groups"])
    assert (
        listed == plan.num_trainable == sum(math.prod(plan.factors[k].shape) for k in own if plan.factors[k].trainable)
    )


def test_a_trained_bank_is_counted_once():
    """VeRA with its projections trained: both groups of sites use slices of them, neither owns them."""
    plan = ta.plan(ta.preset("vera", rank=3, targets=["q_proj", "up_proj"], frozen=()), Toy(layers=2))
    sites = 2 * (12 + 3) + 2 * (24 + 3)
    assert sum(row["num_trainable"] for row in plan.to_dict()["groups"]) == sites
    assert plan.num_trainable == sites + 3 * 24 + 3 * 12


def test_heads_from_the_config_give_the_count_too():
    sites = from_mapping(MODELS["roberta-base"], heads=12, kv_heads=12)
    assert ta.plan(ta.preset("lorta", rank=4, targets=ATTENTION), sites).num_trainable == 3440
