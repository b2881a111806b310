"""LAPACK's long calls, which an interruption does not have to wait for.

A call into LAPACK takes seconds on a large matrix, and Python looks at signals between calls alone. Large calls on the
CPU run on a thread beside the main one, which waits for it and can be interrupted. What a device cannot decompose, the
CPU does. Invariant: results are those of the plain call with the caller's number of threads, on the matrices' device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tensoradapt.linalg.home import at_home

LONG = 1024  # rows and columns from which on a decomposition takes a noticeable time
LOOK = 0.1  # seconds between two looks at signals


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of symmetric matrices, ascending, and their eigenvectors.  Shape: (.., n, n)."""
    values, vectors = _beside(torch.linalg.eigh, a)
    return values, vectors


def eigvalsh(a: Tensor) -> Tensor:
    """The eigenvalues of symmetric matrices, ascending.  Shape: (.., n, n) -> (.., n)."""
    found: Tensor = _beside(torch.linalg.eigvalsh, a)
    return found


def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (.., m, k), S (.., k) descending and V^T (.., k, n) of matrices, k = min(m, n).  Shape: (.., m, n)."""
    u, s, vh = _beside(lambda x: torch.linalg.svd(x, full_matrices=False), a)
    return u, s, vh


def qr(a: Tensor) -> tuple[Tensor, Tensor]:
    """Q (.., m, k) and R (.., k, n) of matrices, k = min(m, n).  Shape: (.., m, n)."""
    q, r = at_home(torch.linalg.qr, a)
    return q, r


def _beside(function: Callable[[Tensor], Any], a: Tensor) -> Any:
    """What the function returns or raises, from a thread of its own where the call is long and signals come here."""
    here = threading.current_thread() is threading.main_thread()
    if not here or a.device.type != "cpu" or min(a.shape[-2:], default=0) < LONG:
        return at_home(function, a)
    found: list[Any] = []
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()

    def work() -> None:
        torch.set_num_threads(threads)
        try:
            with torch.set_grad_enabled(grad):
                found.append((function(a), None))
        except RuntimeError as error:
            found.append((None, error))

    thread = threading.Thread(target=work, name="lapack")
    thread.start()
    while thread.is_alive():
        thread.join(LOOK)
    result, error = found[0]
    if error is not None:
        raise error
    return result
