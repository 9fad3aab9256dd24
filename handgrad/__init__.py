"""A mini layer framework on PyTorch tensors without autograd: every layer has a forward and an explicit backward."""

from handgrad.errors import (
    ArgumentError,
    DtypeError,
    HandgradError,
    IndexRangeError,
    ShapeError,
    StateDictError,
    StateError,
)
from handgrad.layer import Layer, buffer, parameter
from handgrad.layers.activation import Tanh
from handgrad.layers.batchnorm import BatchNorm1d
from handgrad.layers.container import Sequential
from handgrad.layers.flatten import Flatten
from handgrad.layers.linear import Linear
from handgrad.layers.sparse import Embedding
from handgrad.losses.cross_entropy import CrossEntropy
from handgrad.losses.loss import Loss
from handgrad.optim import SGD
from handgrad.train import TrainStep

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "ArgumentError",
    "BatchNorm1d",
    "CrossEntropy",
    "DtypeError",
    "Embedding",
    "Flatten",
    "HandgradError",
    "IndexRangeError",
    "Layer",
    "Linear",
    "Loss",
    "Sequential",
    "ShapeError",
    "StateDictError",
    "StateError",
    "Tanh",
    "TrainStep",
    "buffer",
    "parameter",
]
