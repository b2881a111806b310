"""Optimisers that know the network whose factors they train, each around any optimiser of `torch.optim`."""

from tensoradapt.optim.galore import GaLore
from tensoradapt.optim.lorapro import LoRAPro
from tensoradapt.optim.roles import parameter_groups
from tensoradapt.optim.scaled import ScaledGD
from tensoradapt.optim.schedule import CubicSchedule, RankSchedule, Schedule
from tensoradapt.optim.stiefel import Stiefel
from tensoradapt.optim.wrapper import Wrapper

__all__ = [
    "CubicSchedule",
    "GaLore",
    "LoRAPro",
    "RankSchedule",
    "ScaledGD",
    "Schedule",
    "Stiefel",
    "Wrapper",
    "parameter_groups",
]
