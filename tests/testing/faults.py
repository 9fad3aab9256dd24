"""Backwards as people really get them wrong: each is one edit of the source of a layer, a loss or an optimizer.

A row says what is wrong, the text as it stands in the source, what it becomes, and the property that notices it where
that is not `gradients`. An edit that no longer finds its text is an error, so the list cannot go stale unseen.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import handgrad as hg
from tests.mutate import build, patched


class Fault(NamedTuple):
    """One wrong variant of a class: an edit of one of its methods, or of a function beside it in its module."""

    layer: type
    name: str
    noticed_by: str  # a property, or check_optimizer
    method: str
    old: str
    new: str

    def planted(self) -> AbstractContextManager[None]:
        """Inside, the class has the fault."""
        module = sys.modules[self.layer.__module__]
        owner: Any = next((cls for cls in self.layer.__mro__ if self.method in vars(cls)), module)
        home = module if owner is module else sys.modules[owner.__module__]
        source = textwrap.dedent(inspect.getsource(vars(owner)[self.method]))
        assert self.old in source, f"{self.layer.__name__}.{self.method} no longer has {self.old!r}"
        (tree,) = ast.parse(source.replace(self.old, self.new)).body
        return patched(owner, self.method, build(tree, owner, home))


PLANTED: list[Fault] = []


def faults(layer: type, *rows: tuple[str, ...], method: str = "backward", by: str = "gradients") -> None:
    """Register faults of one method: what is wrong, the text, what it becomes, and who notices it if not `by`."""
    for name, old, new, *other in rows:
        PLANTED.append(Fault(layer, name, other[0] if other else by, method, old, new))


# ---------------------------------------------------------------- the names MLP

faults(
    hg.Linear,
    ("dweight averaged over the rows", "dout_rows.t() @ rows(x)", "dout_rows.t() @ rows(x) / max(len(dout_rows), 1)"),
    ("dbias averaged over the rows", "dout_rows.sum(0)", "dout_rows.mean(0)"),
    ("dbias sums the first dimension only", "dout_rows.sum(0)",
     "dout.sum(0) if dout.dim() == 2 else dout.reshape(dout.shape[0], -1, dout.shape[-1])[:, 0].sum(0)"),
    ("dx through a square weight not transposed", "dout @ weight",
     "dout @ (weight.t() if weight.shape[0] == weight.shape[1] else weight)"),
    ("dout written to in place", "dout @ weight", "dout.mul_(1) @ weight", "ownership"),
    ("dbias is a view of dout for a single row", "dout_rows.sum(0)",
     "dout_rows[0] if len(dout_rows) == 1 else dout_rows.sum(0)", "reuse"),
    ("rows read with view: fails for transposed dout", "rows(dout)", "dout.view(-1, self.out_features)", "layouts"),
    ("gradient assigned, not added", "self.add_grad(weight, dout_rows.t() @ rows(x))",
     "weight.grad = dout_rows.t() @ rows(x)", "accumulation"),
    ("reads the weight of now, not of its forward", "x, weight = self.pop(dout)",
     "x, weight = (self._records.pop()[0] if self._records else self.pop(dout))[0], self.weight", "aliasing"),
    ("looks at the record without taking it", "self.pop(dout)",
     "self._records[-1][0] if self._records else self.pop(dout)", "reuse"),
)  # fmt: skip
faults(
    hg.Embedding,
    ("rows assigned: of equal indices the last one wins", "index_add_(", "index_copy_("),
    ("grad[x] += dout, which adds equal indices once",
     "dweight.index_add_(0, x.reshape(-1), dout.reshape(-1, self.embedding_dim))", "dweight[x] += dout"),
    ("averaged over equal indices", "self.add_grad(self.weight, dweight)", "self.add_grad(self.weight, dweight / "
     "torch.bincount(x.reshape(-1), minlength=self.num_embeddings).clamp(min=1).unsqueeze(1))"),
    ("the padding row gets a gradient", "if self.padding_idx is not None:", "if False:"),
    ("returns zeros for the indices, not None", "self.add_grad(self.weight, dweight)",
     "self.add_grad(self.weight, dweight); return torch.zeros(x.shape)"),
    ("index 0 taken for padding always", "self.add_grad(self.weight, dweight)",
     "dweight[0] = 0; self.add_grad(self.weight, dweight)"),
    ("gradient assigned, not added", "self.add_grad(self.weight, dweight)", "self.weight.grad = dweight",
     "accumulation"),
)  # fmt: skip
faults(
    hg.Flatten,
    ("returns dout as it came", "dout.reshape(shape)", "dout"),
    ("the elements in reversed order of dimensions", "dout.reshape(shape)",
     "dout.reshape(shape[::-1]).permute(*range(len(shape) - 1, -1, -1))"),
    ("the last two dimensions swapped", "dout.reshape(shape)",
     "dout.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)"),
    ("dout reshaped in place", "dout.reshape(shape)", "dout.mul_(1).reshape(shape)", "ownership"),
    ("reads memory past the strides", "dout.reshape(shape)", "dout.as_strided(shape, dout.new_empty(shape).stride())",
     "layouts"),
    ("dx in float32", "dout.reshape(shape)", "dout.reshape(shape).float()"),
    ("the shape of the latest forward, not of its own", "(shape,) = self.pop(dout)",
     "latest = getattr(self, 'latest', None) if len(self._records) == 1 else None; (shape,) = self.pop(dout); "
     "self.latest, shape = shape, latest or shape", "reuse"),
)  # fmt: skip
faults(
    hg.Tanh,
    ("1 - out", "blockwise(formula, dout, out)", "dout * (1 - out)"),
    ("1 + out^2", "blockwise(formula, dout, out)", "dout * (1 + out * out)"),
    ("tanh applied once more", "blockwise(formula, dout, out)", "dout * (1 - torch.tanh(out) ** 2)"),
    ("forgets dout", "blockwise(formula, dout, out)", "1 - out * out"),
    ("writes dx into dout", "blockwise(formula, dout, out)", "dout.mul_(1 - out * out)", "ownership"),
    ("writes into the out it recorded", "blockwise(formula, dout, out)", "out.pow_(2).neg_().add_(1) * dout",
     "ownership"),
    ("derivative in float32", "blockwise(formula, dout, out)", "dout * (1 - out.float() ** 2).to(dout)"),
)  # fmt: skip
faults(
    hg.BatchNorm1d,
    ("the path through the mean forgotten", "column(dbias), xhat", "column(0 * dbias), xhat"),
    ("the path through the variance forgotten", "column(dweight)", "column(0 * dweight)"),
    ("statistics taken for constants", "if m is None:", "if True:"),
    ("n - 1 where n belongs", "value=n / max(m, 1)", "value=n / max(n - 1, 1)"),
    ("weight squared in the variance's path", "column(dweight)",
     "column(dweight * (1 if weight is None else weight))"),
    ("dweight of x - mean, not of xhat", "self.add_grad(weight, dweight)", "self.add_grad(weight, dweight / rstd)"),
    ("dbias averaged", "self.add_grad(self.bias, dbias)",
     "self.add_grad(self.bias, dbias / max(x.numel() // self.num_features, 1))"),
    ("weight forgotten in dx: right for weight 1", "rstd if weight is None else rstd * weight", "rstd"),
)  # fmt: skip
faults(
    hg.BatchNorm1d,
    ("running_var keeps the biased variance", "if factor is None and",
     "if var is not None: var.sub_(momentum * x.transpose(0, 1).flatten(1).var(1) / (x.numel() // self.num_features))\n"
     "    if factor is None and", "state"),
    ("momentum taken for the share of the old value", "momentum = 1.0 if factor is None else factor",
     "momentum = 1.0 if factor is None else 1 - factor", "state"),
    ("num_batches_tracked not counted", "return out, batch_mean,",
     "if mean is not None: self.num_batches_tracked.sub_(1)\n    return out, batch_mean,", "state"),
    method="_normalize",
)  # fmt: skip
faults(
    hg.SyncBatchNorm,
    ("the path through the mean forgotten", "column(dbias) + xhat", "xhat"),
    ("the path through the variance forgotten", "xhat * column(dweight)", "0 * xhat * column(dweight)"),
    ("statistics taken for constants", "if m is None:", "if True:"),
    ("m where n belongs: right without unbiased", "* (n / m)) / max(n, 1)", ") / max(n, 1)"),
    ("dweight of x - mean, not of xhat", "self.add_grad(weight, dweight)", "self.add_grad(weight, dweight / rstd)"),
    ("weight forgotten in dx: right for weight 1", "rstd if weight is None else rstd * weight", "rstd"),
)  # fmt: skip
faults(
    hg.CrossEntropy,
    ("dout ignored: right for the plain loss.backward()", "self.row_dlosses(dout,",
     "self.row_dlosses(dout if dout is not None and dout.dim() else None,"),
    ("label smoothing forgotten in backward", "s, C, column = self.label_smoothing,", "s, C, column = 0.0,"),
    ("divided by the classes, too", "return dx.mul_(", "return dx.div_(C).mul_("),
    ("sign turned round", "return dx.mul_(", "return dx.neg_().mul_("),
    ("each row's gradient shifted so that it sums to 1", "return dx.mul_(", "return dx.add_(1 / C).mul_("),
)  # fmt: skip
faults(
    hg.CrossEntropy,
    ("the mean's 1/N forgotten", "self.dlosses(dout, x, count)", "self.dlosses(dout, x, 1)"),
    ("ignored rows get the gradient of their class 0", "x, count), used)", "x, count), None)"),
    method="row_dlosses",
)
faults(
    hg.CrossEntropy,
    ("probabilities averaged over the classes, too", "max(sum_q.numel(), 1)", "max(target.numel(), 1)"),
    ("probabilities taken for a distribution", "exp(logp) * sum_q - q", "exp(logp) - q"),
    method="_backward_of_probabilities",
)


def walk(step: str = "dout = layer.backward(dout)", result: str = "dout") -> tuple[str, str]:
    """The edit of Sequential's backward that gives it another loop."""
    loop = f"for layer in reversed(self.layers): {step}"
    return "self.pop(dout)", f"self.pop(dout); given = dout\n    {loop}\n    return {result}"


faults(
    hg.Sequential,
    ("returns dout, not dx", *walk(result="given")),
    ("a factor left in dx", *walk(result="dout * 1.5")),
    ("the first layer gets no gradient",
     *walk(result="[setattr(p, 'grad', None) for layer in self.layers[:1] for p in layer.parameters()] and dout")),
    ("clears gradients before it adds", *walk("layer.zero_grad(); dout = layer.backward(dout)"), "accumulation"),
    ("clears dout after use", *walk(result="dout if given.zero_() is given else None"), "ownership"),
    ("float32 between the layers", *walk("dout = layer.backward(dout.float().to(dout.dtype))")),
)  # fmt: skip
faults(
    hg.SGD,
    ("weight decay after the momentum", "states = [", "torch._foreach_mul_(params, 1 - group['lr'] * "
     "group['weight_decay']); group = {**group, 'weight_decay': 0}; states = ["),
    ("the first group's learning rate for all", "if not isinstance(group",
     "group = {**group, 'lr': self.param_groups[0]['lr']}\n    if not isinstance(group"),
    method="_update", by="check_optimizer",
)  # fmt: skip
faults(
    hg.SGD,
    ("dampening in the first step, too", "g.clone() if b is None", "g * share if b is None"),
    ("nesterov ignored", 'if group["nesterov"] else', "if False else"),
    ("maximize ignored", 'if group["maximize"]:', "if False:"),
    ("weight decay added to the gradient in place",
     'grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))',
     'torch._foreach_add_(grads, params, alpha=group["weight_decay"])'),
    ("the gradient itself kept as momentum buffer", "g.clone() if b is None", "g if b is None"),
    method="descend", by="check_optimizer",
)  # fmt: skip

# ---------------------------------------------------------------- containers

faults(
    hg.Identity,
    ("doubled", "return dout", "return 2 * dout"),
    ("zero", "return dout", "return 0 * dout"),
    ("ones", "return dout", "return dout * 0 + 1"),
    ("written to in place", "return dout", "return dout.mul_(1)", "ownership"),
    ("in float32", "return dout", "return dout.float()"),
    ("the record looked at, not taken", "self.pop(dout)", "self._records or self.pop(dout)", "reuse"),
)
faults(
    hg.Residual,
    ("the body forgotten", "return plus(dout, dx)", "return dout"),
    ("the connection forgotten", "return plus(dout, dx)", "return dx"),
    ("the difference", "return plus(dout, dx)", "return plus(dout, plus(dx, plus(dx, dx)))"),
    ("added into dout", "return plus(dout, dx)", "return dout.add_(dx)", "ownership"),
    ("dout twice", "return plus(dout, dx)", "return plus(dout, plus(dout, dx))"),
    ("the body twice", '"body", dout, need_dx', '"body", plus(dout, dout), need_dx'),
)
faults(
    hg.Sum,
    ("averaged", "[dout] * len(self.layers)", "[dout / len(self.layers)] * len(self.layers)"),
    ("the first body's dx only", "return total(dxs) if", "return dxs[0] if"),
    ("the last body's dx only", "return total(dxs) if", "return dxs[-1] if"),
    ("the last body gets nothing", "[dout] * len(self.layers)", "[*[dout] * (len(self.layers) - 1), 0 * dout]"),
    ("dout written to", "self.pop(dout)", "self.pop(dout); dout.mul_(1)", "ownership"),
    ("dx doubled", "return total(dxs) if", "return plus(total(dxs), total(dxs)) if"),
)
faults(
    hg.Product,
    ("the other factor forgotten", "times_the_others(dout, outs)", "[dout] * len(outs)"),
    ("its own factor, not the other's", "times_the_others(dout, outs)", "[dout * out for out in outs]"),
    ("the factors exchanged", "times_the_others(dout, outs)", "times_the_others(dout, outs)[::-1]"),
    ("all factors, its own included", "times_the_others(dout, outs)",
     "[out * d for out, d in zip(outs, times_the_others(dout, outs))]"),
    ("the first body's dx only", "return total(dxs) if", "return dxs[0] if"),
    ("factors multiplied in place", "times_the_others(dout, outs)",
     "times_the_others(dout, [out.mul_(1) for out in outs])"),
)  # fmt: skip
faults(
    hg.Concat,
    ("pieces in reversed order", "dxs = self._backward_each(list(torch.split(dout, sizes, self.dim)), need_dx)",
     "dxs = self._backward_each([p.flip(self.dim) for p in torch.split(dout, sizes, self.dim)], need_dx)"),
    ("the first body's dx only", "return total(dxs) if", "return dxs[0] if"),
    ("averaged", "return total(dxs) if", "return total(dxs) / len(dxs) if"),
    ("dout written to", "(sizes,) = self.pop(dout)", "(sizes,) = self.pop(dout); dout.mul_(1)", "ownership"),
    ("dx with a dimension more", "return total(dxs) if", "return total(dxs)[None] if"),
    ("equal pieces of doubled dout", "torch.split(dout, sizes", "torch.split(2 * dout, sizes"),
)  # fmt: skip
faults(
    hg.Constant,
    ("dout handed on", "with_zeros(None, spec)", "dout"),
    ("no dx at all", "with_zeros(None, spec) if need_dx else None", "None"),
    ("ones", "with_zeros(None, spec)", "with_zeros(None, spec) + 1"),
    ("nearly nothing", "with_zeros(None, spec)", "with_zeros(None, spec) + 1e-6"),
    ("dx with a dimension more", "with_zeros(None, spec)", "with_zeros(None, spec)[None]"),
    ("the record looked at, not taken", "self.pop(dout)", "self._records[-1][0]", "reuse"),
)
faults(
    hg.Recompute,
    ("without the second forward", "before is not None", "False"),
    ("the buffers of now", "before.again(), ", "", "ownership"),
    ("no dx", "return self.body", "self.body"),
    ("dout doubled", '"body", dout, need_dx', '"body", plus(dout, dout), need_dx'),
    ("dout written to", "# out = body(x)", "dout.mul_(1)", "ownership"),
    ("the record looked at, not taken", "self.pop(dout)", "self._records[-1][0]", "accumulation"),
)
faults(
    hg.Add,
    ("averaged", "[dout] * count", "[dout / count] * count"),
    ("the first input alone", "[dout] * count", "[dout, *[0 * dout] * (count - 1)]"),
    ("the sign of the last", "[dout] * count", "[*[dout] * (count - 1), -dout]"),
    ("doubled", "[dout] * count", "[2 * dout] * count"),
    ("written to in place", "[dout] * count", "[dout.mul_(1)] * count", "ownership"),
    ("one dx for all inputs", "per_input([dout] * count)", "dout"),
)
faults(
    hg.Multiply,
    ("as for a sum", "times_the_others(dout, xs)", "[dout] * len(xs)"),
    ("its own factor, not the others'", "times_the_others(dout, xs)", "[dout * x for x in xs]"),
    ("the factors exchanged", "times_the_others(dout, xs)", "times_the_others(dout, xs)[::-1]"),
    ("all factors, its own included", "times_the_others(dout, xs)",
     "[x * d for x, d in zip(xs, times_the_others(dout, xs))]"),
    ("dout forgotten", "times_the_others(dout, xs)", "times_the_others(dout * 0 + 1, xs)"),
    ("inputs written to", "times_the_others(dout, xs)", "times_the_others(dout, [x.mul_(1) for x in xs])", "ownership"),
)  # fmt: skip
faults(
    hg.Cat,
    ("pieces turned round", "torch.split(dout, sizes, self.dim)",
     "[p.flip(self.dim) for p in torch.split(dout, sizes, self.dim)]"),
    ("halved", "torch.split(dout, sizes", "torch.split(dout / 2, sizes"),
    ("pieces exchanged", "torch.split(dout, sizes, self.dim)", "torch.split(dout, sizes[::-1], self.dim)[::-1]"),
    ("a dimension lost", "torch.split(dout, sizes, self.dim)",
     "[p.flatten(-2) for p in torch.split(dout, sizes, self.dim)]"),
    ("dout written to", "(sizes,) = self.pop(dout)", "(sizes,) = self.pop(dout); dout.mul_(1)", "ownership"),
    ("the first piece for all", "torch.split(dout, sizes, self.dim)",
     "[torch.split(dout, sizes, self.dim)[0]] * len(sizes)"),
)  # fmt: skip
faults(
    hg.Graph,
    ("a value read twice gets the last gradient", "dx if douts[only] is None else plus(douts[only], dx)", "dx"),
    ("a value read twice gets the first gradient", "plus(douts[only], dx)", "douts[only]"),
    ("forwards, not in reverse", "in reversed(self._steps)", "in self._steps"),
    ("several inputs get nothing", "_send(douts, step.sources, dx, counts)", "pass"),
    ("the inputs exchanged", "zip(douts, specs)", "zip(douts[: len(specs)][::-1], specs)"),
    ("nobody told whose dx is wanted", "need_dx or step.feeds_nodes", "step.feeds_nodes"),
)
faults(
    hg.Parallel,
    ("all the same dout", "list(dout)", "[dout[0] for _ in dout]"),
    ("dx exchanged", "return tuple(dxs) if", "return tuple(dxs[::-1]) if"),
    ("dout exchanged", "list(dout)", "list(dout[::-1])"),
    ("a list, not a tuple", "return tuple(dxs) if", "return list(dxs) if"),
    ("doubled", "list(dout)", "[2 * d for d in dout]"),
    ("the first dx for all", "return tuple(dxs) if", "return (dxs[0],) * len(dxs) if"),
)

faults(
    hg.Losses,
    ("weights forgotten", "self.weights[i])", "1.0)"),
    ("the first weight for all", "self.weights[i])", "self.weights[0])"),
    ("weights squared", "self.weights[i])", "self.weights[i] ** 2)"),
    ("dout forgotten", "dloss if dout is None else dloss * dout", "dloss"),
    ("dx exchanged", "return tuple(dxs)", "return tuple(dxs[::-1])"),
    ("averaged", "dloss if dout is None else dloss * dout", "dloss / 2 if dout is None else dloss * dout / 2"),
)

# ---------------------------------------------------------------- activations

faults(
    hg.Sigmoid,
    ("out + out^2", "value=-1", "value=1"),
    ("out forgotten", "torch.addcmul(out, out, out, value=-1, out=dx)", "(1 - out)"),
    ("dout forgotten", "slope.mul_(dout)", "slope"),
    ("out - out^3", "torch.addcmul(out, out, out,", "torch.addcmul(out, out, out * out,"),
    (
        "written into out",
        "torch.addcmul(out, out, out, value=-1, out=dx)",
        "out.addcmul_(out, out, value=-1).clone()",
        "ownership",
    ),
    ("sigmoid once more", "torch.addcmul(out, out, out,", "torch.addcmul(out, out, torch.sigmoid(out),"),
)
faults(
    hg.ReLU,
    ("slope 1 everywhere", "where_positive(dout, out)", "dout.clone()"),
    ("slope where out is 0", "where_positive(dout, out)", "dout * (out == 0)"),
    ("threshold at a half", "where_positive(dout, out)", "where_positive(dout, out - 0.5)"),
    ("dout forgotten", "where_positive(dout, out)", "where_positive(torch.ones_like(dout), out)"),
    ("the derivative of the square", "where_positive(dout, out)", "dout * 2 * out"),
    ("in float32", "where_positive(dout, out)", "where_positive(dout, out).float()"),
)
faults(
    hg.LeakyReLU,
    ("as ReLU", "self.negative_slope)", "0.0)"),
    ("slope 0.01 whatever was asked for", "self.negative_slope", "0.01"),
    ("the sides exchanged", "torch.sign(x,", "torch.sign(-x,"),
    ("slope squared", "self.negative_slope", "self.negative_slope ** 2"),
    ("dout forgotten", "slope.mul_(dout)", "slope"),
    ("slope 1 everywhere", "torch.threshold_(torch.sign(x, out=dx), 0, self.negative_slope)", "torch.ones_like(x)"),
)
faults(
    hg.SiLU,
    ("as sigmoid", "torch.addcmul(x, x, s, value=-1, out=dx)", "torch.zeros_like(x)"),
    ("1 + s", "value=-1", "value=1"),
    ("s forgotten", "torch.addcmul(s, s, x_rest, out=dx)", "(s + x_rest)"),
    ("the first s forgotten", "torch.addcmul(s, s, x_rest, out=dx)", "s * x_rest"),
    ("dout forgotten", "slope.mul_(dout)", "slope"),
    ("written into x", "torch.addcmul(x, x, s, value=-1, out=dx)", "x.addcmul_(x, s, value=-1)", "ownership"),
)
faults(
    hg.GELU,
    ("the tanh form for both", 'exact if self.approximate == "none" else approximate', "approximate"),
    ("the exact form for both", 'exact if self.approximate == "none" else approximate', "exact"),
    ("density of deviation 2", "normal_pdf(x)", "normal_pdf(x / 2)"),
    ("x phi(x) forgotten", "torch.addcmul(normal_cdf(x), x, normal_pdf(x), out=dx)", "normal_cdf(x)"),
    ("1/3 of the cubic term", "w.lerp_(v, 3.0)", "v"),
    ("u for 2u", "torch.addcmul(xdv, xdv, s, value=-1)", "torch.addcmul(xdv, xdv, s, value=-1) / 2"),
)
faults(
    hg.Softmax,
    ("no Jacobian", "p.addcmul_(out, p.sum(self.dim, keepdim=True), value=-1)", "p"),
    ("as if classes were independent", "p.addcmul_(out, p.sum(self.dim, keepdim=True), value=-1)", "p * (1 - out)"),
    ("the sum over another dimension", "sum(self.dim,", "sum(0 if self.dim else -1,"),
    ("the mean", ".sum(self.dim", ".mean(self.dim"),
    ("the sum of dout alone", "p.sum(", "dout.sum("),
    ("written into dout", "torch.mul(dout, out, out=dx)", "dout.mul_(out).clone()", "ownership"),
)
faults(
    hg.LogSoftmax,
    ("the sum forgotten", "torch.addcmul(dout, p, total, value=-1, out=p)", "dout - p"),
    ("the mean", "dout.sum(self.dim", "dout.mean(self.dim"),
    ("log probabilities for probabilities", "exp(out, out=dx)", "out.clone()"),
    ("the exponential in place", "exp(out, out=dx)", "out.exp_().clone()", "ownership"),
    ("softmax's Jacobian", "dout.sum(self.dim", "(dout * exp(out)).sum(self.dim"),
    ("the sum over another dimension", "dout.sum(self.dim", "dout.sum(0 if self.dim else -1"),
)

# ---------------------------------------------------------------- normalisation, dropout, flattening

faults(
    hg.LayerNorm,
    ("the path through the mean forgotten", ".sub_(total, alpha=1 / n)", ""),
    (
        "the path through the variance forgotten",
        "torch.addcmul(centred, xhat, total_xhat, value=-1 / n, out=xhat)",
        "centred",
    ),
    ("weight forgotten in dx", "torch.mul(dout, gain, out=product)", "dout.clone()"),
    ("dweight of x, not of xhat", "product.sum(0)", "(dout * x).sum(0)"),
    ("dweight averaged", "product.sum(0)", "product.mean(0)"),
    (
        "weight forgotten in the averages",
        "dout @ column, product @ column",
        "dout.sum(1, keepdim=True), product.sum(1, keepdim=True)",
    ),
    (
        "dx written into dout",
        "return rest.mul_(rstd), dweight",
        "return dout.copy_(rest.mul_(rstd)), dweight",
        "ownership",
    ),
)
faults(
    hg.RMSNorm,
    ("the path through rstd forgotten", "torch.addcmul(dxhat, xhat, total_xhat, value=-1 / n, out=xhat)", "dxhat"),
    ("a mean subtracted, as in LayerNorm", "rest.mul_(rstd)", "(rest - dxhat.mean(1, keepdim=True)).mul_(rstd)"),
    ("weight forgotten in dx", "torch.mul(dout, gain, out=product)", "dout.clone()"),
    ("dweight of x, not of xhat", "product.sum(0)", "(dout * x).sum(0)"),
    ("weight forgotten in the average", "product @ column", "product.sum(1, keepdim=True)"),
    ("rstd squared", "rest.mul_(rstd)", "rest.mul_(rstd * rstd)"),
)
faults(
    hg.Dropout,
    ("dout passed on", "return dout if mask is None else dout * mask", "return dout"),
    ("a new mask", "dout * mask", "dout * mask[torch.randperm(len(mask))] if mask.dim() else dout * mask"),
    ("the mask without its scale", "dout * mask", "dout * (mask > 0)"),
    ("the mask of the complement", "dout * mask", "dout * (mask == 0)"),
    ("dout written to", "dout * mask", "dout.mul_(mask)", "ownership"),
    ("scaled twice", "dout * mask", "dout * mask * mask"),
)
faults(
    hg.FlattenConsecutive,
    ("dout as it came", "dout.reshape(shape)", "dout"),
    ("doubled", "dout.reshape(shape)", "2 * dout.reshape(shape)"),
    (
        "time and channels exchanged",
        "dout.reshape(shape)",
        "dout.reshape(shape[0], shape[2], shape[1]).transpose(1, 2)",
    ),
    ("steps in reversed order", "dout.reshape(shape)", "dout.reshape(shape).flip(1)"),
    ("a view, which strides forbid", "dout.reshape(shape)", "dout.view(shape)", "layouts"),
    ("dout written to", "dout.reshape(shape)", "dout.mul_(1).reshape(shape)", "ownership"),
)

# ---------------------------------------------------------------- attention and recurrence

faults(
    hg.SelfAttention,
    ("softmax's sum forgotten", "ds = torch.addcmul(ds, p, ds.sum(-1, keepdim=True), value=-1)", "pass"),
    ("the sum over the queries", ".sum(-1, keepdim=True)", ".sum(-2, keepdim=True)"),
    ("the scale forgotten in dq", " / math.sqrt(q.shape[-1])", ""),
    ("the scale twice in dk", "ds.mT.bmm(q)", "ds.mT.bmm(q) / math.sqrt(q.shape[-1])"),
    ("p not transposed in dv", "a.mT.bmm(dy)", "a.bmm(dy)"),
    ("q and k exchanged", "(dq, dk, dv)", "(dk, dq, dv)"),
    (
        "the output projection skipped",
        'self.out_proj.backward_at("out_proj", self._by_batch(dout))',
        '(self.out_proj.backward_at("out_proj", dout), dout)[1]',
    ),
    ("written into p", "ds = da * a", "ds = a.mul_(da)"),
)
faults(
    hg.RNNCell,
    ("1 - out", "(1 - out * out)", "(1 - out)"),
    ("relu's slope turned round", "dout.where(out > 0, 0)", "dout.where(out <= 0, 0)"),
    ("dh through dout, not db", "dh = db @", "dh = dout @"),
    ("dh not through weight_hh", "dh = db @ weight_hh", "dh = db"),
    ("weight_hh transposed", "db @ weight_hh", "db @ weight_hh.t()"),
    ("the gradients by the input and by the state exchanged", "rows(db).t() @ rows(h)", "rows(db).t() @ rows(x)"),
    ("dx through the other weight", "da @ weight_ih", "da @ weight_hh"),
    ("the gradient of bias_hh given to bias_ih", "self.add_grad(self.bias_hh,", "self.add_grad(self.bias_ih,"),
    ("dbias_ih averaged over the rows", "rows(da).sum(0)", "rows(da).mean(0)"),
    ("dweight_hh of the last row only", "rows(db).t() @ rows(h)", "rows(db)[-1:].t() @ rows(h)[-1:]"),
)
faults(
    hg.GRUCell,
    ("z for 1 - z", "dout * (1 - z)", "dout * z"),
    ("n's sign in dz", "(h - n)", "(h + n)"),
    ("r forgotten before weight_hh", "dan * r", "dan"),
    ("bn forgotten in dr", "dan * bn", "dan"),
    ("gates in the wrong order", "[dar, daz, dan]", "[daz, dar, dan]"),
    ("h of the step after", "(h - n)", "(torch.lerp(n, h, z) - n)"),
    ("the direct way to h forgotten", "dout * z + db @", "db @"),
    ("the direct way through 1 - z", "dout * z + db @", "dout * (1 - z) + db @"),
    ("bn's gradient for an's", "[dar, daz, dan]", "[dar, daz, dbn]"),
)
faults(
    hg.LSTMCell,
    ("tanh' forgotten", "du * (1 - u * u)", "du"),
    ("o forgotten", "dh_out * o", "dh_out"),
    ("i and f exchanged", "[dai, daf, dag, dao]", "[daf, dai, dag, dao]"),
    ("g' as of a sigmoid", "dg * (1 - g * g)", "dg * g * (1 - g)"),
    ("the cell's own gradient forgotten", "dc_out = dc_out + du", "dc_out = du"),
    ("c's gradient through h forgotten", "dc_out + du * (1 - u * u)", "dc_out"),
    ("o's gradient by c", "dh_out * u", "dc_out * u"),
    ("f forgotten in dc", "dc_out * f", "dc_out"),
    ("dc by what went out alone", "(dx, (dh, dc))", "(dx, (dh, dout[1] * f))"),
)
faults(
    hg.Unroll,
    ("the last step's dout everywhere", "dout.select(self.dim, t)", "dout.select(self.dim, -1)"),
    ("the steps' dx in reversed order", "dxs[::-1]", "dxs"),
    ("dx stacked along another dimension", "dxs[::-1], self.dim", "dxs[::-1], 1 - self.dim"),
    ("never cut", "_each(torch.zeros_like, dstate)", "dstate"),
    ("the gradient of the last state forgotten", "dout, dstate = dout if returned else (dout,",
     "dout = dout[0] if returned else dout; dout, dstate = (dout,"),
    ("the gradient of the last state written to", "dout, dstate = dout if returned",
     "dout, dstate = (dout[0], _each(lambda d: d.mul_(1), dout[1])) if returned", "ownership"),
)  # fmt: skip
faults(
    hg.RNN,
    ("the state's gradient not handed on", "dh = dout_t + dh", "dh = dout_t"),
    ("only the last state's gradient", "dh = dout_t + dh", "dh = 0 * dout_t + dh"),
    ("the gradient of the last state forgotten", "dout if returned else (dout, 0)",
     "(dout[0] if returned else dout, 0)"),
    ("the steps' gradients in reversed order", "das[::-1]", "das"),
    ("the first state's gradient before weight_hh", "(dx, dh)", "(dx, das[-1])"),
    ("the slope at the state before", "1 - h[1:] * h[1:]", "1 - h[:-1] * h[:-1]"),
    ("dweight_hh by the state after", "h[:-1], da", "h[1:], da"),
)  # fmt: skip
faults(
    hg.RNN,
    ("bias_hh summed over time only", "rows(db).sum(0)", "db.sum(0) if db.dim() == 2 else db.sum(0)[0]"),
    ("bias_hh forgotten", "self.add_grad(self.bias_hh_l0, rows(db).sum(0))", "pass"),
    method="add_grads",
)
faults(
    hg.GRU,
    ("r and z exchanged", "[sr, sz, sn * r]", "[sz, sr, sn * r]"),
    ("r forgotten before weight_hh", "sn * r]", "sn]"),
    ("r before weight_ih, too", "dh_all * sn]", "dh_all * sn * r]"),
    ("the direct way to h forgotten", "torch.addcmul(db_t @ weight_hh, dhs[-1], z_t)", "db_t @ weight_hh"),
    ("the direct way alone", "torch.addcmul(db_t @ weight_hh, dhs[-1], z_t)", "dhs[-1] * z_t"),
    ("the gradient of the last state forgotten", "dout if returned else (dout,",
     "(dout[0] if returned else dout,"),
    ("the steps' gradients in reversed order", "dhs[::-1]", "dhs"),
    ("h of the step after in dz", "(h[:-1] - n)", "(h[1:] - n)"),
)  # fmt: skip
faults(
    hg.LSTM,
    ("i and f exchanged", "[si, sf, sg]", "[sf, si, sg]"),
    ("o's gradient by c", "dh * so_t", "dc * so_t"),
    ("c's gradient through h forgotten", "torch.addcmul(dc, dh, su_t)", "dc"),
    ("f forgotten in dc", "dc * f_t", "dc"),
    ("c of the step after in df", "c[:-1] * f", "c[1:] * f"),
    ("the gradient of the last c forgotten", "i, f = i_f", "dc = torch.zeros_like(dc); i, f = i_f"),
    ("the state's gradient not handed on", "dh = dout_t + dh", "dh = dout_t"),
    ("the steps' gradients in reversed order", "das[::-1]", "das"),
)

# ---------------------------------------------------------------- convolution and pooling

faults(
    hg.Conv1d,
    ("dx without padding", "weight, None, self.stride, self.padding", "weight, None, self.stride, 0"),
    ("groups forgotten in dx", "rest, self.groups, self.dilation", "rest, 1, self.dilation"),
    ("the unread end forgotten", "self.padding, rest,", "self.padding, 0,"),
    ("kernel turned round in dx", "self.conv_transpose(dout, weight,", "self.conv_transpose(dout, weight.flip(-1),"),
    method="_dx",
)
faults(
    hg.Conv1d,
    ("kernel not turned round", "weight.flip(list(range(2, weight.dim())))", "weight"),
    ("the forward's padding", "None, 1, padding,", "None, 1, self.padding,"),
    ("dilation forgotten", "padding, self.dilation,", "padding, 1,"),
    method="_dx_by_conv",
)
faults(
    hg.Conv1d,
    ("dbias of the first row", "self._dbias(dout)", "self._dbias(dout[:1])"),
    ("the asymmetric zeros kept", "if self.extra else dx", "if False else dx"),
)
faults(
    hg.Conv2d,
    ("stride and dilation not exchanged", "self.dilation, self.padding, self.stride, G)",
     "self.stride, self.padding, self.dilation, G)"),
    ("padding forgotten", "self.dilation, self.padding, self.stride, G)", "self.dilation, 0, self.stride, G)"),
    ("the batch's first row only", "torch.unflatten(x, 1", "torch.unflatten(x * (torch.arange(len(x)) == 0)"
     ".view(-1, 1, 1, 1), 1"),
    ("kernel turned round", "return dweight.transpose(0, 1)", "return dweight.flip(-1).transpose(0, 1)"),
    ("averaged over the rows", "return dweight.transpose(0, 1)", "return dweight.transpose(0, 1) / dout.shape[1]"),
    ("the last steps of the kernel, not the first", "narrow(dim + 2, 0, k)",
     "narrow(dim + 2, dweight.shape[dim + 2] - k, k)"),
    method="_dweight",
)  # fmt: skip
faults(
    hg.MaxPool2d,
    ("of overlapping windows the last one wins", "scatter_add_(", "scatter_("),
    ("the mean's share", "dout.flatten(-2)", "dout.flatten(-2) / 2"),
    ("the neighbour of the maximum", "index.flatten(-2)", "(index.flatten(-2) + 1) % (shape[-2] * shape[-1])"),
    ("rows and columns exchanged", ".view(*shape)", ".view(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)"),
    ("dout forgotten", "dout.flatten(-2)", "torch.ones_like(dout.flatten(-2))"),
    ("as if nothing overlapped with zero", "dx = dout.new_zeros(", "dx = dout.new_ones("),
)
faults(
    hg.AvgPool2d,
    ("divided by the kernel always", "self._size(shape, dout)", "(self.kernel_size[0] * self.kernel_size[1])"),
    ("not divided", "dout / self._size(shape, dout)", "dout + 0"),
    ("padding not cut off", "(-pw, pw + W - dx.shape[-1], -ph, ph + H -", "(0, W - dx.shape[-1], 0, H -"),
)
faults(
    hg.AvgPool2d,
    ("of overlapping windows the last one wins", "+= share", "= share"),
    ("the window one row short", "for i in range(kh)", "for i in range(max(kh - 1, 1))"),
    ("steps of the other dimension", "self.stride, share.shape", "self.stride[::-1], share.shape"),
    method="_overlapping",
)
faults(
    hg.AvgPool2d,
    ("height and width exchanged", "kh, kw = self.kernel_size", "kw, kh = self.kernel_size"),
    ("the windows in turns", "share.repeat_interleave(kw, -1)", "share.repeat(*[1] * (share.dim() - 1), kw)"),
    method="_side_by_side",
)  # fmt: skip

# ---------------------------------------------------------------- losses

faults(
    hg.MSE,
    ("the 2 forgotten", "2 * dlosses", "dlosses"),
    ("divided by the rows alone", "max(diff.numel(), 1)", "max(len(diff) if diff.dim() else 1, 1)"),
    ("the mean for the sum, too", "2 * dlosses",
     "2 / (1 if self.reduction == 'mean' else max(diff.numel(), 1)) * dlosses"),
    ("the sign", "2 * dlosses", "-2 * dlosses"),
    ("dout forgotten", "self.dlosses(dout,", "self.dlosses(None,"),
    ("the square's root", "dlosses * diff", "dlosses * diff.sign()"),
)  # fmt: skip
faults(
    hg.BCEWithLogits,
    ("the sign", "mul_(dlosses)", "mul_(-dlosses)"),
    ("pos_weight forgotten", "a = self._slope(target)", "a = None"),
    ("weight forgotten", "if weight is not None:", "if False:"),
    ("divided by the rows alone", "max(x.numel(), 1)", "max(len(x) if x.dim() else 1, 1)"),
    ("dout forgotten", "self.dlosses(dout,", "self.dlosses(None,"),
    ("sigmoid's slope once more", "mul_(dlosses)", "mul_(torch.sigmoid(x) * dlosses)"),
)
faults(
    hg.LinearCrossEntropy,
    ("the last chunk's dweight only", "dweight.addmm_(dz.t(), xs[a:b])", "dweight = dz.t() @ xs[a:b]"),
    ("the onehot forgotten", "dz.scatter_add_(1, y[a:b, None], at_y[a:b])", "pass"),
    ("ignored rows not ignored", "x, y, used)", "x, y, None)"),
    ("the sum of q taken for 1", "dlosses * sum_q", "dlosses"),
    ("the bias forgotten in z", "linear(xs[a:b], W, bias)", "linear(xs[a:b], W)"),
    ("dbias averaged over the chunk", "dz.sum(0)", "dz.mean(0)"),
)

# ---------------------------------------------------------------- images

faults(
    hg.BatchNorm2d,
    ("the path through the mean forgotten", "column(dbias), xhat", "column(0 * dbias), xhat"),
    ("the path through the variance forgotten", "column(dweight)", "column(0 * dweight)"),
    ("statistics taken for constants", "if m is None:", "if True:"),
    ("n without the positions", "n = max(x.numel() // self.num_features, 1)", "n = max(len(x), 1)"),
    ("weight forgotten in dx: right for weight 1", "rstd if weight is None else rstd * weight", "rstd"),
    (
        "dbias averaged over the rows",
        "self.add_grad(self.bias, dbias)",
        "self.add_grad(self.bias, dbias / max(len(x), 1))",
    ),
)
faults(
    hg.MultiheadAttention,
    ("softmax's sum forgotten", "ds = torch.addcmul(ds, p, ds.sum(-1, keepdim=True), value=-1)", "pass"),
    ("the sum over the queries", "ds.sum(-1, keepdim=True)", "ds.sum(-2, keepdim=True)"),
    ("softmax's slope at what dropout left", "torch.addcmul(ds, p,", "torch.addcmul(ds, a,"),
    ("dv through all probabilities: right without dropout", "a.mT.bmm(dy)", "p.mT.bmm(dy)"),
    ("dkey and dvalue exchanged", "(dk,), (dv,)", "(dv,), (dk,)"),
    ("the scale forgotten in dq", " / math.sqrt(q.shape[-1])", ""),
    ("dquery left out, and not asked for", "if need_dx or dxs else None", "if dxs else None"),
)
faults(
    hg.GroupNorm,
    ("the path through the mean forgotten", "dout * gain - avg -", "dout * gain -"),
    ("the path through the variance forgotten", " - xhat * avg_xhat", ""),
    (
        "the mean of each channel, not of its group",
        "(sums * gain).sum(2, keepdim=True) / n",
        "sums * gain / by_group[3]",
    ),
    ("weight forgotten in dx: right for weight 1", "dout * gain", "dout"),
    ("dweight of x - mean, not of xhat", "sums_xhat.sum((0, 3))", "(sums_xhat / rstd).sum((0, 3))"),
    ("dbias averaged over the rows", "sums.sum((0, 3))", "sums.sum(3).mean(0)"),
)
faults(
    hg.AdaptiveAvgPool2d,
    ("the slope 1 for the share", " / (end - start)", ""),
    ("windows that do not overlap", "((t + 1) * size + count - 1) // count", "(t + 1) * size // count"),
    ("the first row of a window forgotten", "h >= start", "h > start"),
    method="_shares",
)
faults(
    hg.AdaptiveAvgPool2d,
    ("the mean of dout everywhere", "dout.mT @ P", "dout.mT.mean((-2, -1), keepdim=True).expand_as(dout.mT) @ P"),
    ("dout written to", "dout.mT @ P", "dout.mul_(1).mT @ P", "ownership"),
    ("dx in float32", "(dout.mT @ P).mT @ Q", "((dout.mT @ P).mT @ Q).float()"),
)
faults(
    hg.Upsample,
    ("the last dout for the sum of all", "index_add_(dim, index, dx)", "index_copy_(dim, index, dx)"),
    ("the mean for the sum", "return dx", "return dx * (dx.numel() / max(dout.numel(), 1))"),
    ("the next position", "(dim, index, dx)", "(dim, (index + 1).clamp_max(shape[dim] - 1), dx)"),
    ("rows in reversed order", "return dx", "return dx.flip(2)"),
    ("dout written to", "dx = dout", "dx = dout.mul_(1)", "ownership"),
    ("dx in float32", "return dx", "return dx.float()"),
)
faults(
    hg.ConvTranspose2d,
    ("dbias averaged over the rows", "self._dbias(dout)", "self._dbias(dout) / max(len(dout), 1)"),
    ("dx without the dilation", "self.padding, self.dilation, self.groups)", "self.padding, 1, self.groups)"),
    ("dx without the padding", "self.stride, self.padding, self.dilation", "self.stride, 0, self.dilation"),
    ("dx through the kernel turned round", "self.conv(dout, weight,", "self.conv(dout, weight.flip(-1),"),
    ("dweight turned round", "self._dweight(dout, x)", "self._dweight(dout, x).flip(-1)"),
    ("dweight summed over one sample", "self._dweight(dout, x)", "self._dweight(dout[:3], x[:3])"),
    ("dx with output_padding's rest", "narrow(dim, 0, size)", "narrow(dim, dx.shape[dim] - size, size)"),
)
