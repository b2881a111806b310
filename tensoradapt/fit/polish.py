"""Polish: a few sweeps on the whole tensor, after a fit in shared bases that lost some of it.

For the best fit N of the projected tensor, |T - N|^2 <= min over networks X of |T - X|^2 + lost. Invariant: a polished
fit is never worse than the one that it began with.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from tensoradapt.fit.als import als
from tensoradapt.fit.result import Fit
from tensoradapt.fit.tucker import evened, hooi, tucker_core

CLOSE = 2e-3  # a share of the squared error that is not worth a sweep: 0.1 % of the error
SWEEPS = 3  # of alternating least squares


def polished(fit: Fit, lost: float, tensor: Tensor, seed: int) -> Fit:
    """A fit in the axes of the whole tensor T[open], with the sweeps on it that its bases' loss calls for."""
    error = fit.relative_error**2 * fit.total
    if lost <= CLOSE * error:
        return fit
    core = tucker_core(fit.diagram)
    if core is not None:
        factors, after = hooi(tensor, fit.diagram, core, fit.factors, held=fit.total - error)
        if after >= error:
            return fit
        return replace(fit, factors=evened(factors), relative_error=math.sqrt(after / fit.total))
    if fit.method == "svd":
        return fit
    found = als(tensor, fit.diagram, start=fit.factors, sweeps=SWEEPS, seed=seed)
    if found.history[-1] >= fit.relative_error:
        return fit
    return replace(fit, factors=found.factors, relative_error=found.history[-1], history=(*fit.history, *found.history))
