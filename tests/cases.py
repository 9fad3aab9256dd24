"""The one registry of checks: what is drawn for each public layer and loss. A new layer adds its line here.

A case makes the layer from either library: `lib` is handgrad, and then handgrad.twins, whose module judges it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import handgrad as hg
from handgrad import twins
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


def case(
    name: str, x: Any, make: Callable[..., Any] | None = None, *, covers: type | None = None, **keywords: Any
) -> None:
    """Register a check under the name of its class, and a few words where there are several.

    x is the input, or a list of them: a loss's has its target. `make` takes the library, sizes and options; by default
    it is the class without arguments. The twin judges, unless keywords have another `reference`, or `module`.
    """
    kind = name.split()[0]
    covers = covers or getattr(hg, kind)
    make = make or (lambda lib: getattr(lib, kind)())
    if not keywords.keys() & {"reference", "module"}:
        keywords["module"] = partial(make, twins)
    is_loss = issubclass(covers, hg.Loss)
    ours = partial(make, hg)
    CASES[name] = Case(covers, check_loss if is_loss else check_layer, (ours, *x) if is_loss else (ours, x), keywords)


BOTH = [True, False]
REDUCTIONS = ["mean", "sum", "none"]

# ---------------------------------------------------------------------- layers/activation.py
case("Tanh", "*N")
case("Sigmoid", "*N")
case("ReLU", "*N", kinks={0.0: 0.0})
case(
    "LeakyReLU",
    "*N",
    lambda lib, slope: lib.LeakyReLU(slope),
    options={"slope": [0.01, 0.3, 1.5, -0.3]},
    kinks={0.0: None},
)
case("SiLU", "*N")
case("GELU", "*N", lambda lib, approximate: lib.GELU(approximate), options={"approximate": ["none", "tanh"]})
for kind in ("Softmax", "LogSoftmax"):
    make = lambda lib, dim, kind=kind: getattr(lib, kind)(dim)  # noqa: E731
    case(kind, "N *M C", make, options={"dim": [0, -1, -2]})
    case(f"{kind} of any shape", "*N", make, options={"dim": [0, -1]})

# ---------------------------------------------------------------------- layers/linear.py, sparse.py, flatten.py
case("Linear", "*N D", lambda lib, D, K, bias: lib.Linear(D, K, bias=bias), options={"bias": BOTH})
case("Embedding", "*N < V", lambda lib, V, D: lib.Embedding(V, D))
case(
    "Embedding with padding_idx",
    "*N < V",
    lambda lib, V, D: lib.Embedding(V, D, padding_idx=-1),
    skip={"differences": "the padding row is used, and by definition has no gradient"},
)
case("Flatten", "N *M", sizes={"*M": (1, 3)})
case(
    "Flatten of some dimensions",
    "N A B C",
    lambda lib, start, end: lib.Flatten(start, end),
    options={"start": [0, 1], "end": [1, 2, -1]},
)
case(
    "FlattenConsecutive",
    "N 12 C",
    lambda lib, size: lib.FlattenConsecutive(size),
    sizes={"N": (1, 2), "C": (1, 2)},
    options={"size": [2, 1, 3, 4, 6, 12]},
)
case("FlattenConsecutive to the last step", "N T C", lambda lib, T: lib.FlattenConsecutive(T))

# ---------------------------------------------------------------------- layers/batchnorm.py, normalization.py
NORM = {"eps": [1e-5, 0.1], "momentum": [0.1, 0.7, None], "affine": BOTH, "track": BOTH}
case(
    "BatchNorm1d",
    "N C *L",
    lambda lib, C, eps, momentum, affine, track: lib.BatchNorm1d(C, eps, momentum, affine, track),
    sizes={"*L": (0, 1)},
    options=NORM,
)
case(
    "BatchNorm1d unbiased",
    "N C *L",
    lambda lib, C, eps, momentum, affine, track: lib.BatchNorm1d(C, eps, momentum, affine, track, unbiased=True),
    sizes={"N": (2, 5), "*L": (0, 1)},
    options=NORM,
)
case(
    "BatchNorm1d channels_last",
    "N *T C",
    lambda lib, C, eps, momentum, affine, track: lib.BatchNorm1d(C, eps, momentum, affine, track, channels_last=True),
    sizes={"*T": (0, 2)},
    options=NORM,
)
case(
    "SyncBatchNorm",
    "N C *L",
    lambda lib, C, eps, momentum, affine, track: lib.SyncBatchNorm(C, eps, momentum, affine, track),
    sizes={"*L": (0, 2)},
    options=NORM,
)
case(
    "SyncBatchNorm in other forms",
    "N *T C",
    lambda lib, C, affine, track, unbiased: lib.SyncBatchNorm(
        C, affine=affine, track_running_stats=track, unbiased=unbiased, channels_last=True
    ),
    sizes={"N": (2, 5), "*T": (0, 2)},
    options={"affine": BOTH, "track": BOTH, "unbiased": BOTH},
)
case(
    "BatchNorm2d",
    "N C H W",
    lambda lib, C, eps, momentum, affine, track, unbiased: lib.BatchNorm2d(
        C, eps, momentum, affine, track, unbiased=unbiased
    ),
    sizes={"N": (2, 3), "C": (1, 3), "H": (1, 3), "W": (1, 3)},
    options=NORM | {"unbiased": BOTH},
)
case(
    "BatchNorm2d channels_last",
    "N H W C",
    lambda lib, C, affine, track: lib.BatchNorm2d(C, affine=affine, track_running_stats=track, channels_last=True),
    sizes={"N": (2, 3), "C": (1, 3), "H": (1, 3), "W": (1, 3)},
    options={"affine": BOTH, "track": BOTH},
)
case(
    "LayerNorm",
    "*N D",
    lambda lib, D, eps, affine, bias: lib.LayerNorm(D, eps, affine, bias),
    options={"eps": [1e-5, 0.1], "affine": BOTH, "bias": BOTH},
)
case(
    "LayerNorm over two dimensions",
    "*N T D",
    lambda lib, T, D, kind: lib.LayerNorm(kind((T, D))),
    options={"kind": [tuple, list]},
)
case(
    "RMSNorm",
    "*N D",
    lambda lib, D, eps, affine: lib.RMSNorm(D, eps, affine),
    options={"eps": [1e-5, 0.1], "affine": BOTH},
)
case(
    "RMSNorm over two dimensions",
    "*N T D",
    lambda lib, T, D, kind: lib.RMSNorm(kind((T, D)), eps=0.1),
    options={"kind": [tuple, list]},
)
case(
    "RMSNorm with the default eps",
    "*N D",
    lambda lib, D: lib.RMSNorm(D),
    skip={"dtypes": "eps is that of the dtype: in float32 it is another function"},
)
case(
    "GroupNorm",
    "N 6 *L",
    lambda lib, groups, eps, affine: lib.GroupNorm(groups, 6, eps, affine),
    sizes={"N": (1, 3), "*L": (0, 2)},
    options={"groups": [1, 2, 3, 6], "eps": [1e-5, 0.1], "affine": BOTH},
)

# ---------------------------------------------------------------------- layers/dropout.py


def dropped(layer: hg.Dropout, x: Tensor) -> Tensor:
    """What Dropout gives, with a mask from the same uniform numbers; test_dropout.py has its share and scale."""
    if not layer.training or layer.p == 0:
        return x
    kept = torch.empty_like(x).uniform_() < 1 - layer.p
    return x * kept / (1 - layer.p if layer.p < 1 else 1)


case(
    "Dropout",
    "*N",
    lambda lib, p: lib.Dropout(p),
    options={"p": [0.5, 0.2, 0.0, 1.0]},
    reference=dropped,
)
case("Dropout of nothing and of all", "*N", lambda lib, p: lib.Dropout(p), options={"p": [0.0, 1.0]})

# ---------------------------------------------------------------------- layers/attention.py
torch.backends.cuda.enable_flash_sdp(False)  # on the CPU, too: its backward loses digits where scores are large
case(
    "SelfAttention",
    "*N T D",
    lambda lib, D, heads, bias, causal: lib.SelfAttention(D, math.gcd(D, heads), bias=bias, causal=causal),
    sizes={"*N": (0, 2), "D": (1, 6)},
    options={"heads": [1, 2, 12], "bias": BOTH, "causal": BOTH},
)

FAR = {"special": "of keys and values of 800 the gradients cancel to rounding alone; SelfAttention's case has it"}
ATTENTION: dict[str, Any] = {"sizes": {"N": (1, 2), "D": (1, 6), "T": (1, 3)}, "skip": FAR}
HEADS = {"heads": [1, 2, 12], "bias": BOTH}
case(
    "MultiheadAttention",
    ["N T D", "N S D", "N S D"],
    lambda lib, D, heads, bias: lib.MultiheadAttention(D, math.gcd(D, heads), bias=bias, batch_first=True),
    options=HEADS,
    **ATTENTION,
)
case(
    "MultiheadAttention with time first",
    ["T N D", "S N D", "S N D"],
    lambda lib, D, heads, bias: lib.MultiheadAttention(D, math.gcd(D, heads), bias=bias),
    options=HEADS,
    **ATTENTION,
)
case(
    "MultiheadAttention of one sequence",
    ["T D", "S D", "S D"],
    lambda lib, D, heads, first: lib.MultiheadAttention(D, math.gcd(D, heads), batch_first=first),
    sizes={"D": (1, 6)},
    options={"heads": [1, 2, 12], "first": BOTH},
    skip=FAR,
)
MASKS = {
    "key_padding_mask": lambda N, H, T, S: (N, S) if N else (S,),
    "attn_mask": lambda N, H, T, S: (T, S),
    "attn_mask per head": lambda N, H, T, S: (max(N, 1) * H, T, S),
}


class Masked(hg.Layer):
    """Attention under masks that the shapes of its inputs decide: many queries may read nothing."""

    def __init__(self, attention: Any, kinds: dict[str, Any]) -> None:
        self.attention, self.kinds = attention, kinds

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = self.attention(query, key, value, **self.masks(query, key))
        self.push(out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Any:
        self.pop(dout)
        return self.attention.backward(dout, need_dx)

    def masks(self, query: Tensor, key: Tensor) -> dict[str, Tensor]:
        """The masks by name, of bools or of numbers."""
        batched, first = query.dim() == 3, self.attention.batch_first
        N, (T, S) = query.shape[not first] if batched else 0, (x.shape[batched and first] for x in (query, key))
        found, generator = {}, torch.Generator().manual_seed(T + 7 * S)
        for name, kind in self.kinds.items():
            shape = MASKS[name](N, self.attention.num_heads, T, S)
            hidden = torch.rand(shape, generator=generator) < 0.5
            numbers = torch.randn(shape, generator=generator, dtype=torch.float64).masked_fill(hidden, -math.inf)
            found[name.split()[0]] = hidden if kind is bool else numbers.to(query.dtype)
        return found


class MaskedModule(nn.Module):
    """The same of torch's module."""

    masks = Masked.masks

    def __init__(self, attention: nn.Module, kinds: dict[str, Any]) -> None:
        super().__init__()
        self.attention, self.kinds = attention, kinds

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        masks = self.masks(query, key) if key.numel() else {}  # torch cannot take masks of nothing
        out: Tensor = self.attention(query, key, value, **masks)
        return out


def masked(lib: Any, D: int, heads: int, kinds: dict[str, Any], first: bool) -> Any:
    """Attention under masks."""
    attention = lib.MultiheadAttention(D, math.gcd(D, heads), batch_first=first)
    return Masked(attention, kinds) if lib is hg else MaskedModule(attention, kinds)


ONE_MASK = [{name: kind} for name in MASKS for kind in (bool, float)]
TWO_MASKS = [{"key_padding_mask": kind, name: kind} for name in list(MASKS)[1:] for kind in (bool, float)]
for words, inputs, first in (
    ("with masks", ["N T D", "N S D", "N S D"], True),
    ("with masks and time first", ["T N D", "S N D", "S N D"], False),
    ("with masks of one sequence", ["T D", "S D", "S D"], False),
):
    case(  # the masks are made, not drawn: a forward's keywords are not among its inputs
        f"MultiheadAttention {words}",
        inputs,
        lambda lib, D, heads, kinds, first=first: masked(lib, D, heads, kinds, first),
        covers=hg.MultiheadAttention,
        options={"heads": [2, 1], "kinds": ONE_MASK + TWO_MASKS},
        sizes={"D": (1, 6), "T": (1, 3)},
        skip=FAR,
    )


def attended(layer: hg.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What MultiheadAttention gives for N first, with dropout from the same uniform numbers as Dropout."""
    weights, biases, H = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), layer.num_heads
    each = [functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]
    q, k, v = (x.unflatten(-1, (H, -1)).transpose(1, 2) for x in each)
    p = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
    if layer.training:
        p = dropped(hg.Dropout(layer.dropout), p)
    return functional.linear((p @ v).transpose(1, 2).flatten(2), layer.out_proj.weight, layer.out_proj.bias)


case(
    "MultiheadAttention with dropout",
    ["N T D", "N S D", "N S D"],
    lambda lib, D, heads, p: lib.MultiheadAttention(D, math.gcd(D, heads), p, batch_first=True),
    options={"heads": [1, 2, 12], "p": [0.5, 0.2, 1.0]},
    reference=attended,
    **ATTENTION,
)

# ---------------------------------------------------------------------- layers/cells.py
CELL: dict[str, Any] = {"sizes": {"*N": (0, 1)}, "options": {"bias": BOTH}}
case("RNNCell", ["*N D", "*N H"], lambda lib, D, H, bias: lib.RNNCell(D, H, bias), **CELL)
case("GRUCell", ["*N D", "*N H"], lambda lib, D, H, bias: lib.GRUCell(D, H, bias), **CELL)
case("LSTMCell", ["*N D", ("*N H", "*N H")], lambda lib, D, H, bias: lib.LSTMCell(D, H, bias), **CELL)
case("RNNCell from zeros", "*N D", lambda lib, D, H, bias: lib.RNNCell(D, H, bias), **CELL)
case("GRUCell from zeros", "*N D", lambda lib, D, H, bias: lib.GRUCell(D, H, bias), **CELL)
case("LSTMCell from zeros", "*N D", lambda lib, D, H, bias: lib.LSTMCell(D, H, bias), **CELL)
case(
    "RNNCell with relu",
    ["*N D", "*N H"],
    lambda lib, D, H, bias: lib.RNNCell(D, H, bias, nonlinearity="relu"),
    **CELL,
)

# ---------------------------------------------------------------------- layers/recurrent.py
for kind, state in (("RNN", "N H"), ("GRU", "N H"), ("LSTM", ("N H",) * 2)):
    case(
        kind,
        "T N D",
        lambda lib, D, H, bias, batch_first, out, kind=kind: getattr(lib, kind)(
            D, H, bias=bias, batch_first=batch_first, return_state=out
        ),
        options={"bias": BOTH, "batch_first": BOTH, "out": BOTH},
    )
    case(
        f"{kind} with a state",
        ["T N D", state],
        lambda lib, D, H, out, kind=kind: getattr(lib, kind)(D, H, return_state=out),
        options={"out": BOTH},
    )
    case(f"{kind} of one sequence", "T D", lambda lib, D, H, kind=kind: getattr(lib, kind)(D, H))
    case(
        f"Unroll of {kind}Cell",
        ["N T D", state],
        lambda lib, D, H, kind=kind: lib.Unroll(getattr(lib, f"{kind}Cell")(D, H), return_state=True),
    )
case("RNN with relu", "T N D", lambda lib, D, H: lib.RNN(D, H, nonlinearity="relu"))
case("Unroll", "N T D", lambda lib, D, H: lib.Unroll(lib.RNNCell(D, H)))
case("Unroll with a state in and none out", ["N T D", "N H"], lambda lib, D, H: lib.Unroll(lib.GRUCell(D, H)))
case("Unroll with a state out and none in", "N T D", lambda lib, D, H: lib.Unroll(lib.GRUCell(D, H), return_state=True))
case("Unroll over the first dimension", "T N D", lambda lib, D, H: lib.Unroll(lib.LSTMCell(D, H), 0))
CUT = {"differences": "the state handed over counts as a constant"}
case(
    "Unroll truncated",
    "N T D",
    lambda lib, D, H, steps: lib.Unroll(lib.GRUCell(D, H), steps=steps),
    options={"steps": [1, 2]},
    skip=CUT,
)
case(
    "Unroll truncated with a state",
    ["N T D", ("N H", "N H")],
    lambda lib, D, H: lib.Unroll(lib.LSTMCell(D, H), steps=2, return_state=True),
    skip=CUT,
)

# ---------------------------------------------------------------------- layers/graph.py
for join in ("Add", "Multiply"):
    case(f"{join} of one", ["*N"], lambda lib, join=join: getattr(lib, join)())
    case(join, ["*N", "*N"], lambda lib, join=join: getattr(lib, join)())
    case(f"{join} of three", ["*N", "*N", "*N"], lambda lib, join=join: getattr(lib, join)())
case("Cat", ["N T D", "N T K"], lambda lib: lib.Cat(-1))
case("Cat along the first dimension", ["N D", "M D", "K D"], lambda lib: lib.Cat(0))


def diffusion(lib: Any, D: int, V: int) -> Any:
    """Two inputs, one of them indices, and a value that is read twice."""
    body = lib.Sequential(lib.SiLU(), lib.Linear(3, D))
    return lib.Graph(
        "x t",
        "out",
        h=(lib.Linear(D, 3), "x"),
        e=(lib.Embedding(V, 3), "t"),
        s=(lib.Add(), "h e"),
        y=(body, "s"),
        out=(lib.Add(), "y x"),
    )


def siamese(lib: Any, D: int, H: int) -> Any:
    """One layer object at two nodes."""
    tower = lib.Sequential(lib.Linear(D, H), lib.Tanh())
    return lib.Graph("a b", "out", l=(tower, "a"), r=(tower, "b"), out=(lib.Multiply(), "l r"))


case("Graph", ["*N D", "*N < V"], diffusion)
case("Graph with a layer at two nodes", ["N D", "N D"], siamese)
case(
    "Graph of tuples",
    ["T N D", "N H"],
    lambda lib, D, H: lib.Graph(
        "x h",
        "out state.0",
        enc=(lib.GRU(D, H, return_state=True), "x h"),
        dec=(lib.GRU(H, H, return_state=True), "enc"),
        state=(lib.Parallel(lib.Tanh(), lib.Tanh()), "dec"),
        out=(lib.Linear(H, 2), "enc.1"),
    ),
)
case(
    "Graph with a constant in the middle",
    "N D",
    lambda lib, D, H: lib.Graph(
        "x", "out", a=(lib.Linear(D, H), "x"), c=(lib.Constant(lib.Linear(H, H)), "a"), out=(lib.Multiply(), "a c")
    ),
    skip={"differences": "the constant is used, and by definition has no gradient"},
)
case(
    "Constant",
    "N D",
    lambda lib, D, H: lib.Constant(lib.Linear(D, H)),
    skip={"differences": "by definition it has no gradient", "sensitivity": "all its gradients are zero or none"},
)

# ---------------------------------------------------------------------- layers/conv.py


def padded(layer: hg.Conv1d | hg.Conv2d, x: Tensor) -> Tensor:
    """What padding="same" means, written out: the odd one of the zeros at the end. torch warns of it."""
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
    x = functional.pad(x, [side for r in reversed(reach) for side in (r // 2, r - r // 2)])
    convolve = functional.conv1d if len(reach) == 1 else functional.conv2d
    return convolve(x, layer.weight, layer.bias, dilation=layer.dilation, groups=layer.groups)


CONVOLUTION = {"stride": [1, 2, 3], "padding": [0, 1, 2, 5, "valid"], "dilation": [1, 2, 3], "bias": BOTH}
case(
    "Conv1d",
    "N C L",
    lambda lib, C, K, stride, padding, dilation, bias: lib.Conv1d(
        C, 3, K, 1 if padding == "valid" else stride, padding, dilation, 1, bias
    ),
    sizes={"L": (7, 9), "K": (1, 3), "C": (1, 2)},
    options=CONVOLUTION,
)
case(
    "Conv1d in groups",
    "N 4 L",
    lambda lib, K, stride, padding, dilation, bias: lib.Conv1d(4, 6, K, stride, padding, dilation, 2, bias),
    sizes={"L": (7, 9), "K": (1, 3), "N": (1, 2)},
    options=CONVOLUTION,
)
case(
    "Conv1d that keeps the length",
    "2 L",
    lambda lib, K, dilation, groups: lib.Conv1d(2, 4, K, padding="same", dilation=dilation, groups=groups),
    sizes={"L": (3, 8), "K": (1, 4)},
    options={"dilation": [1, 2, 3], "groups": [1, 2]},
    reference=padded,
)
case(
    "Conv2d",
    "N C H W",
    lambda lib, C, kernel, stride, padding, dilation: lib.Conv2d(C, 2, kernel, stride, padding, dilation),
    sizes={"H": (3, 5), "W": (3, 5), "C": (1, 2)},
    options={
        "kernel": [(2, 3), (1, 3), 2],
        "stride": [1, (2, 1), (1, 2), (3, 2)],
        "padding": [0, 1, (0, 2)],
        "dilation": [1, (2, 1)],
    },
)
case(
    "Conv2d in groups",
    "4 H W",
    lambda lib, groups, stride, bias: lib.Conv2d(4, 4, (3, 2), stride, 1, groups=groups, bias=bias),
    sizes={"H": (2, 4), "W": (2, 4)},
    options={"groups": [2, 4], "stride": [1, (2, 1)], "bias": BOTH},
)
case(
    "Conv2d that keeps the size",
    "2 H W",
    lambda lib, kernel, dilation, groups: lib.Conv2d(2, 2, kernel, padding="same", dilation=dilation, groups=groups),
    sizes={"H": (1, 4), "W": (1, 4)},
    options={"kernel": [3, (4, 3), (3, 2), (2, 4)], "dilation": [1, (3, 1)], "groups": [1, 2]},
    reference=padded,
)
case(
    "ConvTranspose2d",
    "N C H W",
    lambda lib, C, window, stride, rest, dilation, bias: lib.ConvTranspose2d(
        C, 2, window[0], stride, window[1], min(rest, stride - 1), 1, bias, dilation
    ),
    sizes={"N": (1, 2), "C": (1, 2), "H": (1, 3), "W": (1, 3)},
    options={
        "window": [((2, 3), 0), ((2, 3), (0, 1)), (2, 1), ((1, 3), 0), (4, (2, 1))],  # kernel_size and padding
        "stride": [1, 2, 3],
        "rest": [0, 1, 2],
        "dilation": [1, (2, 1), 3],
        "bias": BOTH,
    },
)
case(
    "ConvTranspose2d in groups",
    "4 H W",
    lambda lib, groups, stride, bias: lib.ConvTranspose2d(4, 8, (3, 2), stride, 1, groups=groups, bias=bias),
    sizes={"H": (2, 3), "W": (2, 3)},
    options={"groups": [2, 4], "stride": [1, (2, 1)], "bias": BOTH},
)
case(
    "ConvTranspose2d with room for one position more",
    "N 1 H W",
    lambda lib, rest: lib.ConvTranspose2d(1, 2, 2, (1, 2), 0, rest, dilation=(3, 4)),
    sizes={"N": (1, 2), "H": (1, 3), "W": (1, 3)},
    options={"rest": [(1, 0), (2, 3)]},
)

# ---------------------------------------------------------------------- layers/pooling.py
POOL: dict[str, Any] = {
    "window": [(2, 0), (2, 1), ((3, 2), 0), ((3, 2), 1), ((3, 2), (1, 0)), (1, 0), (3, 1)],  # kernel_size and padding
    "stride": [None, 1, (2, 3)],
    "ceil_mode": BOTH,
}
PLANE = {"*N": (0, 1), "H": (3, 5), "W": (3, 5)}
case(
    "MaxPool2d",
    "*N C H W",
    lambda lib, window, stride, ceil_mode: lib.MaxPool2d(window[0], stride, window[1], ceil_mode=ceil_mode),
    sizes=PLANE,
    options=POOL,
    distinct=True,
)
case(
    "MaxPool2d with dilation and ties",
    "N 1 H W",
    # with a larger dilation, a window may lie in the padding alone
    lambda lib, H, W, stride, dilation: lib.MaxPool2d(2, stride, 1, min(dilation, H, W)),
    sizes={"N": (1, 2), "H": (1, 5), "W": (1, 5)},
    options={"stride": [1, None], "dilation": [1, 2, 3]},
    skip={"differences": "at a tie the maximum has no slope"},
)
case(
    "AvgPool2d",
    "*N C H W",
    lambda lib, window, stride, ceil_mode, count, divisor: lib.AvgPool2d(
        window[0], stride, window[1], ceil_mode, count, divisor
    ),
    sizes=PLANE,
    options=POOL | {"count": BOTH, "divisor": [None, 3, -7]},
)
case(
    "AdaptiveAvgPool2d",
    "*N C H W",
    lambda lib, size: lib.AdaptiveAvgPool2d(size),
    sizes={"*N": (0, 1), "H": (1, 7), "W": (1, 5)},
    options={"size": [1, 3, (2, 3), (4, 1), 5, (None, 2), (3, None), (None, None)]},
)

# ---------------------------------------------------------------------- layers/upsample.py
# factors that leave no size as it is, or exactly doubled, but 1 and 2: there torch's layouts differ in their rule
case(
    "Upsample",
    "N C H W",
    lambda lib, by: lib.Upsample(**by),
    sizes={"N": (1, 2), "C": (1, 2)},
    options={
        "by": [{"size": s} for s in (1, 3, (4, 2), (5, 7))]
        + [{"scale_factor": s} for s in (2, 1, 1.5, 3.7, (1.0, 2.5), (3, 1), (2.9, 1.6))]
    },
)
case(
    "Upsample to smaller ones", "N C H W", lambda lib: lib.Upsample(scale_factor=0.6), sizes={"H": (3, 5), "W": (3, 5)}
)
case(
    "Upsample of a sequence",
    "N C L",
    lambda lib, by: lib.Upsample(**by),
    options={"by": [{"size": 5}, {"scale_factor": 2.6}]},
)
case(
    "Upsample of a volume",
    "N 1 D H W",
    lambda lib, by: lib.Upsample(**by),
    sizes={"N": (1, 2), "D": (1, 2), "H": (1, 2), "W": (1, 3)},
    options={"by": [{"size": (2, 3, 4)}, {"scale_factor": (1.0, 2.0, 1.5)}]},
)

# ---------------------------------------------------------------------- layers/containers.py
case(
    "Sequential",
    "*N D",
    lambda lib, D, H, K: lib.Sequential(lib.Linear(D, H), lib.Linear(H, H), lib.Tanh(), lib.Linear(H, K)),
)
case("Sequential of nothing", "*N", lambda lib: lib.Sequential())
case(
    "Sequential of the names MLP",
    "N 3 < V",
    lambda lib, V, D, H: lib.Sequential(
        lib.Embedding(V, D),
        lib.Flatten(),
        lib.Linear(3 * D, H, bias=False),
        lib.BatchNorm1d(H),
        lib.Tanh(),
        lib.Linear(H, V),
    ),
)


def thrice(lib: Any, D: int) -> hg.Sequential:
    """One layer object in three places."""
    linear = lib.Linear(D, D)
    return lib.Sequential(linear, lib.Tanh(), linear, lib.Tanh(), linear)


def once(layer: hg.Sequential, x: Tensor) -> Tensor:
    """The same with one layer."""
    w, b = layer[0].weight, layer[0].bias
    return functional.linear(functional.linear(functional.linear(x, w, b).tanh(), w, b).tanh(), w, b)


case(
    "Sequential of several inputs",
    ["*N D", "*N H"],
    lambda lib, D, H: lib.Sequential(lib.Parallel(lib.Tanh(), lib.Linear(H, D)), lib.Multiply(), lib.Linear(D, H)),
)
case("Sequential with a shared layer", "*N D", thrice, reference=once)

# ---------------------------------------------------------------------- layers/containers.py


def bodies(lib: Any, D: int, count: int) -> list[Any]:
    """The first bodies of a list; Identity hands on x and dout themselves, which nobody may write to."""
    return [lib.Identity(), lib.Linear(D, D), lib.Tanh(), lib.Sequential(lib.Linear(D, D), lib.Tanh())][:count]


COUNTS = {"count": [2, 1, 3, 4]}
case("Identity", "*N")
case(
    "Residual",
    "*N D",
    lambda lib, D, H: lib.Residual(lib.Sequential(lib.Linear(D, H), lib.Tanh(), lib.Linear(H, D))),
)
case(
    "Residual of several inputs",
    ["N D", "M"],
    lambda lib, D: lib.Residual(lib.Parallel(lib.Linear(D, D), lib.Tanh())),
)
case("Residual of the identity", "*N", lambda lib: lib.Residual(lib.Identity()))
case("Sum", "*N D", lambda lib, D, count: lib.Sum(*bodies(lib, D, count)), options=COUNTS)
case("Sum of several inputs", ["*N D", "*N D"], lambda lib, D: lib.Sum(lib.Multiply(), lib.Add()))
case("Sum of embeddings", "*N < V", lambda lib, V, D: lib.Sum(lib.Embedding(V, D), lib.Embedding(V, D)))
case("Sum of views", "N", lambda lib: lib.Sum(lib.Identity(), lib.Flatten(0), lib.Identity()))
case("Product", "*N D", lambda lib, D, count: lib.Product(*bodies(lib, D, count)), options=COUNTS)
case(
    "Concat",
    "N T D",
    lambda lib, D, H, K, dim: lib.Concat(lib.Linear(D, H), lib.Linear(D, K), dim=dim),
    options={"dim": [-1, 2]},
)
case(
    "Concat along any dimension",
    "N T D",
    lambda lib, D, count, dim: lib.Concat(*bodies(lib, D, count), dim=dim),
    options=COUNTS | {"dim": [0, 1, -1, -2, -3]},
)
case(
    "Parallel",
    [("N D", "N H")],
    lambda lib, D, H, K: lib.Parallel(lib.Linear(D, K), lib.Linear(H, K)),
)
case(
    "Parallel in Parallel",
    [("N D", ("M H", "*L"))],
    lambda lib, D, H, K: lib.Parallel(lib.Linear(D, K), lib.Parallel(lib.Linear(H, K), lib.Tanh())),
)
case(
    "Parallel with indices",
    [("N < V", "*M")],
    lambda lib, V, D: lib.Parallel(lib.Embedding(V, D), lib.Identity()),
)


def shared(lib: Any, D: int) -> hg.Sum:
    """One layer object in four bodies, at several depths."""
    linear = lib.Linear(D, D)
    gate = lib.Product(linear, lib.Sequential(linear, lib.Tanh()))
    return lib.Sum(lib.Residual(linear), gate, lib.Concat(lib.Sequential(linear), dim=-1))


def written_out(layer: hg.Sum, x: Tensor) -> Tensor:
    """The same with one layer."""
    y = functional.linear(x, layer[0].body.weight, layer[0].body.bias)
    return x + y + y * y.tanh() + y


case("Sum with a shared layer", "*N D", shared, reference=written_out)

# ---------------------------------------------------------------------- memory.py
case(
    "Recompute",
    "N D",
    lambda lib, D, H: lib.Recompute(lib.Sequential(lib.Linear(D, H), lib.BatchNorm1d(H), lib.Tanh())),
)
case(
    "Recompute of several inputs",
    ["N D", "M"],
    lambda lib, D: lib.Recompute(lib.Parallel(lib.Linear(D, D), lib.Tanh())),
)
case(
    "Recompute in Recompute",
    "*N < V",
    lambda lib, V, D: lib.Recompute(lib.Sequential(lib.Embedding(V, D), lib.Recompute(lib.Linear(D, D)), lib.Tanh())),
)

# ---------------------------------------------------------------------- bridge.py
case(
    "from_torch Linear",
    "*N D",
    lambda lib, D, K: lib.from_torch(nn.Linear(D, K)),
    covers=ModuleLayer,
)
case(
    "from_torch BatchNorm1d",
    "N C *L",
    lambda lib, C: lib.from_torch(nn.BatchNorm1d(C)),
    covers=ModuleLayer,
    sizes={"*L": (0, 1)},
)
case("from_torch GELU", "*N", lambda lib: lib.from_torch(nn.GELU()), covers=ModuleLayer)


class Mixed(nn.Module):
    """Inputs of numbers, of indices, and one that is not used; outputs in tuples; gradients in the same memory."""

    def __init__(self, N: int, D: int, V: int) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.a, self.b, self.c, self.unused = (nn.Parameter(torch.zeros(N, D)) for _ in range(4))

    def forward(self, x: Tensor, index: Tensor, other: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return 2 * (x + self.a + self.table(index)), (2 * (self.b + self.c).sum(),)


case(
    "from_torch of several inputs and outputs",
    ["N D", "N < V", "M"],
    lambda lib, N, D, V: lib.from_torch(Mixed(N, D, V)),
    covers=ModuleLayer,
)

# ---------------------------------------------------------------------- losses


def weights(*shape: int) -> Tensor:
    """A weight for each class, no two alike."""
    return torch.linspace(0.5, 2, math.prod(shape)).reshape(shape)


case(
    "CrossEntropy",
    ["N C *D", "N *D < C"],
    lambda lib, C, weighted, ignored, smoothing, reduction: lib.CrossEntropy(
        weights(C) if weighted else None,
        ignore_index=0 if ignored else -100,
        label_smoothing=smoothing,
        reduction=reduction,
    ),
    sizes={"*D": (0, 2)},
    options={"weighted": BOTH, "ignored": BOTH, "smoothing": [0.0, 0.2], "reduction": REDUCTIONS},
)
case("CrossEntropy of one row", ["C", "< C"])
case(
    "CrossEntropy of probabilities",
    ["N C *D", "N C *D in 0 1"],
    lambda lib, C, weighted, smoothing, reduction: lib.CrossEntropy(
        weights(C) if weighted else None, label_smoothing=smoothing, reduction=reduction
    ),
    sizes={"*D": (0, 2)},
    options={"weighted": BOTH, "smoothing": [0.0, 0.2], "reduction": REDUCTIONS},
)
case(
    "CrossEntropy of the probabilities of one row",
    ["C", "C in 0 1"],
    lambda lib, reduction: lib.CrossEntropy(reduction=reduction),
    options={"reduction": REDUCTIONS},
)
case("CrossEntropy without options", ["N C", "N < C"])
case(
    "LinearCrossEntropy with ignored rows",
    ["N D", "N < V"],
    lambda lib, D, V: lib.LinearCrossEntropy(D, V, bias=True, ignore_index=0, chunk_size=2),
)
case("LinearCrossEntropy without options", ["N D", "N < V"], lambda lib, D, V: lib.LinearCrossEntropy(D, V))
case(
    "LinearCrossEntropy",
    ["*N D", "*N < V"],
    lambda lib, D, V, bias, weighted, ignored, smoothing, reduction, chunk: lib.LinearCrossEntropy(
        D,
        V,
        bias=bias,
        weight=weights(V) if weighted else None,
        ignore_index=0 if ignored else -100,
        label_smoothing=smoothing,
        reduction=reduction,
        chunk_size=chunk,
    ),
    options={
        "bias": BOTH,
        "weighted": BOTH,
        "ignored": BOTH,
        "smoothing": [0.0, 0.2, 1.0],
        "reduction": REDUCTIONS,
        "chunk": [1, 2, 3, 100],
    },
)
case("MSE", ["*N", "*N"], lambda lib, reduction: lib.MSE(reduction=reduction), options={"reduction": REDUCTIONS})
case(
    "BCEWithLogits",
    ["*N D", "*N D in 0 1"],
    lambda lib, D, weighted, reduction: lib.BCEWithLogits(
        weights(D) if weighted else None, reduction=reduction, pos_weight=2 * weights(D) if weighted else None
    ),
    options={"weighted": BOTH, "reduction": REDUCTIONS},
)
case(
    "Losses",
    [("N C", "M"), ("N < C", "M")],
    lambda lib: lib.Losses(lib.CrossEntropy(), lib.MSE(), weights=(1, 0.5)),
)
WEIGHTS = {
    "none": lambda N, D: None,
    "()": lambda N, D: weights(),
    "(1,)": lambda N, D: weights(1),
    "(D,)": lambda N, D: weights(D),
    "(N, 1)": lambda N, D: weights(N, 1),
    "(N, D)": lambda N, D: weights(N, D),
}
case(
    "BCEWithLogits with weights of any shape",
    ["N D", "N D in 0 1"],
    lambda lib, N, D, weight, pos_weight, reduction: lib.BCEWithLogits(
        WEIGHTS[weight](N, D), reduction=reduction, pos_weight=WEIGHTS[pos_weight](N, D)
    ),
    options={"weight": list(WEIGHTS), "pos_weight": list(WEIGHTS), "reduction": REDUCTIONS},
)

# ---------------------------------------------------------------------- optim.py
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
