"""What the decompositions share: their result, seeded noise, norms and orthonormal bases.

Invariant: a norm of many float32 entries is accumulated in float64, so that a small residual is no rounding error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensoradapt.errors import ShapeError, SpecError
from tensoradapt.linalg.home import double, home_of, moved
from tensoradapt.linalg.lapack import qr
from tensoradapt.linalg.level import norms

DEVICES = ("cpu", "cuda", "mps")
MEANT = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "metal": "mps", "apple": "mps"}
LARGE = 1 << 26  # entries from which on a matrix is read in strips, or is worked on alone
KEPT = {"longdouble": "float64", "float128": "float64", "bfloat16": "float32"}  # dtypes of arrays alone
BLOCK = 1 << 22  # entries that are looked at at a time where a full-size copy would cost too much memory


@dataclass(frozen=True)
class Seed:
    """Where random numbers come from: equal seeds give equal numbers on every machine and thread count."""

    value: int = 0

    def noise(self, *shape: int, like: Tensor, salt: int = 0) -> Tensor:
        """Normal entries in the dtype and on the device of `like`; another `salt` gives others."""
        generator = torch.Generator().manual_seed((self.value * 1_000_003 + salt) % (1 << 63))
        return moved(torch.randn(*shape, generator=generator, dtype=torch.float32).to(like.dtype), like.device)


@dataclass(frozen=True)
class LowRank:
    """A truncated singular value decomposition A ~ sum_r u[:, r] s[r] v[:, r], and what it leaves out.

    Shapes: u (.., m, r), s (.., r) descending, v (.., n, r), total and residual (..). `total` is the squared norm of A,
    `residual` the norm of A less the sum: exact up to rounding, since u is orthonormal and v s = A^T u. `method` and
    `steps` say how it was found, `retried` why it was found on the CPU (empty where it was not).
    """

    u: Tensor
    s: Tensor
    v: Tensor
    total: Tensor
    residual: Tensor
    method: str
    steps: int = 0
    retried: str = ""

    def dense(self) -> Tensor:
        """The sum.  Shape: (.., m, n)."""
        return (self.u * self.s[..., None, :]) @ self.v.mT

    def cut(self, rank: int) -> LowRank:
        """The first `rank` terms."""
        dropped = double(self.s[..., rank:]).square().sum(-1)
        residual = (double(self.residual).square() + dropped).sqrt()
        return replace(
            self, u=self.u[..., :rank], s=self.s[..., :rank], v=self.v[..., :rank], residual=residual.to(self.s)
        )

    def times(self, level: float) -> LowRank:
        """The decomposition of `level` times the matrix, in float64 where the dtype has no such numbers."""
        s, residual = double(self.s) * level, double(self.residual) * level
        fits = bool(s.to(self.s.dtype).isfinite().all() & residual.to(self.s.dtype).isfinite().all())
        if fits:
            s, residual = s.to(self.s), residual.to(self.s)
        return replace(self, s=s, total=self.total * level * level, residual=residual)

    def turned(self) -> LowRank:
        """The decomposition of the transpose."""
        return replace(self, u=self.v, v=self.u)


def square(a: Tensor) -> Tensor:
    """The squared Frobenius norm of matrices, summed over rows or columns in float64.  Shape: (.., m, n) -> (..)."""
    along = -1 if a.stride(-1) == 1 else -2  # the way the entries lie
    return norms(a, along).square().sum(-1)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with an entry that is not finite: a device is waited for once, for all of them."""
    sound = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return next((name for name, finite in zip(tensors, sound, strict=True) if not finite), None)


def orthonormal(y: Tensor, basis: Tensor | None = None) -> Tensor:
    """An orthonormal basis of the columns of y, orthogonal to a basis that there is already.

    Shape: (.., m, b) -> (.., m, b).
    """
    if basis is None:
        return qr(y)[0]
    for _ in range(2):  # twice is enough (Giraud, Langou and Rozloznik, 2005), also for columns that all but depend
        y = qr(y - basis @ (basis.mT @ y))[0]
    return y


def signed(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors with the largest entry of every column of u positive.  Shapes: (.., m, r), (.., n, r)."""
    if not u.shape[-1]:
        return u, v
    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * signs, v * signs


def leftover(a: Tensor, u: Tensor, sv: Tensor) -> Tensor:
    """The norm of A - u sv^T, formed a block of rows at a time.  Shapes: (.., m, n), (.., m, r), (.., n, r) -> (..)."""
    found = torch.zeros(a.shape[:-2], dtype=torch.float64, device=home_of(a.device))
    height = max(1, BLOCK * a.shape[-2] // max(a.numel(), 1))
    for start in range(0, a.shape[-2], height):
        rows = slice(start, start + height)
        found += square(a[..., rows, :] - u[..., rows, :] @ sv.mT)
    return found.sqrt()


def gram_matrix(a: Tensor) -> Tensor:
    """A A^T in float64, a block of columns at a time.  Shape: (.., m, n) -> (.., m, m)."""
    found = torch.zeros(*a.shape[:-1], a.shape[-2], dtype=torch.float64, device=home_of(a.device))
    width = max(1, BLOCK * a.shape[-1] // max(a.numel(), 1))
    for start in range(0, a.shape[-1], width):
        block = double(a[..., start : start + width])
        found += block @ block.mT
    return found


def empty(device: str | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """What deltas are like: a dtype and a device. Raises SpecError on a device that is not there."""
    try:
        return torch.zeros((), dtype=dtype, device=device or "cpu")
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # torch is not of one mind about it
        reason = next(iter(str(error).splitlines()), "")
        shown = None if reason.startswith("Expected one of") else reason  # twenty names that nobody has
        hint = None if shown else _meant(str(device))
        expected = "cpu, cuda, cuda:1, mps"
        raise SpecError(f"device {device!r} cannot be used", got=shown, expected=expected, hint=hint) from None


def _meant(device: str) -> str | None:
    """The device that a name like `gpu` means."""
    kind = device.partition(":")[0].lower()
    found = MEANT.get(kind) or next(iter(get_close_matches(kind, DEVICES, n=1)), None)
    return f"did you mean {found}?" if found else None


def _plain(array: Any) -> Any:
    """An array as torch takes it: a dtype that it has, bytes in this machine's order, no strides backwards."""
    array = array.astype(KEPT.get(array.dtype.name) or array.dtype.newbyteorder("="), copy=False)
    return array.copy() if any(stride < 0 for stride in array.strides) else array


def as_tensor(value: Any, what: str = "this") -> Tensor:
    """A tensor, or an array or nested list as one; memory is shared where it can be. Raises ShapeError on all else."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(_plain(np.asarray(value)))
    except (TypeError, ValueError, RuntimeError):
        raise ShapeError(
            f"{what} is no tensor", got=type(value).__name__, expected="a torch tensor or a numpy array"
        ) from None
