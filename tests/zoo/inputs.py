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


def uncached(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": words(), "use_cache": False}


def pairs(model: nn.Module) -> dict[str, Any]:
    """Tokens for an encoder and for a decoder."""
    return {"input_ids": words(), "decoder_input_ids": words(2, 4, seed=1)}


def pixels(model: nn.Module) -> dict[str, Any]:
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size
    size = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": noise(2, getattr(config, "num_channels", 3), *size)}


def image_text(model: nn.Module) -> dict[str, Any]:
    """A picture and a sentence, for two towers."""
    return {"input_ids": words(), **pixels(model)}


def image_in_text(model: nn.Module) -> dict[str, Any]:
    """A sentence with a picture in it: as many words of the image as the picture has patches."""
    config = model.config
    size = config.vision_config.image_size // config.vision_config.patch_size
    many = getattr(config, "mm_tokens_per_image", size * size)
    image = torch.full((2, many), config.image_token_id)
    return {"input_ids": torch.cat([words(2, 2), image, words(2, 2, seed=1)], 1), **pixels(model)}


def audio(model: nn.Module) -> dict[str, Any]:
    return {"input_values": noise(2, 800)}


def mel_and_words(model: nn.Module) -> dict[str, Any]:
    """A spectrogram for an encoder, tokens for a decoder."""
    return {"input_features": noise(2, 8, 128), "decoder_input_ids": words(2, 4)}


def vectors(model: nn.Module) -> dict[str, Any]:
    """A sequence of vectors, for a module of plain torch."""
    return {"x": noise(2, 5, 16)}


def maps(model: nn.Module) -> dict[str, Any]:
    return {"x": noise(2, 3, 8, 8)}
