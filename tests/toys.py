"""A small transformer-shaped model, with named projections in layers, for tests that attach adapters."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, kv_width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv_width)
        self.v_proj = nn.Linear(width, kv_width)
        self.o_proj = nn.Linear(width, width)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = (self.k_proj(x) * self.v_proj(x)).repeat(1, 1, self.q_proj.out_features // self.k_proj.out_features)
        x = x + self.o_proj(self.q_proj(x) + mixed)
        return x + self.down_proj(self.up_proj(x).relu())


class Toy(nn.Module):
    """Layers of q, k, v, o, up and down projections; keys and values may have fewer heads."""

    def __init__(self, layers: int = 3, width: int = 12, heads: int = 4, kv_heads: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads)
        self.layers = nn.ModuleList(Block(width, width * kv_heads // heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Convolutions(nn.Module):
    """Two convolutions with a stride, a padding and a kernel that is no square."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).relu())
