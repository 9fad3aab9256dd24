"""For each public layer and loss its counterpart in torch, and ordinary inputs to compare the two on.

This module has the names of handgrad and the means of torch: ``twins.Linear(3, 4)`` takes what ``Linear(3, 4)`` takes
and is the equal torch.nn.Module, with the same `state_dict` keys. So one text makes both sides, whatever it composes:

>>> from handgrad import twins
>>> def model(lib, D):
...     return lib.Sequential(lib.Linear(D, D), lib.Residual(lib.Tanh()))
>>> list(model(handgrad, 4).state_dict()) == list(model(twins, 4).state_dict())
True

What handgrad has beside torch and what changes no result but the weights that it starts from (`gain`, `generator`) is
left out. `WITHOUT_ARGUMENT` and `BESIDE_TORCH` say which arguments only one of the two has. The others have torch's
names and defaults; those that may be given without their names are the first of torch's, in torch's order.

`TWINS` has an ordinary size of each of them. The property tests, the benchmarks and the tests of kernels read it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import (  # noqa: F401 - the same under the same name
    GELU,
    AdaptiveAvgPool2d,
    AvgPool2d,
    Conv1d,
    Conv2d,
    ConvTranspose2d,
    Dropout,
    Embedding,
    Flatten,
    GroupNorm,
    GRUCell,
    Identity,
    LayerNorm,
    LeakyReLU,
    Linear,
    LogSoftmax,
    LSTMCell,
    MaxPool2d,
    ReLU,
    RMSNorm,
    RNNCell,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
    Upsample,
)
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import handgrad
from handgrad.layer import Layer, arity

CrossEntropy, MSE, BCEWithLogits = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss


def _batch_norm(
    module: type[nn.Module], *args: Any, unbiased: bool = False, channels_last: bool = False, **options: Any
) -> nn.Module:
    """Torch's module itself, and another only for what it does not have."""
    if unbiased or channels_last:
        return _BatchNorm(*args, unbiased=unbiased, channels_last=channels_last, **options)
    return module(*args, **options)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch's module with n - 1 in the batch's variance, or for channels in the last dimension."""

    def __init__(self, *args: Any, unbiased: bool, channels_last: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.unbiased, self.channels_last = unbiased, channels_last

    def _check_input_dim(self, input: Tensor) -> None:
        """Take x of any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(-1, 1) if self.channels_last else x
        out: Tensor = super().forward(rows)  # the running statistics have n - 1 in any case
        if self.unbiased and (self.training or self.running_mean is None):
            others = [d for d in range(rows.dim()) if d != 1]
            mean, n = rows.mean(others, keepdim=True), rows.numel() // self.num_features
            var = (rows - mean).square().sum(others, keepdim=True) / max(n - 1, 1)  # var() warns of an empty batch
            out = (rows - mean) / (var + self.eps).sqrt()
            if self.affine:
                out = out * self.weight.view_as(mean[0]) + self.bias.view_as(mean[0])
        return out.movedim(1, -1) if self.channels_last else out


BatchNorm1d, BatchNorm2d = partial(_batch_norm, nn.BatchNorm1d), partial(_batch_norm, nn.BatchNorm2d)
SyncBatchNorm = partial(_batch_norm, nn.SyncBatchNorm)


class FlattenConsecutive(nn.Module):
    """The view of the lecture."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        N, T, C = x.shape
        out = x.reshape(N, T // self.size, self.size * C)
        return out.squeeze(1) if self.size == T else out


class MultiheadAttention(nn.MultiheadAttention):
    """torch's, for its output alone."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **masks: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = super().forward(query, key, value, need_weights=False, **masks)[0]  # type: ignore[arg-type]
        return out


class SelfAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention of x with itself."""

    def __init__(self, embed_dim: int, num_heads: int, *, bias: bool = True, causal: bool = False) -> None:
        super().__init__(embed_dim, num_heads, bias=bias, batch_first=True)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # one input for three
        T, D = x.shape[-2:]
        rows = x.reshape(math.prod(x.shape[:-2]), T, D)
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1) if self.causal else None
        out = super().forward(rows, rows, rows, need_weights=False, attn_mask=later, is_causal=self.causal)[0]
        return out.reshape(x.shape)


class Unroll(nn.Module):
    """A torch cell in a loop over the time steps."""

    def __init__(self, cell: nn.Module, dim: int = 1, *, steps: int | None = None, return_state: bool = False) -> None:
        super().__init__()
        self.cell, self.dim, self.steps, self.return_state = cell, dim, steps, return_state

    def forward(self, x: Tensor, state: Any = None) -> Any:
        outs = []
        for t, x_t in enumerate(x.unbind(self.dim)):
            if t > 0 and self.steps is not None and t % self.steps == 0:
                state = _each(Tensor.detach, state)
            state = self.cell(x_t, state)
            outs.append(state[0] if isinstance(state, tuple) else state)
        out = torch.stack(outs, self.dim)
        return (out, state) if self.return_state else out


class _Recurrent(nn.Module):
    """What RNN, GRU and LSTM have beside torch's: a state without the dimension of the stacked layers, on request."""

    def __init__(self, *args: Any, return_state: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.return_state = return_state

    def forward(self, x: Tensor, state: Any = None) -> Any:
        first = None if state is None else _each(lambda s: s.unsqueeze(0), state)
        out, last = super().forward(x, first)
        return (out, _each(lambda s: s.squeeze(0), last)) if self.return_state else out


class RNN(_Recurrent, nn.RNN):  # type: ignore[misc]  # another forward
    """torch.nn.RNN of one layer."""


class GRU(_Recurrent, nn.GRU):  # type: ignore[misc]  # another forward
    """torch.nn.GRU of one layer."""


class LSTM(_Recurrent, nn.LSTM):  # type: ignore[misc]  # another forward
    """torch.nn.LSTM of one layer."""


def _call(module: nn.Module, x: Any) -> Any:
    """The module's output; of several inputs where x is a tuple and its forward takes several."""
    several = isinstance(x, tuple) and not isinstance(module, _Container) and arity(module.forward)[1] > 1
    return module(*x) if several else module(x)


class _Container(nn.Module):
    """What all containers share: f(a, b) is f((a, b)), and the modules inside take the tuple apart."""

    def __call__(self, *inputs: Any) -> Any:
        return super().__call__(inputs[0] if len(inputs) == 1 else inputs)


class Sequential(_Container, nn.Sequential):
    """torch.nn.Sequential, of modules with several inputs, too."""

    def forward(self, x: Any) -> Any:
        for module in self:
            x = _call(module, x)
        return x


class Residual(_Container):
    """A body with a connection around it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Any) -> Any:
        y = _call(self.body, x)
        return tuple(map(torch.add, x, y)) if isinstance(x, tuple) else torch.add(x, y)


class Constant(_Container):
    """A body without a gradient."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Any) -> Any:
        with torch.no_grad():
            return _call(self.body, x)


class Recompute(_Container):
    """torch.utils.checkpoint."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Any) -> Any:
        return checkpoint(_call, self.body, x, use_reentrant=False)


class _Branches(_Container, nn.ModuleList):
    """Several bodies."""

    def __init__(self, *bodies: nn.Module) -> None:
        super().__init__(bodies)


class Sum(_Branches):
    """torch.add of all outputs."""

    def forward(self, x: Any) -> Any:
        return reduce(torch.add, [_call(body, x) for body in self])


class Product(_Branches):
    """torch.mul of all outputs."""

    def forward(self, x: Any) -> Any:
        return reduce(torch.mul, [_call(body, x) for body in self])


class Concat(_Branches):
    """torch.cat of all outputs."""

    def __init__(self, *bodies: nn.Module, dim: int) -> None:
        super().__init__(*bodies)
        self.dim = dim

    def forward(self, x: Any) -> Tensor:
        return torch.cat([_call(body, x) for body in self], self.dim)


class Parallel(_Branches):
    """To each body its own input."""

    def forward(self, x: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_call(body, each) for body, each in zip(self, x))


class Add(nn.Module):
    """torch.add of all inputs."""

    def forward(self, *xs: Tensor) -> Tensor:
        return reduce(torch.add, xs)


class Multiply(nn.Module):
    """torch.mul of all inputs."""

    def forward(self, *xs: Tensor) -> Tensor:
        return reduce(torch.mul, xs)


class Cat(nn.Module):
    """torch.cat of all inputs."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, self.dim)


class Graph(_Container, nn.ModuleDict):
    """Modules by name, each called with what its names stand for."""

    def __init__(self, inputs: str, outputs: str, /, **nodes: tuple[nn.Module, str]) -> None:
        super().__init__({name: module for name, (module, _) in nodes.items()})
        self.inputs, self.outputs = inputs.split(), outputs
        self.reads = {name: reads for name, (_, reads) in nodes.items()}

    def forward(self, x: Any) -> Any:
        known = dict(zip(self.inputs, x if len(self.inputs) > 1 else (x,)))

        def value(text: str) -> Any:
            found = [known[name][int(part)] if part else known[name] for name, _, part in map(_parted, text.split())]
            return found[0] if len(found) == 1 else tuple(found)

        for name, reads in self.reads.items():
            known[name] = _call(self[name], value(reads))
        return value(self.outputs)


def _parted(text: str) -> tuple[str, str, str]:
    return text.partition(".")


class Losses(nn.ModuleList):
    """The weighted sum of several losses."""

    def __init__(self, *losses: nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__(losses)
        self.weights = weights or [1.0] * len(losses)

    def forward(self, x: tuple[Any, ...], target: tuple[Any, ...]) -> Any:
        return sum(w * loss(a, b) for w, loss, a, b in zip(self.weights, self, x, target))


def from_torch(module: nn.Module) -> nn.Module:
    """The module itself."""
    return module


class LinearCrossEntropy(nn.Module):
    """A torch.nn.Linear and cross entropy, in one piece."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        weight: Tensor | None = None,
        chunk_size: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.linear, self.options = nn.Linear(in_features, num_classes, bias), options
        self.register_buffer("weight", weight)
        self.weight: Tensor | None

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        logits = self.linear(x).reshape(-1, self.linear.out_features)
        loss = cross_entropy(logits, target.reshape(-1), self.weight, **self.options)
        return loss.reshape(target.shape) if loss.dim() else loss


def _each(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    return tuple([function(s) for s in state]) if isinstance(state, tuple) else function(state)


# ---------------------------------------------------------------------- the registry

Inputs = tuple[Any, ...]
MakeInputs = Callable[[int, int, torch.dtype], Inputs]


def rows(N: int, D: int, dtype: torch.dtype) -> Inputs:
    """Inputs of an ordinary layer."""
    return (torch.randn(N, D, dtype=dtype),)


def _reshaped(*shape: int) -> MakeInputs:
    """N D numbers, in N rows of the shape; a -1 in it takes the rest."""
    return lambda N, D, dtype: (torch.randn(N, D, dtype=dtype).reshape(N, *shape),)


def _steps(count: int) -> MakeInputs:
    """N/count sequences of `count` steps."""
    return lambda N, D, dtype: (torch.randn(N, D, dtype=dtype).reshape(-1, count, D),)


def _image(N: int, D: int, dtype: torch.dtype) -> Inputs:
    height = 2 ** (max((D // 4).bit_length() - 1, 0) // 2)
    return (torch.randn(N, D, dtype=dtype).reshape(N, 4, height, -1),)


def rows_and_labels(N: int, D: int, dtype: torch.dtype) -> Inputs:
    """Inputs of an ordinary classification loss: a row for each of N labels, which are below D."""
    return torch.randn(N, D, dtype=dtype), torch.randint(D, (N,))


@dataclass(frozen=True)
class Twin:
    """A layer, the equal torch module, and ordinary inputs of both, at the size of N rows and D columns.

    layer, module  make the two from D; their parameters and buffers have the same names
    inputs         makes the inputs of a forward from N, D and the dtype: a tuple, one tensor by default
    random         in training it draws random numbers: results are compared in evaluation
    arithmetic     False where it only calls what is inside it, so that there is nothing of its own to time
    """

    name: str
    layer: Callable[[int], Layer]
    module: Callable[[int], nn.Module]
    inputs: MakeInputs = rows
    random: bool = False
    arithmetic: bool = True

    def fits(self, N: int, D: int) -> bool:
        """Whether it exists at the size: shapes that cut D or N into pieces need whole ones."""
        try:
            return all(t.numel() > 0 for t in self.inputs(N, D, torch.float32) if isinstance(t, Tensor))
        except RuntimeError:
            return False


TWINS: dict[str, Twin] = {}
"""The twin of each public layer and loss by its name, and of what `from_torch` makes."""

WITHOUT_TWIN = {
    "Layer": "what all layers share",
    "Loss": "what all losses share",
    "to_torch": "what it makes is a torch module, with the layer inside it",
}
"""The other public names of layers and bridges, and why they have none."""


WITHOUT_ARGUMENT = {
    "inplace": ("ReLU LeakyReLU SiLU Dropout", "a forward never changes its input"),
    "bias": ("BatchNorm1d BatchNorm2d SyncBatchNorm GroupNorm", "affine decides on weight and bias together"),
    "padding_mode": ("Conv1d Conv2d ConvTranspose2d", "the padding is zeros"),
    "return_indices": ("MaxPool2d", "the output is the maxima alone"),
    "align_corners": ("Upsample", "it belongs to modes other than nearest"),
    "recompute_scale_factor": ("Upsample", "give the size instead"),
    "norm_type": ("Embedding", "it belongs to max_norm, which is refused"),
    "scale_grad_by_freq": ("Embedding", "the gradient is the sum"),
    "sparse": ("Embedding", "gradients are dense"),
    "_weight": ("Embedding", "assign layer.weight"),
    "_freeze": ("Embedding", "call layer.freeze()"),
    "proj_size": ("RNN GRU LSTM", "the state has hidden_size numbers; compose with a Linear"),
    "add_bias_kv": ("MultiheadAttention SelfAttention", "join what is to be added to key and value"),
    "add_zero_attn": ("MultiheadAttention SelfAttention", "join what is to be added to key and value"),
    "kdim": ("MultiheadAttention SelfAttention", "query, key and value have embed_dim numbers"),
    "vdim": ("MultiheadAttention SelfAttention", "query, key and value have embed_dim numbers"),
    "dropout": ("SelfAttention", "MultiheadAttention has it"),
    "batch_first": ("SelfAttention", "time is the last dimension but one"),
    "size_average": ("CrossEntropy MSE BCEWithLogits", "torch's old form of reduction"),
    "reduce": ("CrossEntropy MSE BCEWithLogits", "torch's old form of reduction"),
    "out_features": ("LinearCrossEntropy", "a target is one label for each row"),
    "options": ("LinearCrossEntropy", "chunk_size is what decides on memory"),
}
"""The arguments that only torch has: of which layers, and why or what instead. Given, each is a TypeError."""

BESIDE_TORCH = {
    "generator": (
        "Linear Embedding Dropout Conv1d Conv2d ConvTranspose2d RNNCell GRUCell LSTMCell RNN GRU LSTM "
        "MultiheadAttention SelfAttention LinearCrossEntropy",
        "what random numbers are drawn from",
    ),
    "gain": ("Linear", "the scale of normal weights"),
    "unbiased": ("BatchNorm1d BatchNorm2d SyncBatchNorm", "n - 1 in the variance of the batch"),
    "channels_last": ("BatchNorm1d BatchNorm2d SyncBatchNorm", "the channels are the last dimension"),
    "return_state": ("RNN GRU LSTM", "torch always returns the state, too"),
    "causal": ("SelfAttention", "no step reads from later ones"),
    "chunk_size": ("LinearCrossEntropy", "how many rows are taken at a time"),
}
"""The arguments that only handgrad has, given by name: of which layers, and what they are."""


def _twin(name: str, make: Callable[[Any, int], Any] | None = None, inputs: MakeInputs = rows, **what: bool) -> None:
    """Register the twin that `make` makes of either library and D; without it, the class without arguments."""
    make = make or (lambda lib, D: getattr(lib, name)())
    TWINS[name] = Twin(name, partial(make, handgrad), partial(make, sys.modules[__name__]), inputs, **what)


_twin("Linear", lambda lib, D: lib.Linear(D, D))
_twin("BatchNorm1d", lambda lib, D: lib.BatchNorm1d(D))
_twin("BatchNorm2d", lambda lib, D: lib.BatchNorm2d(4), _image)
_twin("SyncBatchNorm", lambda lib, D: lib.SyncBatchNorm(D))
_twin("Tanh")
_twin("CrossEntropy", None, rows_and_labels)
_twin("Embedding", lambda lib, D: lib.Embedding(D, D), lambda N, D, dtype: (torch.randint(D, (N,)),))
_twin("Flatten", None, _reshaped(4, -1))
_twin("ReLU")
_twin("LeakyReLU")
_twin("Sigmoid")
_twin("SiLU")
_twin("GELU")
_twin("Softmax", lambda lib, D: lib.Softmax(-1))
_twin("LogSoftmax", lambda lib, D: lib.LogSoftmax(-1))
_twin("LayerNorm", lambda lib, D: lib.LayerNorm(D))
_twin("RMSNorm", lambda lib, D: lib.RMSNorm(D))
_twin("GroupNorm", lambda lib, D: lib.GroupNorm(2, 4), _image)
_twin("Dropout", lambda lib, D: lib.Dropout(0.5), random=True)
_twin("Conv1d", lambda lib, D: lib.Conv1d(8, 8, 3, padding=1), _reshaped(8, -1))
_twin("Conv2d", lambda lib, D: lib.Conv2d(4, 8, 3, padding=1), _image)
_twin("ConvTranspose2d", lambda lib, D: lib.ConvTranspose2d(4, 8, 4, 2, 1), _image)
_twin("MaxPool2d", lambda lib, D: lib.MaxPool2d(2), _image)
_twin("AvgPool2d", lambda lib, D: lib.AvgPool2d(2), _image)
_twin("AdaptiveAvgPool2d", lambda lib, D: lib.AdaptiveAvgPool2d(1), _image)
_twin("Upsample", lambda lib, D: lib.Upsample(scale_factor=2), _image)
_twin("FlattenConsecutive", lambda lib, D: lib.FlattenConsecutive(2), _reshaped(4, -1))
_twin("RNNCell", lambda lib, D: lib.RNNCell(D, D))
_twin("GRUCell", lambda lib, D: lib.GRUCell(D, D))
_twin("LSTMCell", lambda lib, D: lib.LSTMCell(D, D))
_twin("RNN", lambda lib, D: lib.RNN(D, D, batch_first=True), _steps(8))
_twin("GRU", lambda lib, D: lib.GRU(D, D, batch_first=True), _steps(8))
_twin("LSTM", lambda lib, D: lib.LSTM(D, D, batch_first=True), _steps(8))
_twin("Unroll", lambda lib, D: lib.Unroll(lib.RNNCell(D, D)), _steps(8))
_twin(
    "MultiheadAttention",
    lambda lib, D: lib.MultiheadAttention(D, 4, batch_first=True),
    lambda N, D, dtype: _steps(16)(N, D, dtype) + 2 * _steps(8)(N // 2, D, dtype),
)
_twin("SelfAttention", lambda lib, D: lib.SelfAttention(D, 4), _steps(16))
_twin("MSE", None, lambda N, D, dtype: (torch.randn(N, D, dtype=dtype), torch.randn(N, D, dtype=dtype)))
_twin("BCEWithLogits", None, lambda N, D, dtype: (torch.randn(N, D, dtype=dtype), torch.rand(N, D, dtype=dtype)))
_twin("LinearCrossEntropy", lambda lib, D: lib.LinearCrossEntropy(D, D), rows_and_labels)
_twin("Identity", arithmetic=False)
_twin("Sequential", lambda lib, D: lib.Sequential(lib.Linear(D, D), lib.Tanh()), arithmetic=False)
_twin("Residual", lambda lib, D: lib.Residual(lib.Linear(D, D)), arithmetic=False)
_twin("Sum", lambda lib, D: lib.Sum(lib.Linear(D, D), lib.Tanh()), arithmetic=False)
_twin("Product", lambda lib, D: lib.Product(lib.Linear(D, D), lib.Sigmoid()), arithmetic=False)
_twin("Concat", lambda lib, D: lib.Concat(lib.Linear(D, D), lib.ReLU(), dim=-1), arithmetic=False)
_twin(
    "Parallel",
    lambda lib, D: lib.Parallel(lib.Linear(D, D), lib.Tanh()),
    lambda N, D, dtype: (rows(N, D, dtype) + rows(N, D, dtype),),
    arithmetic=False,
)
_twin("Recompute", lambda lib, D: lib.Recompute(lib.Sequential(lib.Linear(D, D), lib.Tanh())), arithmetic=False)
_twin(
    "Constant",
    lambda lib, D: lib.Sequential(lib.Constant(lib.Embedding(D, D)), lib.Linear(D, D)),
    lambda N, D, dtype: (torch.randint(D, (N,)),),
    arithmetic=False,
)


def _pairs(N: int, D: int, dtype: torch.dtype) -> Inputs:
    return rows(N, D, dtype) + rows(N, D, dtype)


_twin("Add", None, _pairs)
_twin("Multiply", None, _pairs)
_twin("Cat", lambda lib, D: lib.Cat(-1), _pairs)
_twin(
    "Graph",
    lambda lib, D: lib.Graph("x", "out", h=(lib.Linear(D, D), "x"), out=(lib.Add(), "x h")),
    arithmetic=False,
)
_twin(
    "Losses",
    lambda lib, D: lib.Losses(lib.MSE(), lib.MSE(), weights=(1, 0.5)),
    lambda N, D, dtype: (_pairs(N, D, dtype), _pairs(N, D, dtype)),
    arithmetic=False,
)
_twin("from_torch", lambda lib, D: lib.from_torch(nn.Linear(D, D)), arithmetic=False)
