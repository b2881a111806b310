"""Modules of plain torch: those that call a weight in their own way, and those that wrap others."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(16, 4, 1, 1, 24, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, x.flip(1))


class Encoder(nn.Module):
    """Layers that take the fast path of nn.TransformerEncoder in evaluation mode, without calling their parts."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True)
        self.net = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


class Scaled(nn.Linear):
    """A linear module with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * F.linear(x, self.weight / self.weight.norm(), self.bias)


class Subclassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.head = Scaled(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.scaled(x)))


class Normed(nn.Module):
    """A weight that is computed from a direction and lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.normed(x)))


class ReadByParent(nn.Module):
    """A module whose weight its parent uses without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, self.child.weight, self.child.bias)))


def convolutions() -> nn.Module:
    return Named(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.ReLU()))


class Named(nn.Module):
    """A call by keyword to a module that takes one tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
