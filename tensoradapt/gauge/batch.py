"""Equal networks as one: factors stacked along an axis that all nodes carry, so that one QR serves many groups.

Invariant: `unstacked(stacked(diagram, networks))` gives the networks back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tensoradapt.diagram import Diagram
from tensoradapt.gauge.tree import Factors, Network, measured

STACK = "stacked networks"  # no name that a spec can give an axis


def stacked(diagram: Diagram, factors: Sequence[Factors]) -> Network:
    """Factors of several networks of one diagram as one network with a batch axis in front.  Shape: (network, ..)."""
    wide = stacked_diagram(diagram, len(factors))
    return Network(wide, {node: torch.stack([held[node] for held in factors]) for node in wide.nodes})


def stacked_diagram(diagram: Diagram, count: int) -> Diagram:
    """The diagram of several networks as one."""
    nodes = {node: (STACK, *indices) for node, indices in diagram.nodes.items()}
    return replace(diagram, sizes={STACK: count, **diagram.sizes}, nodes=nodes, open=(STACK, *diagram.open))


def unstacked(network: Network) -> list[Network]:
    """The networks of a batch, each with its own diagram."""
    diagram = network.diagram
    sizes = {index: size for index, size in diagram.sizes.items() if index != STACK}
    nodes = {node: indices[1:] for node, indices in diagram.nodes.items()}
    plain = replace(diagram, sizes=sizes, nodes=nodes, open=diagram.open[1:])
    parts = {node: tensor.unbind() for node, tensor in network.factors.items()}
    return [measured(plain, {n: parts[n][k] for n in nodes}) for k in range(diagram.sizes[STACK])]
