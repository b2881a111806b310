"""What a model is called with, by name; made from the model's own config, the same in every run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WORDS = 39  # the last word of a vocabulary stands for images


def words(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, WORDS, shape or (2, 6), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": words()}


def eight_tokens(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": words(2, 8)}


def uncached(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": words(), "use_cache": False}


def pairs(model: nn.Module) -> dict[str, Any]:
    """Tokens for an encoder and for a decoder."""
    return {"input_ids": words(), "decoder_input_ids": words(2, 4, seed=1)}


def pixels(model: nn.Module) -> dict[str, Any]:
    """Pictures of the size that the config says."""
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size
    size = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": noise(2, getattr(config, "num_channels", 3), *size)}


def pixels28(model: nn.Module) -> dict[str, Any]:
    return {"pixel_values": noise(1, 3, 28, 28)}


def pixels32(model: nn.Module) -> dict[str, Any]:
    return {"pixel_values": noise(1, 3, 32, 32)}


def pixels64(model: nn.Module) -> dict[str, Any]:
    return {"pixel_values": noise(1, 3, 64, 64)}


def pixels_and_words(model: nn.Module) -> dict[str, Any]:
    """Pictures for an encoder, tokens for a decoder."""
    return {"pixel_values": noise(2, 3, 16, 16), "decoder_input_ids": words(2, 4)}


def video(model: nn.Module) -> dict[str, Any]:
    return {"pixel_values": noise(1, 4, 3, 16, 16)}


def video_frames(model: nn.Module) -> dict[str, Any]:
    return {"pixel_values_videos": noise(1, 4, 3, 16, 16)}


def image_text(model: nn.Module) -> dict[str, Any]:
    """A picture and a sentence, for two towers."""
    return {"input_ids": words(), **pixels(model)}


def patches_text(model: nn.Module) -> dict[str, Any]:
    """A picture in patches and a sentence."""
    shapes, mask = torch.tensor([[2, 2], [2, 2]]), torch.ones(2, 4, dtype=torch.long)
    return {
        "input_ids": words(),
        "pixel_values": noise(2, 4, 48),
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }


def image_in_text(model: nn.Module) -> dict[str, Any]:
    """A sentence with a picture in it: as many words of the image as the picture has patches."""
    config = model.config
    size = config.vision_config.image_size // config.vision_config.patch_size
    many = getattr(config, "mm_tokens_per_image", size * size)
    image = torch.full((2, many), config.image_token_id)
    return {"input_ids": torch.cat([words(2, 2), image, words(2, 2, seed=1)], 1), **pixels(model)}


def image_in_questions(model: nn.Module) -> dict[str, Any]:
    """A sentence with a picture in it, and the sentence that the picture is asked about."""
    config = model.config
    image = torch.full((2, config.num_query_tokens), config.image_token_id)
    return {**pixels(model), "qformer_input_ids": words(), "input_ids": torch.cat([image, words(2, 3)], 1)}


def tiles_text(model: nn.Module) -> dict[str, Any]:
    """A picture in two tiles, which layers of the text look at."""
    tiles = {"aspect_ratio_ids": torch.tensor([[2]]), "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long)}
    looks = torch.ones(1, 6, 1, 2, dtype=torch.long)
    return {"input_ids": words(1, 6), "pixel_values": noise(1, 1, 2, 3, 16, 16), "cross_attention_mask": looks, **tiles}


def grid_in_text(model: nn.Module) -> dict[str, Any]:
    """A picture of 4 x 4 patches, merged by two, in a sentence."""
    image = torch.tensor([[37, 39, 39, 39, 39, 36]])
    text = torch.cat([words(1, 2), image, words(1, 2, seed=1)], 1).clamp(max=39)
    grid = {"pixel_values": noise(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {"input_ids": text, "mm_token_type_ids": (text == 39).long(), **grid}


def audio(model: nn.Module) -> dict[str, Any]:
    return {"input_values": noise(2, 800)}


def waves(model: nn.Module) -> dict[str, Any]:
    return {"input_values": noise(1, 1, 64)}


def audio_and_words(model: nn.Module) -> dict[str, Any]:
    return {"input_values": noise(1, 1600), "decoder_input_ids": words(1, 4)}


def spectrogram(model: nn.Module) -> dict[str, Any]:
    return {"input_values": noise(2, 24, 16)}


def spectrogram_text(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": words(), "input_features": noise(2, 1, 32, 8)}


def features(model: nn.Module) -> dict[str, Any]:
    config = getattr(model.config, "encoder_config", model.config)
    return {"input_features": noise(2, 24, getattr(config, "feature_projection_input_dim", 16))}


def frames_and_words(model: nn.Module) -> dict[str, Any]:
    return {"input_features": noise(2, 16, 8), "decoder_input_ids": words(2, 4)}


def mel_and_words(model: nn.Module) -> dict[str, Any]:
    """A spectrogram for an encoder, tokens for a decoder."""
    return {"input_features": noise(2, 8, 128), "decoder_input_ids": words(2, 4)}


def boxed(model: nn.Module) -> dict[str, Any]:
    """Words of a page, with their places."""
    return {"input_ids": words(), "bbox": torch.tensor([2, 3, 9, 11]).expand(2, 6, 4).contiguous()}


def boxed8(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": words(), "bbox": noise(2, 6, 8).abs()}


def boxed_pairs(model: nn.Module) -> dict[str, Any]:
    return {**pairs(model), "bbox": noise(2, 6, 4).abs().clamp(max=1)}


def regions(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": words(), "visual_feats": noise(2, 3, 8), "visual_pos": noise(2, 3, 4)}


def perceived(model: nn.Module) -> dict[str, Any]:
    return {"inputs": words(2, 8)}


def trajectory(model: nn.Module) -> dict[str, Any]:
    steps = {"timesteps": torch.arange(3)[None], "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    return {"states": noise(1, 3, 3), "actions": noise(1, 3, 2), "returns_to_go": noise(1, 3, 1), **steps}


def series(model: nn.Module) -> dict[str, Any]:
    return {"past_values": noise(2, 16, 2)}


def flat_patches(model: nn.Module) -> dict[str, Any]:
    patches = torch.cat([torch.ones(2, 4, 2), noise(2, 4, 6)], -1)
    return {"flattened_patches": patches, "attention_mask": torch.ones(2, 4), "decoder_input_ids": words(2, 4)}


def vectors(model: nn.Module) -> dict[str, Any]:
    """A sequence of vectors, for a module of plain torch."""
    return {"x": noise(2, 5, 16)}


def maps(model: nn.Module) -> dict[str, Any]:
    return {"x": noise(2, 3, 8, 8)}


def numbers(model: nn.Module) -> dict[str, Any]:
    """Tokens, for a module of plain torch."""
    return {"x": words(2, 6)}
