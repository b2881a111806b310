"""Optimisers that know the network whose factors they train, each around any optimiser of `torch.optim`."""

from tensoradapt.optim.lorapro import LoRAPro
from tensoradapt.optim.scaled import ScaledGD
from tensoradapt.optim.stiefel import Stiefel
from tensoradapt.optim.wrapper import Wrapper

__all__ = ["LoRAPro", "ScaledGD", "Stiefel", "Wrapper"]
