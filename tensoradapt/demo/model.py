"""The demo's model: a small vision transformer in plain PyTorch, with the projections that adapters usually go on.

Invariant: every projection of the attention is an `nn.Linear` named `blocks.{layer}.attn.{role}`, role of q, k, v, o.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

WIDTH, HEADS, LAYERS = 64, 4, 6
SIDE, PATCH = 8, 2
TOKENS = (SIDE // PATCH) ** 2 + 1  # the patches and the class token


class Attention(nn.Module):
    """Multi-head self-attention: (batch, tokens, width) -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Softmax attention of every head, then the output projection."""
        q, k, v = (self._by_head(project(x)) for project in (self.q, self.k, self.v))
        # Written out: for so few tokens the fused kernel is slower on a CPU.
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """One pre-norm transformer layer: (batch, tokens, width) -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Attention and the feed-forward network, each added to its input."""
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nn.Module):
    """Images (batch, 8, 8) -> logits (batch, classes), from 2 x 2 patches and a class token."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(0.3 * torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def features(self, images: Tensor) -> Tensor:
        """What the head reads, the class token after the last layer: (batch, 8, 8) -> (batch, width)."""
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        tokens = torch.cat([self.cls.expand(len(images), -1, -1), self.embed(patches)], dim=1) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        """The logits of a batch of images."""
        return self.head(self.features(images))


def build(classes: int, seed: int) -> VisionTransformer:
    """A fresh model whose values depend on the seed alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return VisionTransformer(classes)


def with_new_head(base: VisionTransformer, classes: int, seed: int) -> VisionTransformer:
    """A copy of the base with a new head for another set of classes."""
    model = copy.deepcopy(base)
    model.head = build(classes, seed).head
    return model
