"""Wrong backwards as people write them, each a layer of its own, and what the checks say to them.

They follow what students and authors of public code got wrong: a sum over the batch forgotten, n - 1 for n, the wrong
saved tensor, a term through a mean left out. Every class below is wrong in its backward, by one mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from handgrad import Layer, Linear, Loss, Sequential, Tanh, parameter
from handgrad.testing import check_layer, check_loss


class Mistake(NamedTuple):
    """One wrong backward: how it is checked, and the verdict on its hints.

    `hint` is what the first hint must say; empty where there must be none. `verdict` is a person's judgement of it:
    it "leads" to the mistake, or "near" it (to the term, the dimension or the elements to look at); "told": the failure
    itself says it; "silent": nobody does.
    """

    what: str
    make: Callable[..., Any]
    x: Any
    verdict: str
    hint: str
    also: tuple[str, ...] = ()  # the same of the further hints
    check: Callable[..., Any] = check_layer
    more: dict[str, Any] = {}  # noqa: RUF012  # read only


MISTAKES: list[Mistake] = []


def mistake(
    what: str,
    x: Any,
    verdict: str,
    hint: str,
    make: Any = None,
    check: Any = check_layer,
    also: tuple[str, ...] = (),
    **more: Any,
) -> Any:
    """Register a class, made of the sizes that `make` hands on."""

    def register(cls: Any) -> Any:
        MISTAKES.append(Mistake(what, make(cls) if make else cls, x, verdict, hint, also, check, more))
        return cls

    return register


def sized(cls: Any) -> Any:
    """A layer of D features to H."""
    return lambda D, H: cls(D, H)


def square(cls: Any) -> Any:
    """A layer of D features to D."""
    return lambda D: cls(D, D)


def rows(cls: Any) -> Any:
    """A layer of D features."""
    return lambda D: cls(D)


# ---------------------------------------------------------------- a matrix


class Affine(Layer):
    """out = x weight + bias: right, and the ground for mistakes."""

    weight = parameter("D", "H")
    bias = parameter("H")

    def __init__(self, D, H):
        self.weight, self.bias = torch.ones(D, H), torch.zeros(H)

    def forward(self, x):
        out = x @ self.weight + self.bias
        self.push(x, self.weight, out=out)
        return out


@mistake("bias not summed over the batch", "N D", "told", "the gradient of bias must be (1,)", sized)
class BiasNotSummed(Affine):
    def backward(self, dout):
        x, weight = self.pop(dout)
        self.add_grad(self.weight, x.t() @ dout)
        self.add_grad(self.bias, dout.clone())
        return dout @ weight.t()


@mistake("bias averaged over the batch", "N D", "leads", "times the right one, which is 1/(x.shape[0])", sized)
class BiasAveraged(Affine):
    def backward(self, dout):
        x, weight = self.pop(dout)
        self.add_grad(self.weight, x.t() @ dout)
        self.add_grad(self.bias, dout.sum(0) / max(len(dout), 1))
        return dout @ weight.t()


@mistake("bias from the first row", "N D", "leads", "the share of the first index of dout's dimension 0 alone", sized)
class BiasFirstRow(Affine):
    def backward(self, dout):
        x, weight = self.pop(dout)
        self.add_grad(self.weight, x.t() @ dout)
        self.add_grad(self.bias, dout[0].clone() if len(dout) else dout.sum(0))
        return dout @ weight.t()


@mistake(
    "weight transposed in dx",
    "N D",
    "leads",
    "it is right with weight transposed",
    square,
    also=("it is right with weight transposed in what backward reads", "it is right when weight = 1"),
)
class WeightTransposed(Affine):
    def backward(self, dout):
        x, weight = self.pop(dout)
        self.add_grad(self.weight, x.t() @ dout)
        self.add_grad(self.bias, dout.sum(0))
        return dout @ weight


@mistake("dweight transposed", "N D", "leads", "it is the transpose of the right one", square)
class GradientTransposed(Affine):
    def backward(self, dout):
        x, weight = self.pop(dout)
        self.add_grad(self.weight, dout.t() @ x)
        self.add_grad(self.bias, dout.sum(0))
        return dout @ weight.t()


@mistake("gradient assigned, not added", "N D", "leads", "it holds the latest gradient alone", sized)
class Assigned(Affine):
    def backward(self, dout):
        x, weight = self.pop(dout)
        self.weight.grad = x.t() @ dout
        self.bias.grad = dout.sum(0)
        return dout @ weight.t()


@mistake("bias forgotten", "N D", "leads", "backward never adds to it", sized)
class BiasForgotten(Affine):
    def backward(self, dout):
        x, weight = self.pop(dout)
        self.add_grad(self.weight, x.t() @ dout)
        return dout @ weight.t()


@mistake(
    "the gradient of a sum over the batch shared out",
    "N D",
    "leads",
    "times the right one, which is 1/(x.shape[0])",
    sized,
)
class SharedOut(Affine):
    def backward(self, dout):
        x, weight = self.pop(dout)
        dout = dout / max(len(dout), 1)  # "the mean's share": but that is the loss's
        self.add_grad(self.weight, x.t() @ dout)
        self.add_grad(self.bias, dout.sum(0))
        return dout @ weight.t()


# ---------------------------------------------------------------- elementwise


class Elementwise(Layer):
    """out = f(x); backward gets x and out."""

    def forward(self, x):
        out = self.function(x)
        self.push(x, out, out=out)
        return out

    def backward(self, dout):
        x, out = self.pop(dout)
        return self.derivative(x, out, dout)


@mistake("tanh's slope at x, not at out", "*N", "leads", "it is right with out in place of x in what backward reads")
class TanhOfX(Layer):
    def forward(self, x):
        out = torch.tanh(x)
        self.push(x, out=out)
        return out

    def backward(self, dout):
        (x,) = self.pop(dout)
        return dout * (1 - x * x)


@mistake(
    "sigmoid's second factor",
    "*N",
    "leads",
    "times (1 - out) it is right: that factor is missing",
    also=("minus dout * out^2 it is right",),
)
class HalfSigmoid(Elementwise):
    def function(self, x):
        return torch.sigmoid(x)

    def derivative(self, x, out, dout):
        return dout * out


@mistake("tanh without the square", "*N", "near", "plus dout * out (1 - out) it is right")
class TanhWithoutSquare(Elementwise):
    def function(self, x):
        return torch.tanh(x)

    def derivative(self, x, out, dout):
        return dout * (1 - out)


@mistake(
    "the square's 2",
    "*N",
    "leads",
    "it is 0.5 times the right one, which is 0.5 in every example",
    also=("plus dout * x it is right",),
)
class HalfSquare(Elementwise):
    def function(self, x):
        return x * x

    def derivative(self, x, out, dout):
        return dout * x


@mistake("dout ignored", "*N", "leads", "it is the same for another dout: dout is forgotten")
class NoDout(Elementwise):
    def function(self, x):
        return x * x

    def derivative(self, x, out, dout):
        return 2 * x


@mistake("cosine's sign", "*N", "leads", "the sign is wrong")
class Cosine(Elementwise):
    def function(self, x):
        return torch.cos(x)

    def derivative(self, x, out, dout):
        return dout * torch.sin(x)


@mistake("swish with a factor for another", "*N", "silent", "")
class Swish(Elementwise):
    def function(self, x):
        return x * torch.sigmoid(x)

    def derivative(self, x, out, dout):
        return dout * (out + torch.sigmoid(x)) - dout * out * out


@mistake("relu's mask turned round", "*N", "leads", "it is right with mask turned round (~mask)", kinks={0.0: 0.0})
class WrongMask(Layer):
    def forward(self, x):
        mask = x > 0
        self.push(mask, out=x)
        return x * mask

    def backward(self, dout):
        (mask,) = self.pop(dout)
        return dout * ~mask


@mistake(
    "leaky relu's negative side",
    "*N",
    "near",
    "it is wrong where x < 0, everywhere there and only there",
    kinks={0.0: None},
)
class Leaky(Elementwise):
    def function(self, x):
        return torch.where(x > 0, x, 0.2 * x)

    def derivative(self, x, out, dout):
        return dout * (x > 0)


@mistake(
    "an option that backward does not know",
    "*N",
    "leads",
    "times the right one, which is 1/slope",
    lambda cls: lambda slope: cls(slope),
    options={"slope": [0.3, 0.7, 1.5]},
    also=("it is right when slope = 1",),
)
class Scaled(Layer):
    def __init__(self, slope=1.0):
        self.slope = slope

    def forward(self, x):
        out = torch.sin(self.slope * x)
        self.push(x, out=out)
        return out

    def backward(self, dout):
        (x,) = self.pop(dout)
        return dout * torch.cos(self.slope * x)


@mistake("a sign by division", "*N", "leads", "`return dout * (x / x.abs())` (div)", kinks={0.0: 0.0})
class Magnitude(Layer):
    def forward(self, x):
        self.push(x, out=x)
        return x.abs()

    def backward(self, dout):
        (x,) = self.pop(dout)
        return dout * (x / x.abs())


# ---------------------------------------------------------------- sums over a dimension


@mistake(
    "softmax without the other classes", "N C", "leads", "what it does to the others is missing", sizes={"C": (2, 4)}
)
class SoftmaxDiagonal(Elementwise):
    def function(self, x):
        return torch.softmax(x, -1)

    def derivative(self, x, out, dout):
        return dout * out * (1 - out)


@mistake(
    "softmax without the sum",
    "N C",
    "near",
    "it is off by a multiple of out all along dimension 1",
    sizes={"C": (2, 4)},
)
class SoftmaxNoSum(Elementwise):
    def function(self, x):
        return torch.softmax(x, -1)

    def derivative(self, x, out, dout):
        return dout * out


@mistake(
    "softmax's sum over the batch",
    "N C",
    "leads",
    "a sum or mean in it runs over the wrong dimension",
    sizes={"N": (3, 5), "C": (3, 5)},
    skip={"edges": "not what it is about"},
)
class SoftmaxOverBatch(Elementwise):
    def function(self, x):
        return torch.softmax(x, -1)

    def derivative(self, x, out, dout):
        return out * (dout - (dout * out).sum(0, keepdim=True))


@mistake(
    "the mean's own gradient forgotten",
    "N D",
    "near",
    "it is off by the same amount all along dimension 1",
    also=("it equals dout: as if the layer were the identity",),
)
class Centred(Layer):
    def forward(self, x):
        out = x - x.mean(-1, keepdim=True)
        self.push(out=out)
        return out

    def backward(self, dout):
        self.pop(dout)
        return dout.clone()


@mistake("a mean taken for a sum", "N D", "leads", "times the right one, which is x.shape[1]")
class Mean(Layer):
    def forward(self, x):
        out = x.mean(-1)
        self.push(x, out=out)
        return out

    def backward(self, dout):
        (x,) = self.pop(dout)
        return dout.unsqueeze(-1).expand(x.shape).clone()


class Standardized(Layer):
    """Each row by its mean and deviation."""

    def __init__(self, eps=1e-2):
        self.eps = eps

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        var = ((x - mean) ** 2).mean(-1, keepdim=True)
        rstd = (var + self.eps) ** -0.5
        out = (x - mean) * rstd
        self.push(x, out, rstd, out=out)
        return out


@mistake(
    "statistics taken for constants", "N D", "leads", "it is off by a constant and a multiple of ", sizes={"D": (2, 6)}
)
class ConstantStatistics(Standardized):
    def backward(self, dout):
        _, _, rstd = self.pop(dout)
        return dout * rstd


@mistake(
    "the variance's path forgotten",
    "N D",
    "near",
    "it is off by a multiple of out all along dimension 1",
    sizes={"D": (2, 6)},
)
class NoVariancePath(Standardized):
    def backward(self, dout):
        _, _, rstd = self.pop(dout)
        return rstd * (dout - dout.mean(-1, keepdim=True))


@mistake(
    "n - 1 in the variance's path",
    "N D",
    "near",
    "it is off by a multiple of out all along dimension 1",
    sizes={"D": (2, 6)},
)
class OneLess(Standardized):
    def backward(self, dout):
        _, out, rstd = self.pop(dout)
        share = (dout * out).sum(-1, keepdim=True) / max(out.shape[-1] - 1, 1)
        return rstd * (dout - dout.mean(-1, keepdim=True) - out * share)


@mistake("eps outside the root in backward", "N D", "leads", "it is right when eps = 0", sizes={"D": (3, 6)})
class EpsOutside(Standardized):
    def backward(self, dout):
        x, out, _ = self.pop(dout)
        rstd = 1 / (x.var(-1, keepdim=True, unbiased=False).sqrt() + self.eps)
        out = (x - x.mean(-1, keepdim=True)) * rstd
        return rstd * (dout - dout.mean(-1, keepdim=True) - out * (dout * out).mean(-1, keepdim=True))


@mistake("a length taken for a constant", "N D", "near", "it is off by a multiple of x all along dimension 1")
class Unit(Layer):
    def forward(self, x):
        length = (x.square().sum(-1, keepdim=True) + 0.1).sqrt()
        self.push(length, out=x)
        return x / length

    def backward(self, dout):
        (length,) = self.pop(dout)
        return dout / length


@mistake("a running sum not turned round", "N D", "silent", "")
class RunningSum(Layer):
    def forward(self, x):
        out = x.cumsum(-1)
        self.push(out=out)
        return out

    def backward(self, dout):
        self.pop(dout)
        return dout.cumsum(-1)


@mistake("the first 64 rows", "N D", "leads", "it is right up to index 63 of dimension 0, and wrong from there on")
class FirstRows(Layer):
    def forward(self, x):
        self.push(x, out=x)
        return x * x

    def backward(self, dout):
        (x,) = self.pop(dout)
        dx = torch.zeros_like(x)
        dx[:64] = (2 * x * dout)[:64]
        return dx


# ---------------------------------------------------------------- a parameter per feature


class Gain(Layer):
    """out = weight f(x)."""

    weight = parameter("D")

    def __init__(self, D):
        self.weight = torch.ones(D)

    def forward(self, x):
        out = torch.tanh(x) * self.weight
        self.push(x, self.weight, out=out)
        return out

    def add(self, grad):
        self.add_grad(self.weight, grad.reshape(-1, self.weight.numel()).sum(0))


@mistake(
    "weight forgotten in dx",
    "*N D",
    "leads",
    "times weight it is right: that factor is missing",
    rows,
    also=("it is right when weight = 1",),
)
class WeightForgotten(Gain):
    def backward(self, dout):
        x, _ = self.pop(dout)
        h = torch.tanh(x)
        self.add(dout * h)
        return dout * (1 - h * h)


@mistake("x for tanh x in dweight", "*N D", "silent", "", rows)
class WrongFactor(Gain):
    def backward(self, dout):
        x, weight = self.pop(dout)
        self.add(dout * x)
        return dout * weight * (1 - torch.tanh(x) ** 2)


@mistake(
    "out, which has the weight, for tanh x",
    "N D",
    "leads",
    "divided by weight it is right: that factor is one too many",
    rows,
    also=("it is right when weight = 1",),
)
class OutForInside(Gain):
    def backward(self, dout):
        x, weight = self.pop(dout)
        h = torch.tanh(x)
        self.add(dout * h * weight)
        return dout * weight * (1 - h * h)


@mistake(
    "weight divided by, not multiplied with",
    "N D",
    "leads",
    "times weight^2 it is right: that factor is missing",
    rows,
    also=("it is right when weight = 1",),
)
class Divided(Gain):
    def backward(self, dout):
        x, weight = self.pop(dout)
        h = torch.tanh(x)
        self.add(dout * h)
        return dout * (1 - h * h) / (weight + 1e-3 * (weight == 0))


# ---------------------------------------------------------------- several inputs, uses and indices


@mistake(
    "the factors of a product exchanged",
    ["*N", "*N"],
    "leads",
    "it is the right one of dx[1]: are the two exchanged?",
    also=("it is right with y in place of x in what backward reads",),
)
class Product(Layer):
    def forward(self, x, y):
        self.push(x, y, out=x)
        return x * y

    def backward(self, dout):
        x, y = self.pop(dout)
        return dout * x, dout * y


@mistake("a broadcast input not summed", ["N D", "D"], "leads", "x[1] was broadcast on the way to out")
class Plus(Layer):
    def forward(self, x, y):
        self.push(out=x)
        return x + y

    def backward(self, dout):
        self.pop(dout)
        return dout.clone(), dout.clone()


@mistake(
    "a sum that forgets the direct way",
    "N D",
    "leads",
    "plus dout it is right",
    lambda cls: lambda D: cls(Sequential(Linear(D, D), Tanh())),
)
class Skip(Layer):
    def __init__(self, body):
        self.body = body

    def forward(self, x):
        out = x + self.body.forward_at("body", x)
        self.push(out=out)
        return out

    def backward(self, dout):
        self.pop(dout)
        return self.body.backward_at("body", dout)


@mistake(
    "a layer used twice, its backwards first to last",
    ["N D", "N D"],
    "leads",
    "run the backwards in reverse",
    lambda cls: lambda D: cls(Linear(D, 3)),
)
class Tower(Layer):
    def __init__(self, tower):
        self.tower = tower

    def forward(self, a, b):
        out = self.tower.forward_at("tower", a), self.tower.forward_at("tower", b)
        self.push(out=out)
        return out

    def backward(self, dout):
        self.pop(dout)
        return tuple([self.tower.backward_at("tower", d) for d in dout])


class Table(Layer):
    """Rows of a table by index."""

    weight = parameter("V", "D")

    def __init__(self, V, D):
        self.weight = torch.ones(V, D)

    def forward(self, x):
        out = self.weight[x]
        self.push(x, out=out)
        return out


@mistake(
    "equal indices assigned",
    "N < V",
    "leads",
    "of equal indices only the last one arrived",
    lambda c: lambda V, D: c(V, D),
)
class LastIndex(Table):
    def backward(self, dout):
        (x,) = self.pop(dout)
        grad = torch.zeros_like(self.weight)
        grad[x] = dout
        self.add_grad(self.weight, grad)


@mistake("a maximum that all elements get", "N D", "silent", "", distinct=True)
class Maximum(Layer):
    def forward(self, x):
        out = x.amax(-1)
        self.push(x, out=out)
        return out

    def backward(self, dout):
        (x,) = self.pop(dout)
        return dout.unsqueeze(-1) * (x > 0)


# ---------------------------------------------------------------- losses


@mistake(
    "the mean over the rows alone",
    ("N D", "N D"),
    "leads",
    "times the right one, which is x[0].shape[1]",
    None,
    check_loss,
    options={"reduction": ["mean"]},
    skip={"edges": "no rows"},
)
class Squared(Loss):
    def forward(self, x, target):
        out = ((x - target) ** 2).mean()
        self.push(x - target, out=out)
        return out

    def backward(self, dout=None):
        (diff,) = self.pop(dout)
        return 2 * diff / len(diff) * (1 if dout is None else dout)


@mistake(
    "dout of the unreduced loss ignored",
    ("N D", "N D"),
    "leads",
    "it is the same for another dout",
    None,
    check_loss,
    skip={"edges": "no rows"},
)
class Absolute(Loss):
    def forward(self, x, target):
        diff = x - target
        out = self.reduce(diff.abs())
        self.push(diff, out=out)
        return out

    def backward(self, dout=None):
        (diff,) = self.pop(dout)
        if self.reduction == "none":
            return diff.sign()
        return self.dlosses(dout, diff, max(diff.numel(), 1)) * diff.sign()
