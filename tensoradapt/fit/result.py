"""What a fit returns: the factors of a diagram, and how far they are from the tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.interchange import from_diagram
from tensoradapt.lower import dense


@dataclass(frozen=True)
class Fit:
    """The factors of a diagram whose network is close to a tensor X.

    `relative_error` is |X - X^| / |X| (0 where X is zero); `bound` is what the method guarantees for it, from the
    spectra that it discarded; no fit of these ranks has a smaller one than `optimal`; both are None where unknown.
    `spectra` holds the singular values across every bond as far as they were computed, `history` the relative error
    after every sweep of an iterative method, `converged` whether it settled; `retried` lists the failures after which
    a step was done once more, on the CPU in float64.
    """

    diagram: Diagram
    factors: Mapping[str, Tensor]
    relative_error: float
    total: float
    method: str
    format: str = "network"
    bound: float | None = None
    optimal: float | None = None
    spectra: Mapping[str, Tensor] = field(default_factory=dict)
    history: tuple[float, ...] = ()
    converged: bool = True
    retried: tuple[str, ...] = ()

    def dense(self) -> Tensor:
        """The network as a tensor, axes in the order of the diagram's."""
        return dense(self.diagram, self.factors)

    def to_tensorly(self) -> Any:
        """The factors as a TuckerTensor, TTTensor, CPTensor or TTMatrix. Raises SpecError where there is no class."""
        return from_diagram(self.diagram, self.factors, self.format)

    @property
    def num_parameters(self) -> int:
        """The number of entries of all factors."""
        return self.diagram.num_parameters

    @property
    def rank(self) -> dict[str, int]:
        """What every bond got."""
        return {bond: self.diagram.sizes[bond] for bond in self.diagram.bonds}
