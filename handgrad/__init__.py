"""A mini layer framework on PyTorch tensors without autograd: every layer has a forward and an explicit backward."""

from handgrad.bridge import from_torch, to_torch
from handgrad.errors import (
    ArgumentError,
    CompileError,
    DtypeError,
    HandgradError,
    IndexRangeError,
    NonFiniteError,
    ProcessError,
    ShapeError,
    StateDictError,
    StateError,
)
from handgrad.layer import Layer, buffer, parameter
from handgrad.layers.activation import GELU, LeakyReLU, LogSoftmax, ReLU, Sigmoid, SiLU, Softmax, Tanh
from handgrad.layers.attention import MultiheadAttention, SelfAttention
from handgrad.layers.batchnorm import BatchNorm1d, BatchNorm2d
from handgrad.layers.cells import GRUCell, LSTMCell, RNNCell
from handgrad.layers.containers import Concat, Constant, Identity, Parallel, Product, Residual, Sequential, Sum
from handgrad.layers.conv import Conv1d, Conv2d, ConvTranspose2d
from handgrad.layers.dropout import Dropout
from handgrad.layers.flatten import Flatten, FlattenConsecutive
from handgrad.layers.graph import Add, Cat, Graph, Multiply
from handgrad.layers.linear import Linear
from handgrad.layers.normalization import GroupNorm, LayerNorm, RMSNorm
from handgrad.layers.pooling import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from handgrad.layers.recurrent import GRU, LSTM, RNN, Unroll
from handgrad.layers.sparse import Embedding
from handgrad.layers.upsample import Upsample
from handgrad.losses.bce import BCEWithLogits
from handgrad.losses.cross_entropy import CrossEntropy
from handgrad.losses.linear_cross_entropy import LinearCrossEntropy
from handgrad.losses.loss import Loss
from handgrad.losses.mse import MSE
from handgrad.losses.several import Losses
from handgrad.memory import Recompute, keep_freed_memory
from handgrad.optim import SGD
from handgrad.parallel import SyncBatchNorm, average_gradients, broadcast_model
from handgrad.statistics import Statistics
from handgrad.train import TrainStep
from handgrad.watch import tripwire, watch

__version__ = "0.1.0"

__all__ = [
    "GELU",
    "GRU",
    "LSTM",
    "MSE",
    "RNN",
    "SGD",
    "AdaptiveAvgPool2d",
    "Add",
    "ArgumentError",
    "AvgPool2d",
    "BCEWithLogits",
    "BatchNorm1d",
    "BatchNorm2d",
    "Cat",
    "CompileError",
    "Concat",
    "Constant",
    "Conv1d",
    "Conv2d",
    "ConvTranspose2d",
    "CrossEntropy",
    "Dropout",
    "DtypeError",
    "Embedding",
    "Flatten",
    "FlattenConsecutive",
    "GRUCell",
    "Graph",
    "GroupNorm",
    "HandgradError",
    "Identity",
    "IndexRangeError",
    "LSTMCell",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LinearCrossEntropy",
    "LogSoftmax",
    "Loss",
    "Losses",
    "MaxPool2d",
    "MultiheadAttention",
    "Multiply",
    "NonFiniteError",
    "Parallel",
    "ProcessError",
    "Product",
    "RMSNorm",
    "RNNCell",
    "ReLU",
    "Recompute",
    "Residual",
    "SelfAttention",
    "Sequential",
    "ShapeError",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "StateDictError",
    "StateError",
    "Statistics",
    "Sum",
    "SyncBatchNorm",
    "Tanh",
    "TrainStep",
    "Unroll",
    "Upsample",
    "average_gradients",
    "broadcast_model",
    "buffer",
    "from_torch",
    "keep_freed_memory",
    "parameter",
    "to_torch",
    "tripwire",
    "watch",
]
