"""Folders whose tensors transformers stores under other names, or in other shapes, than the modules have them."""

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import tensoradapt as ta
from tensoradapt.analysis.source import open_source

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"vocab_size": 40, "max_position_embeddings": 32, "num_hidden_layers": 2}
WIDE = {**TEXT, "head_dim": 4}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE |= {"image_size": 16, "patch_size": 8}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 0]}
FEW = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


def made(name: str, config) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return getattr(tf, name)(config).eval()


def deepseek():
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    routed = {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    return made("DeepseekV3ForCausalLM", tf.DeepseekV3Config(moe_intermediate_size=12, **ranks, **routed, **TEXT))


def swin():
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    return made("SwinForImageClassification", tf.SwinConfig(**sizes))


def qwen2_moe():
    config = tf.Qwen2MoeConfig(shared_expert_intermediate_size=12, **FEW, **WIDE)
    return made("Qwen2MoeForCausalLM", config)


def qwen2_vl():
    tower = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    config = tf.Qwen2VLConfig(text_config={**WIDE, "rope_parameters": ROPE}, vision_config=tower)
    return made("Qwen2VLForConditionalGeneration", config)


def qwen3_vl_moe():
    tower = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    tower |= {"out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = tf.Qwen3VLMoeConfig(text_config={**WIDE, **FEW, "rope_parameters": ROPE}, vision_config=tower)
    return made("Qwen3VLMoeForConditionalGeneration", config)


def llava():
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**WIDE), vision_config=tf.CLIPVisionConfig(**IMAGE))
    return made("LlavaForConditionalGeneration", config)


def pali_gemma():
    sides = {"text_config": {**WIDE, "model_type": "gemma"}}
    sides |= {"vision_config": {**IMAGE, "model_type": "siglip_vision_model"}, "projection_dim": 16}
    return made("PaliGemmaForConditionalGeneration", tf.PaliGemmaConfig(**sides))


def gemma3():
    sides = {"text_config": {**WIDE, "sliding_window": 8}, "vision_config": IMAGE, "mm_tokens_per_image": 4}
    return made("Gemma3ForConditionalGeneration", tf.Gemma3Config(**sides))


def spectrogram():
    sizes = {"max_length": 32, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8}
    return made("ASTForAudioClassification", tf.ASTConfig(**(IMAGE | sizes | {"patch_size": 16})))


MODELS = {
    "ViT": lambda: made("ViTForImageClassification", tf.ViTConfig(**IMAGE)),
    "DINOv2": lambda: made("Dinov2Model", tf.Dinov2Config(**IMAGE)),
    "Swin": swin,
    "AST": spectrogram,
    "LLaVA": llava,
    "PaliGemma": pali_gemma,
    "Gemma 3": gemma3,
    "Qwen2-VL": qwen2_vl,
    "Qwen3-VL-MoE": qwen3_vl_moe,
    "Mixtral": tiny.mixtral,
    "Qwen2-MoE": qwen2_moe,
    "DeepSeek-V3": deepseek,
    "GPT-OSS": tiny.gpt_oss,
    "BERT": tiny.bert_classifier,
}
EXPERTS = ("Mixtral", "Qwen2-MoE", "DeepSeek-V3", "GPT-OSS", "Qwen3-VL-MoE")


def tuned_of(model: torch.nn.Module) -> torch.nn.Module:
    """A copy, every matrix and every expert changed by a matrix of rank 1."""
    tuned = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if weight.dim() == 2 and "position" not in name and not name.endswith("bias"):
                weight += 0.1 * torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1]))
            elif weight.dim() == 3 and "expert" in name:
                columns = torch.randn(len(weight), weight.shape[2])
                weight += 0.1 * torch.einsum("ei,ej->eij", torch.randn(weight.shape[:2]), columns)
    return tuned


@pytest.fixture(scope="module", params=MODELS)
def sides(request, tmp_path_factory):
    """A model, a changed copy, and the folders that their own save_pretrained writes."""
    folder: Path = tmp_path_factory.mktemp("models")
    base = MODELS[request.param]()
    tuned = tuned_of(base)
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned")
    return base, tuned, folder, request.param


@pytest.fixture(scope="module")
def extracted(sides, tmp_path_factory):
    *_, folder, _ = sides
    return ta.extract(folder / "base", folder / "tuned", ta.preset("lora", rank=1), tmp_path_factory.mktemp("adapter"))


def differ(model, other) -> list[str]:
    """The parameters of one model that are not those of another."""
    theirs = other.state_dict()
    return [
        n
        for n, t in model.state_dict().items()
        if t.is_floating_point() and not torch.allclose(t, theirs[n], atol=2e-6)
    ]


def test_a_folder_is_read_under_the_names_and_in_the_shapes_of_the_modules(sides):
    base, tuned, folder, name = sides
    with open_source(folder / "base", folder / "tuned") as deltas:
        for side, model in ((deltas.base, base), (deltas.tuned, tuned)):
            state = model.state_dict()
            assert not set(side.entries) - set(state)
            assert all(side.entries[n].shape == tuple(state[n].shape) for n in side.entries)
            assert all(torch.equal(side.read(n), state[n]) for n in side.entries)
        experts = [site for site in deltas.sites if site.index is not None]
        assert bool(experts) == (name in EXPERTS)
        for site in experts:
            stored = deltas.pair(site.path).tuned_name
            assert torch.equal(deltas.tuned.read(stored, site.index), tuned.state_dict()[stored][site.index])
        assert not deltas.match.only_base and not deltas.match.only_tuned


def test_what_is_extracted_from_its_folders_loads_onto_the_model(sides, extracted):
    base, tuned, folder, _ = sides
    model = copy.deepcopy(base)
    adapter = ta.load(extracted.path, model)
    adapter.merge_and_detach()
    held = set(ta.open_adapter(extracted.path).sites)
    changed = {site.removesuffix(".weight").partition("[")[0] for site in held}
    assert len(changed) > 5 and extracted.relative_error < 1e-5
    assert not {n.removesuffix(".weight") for n in differ(model, tuned)} & changed
    found = ta.verify(extracted.path, folder / "base", folder / "tuned")
    assert found.relative_error < 1e-5


def test_merging_into_the_models_own_folder_is_merging_into_the_model(sides, extracted, tmp_path):
    base, _, folder, _ = sides
    ta.merge_folder(folder / "base", extracted.path, tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (folder / "base", tmp_path / "merged"))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    model = copy.deepcopy(base)
    ta.load(extracted.path, model).merge_and_detach()
    assert not differ(type(base).from_pretrained(tmp_path / "merged"), model)


def test_an_attached_adapter_merges_into_the_models_own_folder(sides, tmp_path):
    base, _, folder, _ = sides
    model = copy.deepcopy(base)
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["all-linear"]))
    tiny.shake(adapter)
    ta.merge_folder(folder / "base", adapter, tmp_path / "merged", tied=True)
    adapter.merge_and_detach()
    assert not differ(type(base).from_pretrained(tmp_path / "merged"), model)


def test_a_state_dict_of_the_model_matches_its_folder(sides):
    base, tuned, folder, _ = sides
    with open_source(folder / "base", tuned.state_dict()) as one, open_source(folder / "base", folder / "tuned") as two:
        assert {site.path for site in one.sites} == {site.path for site in two.sites}
        assert not one.match.only_base
    with open_source(dict(load_file(folder / "base" / "model.safetensors")), tuned) as live:
        assert {site.path for site in live.sites} >= {site.path for site in one.sites}
        assert not live.match.only_base


def test_an_adapter_with_stored_names_is_met(tmp_path):
    """As one was extracted from files without their config."""
    base = MODELS["ViT"]()
    tuned = tuned_of(base)
    for model, name in ((base, "base"), (tuned, "tuned")):
        model.save_pretrained(tmp_path / name)
    sides = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned")]
    spec = ta.preset("lora", rank=1, targets=["query", "dense"])
    result = ta.extract(*sides, spec, tmp_path / "a")
    assert any("attention.attention.query" in path for path in ta.open_adapter(result.path).sites)
    model = copy.deepcopy(base)
    adapter = ta.load(result.path, model)
    adapter.merge_and_detach()
    assert torch.allclose(
        model.vit.layers[1].attention.q_proj.weight, tuned.vit.layers[1].attention.q_proj.weight, atol=1e-6
    )
    ta.merge_folder(tmp_path / "base", result.path, tmp_path / "merged")
    assert not differ(tf.ViTForImageClassification.from_pretrained(tmp_path / "merged"), model)
    assert ta.verify(result.path, tmp_path / "base", tmp_path / "tuned").relative_error < 1e-5


def test_folders_of_both_generations_match(tmp_path):
    """One as transformers 4 wrote it, one under the names of the modules."""
    base = tiny.mixtral()
    tuned = tuned_of(base)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "tuned").mkdir()
    save_file({n: t.contiguous() for n, t in tuned.state_dict().items()}, tmp_path / "tuned" / "model.safetensors")
    (tmp_path / "tuned" / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    result = ta.extract(tmp_path / "base", tmp_path / "tuned", ta.preset("lora", rank=1), tmp_path / "a")
    assert result.whole_error < 1e-5
    ta.merge_folder(tmp_path / "tuned", result.path, tmp_path / "twice")
    ta.merge_folder(tmp_path / "base", result.path, tmp_path / "once")
    assert not differ(tf.MixtralForCausalLM.from_pretrained(tmp_path / "once"), tuned)
    names = set(load_file(tmp_path / "twice" / "model.safetensors"))
    assert names == set(tuned.state_dict())


def test_what_its_config_does_not_fit_keeps_its_names_and_says_so(tmp_path):
    base = tiny.mixtral()
    for name, model in (("base", base), ("tuned", tuned_of(base))):
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_local_experts": 2}))
    with open_source(tmp_path / "base", tmp_path / "tuned") as deltas:
        assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in deltas.tuned.entries
        assert any("gate_up_proj" in note and "the shapes that the config says" in note for note in deltas.match.notes)
