"""Every layer with its torch counterpart and the inputs they are compared on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody knows

import handgrad as hg
from handgrad.layer import Layer

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One comparison: how to make both sides and their inputs at the size of N rows and D columns.

    ours, theirs   make the layer and the torch module from D; their parameters have the same names
    inputs         makes the inputs of a forward from N, D and the dtype: a tuple, one tensor by default
    """

    name: str
    ours: Callable[[int], Layer]
    theirs: Callable[[int], nn.Module]
    inputs: Callable[[int, int, torch.dtype], Inputs] = lambda N, D, dtype: (torch.randn(N, D, dtype=dtype),)
    random: bool = False  # draws random numbers in training: results are compared in evaluation

    def fits(self, N: int, D: int) -> bool:
        """Whether the case exists at the size: shapes that cut D or N into pieces need whole ones."""
        try:
            return all(t.numel() > 0 for t in self.inputs(N, D, torch.float32))
        except RuntimeError:
            return False


class Attention(nn.Module):
    """torch.nn.MultiheadAttention of x with itself."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class LinearCrossEntropy(nn.Module):
    """torch.nn.Linear and cross entropy: what LinearCrossEntropy does in chunks."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(x), target)


class Unroll(nn.Module):
    """A torch cell in a loop over the time steps."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.cell = nn.RNNCell(D, D)

    def forward(self, x: Tensor) -> Tensor:
        state, states = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            states.append(state)
        return torch.stack(states, 1)


class Join(nn.Module):
    """torch's reshape for FlattenConsecutive."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1] // 2, -1)


def _reshaped(*shape: int) -> Callable[[int, int, torch.dtype], Inputs]:
    """Inputs of N D numbers, in N rows of the shape; a -1 in it takes the rest."""
    return lambda N, D, dtype: (torch.randn(N, D, dtype=dtype).reshape(N, *shape),)


def _steps(count: int) -> Callable[[int, int, torch.dtype], Inputs]:
    """N/count sequences of `count` steps."""
    return lambda N, D, dtype: (torch.randn(N, D, dtype=dtype).reshape(-1, count, D),)


def _image(N: int, D: int, dtype: torch.dtype) -> Inputs:
    height = 2 ** (max((D // 4).bit_length() - 1, 0) // 2)
    return (torch.randn(N, D, dtype=dtype).reshape(N, 4, height, -1),)


def _labels(N: int, D: int, dtype: torch.dtype) -> Inputs:
    return torch.randn(N, D, dtype=dtype), torch.randint(D, (N,))


_ALL = [
    Case("Linear", lambda D: hg.Linear(D, D), lambda D: nn.Linear(D, D)),
    Case("BatchNorm1d", lambda D: hg.BatchNorm1d(D), lambda D: nn.BatchNorm1d(D)),
    Case("Tanh", lambda D: hg.Tanh(), lambda D: nn.Tanh()),
    Case("CrossEntropy", lambda D: hg.CrossEntropy(), lambda D: nn.CrossEntropyLoss(), _labels),
    Case(
        "Embedding",
        lambda D: hg.Embedding(D, D),
        lambda D: nn.Embedding(D, D),
        lambda N, D, dtype: (torch.randint(D, (N,)),),
    ),
    Case("Flatten", lambda D: hg.Flatten(), lambda D: nn.Flatten(), _reshaped(4, -1)),
    Case("ReLU", lambda D: hg.ReLU(), lambda D: nn.ReLU()),
    Case("LeakyReLU", lambda D: hg.LeakyReLU(), lambda D: nn.LeakyReLU()),
    Case("Sigmoid", lambda D: hg.Sigmoid(), lambda D: nn.Sigmoid()),
    Case("SiLU", lambda D: hg.SiLU(), lambda D: nn.SiLU()),
    Case("GELU", lambda D: hg.GELU(), lambda D: nn.GELU()),
    Case("Softmax", lambda D: hg.Softmax(-1), lambda D: nn.Softmax(-1)),
    Case("LogSoftmax", lambda D: hg.LogSoftmax(-1), lambda D: nn.LogSoftmax(-1)),
    Case("LayerNorm", lambda D: hg.LayerNorm(D), lambda D: nn.LayerNorm(D)),
    Case("RMSNorm", lambda D: hg.RMSNorm(D), lambda D: nn.RMSNorm(D)),
    Case("Dropout", lambda D: hg.Dropout(0.5), lambda D: nn.Dropout(0.5), random=True),
    Case("Conv1d", lambda D: hg.Conv1d(8, 8, 3, padding=1), lambda D: nn.Conv1d(8, 8, 3, padding=1), _reshaped(8, -1)),
    Case("Conv2d", lambda D: hg.Conv2d(4, 8, 3, padding=1), lambda D: nn.Conv2d(4, 8, 3, padding=1), _image),
    Case("MaxPool2d", lambda D: hg.MaxPool2d(2), lambda D: nn.MaxPool2d(2), _image),
    Case("AvgPool2d", lambda D: hg.AvgPool2d(2), lambda D: nn.AvgPool2d(2), _image),
    Case("FlattenConsecutive", lambda D: hg.FlattenConsecutive(2), lambda D: Join(), _reshaped(4, -1)),
    Case("RNNCell", lambda D: hg.RNNCell(D, D), lambda D: nn.RNNCell(D, D)),
    Case("GRUCell", lambda D: hg.GRUCell(D, D), lambda D: nn.GRUCell(D, D)),
    Case("LSTMCell", lambda D: hg.LSTMCell(D, D), lambda D: nn.LSTMCell(D, D)),
    Case("Unroll", lambda D: hg.Unroll(hg.RNNCell(D, D)), lambda D: Unroll(D), _steps(8)),
    Case("SelfAttention", lambda D: hg.SelfAttention(D, 4), lambda D: Attention(D), _steps(16)),
    Case(
        "MSE",
        lambda D: hg.MSE(),
        lambda D: nn.MSELoss(),
        lambda N, D, dtype: (torch.randn(N, D, dtype=dtype), torch.randn(N, D, dtype=dtype)),
    ),
    Case(
        "BCEWithLogits",
        lambda D: hg.BCEWithLogits(),
        lambda D: nn.BCEWithLogitsLoss(),
        lambda N, D, dtype: (torch.randn(N, D, dtype=dtype), torch.rand(N, D, dtype=dtype)),
    ),
    Case("LinearCrossEntropy", lambda D: hg.LinearCrossEntropy(D, D), lambda D: LinearCrossEntropy(D), _labels),
]

CASES: dict[str, Case] = {case.name: case for case in _ALL}
"""The layers of handgrad that do arithmetic, by name; containers only call what is inside them."""


def case_of(ours: Any, theirs: Any) -> Case:
    """A case for two classes of anybody: each is called without arguments, or with D, or with D and D.

    >>> case_of(hg.Tanh, nn.Tanh).ours(8), case_of(hg.Linear, nn.Linear).ours(8)
    (Tanh(), Linear(8 -> 8))
    """
    name = getattr(ours, "__name__", str(ours))
    return Case(name, lambda D: _made(ours, D), lambda D: _made(theirs, D), _of_kind(ours))


def _of_kind(ours: Any) -> Callable[[int, int, torch.dtype], Inputs]:
    if isinstance(ours, type) and issubclass(ours, hg.Loss):
        return _labels
    return lambda N, D, dtype: (torch.randn(N, D, dtype=dtype),)


def _made(maker: Any, D: int) -> Any:
    for arguments in ((), (D,)):
        try:
            return maker(*arguments)
        except TypeError:
            continue
    return maker(D, D)
