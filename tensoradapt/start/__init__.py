"""Starts: factors of an attached adapter taken from weights, gradients, activations or deltas."""

from tensoradapt.start.activations import Activations, activations
from tensoradapt.start.gradients import Gradients, gradients
from tensoradapt.start.methods import METHODS, initialize

__all__ = ["METHODS", "Activations", "Gradients", "activations", "gradients", "initialize"]
