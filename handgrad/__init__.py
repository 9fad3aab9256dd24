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
from handgrad.layers.branches import Concat, Identity, Parallel, Product, Residual, Sum
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
    "Concat",
    "CrossEntropy",
    "DtypeError",
    "Embedding",
    "Flatten",
    "HandgradError",
    "Identity",
    "IndexRangeError",
    "Layer",
    "Linear",
    "Loss",
    "Parallel",
    "Product",
    "Residual",
    "Sequential",
    "ShapeError",
    "StateDictError",
    "StateError",
    "Sum",
    "Tanh",
    "TrainStep",
    "buffer",
    "parameter",
]
