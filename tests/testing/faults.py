"""Backwards as people really get them wrong, for the layers of the names MLP: each is right in most ways.

A fault replaces methods of the class itself (`patched`), so that the cases of that class meet it unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import handgrad as hg


@dataclass(frozen=True)
class Fault:
    """One wrong variant of a class: its methods, and the property that must notice it."""

    layer: type
    name: str
    methods: dict[str, Callable[..., Any]]
    noticed_by: str


FAULTS: list[Fault] = []


def fault(layer: type, name: str, noticed_by: str, method: str = "backward") -> Callable[[Callable[..., Any]], Any]:
    """Register a function as a wrong method of the class."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        FAULTS.append(Fault(layer, name, {method: function}, noticed_by))
        return function

    return register


def rows(t: torch.Tensor) -> torch.Tensor:
    """A tensor as a matrix, its leading dimensions joined."""
    return t.reshape(-1, t.shape[-1])


# ---------------------------------------------------------------- Linear


def _linear(dweight=None, dbias=None, dx=None):
    def backward(self, dout, need_dx=True):
        x, weight = self.pop(dout)
        self.add_grad(weight, (dweight or (lambda d, x, w: rows(d).t() @ rows(x)))(dout, x, weight))
        if self.bias is not None:
            self.add_grad(self.bias, (dbias or (lambda d: rows(d).sum(0)))(dout))
        return (dx or (lambda d, w: d @ w))(dout, weight) if need_dx else None

    return backward


fault(hg.Linear, "dweight averaged over the rows", "gradients")(
    _linear(dweight=lambda d, x, w: rows(d).t() @ rows(x) / max(len(rows(x)), 1))
)
fault(hg.Linear, "dbias averaged over the rows", "gradients")(_linear(dbias=lambda d: rows(d).mean(0)))
fault(hg.Linear, "dbias sums the first dimension only", "gradients")(
    _linear(dbias=lambda d: d.sum(0) if d.dim() == 2 else d.reshape(d.shape[0], -1, d.shape[-1])[:, 0].sum(0))
)
fault(hg.Linear, "dx through a square weight not transposed", "gradients")(
    _linear(dx=lambda d, w: d @ (w.t() if w.shape[0] == w.shape[1] else w))
)
fault(hg.Linear, "dout written to in place", "ownership")(_linear(dx=lambda d, w: d.mul_(1) @ w))
fault(hg.Linear, "dbias is a view of dout for a single row", "reuse")(
    _linear(dbias=lambda d: rows(d)[0] if len(rows(d)) == 1 else rows(d).sum(0))
)
fault(hg.Linear, "rows read with view: fails for transposed dout", "layouts")(
    _linear(dweight=lambda d, x, w: d.view(-1, d.shape[-1]).t() @ rows(x))
)


@fault(hg.Linear, "gradient assigned, not added", "accumulation")
def _(self, dout, need_dx=True):
    x, weight = self.pop(dout)
    weight.grad = rows(dout).t() @ rows(x)
    if self.bias is not None:
        self.bias.grad = rows(dout).sum(0)
    return dout @ weight


@fault(hg.Linear, "reads the weight of now, not of its forward", "aliasing")
def _(self, dout, need_dx=True):
    if not self._records:
        self.pop(dout)
    (saved, _versions, spec) = self._records.pop()
    x = saved[0]
    self._check_dout(dout, spec)
    self.add_grad(self.weight, rows(dout).t() @ rows(x))
    if self.bias is not None:
        self.add_grad(self.bias, rows(dout).sum(0))
    return dout @ self.weight


@fault(hg.Linear, "looks at the record without taking it", "reuse")
def _(self, dout, need_dx=True):
    if not self._records:
        self.pop(dout)
    x, weight = self._records[-1][0]
    self.add_grad(weight, rows(dout).t() @ rows(x))
    if self.bias is not None:
        self.add_grad(self.bias, rows(dout).sum(0))
    return dout @ weight


# ---------------------------------------------------------------- Embedding


def _embedding(dweight, dx=None):
    def backward(self, dout):
        (x,) = self.pop(dout)
        grad = dweight(self, x.reshape(-1), dout.reshape(-1, self.embedding_dim))
        self.add_grad(self.weight, grad)
        return dx(x) if dx else None

    return backward


def _summed(self, x, d):
    grad = torch.zeros_like(self.weight).index_add_(0, x, d)
    if self.padding_idx is not None:
        grad[self.padding_idx] = 0
    return grad


def _last_row_wins(self, x, d):
    grad = torch.zeros_like(self.weight)
    grad[x] = d
    return grad


def _plus_equals(self, x, d):
    grad = torch.zeros_like(self.weight)
    grad[x] += d
    return grad


def _counted(self, x, d):
    counts = torch.bincount(x, minlength=self.num_embeddings).clamp(min=1).unsqueeze(1)
    return _summed(self, x, d) / counts


fault(hg.Embedding, "rows assigned: of equal indices the last one wins", "gradients")(_embedding(_last_row_wins))
fault(hg.Embedding, "grad[x] += dout, which adds equal indices once", "gradients")(_embedding(_plus_equals))
fault(hg.Embedding, "averaged over equal indices", "gradients")(_embedding(_counted))
fault(hg.Embedding, "the padding row gets a gradient", "gradients")(
    _embedding(lambda self, x, d: torch.zeros_like(self.weight).index_add_(0, x, d))
)
fault(hg.Embedding, "returns zeros for the indices, not None", "gradients")(
    _embedding(_summed, dx=lambda x: torch.zeros(x.shape))
)
fault(hg.Embedding, "index 0 taken for padding always", "gradients")(
    _embedding(lambda self, x, d: _summed(self, x, d * (x != 0).unsqueeze(1)))
)


@fault(hg.Embedding, "gradient assigned, not added", "accumulation")
def _(self, dout):
    (x,) = self.pop(dout)
    self.weight.grad = _summed(self, x.reshape(-1), dout.reshape(-1, self.embedding_dim))


# ---------------------------------------------------------------- Flatten


def _flatten(dx):
    def backward(self, dout):
        (shape,) = self.pop(dout)
        return dx(dout, shape)

    return backward


fault(hg.Flatten, "returns dout as it came", "gradients")(_flatten(lambda d, shape: d))
fault(hg.Flatten, "the elements in reversed order of dimensions", "gradients")(
    _flatten(lambda d, shape: d.reshape(shape[::-1]).permute(*range(len(shape) - 1, -1, -1)))
)
fault(hg.Flatten, "the last two dimensions swapped", "gradients")(
    _flatten(lambda d, shape: d.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2))
)
fault(hg.Flatten, "dout reshaped in place", "ownership")(_flatten(lambda d, shape: d.mul_(1).reshape(shape)))
fault(hg.Flatten, "reads memory past the strides", "layouts")(
    _flatten(lambda d, shape: torch.as_strided(d, shape, torch.empty(shape).stride()))
)
fault(hg.Flatten, "dx in float32", "gradients")(_flatten(lambda d, shape: d.reshape(shape).float()))


@fault(hg.Flatten, "the shape of the latest forward, not of its own", "reuse")
def _(self, dout):
    shape = self._records[-1][0][0] if self._records else None
    latest = getattr(self, "_latest", shape) if len(self._records) == 1 else shape
    self._latest = shape
    self.pop(dout)
    return dout.reshape(latest)


# ---------------------------------------------------------------- Tanh


def _tanh(dx):
    def backward(self, dout):
        (out,) = self.pop(dout)
        return dx(dout, out)

    return backward


fault(hg.Tanh, "1 - out", "gradients")(_tanh(lambda d, out: d * (1 - out)))
fault(hg.Tanh, "1 + out^2", "gradients")(_tanh(lambda d, out: d * (1 + out * out)))
fault(hg.Tanh, "tanh applied once more", "gradients")(_tanh(lambda d, out: d * (1 - torch.tanh(out) ** 2)))
fault(hg.Tanh, "forgets dout", "gradients")(_tanh(lambda d, out: 1 - out * out))
fault(hg.Tanh, "writes dx into dout", "ownership")(_tanh(lambda d, out: d.mul_(1 - out * out)))
fault(hg.Tanh, "writes into the out it recorded", "ownership")(_tanh(lambda d, out: out.pow_(2).neg_().add_(1) * d))
fault(hg.Tanh, "derivative in float32", "gradients")(_tanh(lambda d, out: d * (1 - out.float() ** 2).to(d)))


# ---------------------------------------------------------------- BatchNorm1d


def _popped(self, dout):
    """What a backward of BatchNorm1d works with: dout in x's form, the record, dims, and how to broadcast."""
    x, mean, rstd, weight, m = self.pop(dout)
    dims, column = ((0,), lambda t: t) if x.dim() == 2 else ((0, 2), lambda t: t.unsqueeze(1))
    return dout.reshape(x.shape), x - column(mean), rstd, weight, m, dims, column


def _batch_norm(dx=None, dweight=None, dbias=None):
    def backward(self, dout, need_dx=True):
        shape = dout.shape
        dout, diff, rstd, weight, m, dims, column = _popped(self, dout)
        xhat = diff * column(rstd)
        self.add_grad(weight, (dweight or (lambda d, xhat, diff: (d * xhat).sum(dims)))(dout, xhat, diff))
        self.add_grad(self.bias, dbias(dout, dims) if dbias else dout.sum(dims))
        dxhat = dout if weight is None else dout * column(weight)
        if m is None:
            return (dxhat * column(rstd)).reshape(shape)
        n = max(dout.numel() // self.num_features, 1)
        corr = (dxhat * xhat).sum(dims) / max(m, 1)
        right = lambda g, mean, corr, xhat, rstd, n, w, c: c(rstd) * (g - c(mean) - xhat * c(corr))  # noqa: E731
        w = 1 if weight is None else weight
        return (dx or right)(dxhat, dxhat.sum(dims) / n, corr, xhat, rstd, n, w, column).reshape(shape)

    return backward


fault(hg.BatchNorm1d, "the path through the mean forgotten", "gradients")(
    _batch_norm(lambda g, mean, corr, xhat, rstd, n, w, c: c(rstd) * (g - xhat * c(corr)))
)
fault(hg.BatchNorm1d, "the path through the variance forgotten", "gradients")(
    _batch_norm(lambda g, mean, corr, xhat, rstd, n, w, c: c(rstd) * (g - c(mean)))
)
fault(hg.BatchNorm1d, "statistics taken for constants", "gradients")(
    _batch_norm(lambda g, mean, corr, xhat, rstd, n, w, c: c(rstd) * g)
)
fault(hg.BatchNorm1d, "n - 1 where n belongs", "gradients")(
    _batch_norm(lambda g, mean, corr, xhat, rstd, n, w, c: c(rstd) * (g - c(mean) - xhat * c(corr) * n / max(n - 1, 1)))
)
fault(hg.BatchNorm1d, "weight squared in the variance's path", "gradients")(
    _batch_norm(lambda g, mean, corr, xhat, rstd, n, w, c: c(rstd) * (g - c(mean) - xhat * c(corr * w)))
)
fault(hg.BatchNorm1d, "dweight of x - mean, not of xhat", "gradients")(
    _batch_norm(dweight=lambda d, xhat, diff: (d * diff).sum((0,) if d.dim() == 2 else (0, 2)))
)
fault(hg.BatchNorm1d, "dbias averaged", "gradients")(_batch_norm(dbias=lambda d, dims: d.mean(dims)))


@fault(hg.BatchNorm1d, "weight forgotten in dx: right for weight 1", "gradients")
def _(self, dout, need_dx=True):
    shape = dout.shape
    dout, diff, rstd, weight, m, dims, column = _popped(self, dout)
    xhat = diff * column(rstd)
    self.add_grad(weight, (dout * xhat).sum(dims))
    self.add_grad(self.bias, dout.sum(dims))
    if m is None:
        return (dout * column(rstd)).reshape(shape)
    n = max(dout.numel() // self.num_features, 1)
    through_var = xhat * column((dout * xhat).sum(dims) / max(m, 1))
    return (column(rstd) * (dout - column(dout.sum(dims) / n) - through_var)).reshape(shape)


def _running(distort):
    """A `_normalize` that then distorts what the running variance has learnt; distort(self, old, own, n, factor)."""
    right = hg.BatchNorm1d._normalize

    def normalize(self, x, k):
        old = None if self.running_var is None else self.running_var.clone()
        result = right(self, x, k)
        if self.training and old is not None:
            factor = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            own = old + (self.running_var - old) / factor
            distort(self, old, own, x.numel() // self.num_features, factor)
        return result

    return normalize


fault(hg.BatchNorm1d, "running_var keeps the biased variance", "state", "_normalize")(
    _running(lambda self, old, own, n, f: self.running_var.copy_(old + f * (own * (n - 1) / n - old)))
)
fault(hg.BatchNorm1d, "momentum taken for the share of the old value", "state", "_normalize")(
    _running(lambda self, old, own, n, f: self.running_var.copy_(old + (1 - f) * (own - old)))
)
fault(hg.BatchNorm1d, "num_batches_tracked not counted", "state", "_normalize")(
    _running(lambda self, old, own, n, f: self.num_batches_tracked.sub_(1))
)


# ---------------------------------------------------------------- CrossEntropy


def _cross_entropy(change):
    right = hg.CrossEntropy.backward

    def backward(self, dout=None):
        saved = self._records[-1][0] if self._records else ()
        return change(self, right, dout, saved)

    return backward


def _with(self, right, dout, **attributes):
    """The right backward of a loss whose options were other ones."""
    kept = {name: getattr(self, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(self, name, value)
        return right(self, dout)
    finally:
        for name, value in kept.items():
            setattr(self, name, value)


fault(hg.CrossEntropy, "the mean's 1/N forgotten", "gradients")(
    _cross_entropy(
        lambda self, right, dout, saved: (
            right(self, dout) * (saved[0].shape[0] if self.reduction == "mean" and saved[0].dim() > 1 else 1)
        )
    )
)
fault(hg.CrossEntropy, "dout ignored: right for the plain loss.backward()", "gradients")(
    _cross_entropy(lambda self, right, dout, saved: right(self, None if dout is None or not dout.dim() else dout))
)
fault(hg.CrossEntropy, "label smoothing forgotten in backward", "gradients")(
    _cross_entropy(lambda self, right, dout, saved: _with(self, right, dout, label_smoothing=0.0))
)
fault(hg.CrossEntropy, "divided by the classes, too", "gradients")(
    _cross_entropy(lambda self, right, dout, saved: right(self, dout) / saved[0].shape[min(saved[0].dim() - 1, 1)])
)
fault(hg.CrossEntropy, "sign turned round", "gradients")(
    _cross_entropy(lambda self, right, dout, saved: -right(self, dout))
)
fault(hg.CrossEntropy, "each row's gradient shifted so that it sums to 1", "gradients")(
    _cross_entropy(
        lambda self, right, dout, saved: (
            right(self, dout) + 1 / max(saved[0].numel(), 1) if saved else right(self, dout)
        )
    )
)
fault(hg.CrossEntropy, "ignored rows get the gradient of their class 0", "gradients")(
    _cross_entropy(
        lambda self, right, dout, saved: _unmasked(right(self, dout), saved) if len(saved) > 1 else right(self, dout)
    )
)


def _unmasked(dx, saved):
    logp = saved[0]
    dim = min(logp.dim() - 1, 1)
    silent = (dx == 0).all(dim, keepdim=True)
    return torch.where(silent, logp.exp(), dx)


# ---------------------------------------------------------------- Sequential


def _sequential(change):
    def backward(self, dout, need_dx=True):
        self.pop(dout)
        return change(self.layers, dout)

    return backward


def _through(layers, dout):
    for layer in reversed(layers):
        dout = layer.backward(dout)
    return dout


def _skip_last_dx(layers, dout):
    _through(layers, dout)
    return dout


def _doubled(layers, dout):
    for layer in reversed(layers):
        dout = layer.backward(dout)
    return dout * 1.5


def _frozen_first(layers, dout):
    for layer in reversed(layers[1:]):
        dout = layer.backward(dout)
    kept = [(p, p.grad) for p in layers[0].parameters()] if layers else []
    dx = layers[0].backward(dout) if layers else dout
    for p, grad in kept:
        p.grad = grad
    return dx


def _cleared(layers, dout):
    for layer in reversed(layers):
        layer.zero_grad()
        dout = layer.backward(dout)
    return dout


def _zero_dout(layers, dout):
    dx = _through(layers, dout)
    dout.zero_()
    return dx


def _rounded(layers, dout):
    for layer in reversed(layers):
        dout = layer.backward(dout)
        dout = dout.float().to(dout.dtype) if dout is not None else None
    return dout


fault(hg.Sequential, "returns dout, not dx", "gradients")(_sequential(_skip_last_dx))
fault(hg.Sequential, "a factor left in dx", "gradients")(_sequential(_doubled))
fault(hg.Sequential, "the first layer gets no gradient", "gradients")(_sequential(_frozen_first))
fault(hg.Sequential, "clears gradients before it adds", "accumulation")(_sequential(_cleared))
fault(hg.Sequential, "clears dout after use", "ownership")(_sequential(_zero_dout))
fault(hg.Sequential, "float32 between the layers", "gradients")(_sequential(_rounded))


# ---------------------------------------------------------------- SGD


def _sgd(change):
    def _update(self, params, grads, group):
        for p, g in zip(params, grads):
            change(self, p, g, group)

    return _update


def _step(self, p, g, group, decay="before", first="whole", nesterov="right", sign="right", lr=None):
    g = -g if group["maximize"] and sign == "right" else g
    if group["weight_decay"] and decay == "before":
        g = g + group["weight_decay"] * p
    if group["momentum"]:
        state = self.state[p]
        if "momentum_buffer" not in state:
            share = 1 if first == "whole" else 1 - group["dampening"]
            state["momentum_buffer"] = share * g
        else:
            buffer = group["momentum"] * state["momentum_buffer"] + (1 - group["dampening"]) * g
            state["momentum_buffer"] = buffer
        buffer = state["momentum_buffer"]
        g = g + group["momentum"] * buffer if group["nesterov"] and nesterov == "right" else buffer
    if group["weight_decay"] and decay == "after":
        g = g + group["weight_decay"] * p
    p.sub_((lr or group["lr"]) * g)


fault(hg.SGD, "weight decay after the momentum", "check_optimizer", "_update")(
    _sgd(lambda self, p, g, group: _step(self, p, g, group, decay="after"))
)
fault(hg.SGD, "dampening in the first step, too", "check_optimizer", "_update")(
    _sgd(lambda self, p, g, group: _step(self, p, g, group, first="damped"))
)
fault(hg.SGD, "nesterov ignored", "check_optimizer", "_update")(
    _sgd(lambda self, p, g, group: _step(self, p, g, group, nesterov="ignored"))
)
fault(hg.SGD, "maximize ignored", "check_optimizer", "_update")(
    _sgd(lambda self, p, g, group: _step(self, p, g, group, sign="ignored"))
)
fault(hg.SGD, "the first group's learning rate for all", "check_optimizer", "_update")(
    _sgd(lambda self, p, g, group: _step(self, p, g, group, lr=self.param_groups[0]["lr"]))
)
fault(hg.SGD, "weight decay added to the gradient in place", "check_optimizer", "_update")(
    _sgd(lambda self, p, g, group: _step(self, p, g.add_(group["weight_decay"] * p), {**group, "weight_decay": 0}))
)


def _aliased(self, p, g, group):
    state = self.state[p]
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = g
    else:
        state["momentum_buffer"].mul_(group["momentum"]).add_(g, alpha=1 - group["dampening"])
    p.sub_(group["lr"] * state["momentum_buffer"])


def _aliased_momentum(self, p, g, group):
    plain = not group["momentum"] or group["weight_decay"] or group["nesterov"] or group["maximize"]
    (_step if plain else _aliased)(self, p, g, group)


fault(hg.SGD, "the gradient itself kept as momentum buffer", "check_optimizer", "_update")(_sgd(_aliased_momentum))
