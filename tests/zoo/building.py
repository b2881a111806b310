"""Tiny random models from the lines of `models.txt`: a class, the inputs of its call, and sizes beyond the usual ones.

A config's fields that are named in SIZES get the small number there, those of configs within it too.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from zoo import inputs, plain

HERE = Path(__file__).parent
SECTION = "== "
WIDTH, LAYERS, HEADS, WORDS = 16, 2, 4, 40
_WIDTHS = (
    "hidden_size",
    "d_model",
    "n_embd",
    "embed_dim",
    "dim",
    "projection_dim",
    "embedding_size",
    "word_embed_proj_dim",
)
_WIDTHS += (
    "attention_hidden_size",
    "d_embed",
    "decoder_hidden_size",
    "hidden_dim",
    "emb_dim",
    "model_dim",
    "text_embed_dim",
)
_WIDTHS += ("pooler_hidden_size", "cross_attention_hidden_size")
_INNER = (
    "intermediate_size",
    "d_ff",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "n_inner",
    "moe_intermediate_size",
)
_INNER += ("shared_expert_intermediate_size", "decoder_intermediate_size", "ffn_hidden_size", "mlp_dim", "d_inner")
_INNER += ("dim_feedforward", "feed_forward_size", "intermediate_size_mlp", "ffn_intermediate_size", "mlp_hidden_size")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "n_layers", "depth")
_LAYERS += ("num_decoder_layers", "num_encoder_layers", "decoder_num_hidden_layers", "decoder_n_layers", "num_block")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads", "n_heads")
_HEADS += ("decoder_num_attention_heads", "decoder_n_heads")
_DROPS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop")
_DROPS += ("attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout_rate")
_DROPS += (
    "layerdrop",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "drop_path_rate",
    "feat_proj_dropout",
    "final_dropout",
)
SIZES: dict[str, Any] = {
    **dict.fromkeys(_WIDTHS, WIDTH),
    **dict.fromkeys(_INNER, 24),
    **dict.fromkeys(_LAYERS, LAYERS),
    **dict.fromkeys(_HEADS, HEADS),
    **dict.fromkeys(_DROPS, 0.0),
    **{"num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 4, "d_kv": 4, "vocab_size": WORDS},
    **{"max_position_embeddings": 64, "n_positions": 64, "max_source_positions": 64, "max_target_positions": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "type_vocab_size": 2},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"image_size": 16, "patch_size": 8, "image_token_id": 39, "image_token_index": 39, "num_labels": 3},
    **{"num_mel_bins": 8, "state_size": 4},
}


@dataclass(frozen=True)
class Line:
    """One architecture: its name, its section of the table, the class, the maker of inputs, and its own sizes."""

    name: str
    section: str
    kind: str
    inputs: str
    sizes: Mapping[str, Any]


def read_lines(file: Path = HERE / "models.txt") -> dict[str, Line]:
    """The table: `name | class | inputs | sizes`, in sections that begin with `== `."""
    found: dict[str, Line] = {}
    section = ""
    for text in file.read_text("utf-8").splitlines():
        if text.startswith(SECTION):
            section = text.removeprefix(SECTION)
        elif text.strip() and not text.startswith("#"):
            name, kind, made, sizes = (part.strip() for part in text.split("|", 3))
            assert name not in found, f"{name} is twice in {file.name}"
            found[name] = Line(name, section, kind, made, _sizes(sizes))
    return found


def _sizes(text: str) -> dict[str, Any]:
    """`a=1 text_config.b=[2,3]` as a mapping, a level for every dot."""
    found: dict[str, Any] = {}
    for item in text.split():
        key, _, value = item.partition("=")
        *above, leaf = key.split(".")
        place = found
        for part in above:
            place = place.setdefault(part, {})
        place[leaf] = ast.literal_eval(value)
    return found


LINES = read_lines()


@cache
def built(name: str) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model of a line, in evaluation mode with weights that all matter, and the inputs of its call.

    The model is kept: take a copy.
    """
    line = LINES[name]
    torch.manual_seed(0)
    if hasattr(plain, line.kind):
        model = getattr(plain, line.kind)(**line.sizes)
    else:
        kind = getattr(transformers, line.kind)
        model = kind(small(kind.config_class, line.sizes))
    enliven(model)
    return model.eval(), {} | getattr(inputs, line.inputs)(model)


def small(kind: type, given: Mapping[str, Any]) -> Any:
    """A config with the small sizes, and what a line gives; configs within it likewise."""
    listed = {field.name for field in fields(kind) if isinstance(field.default, list | tuple)}
    listed |= {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is not MISSING}
    names = {field.name for field in fields(kind)} | set(kind.attribute_map)
    aliased = {name for name, own in kind.attribute_map.items() if own in SIZES or own in listed or own in given}
    usual = {name: size for name, size in SIZES.items() if name in names - aliased - listed}
    values = usual | {name: value for name, value in given.items() if name not in kind.sub_configs}
    for name, inner in kind.sub_configs.items():
        own = dict(given.get(name) or {})
        inner = _inner(
            inner, getattr(kind(), name, None) if "model_type" not in own else None, own.pop("model_type", None)
        )
        if inner is not None:
            values[name] = small(inner, own)
    return kind(**values)


def _inner(declared: type, usual: Any, named: str | None) -> type | None:
    """The class of a config within another: the named type's, the default's, or the declared one."""
    if named is not None:
        return type(transformers.AutoConfig.for_model(named))
    if usual is not None and not isinstance(usual, dict):
        return type(usual)
    return None if declared is transformers.AutoConfig else declared


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 0) -> None:
    """Weights as after training: nothing is zero, one or equal, so that no part is without effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:  # others are computed anew at every loading
            noise = torch.randn(parameter.shape, generator=generator)
            fan = (parameter[0].numel() if parameter.dim() > 1 else 400) or 1
            parameter.add_(noise.to(parameter.dtype), alpha=min(0.7 / fan**0.5, 0.5))
