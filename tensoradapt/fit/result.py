"""What a fit returns: the factors of a diagram, and how far they are from the tensor."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.interchange import from_diagram
from tensoradapt.linalg import double, home_of, moved
from tensoradapt.lower import dense


@dataclass(frozen=True)
class Fit:
    """The factors of a diagram whose network is close to a tensor X.

    `relative_error` is |X - X^| / |X| (0 where X is zero); `bound` is what the method guarantees for it, from the
    spectra that it discarded; no fit of these ranks has a smaller one than `optimal`; both are None where unknown.
    `spectra` holds the singular values across every bond as far as they were computed, `history` the relative error
    after every sweep of an iterative method, `converged` whether it settled; `retried` lists the failures after which
    a step was done once more, on the CPU in float64; `agreed` says whether two random starts came to one error.
    """

    diagram: Diagram
    factors: Mapping[str, Tensor] = field(repr=False)
    relative_error: float
    total: float
    method: str
    format: str = "network"
    bound: float | None = None
    optimal: float | None = None
    spectra: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    history: tuple[float, ...] = field(default=(), repr=False)
    converged: bool = True
    retried: tuple[str, ...] = ()
    agreed: bool = field(default=False, repr=False)

    def dense(self) -> Tensor:
        """The network as a tensor, axes in the order of the diagram's."""
        return dense(self.diagram, self.factors)

    def to_tensorly(self) -> Any:
        """The factors as a TuckerTensor, TTTensor, CPTensor or TTMatrix. Raises SpecError where there is no class."""
        return from_diagram(self.diagram, self.factors, self.format)

    def times(self, level: float, fixed: Collection[str] = ()) -> Fit:
        """The fit of `level` times the tensor, a power of two: shared evenly among the nodes that are not `fixed`."""
        if level == 1.0:
            return self
        factors = spread(self.factors, level, fixed)
        spectra = {bond: double(s) * level for bond, s in self.spectra.items()}
        return replace(self, factors=factors, total=self.total * level * level, spectra=spectra)

    def to(self, device: torch.device) -> Fit:
        """The fit with its factors and spectra on a device; those in float64 stay where they are if it has none."""
        if all(tensor.device == device for tensor in (*self.factors.values(), *self.spectra.values())):
            return self
        homes = {torch.float64: home_of(device)}
        factors, spectra = (
            {name: moved(tensor, homes.get(tensor.dtype, device)) for name, tensor in held.items()}
            for held in (self.factors, self.spectra)
        )
        return replace(self, factors=factors, spectra=spectra)

    @property
    def num_parameters(self) -> int:
        """The number of entries of all factors."""
        return self.diagram.num_parameters

    @property
    def rank(self) -> dict[str, int]:
        """What every bond got."""
        return {bond: self.diagram.sizes[bond] for bond in self.diagram.bonds}

    def __str__(self) -> str:
        sizes, dense = self.diagram.sizes, math.prod(self.diagram.sizes[axis] for axis in self.diagram.open)
        axes = " ".join(f"{axis}={sizes[axis]}" for axis in self.diagram.open)
        ranks = " ".join(f"{bond}={size}" for bond, size in self.rank.items()) or "no bonds"
        share = f"{self.num_parameters / dense:.3g} of {dense:,}"
        lines = [f"{self.format} of {axes}: relative error {self.relative_error:.3g}"]
        lines += [f"{self.num_parameters:,} parameters ({share}), ranks {ranks}"]
        known = [f"no fit of these ranks is below {self.optimal:.3g}"] if self.optimal is not None else []
        known += [] if self.converged else ["not converged: more `sweeps` or `restarts` may help"]
        return "\n".join(line for text in (*lines, *known) for line in wrap(text, 80, subsequent_indent="  "))


def spread(factors: Mapping[str, Tensor], level: float, fixed: Collection[str]) -> dict[str, Tensor]:
    """Factors of a network that is multiplied by a power of two: its exponent in even parts on all but the fixed."""
    free = [node for node in factors if node not in fixed]
    if level == 1.0 or not free:
        return dict(factors)
    share, more = divmod(round(math.log2(level)), len(free))
    powers = {node: math.ldexp(1.0, share + (k < more)) for k, node in enumerate(free)}
    made = {node: (double(tensor) * powers[node]).to(tensor) for node, tensor in factors.items() if node in powers}
    return {**factors, **made}
