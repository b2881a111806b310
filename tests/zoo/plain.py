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


class Wrapped(nn.Module):
    """As a wrapper for several processes names its model."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Masked(nn.Linear):
    """A linear module that uses a part of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.tril(), self.bias)


class Clamped(nn.Linear):
    """A linear module whose output is not linear in its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-0.5, 0.5)).clamp(-0.5, 0.5)


class Router(nn.Linear):
    """A linear module that returns more than one tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(x)
        return scores.softmax(-1), scores


class Doubled(nn.Module):
    """Something with `in_features` and `out_features` that returns twice as many."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 16, 16
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x @ self.weight.mT, x], -1)


class Own(nn.Module):
    """A head behind one module with a forward of its own."""

    def __init__(self, part: str) -> None:
        super().__init__()
        made = {"masked": Masked, "clamped": Clamped, "router": Router}
        self.part = Doubled() if part == "doubled" else made[part](16, 16)
        self.head = nn.Linear(32 if part == "doubled" else 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.part(x)
        return self.head(torch.tanh(found[1] * found[0] if isinstance(found, tuple) else found))


class Tied(nn.Module):
    """An embedding whose rows are the head's, and two linear modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head.weight, self.two.weight = self.embedding.weight, self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(torch.tanh(self.one(self.embedding(x)))))


class ScaledEmbedding(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 4.0


class Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = ScaledEmbedding(40, 16), nn.Linear(16, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


class Twice(nn.Module):
    """One module that is called at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(16, 16)
        self.two = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class Bare(nn.Module):
    """Matrices and experts as parameters, without a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(16, 16))
        self.experts = nn.Parameter(torch.randn(3, 16, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.einsum("bti,eio->bto", x @ self.mix, self.experts)))


class Lines(nn.Module):
    """Convolutions of one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = nn.Conv1d(16, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(torch.tanh(self.wide(x.mT))).mT)


class Recurrent(nn.Module):
    """A fused recurrent network before a head."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.GRU(16, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x)[0])


class Transposed(nn.Module):
    """A convolution that enlarges, behind one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 6, 3, stride=2), nn.ConvTranspose2d(6, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.down(x)))
