"""The axis `head` is the attention's head: one row of its factor moves the outputs of that head, and no others."""

import pytest
import torch
import transformers
from toys import Toy

import tensoradapt as ta
from tensoradapt.sites import from_mapping

WIDTH, HEADS, KV_HEADS = 24, 4, 2
HEAD_DIM = WIDTH // HEADS
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
QKV = ("q_proj", "k_proj", "v_proj")
CASES = [
    ("lorta", {"targets": ATTENTION}, "factor_head", 0),
    ("metatt_5d", {"targets": ATTENTION}, "core_head", 1),
    *(
        (name, {"targets": QKV, "form": form}, "factor_head", 0)
        for name in ("tenslora_att", "tenslora_att_qkv", "tenslora_att_depth", "tenslora_att_qkv_depth")
        for form in ("tucker", "cp")
    ),
    ("cara", {"targets": QKV, "projections": ("up_proj",)}, "factor_head", 0),
]
every_case = pytest.mark.parametrize(
    ("name", "call", "node", "dim"), CASES, ids=[f"{c[0]}-{c[1].get('form', '')}" for c in CASES]
)


def heads_of(path: str) -> int:
    return KV_HEADS if path.endswith(("k_proj", "v_proj")) else HEADS


def randomise(adapter: ta.Adapter) -> None:
    generator = torch.Generator().manual_seed(0)
    for tensor in adapter.tensors().values():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))


@every_case
def test_one_row_of_the_factor_moves_one_head(name, call, node, dim):
    model = Toy(layers=2, width=WIDTH, heads=HEADS, kv_heads=KV_HEADS)
    adapter = ta.attach(model, ta.preset(name, rank=3, **call))
    randomise(adapter)
    x = torch.randn(2, 5, WIDTH)
    for group_name, group in adapter.groups.items():
        if node not in group.diagram.nodes:
            continue  # cara's projections have no heads
        whole = adapter.factors(group_name)[node].detach().clone()
        for head in range(heads_of(group.paths[0])):
            one = torch.zeros_like(whole)
            one.select(dim, head).copy_(whole.select(dim, head))
            adapter.set_factors(group_name, {node: one})
            for path in group.paths:
                _check_moves(model.get_submodule(path), adapter, adapter.delta(path), x, head)
        adapter.set_factors(group_name, {node: whole})


def _check_moves(module, adapter, delta, x, head):
    rows = torch.zeros(delta.shape[0], dtype=torch.bool)
    rows[head * HEAD_DIM : (head + 1) * HEAD_DIM] = True
    assert delta[rows].abs().min() > 0 and not delta[~rows].any()
    with adapter.disabled():
        base = module(x)
    moved = module(x) - base
    assert moved[..., rows].abs().max() > 1e-4 and not moved[..., ~rows].any()


@every_case
def test_keys_and_values_have_their_own_heads(name, call, node, dim):
    model = Toy(layers=2, width=WIDTH, heads=HEADS, kv_heads=KV_HEADS)
    plan = ta.plan(ta.preset(name, **call), model)
    for group in (g for g in plan.groups if node in g.diagram.nodes):
        count = {heads_of(path) for path in group.paths}
        assert {group.diagram.sizes["head"]} == count and group.diagram.sizes["head_dim"] == HEAD_DIM


SHAPES = {f"h.{layer}.{role}_proj": (48, 48) if role in "qo" else (12, 48) for layer in range(2) for role in "qkvo"}


def sizes(spec: ta.Spec, model) -> dict[str, tuple[int, int]]:
    return {
        path: (g.diagram.sizes["head"], g.diagram.sizes["head_dim"])
        for g in ta.plan(spec, model).groups
        for path in g.paths
    }


def test_heads_are_passed_or_known_or_asked_for():
    with pytest.raises(ta.SpecError, match=r"(?s)heads.*pass heads=12"):
        ta.plan(ta.preset("lorta", targets=["q_proj"]), SHAPES)
    passed = sizes(ta.preset("lorta", heads=8, kv_heads=2, targets=["q_proj", "v_proj"]), SHAPES)
    known = sizes(ta.preset("lorta", targets=["q_proj", "v_proj"]), from_mapping(SHAPES, heads=8, kv_heads=2))
    assert passed == known == {f"h.{n}.{role}_proj": (8 if role == "q" else 2, 6) for n in range(2) for role in "qv"}


def test_heads_that_are_passed_win_over_the_models():
    found = sizes(
        ta.preset("lorta", heads=16, kv_heads=4, targets=["q_proj", "v_proj"]),
        from_mapping(SHAPES, heads=8, kv_heads=2),
    )
    assert set(found.values()) == {(16, 3), (4, 3)}


def test_keys_keep_the_models_heads_when_only_the_queries_heads_are_passed():
    """Otherwise 12 outputs of a key would be cut into 4 heads of 3 in silence, where the model has 2 of 6."""
    found = sizes(ta.preset("lorta", heads=4, targets=["q_proj", "k_proj"]), from_mapping(SHAPES, heads=4, kv_heads=1))
    assert found["h.0.k_proj"] == (1, 12) and found["h.0.q_proj"] == (4, 12)


def test_heads_that_do_not_divide_the_outputs_are_refused():
    with pytest.raises(ta.ShapeError, match="multiply out"):
        ta.plan(ta.preset("metatt_5d", heads=7, targets=["q_proj"]), SHAPES)


@pytest.mark.parametrize(
    "role", ["k_proj", "v_proj", "key", "attention.self.value", "k", "v", "k_lin", "keys", "c_attn[k]", "qkv_proj[v]"]
)
def test_names_of_keys_and_values(role):
    parts = {"c_attn": ["k"]} if "c_attn" in role else {"qkv_proj": ["v"]} if "qkv" in role else {}
    path = f"h.0.{role.partition('[')[0]}"
    spec = ta.preset("lorta", targets=[path], parts=parts)
    assert set(sizes(spec, from_mapping({path: (12, 48)}, heads=6, kv_heads=2)).values()) == {(2, 6)}


@pytest.mark.parametrize(
    "role",
    [
        "q_proj",
        "query",
        "o_proj",
        "attention.output.dense",
        "out_proj",
        "q",
        "o",
        "kv_gate",
        "conv",
        "block",
        "mlp.monkey",
    ],
)
def test_names_of_neither(role):
    spec = ta.preset("lorta", targets=[f"h.0.{role}"])
    assert set(sizes(spec, from_mapping({f"h.0.{role}": (12, 48)}, heads=6, kv_heads=2)).values()) == {(6, 2)}


def whisper():
    sizes = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 4}
    config = transformers.WhisperConfig(vocab_size=50, num_mel_bins=8, **sizes, **ids, **heads)
    return transformers.WhisperForConditionalGeneration(config)


def bart():
    sizes = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 4}
    return transformers.BartModel(transformers.BartConfig(vocab_size=50, **sizes, **heads))


TEXT = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 50}
IMAGE = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32, "image_size": 16, "patch_size": 8}


def clip(family="CLIP"):
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text, image = TEXT | ids | {"num_attention_heads": 2}, IMAGE | {"num_attention_heads": 4}
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=image)
    return getattr(transformers, f"{family}Model")(config)


def pair_of_berts():
    sides = [{"model_type": "bert", "num_attention_heads": n, **TEXT} for n in (2, 4)]
    sides[1] |= {"is_decoder": True, "add_cross_attention": True}
    config = transformers.EncoderDecoderConfig(encoder=sides[0], decoder=sides[1])
    return transformers.EncoderDecoderModel(config)


def llava():
    text = TEXT | {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 3}
    image = IMAGE | {"model_type": "clip_vision_model", "num_attention_heads": 4, "projection_dim": 8}
    return transformers.LlavaModel(transformers.LlavaConfig(text_config=text, vision_config=image, image_token_index=4))


def swin():
    sizes = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4, "image_size": 16, "patch_size": 2}
    return transformers.SwinModel(transformers.SwinConfig(**sizes))


# what the path of a weight begins with -> its heads: of queries, and of keys and values
TWO = {
    whisper: {"model.encoder": (2, 2), "model.decoder": (4, 4)},
    bart: {"encoder": (2, 2), "decoder": (4, 4)},
    clip: {"text_model": (2, 2), "vision_model": (4, 4)},
    pair_of_berts: {"encoder": (2, 2), "decoder": (4, 4)},
    llava: {"vision_tower": (4, 4), "language_model": (6, 3)},
    swin: {"encoder.layers.0": (1, 1), "encoder.layers.1": (2, 2)},
}


@pytest.mark.parametrize("make", TWO, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("name", "options"), [(c[0], {k: v for k, v in c[1].items() if k == "form"}) for c in CASES], ids=lambda v: str(v)
)
def test_every_tower_has_its_own_heads(name, options, make):
    model = make()
    paths = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and _letter(n)]
    more = {"projections": ["re:.*(fc1|intermediate.dense|up_proj|gate_proj)"]} if name == "cara" else {}
    for around in (model, torch.nn.Sequential(model)):
        plan = ta.plan(ta.preset(name, rank=2, targets=paths and [f"*{p}" for p in paths], **options, **more), around)
        seen = 0
        for group in plan.groups:
            for path in (p.removeprefix("0.") for p in group.paths if "head" in group.diagram.sizes):
                counts = next(heads for start, heads in TWO[make].items() if path.startswith(start))
                expected = counts[_letter(path) != "q"]
                assert (group.diagram.sizes["head"], path) == (expected, path)
                seen += 1
        assert seen == len(paths)


def _letter(path):
    last = path.rpartition(".")[2]
    return {"q_proj": "q", "k_proj": "k", "v_proj": "v", "query": "q", "key": "k", "value": "v"}.get(last)


def test_heads_that_are_given_count_in_every_tower_and_rules_give_each_its_own():
    sides = {"encoder": 3, "decoder": 6}
    spec = [ta.preset("lorta", rank=2, targets=f"{side}.*.q_proj", heads=n) for side, n in sides.items()]
    for group in ta.plan(spec, bart()).groups:
        assert group.diagram.sizes["head"] == sides[group.paths[0].partition(".")[0]]
    given = ta.plan(ta.preset("lorta", rank=2, targets="q_proj", heads=3), bart())
    assert {group.diagram.sizes["head"] for group in given.groups} == {3}


def test_an_extraction_has_the_heads_of_every_tower(tmp_path):
    base, tuned = bart(), bart()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for path, module in tuned.named_modules():
            if path.endswith("q_proj"):
                module.weight += 0.01 * torch.randn(24, 24)
    spec = ta.preset("lorta", rank=2, targets="q_proj")
    live = {frozenset(g.paths): g.diagram.sizes["head"] for g in ta.plan(spec, base).groups}
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    for number, sides in enumerate([(base, tuned), (tmp_path / "base", tmp_path / "tuned")]):
        made = ta.extract(*sides, spec, tmp_path / f"out{number}")
        assert {frozenset(g.paths): g.diagram.sizes["head"] for g in made.plan.groups} == live
        assert set(live.values()) == {2, 4}


class Refusing(torch.nn.Module):
    """A config whose attribute raises an error of its own, as where heads differ from layer to layer."""

    class Config:
        @property
        def head_dim(self):
            raise RuntimeError("differs from layer to layer")

    def __init__(self):
        super().__init__()
        self.config = self.Config()
        self.layer = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})])


def test_a_config_that_refuses_to_say_is_asked_no_more():
    assert ta.plan(ta.preset("lora", rank=1, targets="q_proj"), Refusing()).num_sites == 1
    with pytest.raises(ta.SpecError, match="heads(?s:.*)heads=12"):
        ta.plan(ta.preset("lorta", rank=1, targets="q_proj"), Refusing())
