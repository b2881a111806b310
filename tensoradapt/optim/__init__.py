"""Optimisers that know the network whose factors they train, each around any optimiser of `torch.optim`."""

from tensoradapt.optim.stiefel import Stiefel
from tensoradapt.optim.wrapper import Wrapper

__all__ = ["Stiefel", "Wrapper"]
