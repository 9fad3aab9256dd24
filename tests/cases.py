"""The one registry of layers: how each public layer and loss is checked. A new layer adds its line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import handgrad as hg
from handgrad.bridge import ModuleLayer
from handgrad.testing import check_layer, check_loss, check_optimizer


@dataclass(frozen=True)
class Case:
    """A check of one public class; `run` takes further arguments of check_layer."""

    covers: type
    check: Callable[..., Any]
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, **more: Any) -> Any:
        """Run the check; returns its report."""
        return self.check(*self.args, **{**self.keywords, **more})


CASES: dict[str, Case] = {}
OPTIMIZERS: dict[str, Case] = {}


def layer(name: str, make: Callable[..., Any], x: Any, covers: type | None = None, **keywords: Any) -> None:
    """Register a layer under the name of its class, and a few words where there are several cases."""
    CASES[name] = Case(covers or getattr(hg, name.split()[0]), check_layer, (make, x), keywords)


def loss(name: str, make: Callable[..., Any], x: str, target: str, **keywords: Any) -> None:
    """Register a loss."""
    CASES[name] = Case(getattr(hg, name.split()[0]), check_loss, (make, x, target), keywords)


BOTH = [True, False]
REDUCTIONS = ["mean", "sum", "none"]

layer("Tanh", hg.Tanh, "*N", module=nn.Tanh)
layer("Sigmoid", hg.Sigmoid, "*N", module=nn.Sigmoid)
layer("ReLU", hg.ReLU, "*N", module=nn.ReLU, kinks={0.0: 0.0})
layer(
    "LeakyReLU",
    lambda slope: hg.LeakyReLU(slope),
    "*N",
    options={"slope": [0.01, 0.3, 1.5]},
    kinks={0.0: None},
    reference=lambda layer, x: functional.leaky_relu(x, layer.negative_slope),
)
layer("SiLU", hg.SiLU, "*N", module=nn.SiLU)
layer(
    "GELU",
    lambda approximate: hg.GELU(approximate),
    "*N",
    options={"approximate": ["none", "tanh"]},
    module=lambda approximate: nn.GELU(approximate),
)
layer(
    "Softmax", lambda dim: hg.Softmax(dim), "N *M C", options={"dim": [0, -1, -2]}, module=lambda dim: nn.Softmax(dim)
)
layer(
    "LogSoftmax",
    lambda dim: hg.LogSoftmax(dim),
    "N *M C",
    options={"dim": [0, -1, -2]},
    module=lambda dim: nn.LogSoftmax(dim),
)
layer(
    "Linear",
    lambda D, K, bias: hg.Linear(D, K, bias=bias),
    "*N D",
    options={"bias": BOTH},
    module=lambda D, K, bias: nn.Linear(D, K, bias=bias),
)
layer(
    "Embedding",
    lambda V, D: hg.Embedding(V, D),
    "*N < V",
    module=lambda V, D: nn.Embedding(V, D),
)
layer(
    "Embedding with padding_idx",
    lambda V, D: hg.Embedding(V, D, padding_idx=-1),
    "*N < V",
    module=lambda V, D: nn.Embedding(V, D, padding_idx=-1),
    skip={"differences": "the padding row is used, and by definition has no gradient"},
)
layer("Flatten", hg.Flatten, "N *M", sizes={"*M": (1, 3)}, module=nn.Flatten)
layer(
    "Flatten of some dimensions",
    lambda start, end: hg.Flatten(start, end),
    "N A B C",
    options={"start": [0, 1], "end": [1, 2, -1]},
    module=lambda start, end: nn.Flatten(start, end),
)
layer(
    "FlattenConsecutive",
    lambda: hg.FlattenConsecutive(2),
    "N 4 C",
    reference=lambda x: x.reshape(x.shape[0], 2, 2 * x.shape[2]),
)
layer(
    "FlattenConsecutive to the last step",
    lambda: hg.FlattenConsecutive(3),
    "N 3 C",
    reference=lambda x: x.reshape(x.shape[0], 3 * x.shape[2]),
)
NORM = {"eps": [1e-5, 0.1], "momentum": [0.1, 0.7, None], "affine": BOTH, "track": BOTH}
layer(
    "BatchNorm1d",
    lambda C, eps, momentum, affine, track: hg.BatchNorm1d(C, eps, momentum, affine, track),
    "N C *L",
    sizes={"*L": (0, 1)},
    options=NORM,
    module=lambda C, eps, momentum, affine, track: nn.BatchNorm1d(C, eps, momentum, affine, track),
)


def unbiased_batch_norm(layer: hg.BatchNorm1d, x: torch.Tensor) -> torch.Tensor:
    """The makemore lecture's normalisation, with n - 1."""
    if layer.training:
        out = (x - x.mean(0)) / (x.var(0) + layer.eps).sqrt()
    else:
        out = (x - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
    return out * layer.weight + layer.bias


layer(
    "BatchNorm1d unbiased",
    lambda C: hg.BatchNorm1d(C, eps=1e-3, unbiased=True),
    "N C",
    sizes={"N": (2, 5)},
    reference=unbiased_batch_norm,
)


class ChannelsLast(nn.BatchNorm1d):
    """torch's module, its channels moved to the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over all dimensions but the last."""
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)


layer(
    "BatchNorm1d channels_last",
    lambda C: hg.BatchNorm1d(C, channels_last=True),
    "N T C",
    module=lambda C: ChannelsLast(C),
)
layer(
    "LayerNorm",
    lambda D, eps, affine, bias: hg.LayerNorm(D, eps, affine, bias),
    "*N D",
    options={"eps": [1e-5, 0.1], "affine": BOTH, "bias": BOTH},
    module=lambda D, eps, affine, bias: nn.LayerNorm(D, eps, affine, bias),
)
layer(
    "LayerNorm over two dimensions",
    lambda T, D: hg.LayerNorm((T, D)),
    "*N T D",
    module=lambda T, D: nn.LayerNorm((T, D)),
)
layer(
    "RMSNorm",
    lambda D, eps, affine: hg.RMSNorm(D, eps, affine),
    "*N D",
    options={"eps": [1e-5, 0.1], "affine": BOTH},
    module=lambda D, eps, affine: nn.RMSNorm(D, eps, affine),
)
layer(
    "RMSNorm over two dimensions",
    lambda T, D: hg.RMSNorm((T, D), eps=0.1),
    "*N T D",
    module=lambda T, D: nn.RMSNorm((T, D), eps=0.1),
)


def _dropped(layer: hg.Dropout, x: torch.Tensor) -> torch.Tensor:
    """What Dropout gives, with a mask from the same uniform numbers; test_dropout.py has its share and scale."""
    if not layer.training or layer.p == 0:
        return x
    kept = torch.empty_like(x).uniform_() < 1 - layer.p
    return x * kept / (1 - layer.p if layer.p < 1 else 1)


layer(
    "Dropout",
    lambda p: hg.Dropout(p),
    "*N",
    options={"p": [0.5, 0.2, 0.0, 1.0]},
    reference=_dropped,
    skip={"layouts": "the mask is drawn in the order of memory"},
)
layer(
    "Dropout of nothing and of all",
    lambda p: hg.Dropout(p),
    "*N",
    options={"p": [0.0, 1.0]},
    module=lambda p: nn.Dropout(p),
)
layer(
    "SelfAttention",
    lambda causal, bias, heads: hg.SelfAttention(4, heads, bias, causal=causal),
    "*N T 4",
    sizes={"*N": (0, 2)},
    options={"causal": BOTH, "bias": BOTH, "heads": [1, 2, 4]},
    reference=lambda layer, x: (
        functional.multi_head_attention_forward(
            *[x.reshape(-1, *x.shape[-2:]).transpose(0, 1)] * 3,
            4,
            layer.num_heads,
            layer.in_proj_weight,
            layer.in_proj_bias,
            None,
            None,
            False,
            0.0,
            layer.out_proj.weight,
            layer.out_proj.bias,
            need_weights=False,
            attn_mask=torch.ones(x.shape[-2], x.shape[-2]).tril().log().to(x) if layer.causal else None,
        )[0]
        .transpose(0, 1)
        .reshape(x.shape)
    ),
)
for cell, module, state in (
    (hg.RNNCell, nn.RNN, "N H"),
    (hg.GRUCell, nn.GRU, "N H"),
    (hg.LSTMCell, nn.LSTM, ("N H",) * 2),
):
    layer(
        f"Unroll of {cell.__name__}",
        lambda D, H, bias, cell=cell: hg.Unroll(cell(D, H, bias), return_state=True),
        ["N T D", state],
        covers=hg.Unroll,
        options={"bias": BOTH},
        reference=lambda layer, x, state, module=module: _recurrent(module, layer.cell, x, state),
    )
CELL = {"sizes": {"*N": (0, 1)}, "options": {"bias": BOTH}}
layer(
    "RNNCell",
    lambda D, H, bias: hg.RNNCell(D, H, bias),
    ["*N D", "*N H"],
    module=lambda D, H, bias: nn.RNNCell(D, H, bias),
    **CELL,
)
layer(
    "GRUCell",
    lambda D, H, bias: hg.GRUCell(D, H, bias),
    ["*N D", "*N H"],
    module=lambda D, H, bias: nn.GRUCell(D, H, bias),
    **CELL,
)
layer(
    "LSTMCell",
    lambda D, H, bias: hg.LSTMCell(D, H, bias),
    ["*N D", ("*N H", "*N H")],
    module=lambda D, H, bias: nn.LSTMCell(D, H, bias),
    **CELL,
)
layer("GRUCell from zeros", lambda D, H: hg.GRUCell(D, H), "*N D", module=lambda D, H: nn.GRUCell(D, H), **CELL)
layer(
    "RNNCell with relu",
    lambda D, H: hg.RNNCell(D, H, nonlinearity="relu"),
    ["*N D", "*N H"],
    module=lambda D, H: nn.RNNCell(D, H, nonlinearity="relu"),
    sizes=CELL["sizes"],
)


layer(
    "Unroll",
    lambda D, H: hg.Unroll(hg.RNNCell(D, H)),
    "N T D",
    reference=lambda layer, x: _recurrent(nn.RNN, layer.cell, x),
)
layer("Unroll with a state in and none out", lambda D, H: hg.Unroll(hg.LSTMCell(D, H)), ["N T D", ("N H", "N H")])
layer("Unroll with a state out and none in", lambda D, H: hg.Unroll(hg.GRUCell(D, H), return_state=True), "N T D")
layer(
    "Unroll truncated",
    lambda D, H, steps: hg.Unroll(hg.GRUCell(D, H), steps=steps),
    "N T D",
    options={"steps": [1, 2]},
    skip={"differences": "the state handed over counts as a constant"},
)
layer(
    "Unroll truncated with a state",
    lambda D, H: hg.Unroll(hg.LSTMCell(D, H), steps=2, return_state=True),
    ["N T D", ("N H", "N H")],
    skip={"differences": "the state handed over every second step counts as a constant"},
)
layer("Unroll over the first dimension", lambda D, H: hg.Unroll(hg.LSTMCell(D, H), 0), "T N D")


def _sequence(module: type[nn.RNNBase], layer: Any, x: torch.Tensor, state: Any = None) -> Any:
    """Torch's module on the layer's weights, its state without the dimension of layers."""
    kind = {"nonlinearity": layer.nonlinearity} if module is nn.RNN else {}
    rnn = module(layer.input_size, layer.hidden_size, bias=layer.bias, batch_first=layer.batch_first, **kind).to(
        x.dtype
    )
    first = tuple([s[None] for s in state]) if isinstance(state, tuple) else None if state is None else state[None]
    out, last = torch.func.functional_call(rnn, dict(layer.named_parameters()), (x, first))
    last = tuple([s[0] for s in last]) if isinstance(last, tuple) else last[0]
    return (out, last) if layer.return_state else out


for kind, module, state in ((hg.RNN, nn.RNN, "N H"), (hg.GRU, nn.GRU, "N H"), (hg.LSTM, nn.LSTM, ("N H",) * 2)):
    name = kind.__name__
    torchs = lambda layer, x, state=None, module=module: _sequence(module, layer, x, state)  # noqa: E731
    layer(
        name,
        lambda D, H, bias, batch_first, return_state, kind=kind: kind(
            D, H, bias=bias, batch_first=batch_first, return_state=return_state
        ),
        "T N D",
        options={"bias": BOTH, "batch_first": BOTH, "return_state": [False] if kind is hg.LSTM else BOTH},
        reference=torchs,
    )
    layer(
        f"{name} with a state",
        lambda D, H, return_state, kind=kind: kind(D, H, return_state=return_state),
        ["T N D", state],
        options={"return_state": BOTH},
        reference=torchs,
    )
    layer(f"{name} of one sequence", lambda D, H, kind=kind: kind(D, H), "T D", reference=torchs)
layer(
    "RNN with relu",
    lambda D, H: hg.RNN(D, H, nonlinearity="relu"),
    "T N D",
    reference=lambda layer, x: _sequence(nn.RNN, layer, x),
)
CONVOLUTION = {"stride": [1, 2, 3], "padding": [0, 1, 2], "dilation": [1, 2], "bias": BOTH}
layer(
    "Conv1d",
    lambda C, K, stride, padding, dilation, bias: hg.Conv1d(C, 3, K, stride, padding, dilation, 1, bias),
    "N C L",
    sizes={"L": (5, 8), "K": (1, 3), "C": (1, 2)},
    options=CONVOLUTION,
    module=lambda C, K, stride, padding, dilation, bias: nn.Conv1d(C, 3, K, stride, padding, dilation, 1, bias),
)
layer(
    "Conv1d in groups",
    lambda K, stride, padding, dilation, bias: hg.Conv1d(4, 6, K, stride, padding, dilation, 2, bias),
    "N 4 L",
    sizes={"L": (5, 8), "K": (1, 3)},
    options=CONVOLUTION,
    module=lambda K, stride, padding, dilation, bias: nn.Conv1d(4, 6, K, stride, padding, dilation, 2, bias),
)
layer(
    "Conv1d that keeps the length",
    lambda K, dilation: hg.Conv1d(2, 3, K, padding="same", dilation=dilation),
    "2 L",
    sizes={"L": (3, 8), "K": (1, 4)},
    options={"dilation": [1, 2, 3]},
    reference=lambda layer, x: functional.conv1d(
        functional.pad(x, (_reach(layer) // 2, (_reach(layer) + 1) // 2)),
        layer.weight,
        layer.bias,
        dilation=layer.dilation,
    ),
)
layer(
    "Conv2d",
    lambda C, stride, padding, dilation: hg.Conv2d(C, 2, (2, 3), stride, padding, dilation),
    "N C H W",
    sizes={"H": (3, 5), "W": (3, 5), "C": (1, 2)},
    options={"stride": [1, (2, 1), (1, 2)], "padding": [0, 1, (0, 2)], "dilation": [1, (2, 1)]},
    module=lambda C, stride, padding, dilation: nn.Conv2d(C, 2, (2, 3), stride, padding, dilation),
)
layer(
    "Conv2d in groups",
    lambda stride, bias: hg.Conv2d(4, 4, (3, 2), stride, 1, groups=2, bias=bias),
    "4 H W",
    sizes={"H": (2, 4), "W": (2, 4)},
    options={"stride": [1, (2, 1)], "bias": BOTH},
    module=lambda stride, bias: nn.Conv2d(4, 4, (3, 2), stride, 1, groups=2, bias=bias),
)
POOL = {"kernel_size": [2, (3, 2)], "stride": [None, 1, (2, 3)], "padding": [0, 1, (1, 0)], "ceil_mode": BOTH}
layer(
    "MaxPool2d",
    lambda kernel_size, stride, padding, ceil_mode: hg.MaxPool2d(kernel_size, stride, padding, 1, ceil_mode),
    "*N C H W",
    sizes={"*N": (0, 1), "H": (3, 5), "W": (3, 5)},
    options=POOL,
    distinct=True,
    module=lambda kernel_size, stride, padding, ceil_mode: nn.MaxPool2d(
        kernel_size, stride, padding, 1, ceil_mode=ceil_mode
    ),
)
layer(
    "AvgPool2d",
    lambda kernel_size, stride, padding, ceil_mode, count, divisor: hg.AvgPool2d(
        kernel_size, stride, padding, ceil_mode, count, divisor
    ),
    "*N C H W",
    sizes={"*N": (0, 1), "H": (3, 5), "W": (3, 5)},
    options=POOL | {"count": BOTH, "divisor": [None, 3]},
    module=lambda kernel_size, stride, padding, ceil_mode, count, divisor: nn.AvgPool2d(
        kernel_size, stride, padding, ceil_mode, count, divisor
    ),
)
layer(
    "Sequential",
    lambda D, H, K: hg.Sequential(hg.Linear(D, H), hg.Tanh(), hg.Linear(H, K)),
    "*N D",
    module=lambda D, H, K: nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, K)),
)
layer(
    "Sequential of the names MLP",
    lambda V, D, H: hg.Sequential(
        hg.Embedding(V, D), hg.Flatten(), hg.Linear(3 * D, H, bias=False), hg.BatchNorm1d(H), hg.Tanh(), hg.Linear(H, V)
    ),
    "N 3 < V",
    module=lambda V, D, H: nn.Sequential(
        nn.Embedding(V, D), nn.Flatten(), nn.Linear(3 * D, H, bias=False), nn.BatchNorm1d(H), nn.Tanh(), nn.Linear(H, V)
    ),
)


def shared_twice(D: int) -> hg.Sequential:
    """One layer object in two places."""
    linear = hg.Linear(D, D)
    return hg.Sequential(linear, hg.Tanh(), linear)


layer("Sequential with a shared layer", shared_twice, "*N D")
layer("Identity", hg.Identity, "*N", module=nn.Identity)
layer(
    "Residual",
    lambda D: hg.Residual(hg.Linear(D, D)),
    "*N D",
    reference=lambda layer, x: x + functional.linear(x, layer.body.weight, layer.body.bias),
)
TWO = lambda kind: lambda D, H: kind(hg.Linear(D, H), hg.Sequential(hg.Linear(D, H), hg.Tanh()))  # noqa: E731


def outputs(layer: hg.Sum, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the two bodies of `TWO` give."""
    a, b = layer[0], layer[1][0]
    return functional.linear(x, a.weight, a.bias), functional.linear(x, b.weight, b.bias).tanh()


layer("Sum", TWO(hg.Sum), "*N D", reference=lambda layer, x: torch.add(*outputs(layer, x)))
layer(
    "Sum of embeddings",
    lambda V, D: hg.Sum(hg.Embedding(V, D), hg.Embedding(V, D)),
    "*N < V",
    reference=lambda layer, x: layer[0].weight[x] + layer[1].weight[x],
)
layer("Product", TWO(hg.Product), "*N D", reference=lambda layer, x: torch.mul(*outputs(layer, x)))
layer(
    "Product of three",
    lambda D: hg.Product(hg.Identity(), hg.Linear(D, D), hg.Tanh()),
    "*N D",
    reference=lambda layer, x: x * functional.linear(x, layer[1].weight, layer[1].bias) * x.tanh(),
)
layer(
    "Concat",
    lambda D, H, K: hg.Concat(hg.Linear(D, H), hg.Linear(D, K), dim=-1),
    "*N D",
    reference=lambda layer, x: torch.cat([functional.linear(x, b.weight, b.bias) for b in layer], -1),
)
layer(
    "Parallel",
    lambda D, H, K: hg.Parallel(hg.Linear(D, K), hg.Linear(H, K)),
    [("N D", "N H")],
    reference=lambda layer, x: tuple(functional.linear(t, b.weight, b.bias) for b, t in zip(layer, x)),
)
layer(
    "from_torch Linear",
    lambda D, K: hg.from_torch(nn.Linear(D, K)),
    "*N D",
    covers=ModuleLayer,
    module=lambda D, K: nn.Linear(D, K),
)
layer(
    "from_torch BatchNorm1d",
    lambda C: hg.from_torch(nn.BatchNorm1d(C)),
    "N C *L",
    covers=ModuleLayer,
    sizes={"*L": (0, 1)},
    module=lambda C: nn.BatchNorm1d(C),
)
layer("from_torch GELU", lambda: hg.from_torch(nn.GELU()), "*N", covers=ModuleLayer, module=nn.GELU)

loss(
    "CrossEntropy",
    lambda C, weighted, ignored, smoothing, reduction: hg.CrossEntropy(
        _class_weights(C) if weighted else None, 0 if ignored else -100, smoothing, reduction
    ),
    "N C *D",
    "N *D < C",
    sizes={"*D": (0, 2)},
    options={"weighted": BOTH, "ignored": BOTH, "smoothing": [0.0, 0.2], "reduction": REDUCTIONS},
    module=lambda C, weighted, ignored, smoothing, reduction: nn.CrossEntropyLoss(
        _class_weights(C) if weighted else None,
        ignore_index=0 if ignored else -100,
        label_smoothing=smoothing,
        reduction=reduction,
    ),
)
loss("CrossEntropy of one row", hg.CrossEntropy, "C", "< C", module=nn.CrossEntropyLoss)
loss(
    "LinearCrossEntropy with ignored rows",
    lambda D, V: hg.LinearCrossEntropy(D, V, bias=True, ignore_index=0, chunk_size=2),
    "N D",
    "N < V",
    reference=lambda layer, x, target: functional.cross_entropy(
        functional.linear(x, layer.linear.weight, layer.linear.bias), target, ignore_index=0
    ),
)
loss(
    "LinearCrossEntropy",
    lambda D, V, bias, ignored, reduction, chunk: hg.LinearCrossEntropy(
        D, V, bias=bias, ignore_index=0 if ignored else -100, reduction=reduction, chunk_size=chunk
    ),
    "*N D",
    "*N < V",
    options={"bias": BOTH, "ignored": BOTH, "reduction": REDUCTIONS, "chunk": [1, 2, 100]},
    reference=lambda layer, x, target: functional.cross_entropy(
        functional.linear(x, layer.linear.weight, layer.linear.bias).reshape(-1, layer.linear.weight.shape[0]),
        target.flatten(),
        ignore_index=layer.ignore_index,
        reduction=layer.reduction,
    ).view(target.shape if layer.reduction == "none" else ()),
)
loss(
    "MSE",
    lambda reduction: hg.MSE(reduction),
    "*N",
    "*N",
    options={"reduction": REDUCTIONS},
    module=lambda reduction: nn.MSELoss(reduction=reduction),
)
loss(
    "BCEWithLogits",
    lambda D, weighted, reduction: hg.BCEWithLogits(
        _class_weights(D) if weighted else None, reduction, 2 * _class_weights(D) if weighted else None
    ),
    "*N D",
    "*N D in 0 1",
    options={"weighted": BOTH, "reduction": REDUCTIONS},
    module=lambda D, weighted, reduction: nn.BCEWithLogitsLoss(
        _class_weights(D) if weighted else None,
        reduction=reduction,
        pos_weight=2 * _class_weights(D) if weighted else None,
    ),
)

OPTIMIZERS["SGD"] = Case(
    hg.SGD,
    check_optimizer,
    (hg.SGD, torch.optim.SGD),
    {
        "options": {
            "lr": [0.1, 1.0, torch.tensor(0.3, dtype=torch.float64)],
            "momentum": [0.9, 0.0, 0.5, 1.0],
            "dampening": [0.0, 0.3],
            "weight_decay": [0.0, 0.2, 1.0],
            "nesterov": BOTH,
            "maximize": BOTH,
        },
        "refuses": lambda v: v["nesterov"] and (v["momentum"] == 0 or v["dampening"] != 0),
    },
)


def _class_weights(classes: int) -> torch.Tensor:
    return torch.linspace(0.5, 2, classes)


def _reach(conv: hg.Conv1d) -> int:
    return conv.dilation[0] * (conv.kernel_size[0] - 1)


def _recurrent(module: type[nn.RNNBase], cell: Any, x: torch.Tensor, state: Any = None) -> Any:
    rnn = module(cell.input_size, cell.hidden_size, bias=cell.bias_ih is not None, batch_first=True).to(x.dtype)
    weights = {f"{name}_l0": p for name, p in cell.named_parameters()}
    if state is None:
        return torch.func.functional_call(rnn, weights, (x,))[0]
    first = tuple([s[None] for s in state]) if isinstance(state, tuple) else state[None]
    out, last = torch.func.functional_call(rnn, weights, (x, first))
    return out, tuple([s[0] for s in last]) if isinstance(last, tuple) else last[0]
