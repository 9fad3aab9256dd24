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
    ("dweight averaged over the rows", "dout2.t().mm(x2)", "dout2.t().mm(x2) / max(len(x2), 1)"),
    ("dbias averaged over the rows", "dout2.sum(0)", "dout2.mean(0)"),
    ("dbias sums the first dimension only", "dout2.sum(0)",
     "dout.sum(0) if dout.dim() == 2 else dout.reshape(dout.shape[0], -1, dout.shape[-1])[:, 0].sum(0)"),
    ("dx through a square weight not transposed", "dout2.mm(weight)",
     "dout2.mm(weight.t() if weight.shape[0] == weight.shape[1] else weight)"),
    ("dout written to in place", "dout2.mm(weight)", "dout2.mul_(1).mm(weight)", "ownership"),
    ("dbias is a view of dout for a single row", "dout2.sum(0)", "dout2[0] if len(dout2) == 1 else dout2.sum(0)",
     "reuse"),
    ("rows read with view: fails for transposed dout", "dout2.t().mm(x2)",
     "dout.view(-1, self.out_features).t().mm(x2)", "layouts"),
    ("gradient assigned, not added", "self.add_grad(weight, dout2.t().mm(x2))", "weight.grad = dout2.t().mm(x2)",
     "accumulation"),
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
    ("the path through the mean forgotten", "_column(dbias, x)", "_column(0 * dbias, x)"),
    ("the path through the variance forgotten", "_column(dweight * rstd, x)", "_column(0 * dweight, x)"),
    ("statistics taken for constants", "if m is None:", "if True:"),
    ("n - 1 where n belongs", "value=n / max(m, 1)", "value=n / max(n - 1, 1)"),
    ("weight squared in the variance's path", "_column(dweight * rstd, x)",
     "_column(dweight * rstd * (1 if weight is None else weight), x)"),
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
    hg.CrossEntropy,
    ("the mean's 1/N forgotten", "dloss = share if dloss is None else dloss * share", "pass"),
    ("dout ignored: right for the plain loss.backward()", "Tensor | float | None = dout",
     "Tensor | float | None = dout if dout is not None and dout.dim() else None"),
    ("label smoothing forgotten in backward", "s, classes = self.label_smoothing,", "s, classes = 0.0,"),
    ("divided by the classes, too", "return dx if dloss is None else",
     "dx /= classes\n    return dx if dloss is None else"),
    ("sign turned round", "return dx if dloss is None else", "dx.neg_()\n    return dx if dloss is None else"),
    ("each row's gradient shifted so that it sums to 1", "return dx if dloss is None else",
     "dx += 1 / classes\n    return dx if dloss is None else"),
    ("ignored rows get the gradient of their class 0", "if used is not None:", "if False:"),
)  # fmt: skip


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
    ("the first group's learning rate for all", 'if group["momentum"] == 0:',
     "group = {**group, 'lr': self.param_groups[0]['lr']}\n    if group['momentum'] == 0:"),
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
    ("the body forgotten", "return dout + dx if", "return dout + 0 * dx if"),
    ("the connection forgotten", "return dout + dx if", "return dx + 0 if"),
    ("the difference", "return dout + dx if", "return dout - dx if"),
    ("added into dout", "return dout + dx if", "return dout.add_(dx) if", "ownership"),
    ("averaged", "return dout + dx if", "return (dout + dx) / 2 if"),
    ("the body gets half", '"body", dout, need_dx', '"body", dout / 2, need_dx'),
)
faults(
    hg.Sum,
    ("averaged", "[dout] * len(self.bodies)", "[dout / len(self.bodies)] * len(self.bodies)"),
    ("the first body's dx only", "return _total(dxs) if", "return dxs[0] if"),
    ("the last body's dx only", "return _total(dxs) if", "return dxs[-1] if"),
    ("the last body gets nothing", "[dout] * len(self.bodies)", "[*[dout] * (len(self.bodies) - 1), 0 * dout]"),
    ("dout written to", "self.pop(dout)", "self.pop(dout); dout.mul_(1)", "ownership"),
    ("dx doubled", "return _total(dxs) if", "return 2 * _total(dxs) if"),
)
faults(
    hg.Product,
    ("the other factor forgotten", "douts[i] = douts[i] * after", "pass"),
    ("its own factor, not the other's", "douts[i] * after", "douts[i] * outs[i]"),
    ("the factors before it forgotten", "douts[i] * after", "dout * after"),
    ("as for a sum", "douts.append(douts[-1] * factor)", "douts.append(dout)"),
    ("the first body's dx only", "return _total(dxs) if", "return dxs[0] if"),
    ("factors multiplied in place", "douts[-1] * factor", "douts[-1].mul_(factor)"),
)
faults(
    hg.Concat,
    ("pieces in reversed order", "dxs = self._backward_each(list(torch.split(dout, sizes, self.dim)), need_dx)",
     "dxs = self._backward_each([p.flip(self.dim) for p in torch.split(dout, sizes, self.dim)], need_dx)"),
    ("the first body's dx only", "return _total(dxs) if", "return dxs[0] if"),
    ("averaged", "return _total(dxs) if", "return _total(dxs) / len(dxs) if"),
    ("dout written to", "(sizes,) = self.pop(dout)", "(sizes,) = self.pop(dout); dout.mul_(1)", "ownership"),
    ("dx with a dimension more", "return _total(dxs) if", "return _total(dxs)[None] if"),
    ("equal pieces of doubled dout", "torch.split(dout, sizes", "torch.split(2 * dout, sizes"),
)  # fmt: skip
faults(
    hg.Parallel,
    ("all the same dout", "list(dout)", "[dout[0] for _ in dout]"),
    ("dx exchanged", "return tuple(dxs) if", "return tuple(dxs[::-1]) if"),
    ("dout exchanged", "list(dout)", "list(dout[::-1])"),
    ("a list, not a tuple", "return tuple(dxs) if", "return list(dxs) if"),
    ("doubled", "list(dout)", "[2 * d for d in dout]"),
    ("the first dx for all", "return tuple(dxs) if", "return (dxs[0],) * len(dxs) if"),
)

# ---------------------------------------------------------------- activations

faults(
    hg.Sigmoid,
    ("out + out^2", "value=-1", "value=1"),
    ("out forgotten", "torch.addcmul(o, o, o, value=-1, out=dx)", "torch.sub(1, o, out=dx)"),
    ("dout forgotten", ".mul_(d)", ""),
    ("out - out^3", "torch.addcmul(o, o, o,", "torch.addcmul(o, o, o * o,"),
    (
        "written into out",
        "torch.addcmul(o, o, o, value=-1, out=dx)",
        "o.addcmul_(o, o, value=-1).clone()",
        "ownership",
    ),
    ("sigmoid once more", "torch.addcmul(o, o, o,", "torch.addcmul(o, o, torch.sigmoid(o),"),
)
faults(
    hg.ReLU,
    ("slope 1 everywhere", "torch.ne(o, 0,", "torch.ge(o, 0,"),
    ("slope where out is 0", "torch.ne(o, 0,", "torch.eq(o, 0,"),
    ("threshold at a half", "torch.ne(o, 0,", "torch.gt(o, 0.5,"),
    ("dout forgotten", ".mul_(d)", ""),
    ("the derivative of the square", ".mul_(d)", ".mul_(d).mul_(2 * o)"),
    ("in float32", ".mul_(d)", ".mul_(d).float()"),
)
faults(
    hg.LeakyReLU,
    ("as ReLU", "dx.lerp_(d, self.negative_slope)", "dx"),
    ("slope 0.01 whatever was asked for", "self.negative_slope", "0.01"),
    ("the sides exchanged", "torch.gt(x", "torch.le(x"),
    ("slope squared", "self.negative_slope", "self.negative_slope ** 2"),
    ("dout forgotten", ".mul_(d)", ""),
    ("slope 1 everywhere", "dx.lerp_(d, self.negative_slope)", "dx.copy_(d)"),
)
faults(
    hg.SiLU,
    ("as sigmoid", "torch.addcmul(x, x, s, value=-1, out=dx)", "torch.zeros_like(x)"),
    ("1 + s", "value=-1", "value=1"),
    ("s forgotten", "torch.addcmul(s, s, rest,", "torch.addcmul(s, torch.ones_like(s), rest,"),
    ("the first s forgotten", "torch.addcmul(s, s, rest,", "torch.mul(s, rest,"),
    ("dout forgotten", ".mul_(d)", ""),
    ("written into x", "value=-1, out=dx)", "value=-1, out=x).clone()", "ownership"),
)
faults(
    hg.GELU,
    ("the tanh form for both", 'if self.approximate == "none":', "if False:"),
    ("the exact form for both", 'if self.approximate == "none":', "if True:"),
    ("density of deviation 2", "-0.5 * LOG2_E", "-0.25 * LOG2_E"),
    ("x phi(x) forgotten", "erf.addcmul_(x, density, value=math.sqrt(2 / math.pi))", "erf"),
    ("1/3 of the cubic term", "w.lerp_(v, 3.0)", "w.copy_(v)"),
    ("u for 2u", "rest.addcmul_(rest, s, value=-1)", "rest.addcmul_(rest, s, value=-1).mul_(0.5)"),
)
faults(
    hg.Softmax,
    ("no Jacobian", "torch.sub(d, dx.sum(self.dim, keepdim=True), out=dx)", "d.clone()"),
    ("as if classes were independent", "torch.sub(d, dx.sum(self.dim, keepdim=True), out=dx)", "(d * (1 - o))"),
    ("the sum over another dimension", "sum(self.dim,", "sum(0 if self.dim else -1,"),
    ("the mean", ".sum(self.dim", ".mean(self.dim"),
    ("the sum of dout alone", "torch.mul(d, o, out=dx)", "d.clone()"),
    (
        "written into dout",
        "torch.sub(d, dx.sum(self.dim, keepdim=True), out=dx)",
        "d.sub_(dx.sum(self.dim, keepdim=True)).clone()",
        "ownership",
    ),
)
faults(
    hg.LogSoftmax,
    ("the sum forgotten", ".mul_(d.sum(self.dim, keepdim=True))", ""),
    ("the mean", "d.sum(self.dim", "d.mean(self.dim"),
    ("log probabilities for probabilities", "exp(o, out=dx)", "o.clone()"),
    ("the exponential in place", "exp(o, out=dx)", "o.exp_().clone()", "ownership"),
    ("softmax's Jacobian", "d.sum(self.dim", "(d * o.exp()).sum(self.dim"),
    ("the sum over another dimension", "d.sum(self.dim", "d.sum(0 if self.dim else -1"),
)

# ---------------------------------------------------------------- normalisation, dropout, flattening

faults(
    hg.LayerNorm,
    ("the path through the mean forgotten", ".add_(through_mean)", ""),
    ("the path through the variance forgotten", "xhat.mul_(through_var)", "xhat.mul_(0)"),
    ("weight forgotten in dx", "torch.mul(d, flat, out=product)", "d"),
    ("dweight of x, not of xhat", "torch.mul(d, xhat, out=product)", "torch.mul(d, x, out=product)"),
    ("dweight averaged", "product.sum(0)", "product.mean(0)"),
    ("weight forgotten in the averages", "_minus_average(product, shares)", "_minus_average(product, None)"),
    (
        "dx written into dout",
        "xhat.mul_(through_var).add_(through_mean).add_(dxhat).mul_(rstd)",
        "d.copy_(xhat.mul_(through_var).add_(through_mean).add_(dxhat).mul_(rstd))",
        "ownership",
    ),
)
faults(
    hg.RMSNorm,
    ("the path through rstd forgotten", "xhat.mul_(_minus_average(product, shares))", "xhat.mul_(0)"),
    (
        "a mean subtracted, as in LayerNorm",
        "_minus_average(product, shares)",
        "(_minus_average(product, shares) - d.mean())",
    ),
    ("weight forgotten in dx", "dx.addcmul_(d, flat)", "dx.add_(d)"),
    ("dweight of x, not of xhat", "torch.mul(d, xhat, out=product)", "torch.mul(d, x, out=product)"),
    ("weight forgotten in the average", "_minus_average(product, shares)", "_minus_average(product, None)"),
    ("rstd squared", "flat)).mul_(rstd)", "flat)).mul_(rstd * rstd)"),
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
    ("softmax's sum forgotten", "dp.addcmul_(p, dp.sum(-1, keepdim=True), value=-1)", "dp"),
    ("the sum over the queries", "dp.sum(-1, keepdim=True)", "dp.sum(-2, keepdim=True)"),
    ("the scale forgotten in dq", ".div_(math.sqrt(q.shape[-1]))", ""),
    ("the scale twice in dk", "ds.mT.bmm(q)", "ds.mT.bmm(q) / math.sqrt(q.shape[-1])"),
    ("p not transposed in dv", "p.mT.bmm(dy)", "p.bmm(dy)"),
    ("q and k exchanged", "self._merge(dq, dk, dv)", "self._merge(dk, dq, dv)"),
    ("the output projection skipped", "self.out_proj.backward(dout)", "(self.out_proj.backward(dout), dout)[1]"),
    ("written into p", "dp.mul_(p)", "dp = p.mul_(dp)"),
)
faults(
    hg.RNNCell,
    ("1 - out", "_tanh_slope(out)", "1 - out"),
    ("relu's slope turned round", "out <= 0", "out > 0"),
    method="slopes",
)
faults(
    hg.RNNCell,
    ("dh through dout, not db", "db @ record[2]", "dafter[0] @ record[2]"),
    ("dh not through weight_hh", "db @ record[2]", "db"),
    ("weight_hh transposed", "db @ record[2]", "db @ record[2].t()"),
)
faults(
    hg.RNNCell,
    ("the gradients by the input and by the state exchanged", "self.bias_hh, h, db", "self.bias_hh, x, db"),
    ("dx through the other weight", "da @ weight_ih", "da @ weight_hh"),
    ("the gradient of bias_hh given to bias_ih", "self._add_grads(weight_hh, self.bias_hh,",
     "self._add_grads(weight_hh, self.bias_ih,"),
    method="_affine_backward",
)  # fmt: skip
faults(
    hg.RNNCell,
    ("the sum over the steps a mean", "dout.sum(0)", "dout.mean(0)"),
    ("the last row only", "dout.t() @ x.reshape(-1, x.shape[-1])", "dout[-1:].t() @ x.reshape(-1, x.shape[-1])[-1:]"),
    method="_add_grads",
)
faults(
    hg.RNNCell,
    ("the state's gradient not handed on", "dbefore[0] + dout_t", "dout_t"),
    ("only the last state's gradient", "dbefore[0] + dout_t", "dbefore[0]"),
    ("the steps' gradients in reversed order", "torch.stack(tensors[::-1])", "torch.stack(tensors)"),
    ("the first state's gradient before weight_hh", "_bare(dbefore)", "_bare(dafter)"),
    method="scan_backward",
)
faults(
    hg.GRUCell,
    ("z for 1 - z", ".mul_(1 - z)", ".mul_(z)"),
    ("n's sign in dz", "(h - n)", "(h + n)"),
    ("r forgotten before weight_hh", "shn = sn * r", "shn = sn * 1"),
    ("hn forgotten in dr", ".mul_(shn).mul_(hn)", ".mul_(shn)"),
    ("gates in the wrong order", "torch.stack([sr, sz, shn]", "torch.stack([sz, sr, shn]"),
    ("h of the step after", "(h - n)", "(torch.lerp(n, h, z) - n)"),
    method="slopes",
)
faults(
    hg.GRUCell,
    ("the direct way to h forgotten", "torch.addcmul(dh, dout, z)", "dh"),
    ("the direct way through 1 - z", "torch.addcmul(dh, dout, z)", "torch.addcmul(dh, dout, 1 - z)"),
    method="dbefore",
)
faults(hg.GRUCell, ("hn's gradient for xn's", "db[..., 2 * self.hidden_size :] = dout * sn", "pass"), method="da")
faults(
    hg.LSTMCell,
    ("tanh' forgotten", "_tanh_slope(u).mul_(o)", "o.clone()"),
    ("o forgotten", "_tanh_slope(u).mul_(o)", "_tanh_slope(u)"),
    ("i and f exchanged", "torch.stack([si, sf, sg]", "torch.stack([sf, si, sg]"),
    ("g' as of a sigmoid", "_tanh_slope(g).mul_(i)", "(1 - g).mul_(g).mul_(i)"),
    method="slopes",
)
faults(
    hg.LSTMCell,
    ("the cell's own gradient forgotten", "torch.addcmul(dc_out, dh_out, su)", "dh_out * su"),
    ("c's gradient through h forgotten", "torch.addcmul(dc_out, dh_out, su)", "dc_out"),
    ("o's gradient by c", "dh_out * so", "dc * so"),
    method="db",
)
faults(
    hg.LSTMCell,
    ("f forgotten in dc", ".mul_(f)", ""),
    ("dc by what went out alone", "torch.addcmul(dc_out, dh_out, su)", "dc_out.clone()"),
    method="dbefore",
)
faults(
    hg.Unroll,
    ("the last piece's dout everywhere", "dout[start : start + steps]", "dout[-steps:][: T - start]"),
    ("the pieces' dx in reversed order", "dxs[::-1]", "dxs"),
    ("dx stacked along another dimension", "_joined(dxs[::-1]).movedim(0, self.dim)", "_joined(dxs[::-1])"),
    ("never cut", "dstate if start == 0 else None", "dstate"),
    ("the gradient of the last state forgotten", "_zeros(dout[0], rest) if dstate is None else dstate",
     "_zeros(dout[0], rest)"),
    ("the gradient of the last state written to", "_zeros(dout[0], rest) if dstate is None else dstate",
     "_zeros(dout[0], rest) if dstate is None else tuple([d.mul_(1) for d in dstate])", "ownership"),
)  # fmt: skip

# ---------------------------------------------------------------- convolution and pooling

faults(
    hg.Conv1d,
    ("dx without padding", "weight, None, self.stride, self.padding", "weight, None, self.stride, 0"),
    ("groups forgotten in dx", "rest, self.groups, self.dilation", "rest, 1, self.dilation"),
    ("the unread end forgotten", "self.padding, rest,", "self.padding, 0,"),
    ("dbias of the first row", "drows.sum([0,", "drows[:1].sum([0,"),
    ("kernel turned round in dx", "self.conv_transpose(dout, weight,", "self.conv_transpose(dout, weight.flip(-1),"),
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
    ("divided by the kernel always", "self._size(shape, dout)", "(kh * kw)"),
    ("not divided", "dout / self._size(shape, dout)", "dout + 0"),
    ("padding not cut off", "ph : ph + H, pw : pw + W", ": H, : W"),
    ("of overlapping windows the last one wins", "+= share", "= share"),
    ("the window one row short", "for i in range(kh)", "for i in range(max(kh - 1, 1))"),
    ("steps of the other dimension", "(sh, sw), (ph, pw) = self.kernel_size, self.stride, self.padding",
     "(sh, sw), (pw, ph) = self.kernel_size, self.stride, self.padding"),
)  # fmt: skip

# ---------------------------------------------------------------- losses

faults(
    hg.MSE,
    ("the 2 forgotten", "(2 / max(diff.numel(), 1) if", "(1 / max(diff.numel(), 1) if"),
    ("divided by the rows alone", "max(diff.numel(), 1)", "max(len(diff) if diff.dim() else 1, 1)"),
    ("the mean for the sum, too", 'if self.reduction == "mean" else 2)', ")"),
    ("the sign", "dx: Tensor = diff *", "dx: Tensor = -diff *"),
    ("dout forgotten", "return dx if dout is None else dx.mul_(dout)", "return dx"),
    ("the square's root", "dx: Tensor = diff *", "dx: Tensor = diff.sign() *"),
)
faults(
    hg.BCEWithLogits,
    ("the sign", "dx.div_(max(x.numel(), 1))", "dx.div_(-max(x.numel(), 1))"),
    ("pos_weight forgotten", "a = self._slope(target)", "a = None"),
    ("weight forgotten", "if weight is not None:", "if False:"),
    ("divided by the rows alone", "max(x.numel(), 1)", "max(len(x) if x.dim() else 1, 1)"),
    ("dout forgotten", "return dx if dout is None else dx.mul_(dout)", "return dx"),
    ("sigmoid's slope once more", "return dx if", "dx = dx * torch.sigmoid(x)\n    return dx if"),
)
faults(
    hg.LinearCrossEntropy,
    ("the last chunk's dweight only", "dweight.addmm_(dz.t(), rows[a:b])", "dweight = dz.t() @ rows[a:b]"),
    ("the onehot forgotten", "dz.scatter_add_(1, y[a:b, None], -dloss[a:b, None])", "pass"),
    ("ignored rows not ignored", "used.to(x.dtype)", "x.new_ones(len(y))"),
    ("divided by all rows", "dloss.sum().clamp_min_(1)", "max(len(y), 1)"),
    ("the bias forgotten in z", "dz = linear(rows[a:b], weight, bias)", "dz = linear(rows[a:b], weight)"),
    ("dout forgotten for dweight", "dbias.add_(dz.sum(0))", "dbias.add_(dz.mean(0))"),
)

# ---------------------------------------------------------------- images

faults(
    hg.BatchNorm2d,
    ("the path through the mean forgotten", "column(dbias), diff", "column(0 * dbias), diff"),
    ("the path through the variance forgotten", "column(rstd * dweight)", "column(0 * dweight)"),
    ("statistics taken for constants", "if m is None:", "if True:"),
    ("n without the positions", "n = max(x.numel() // self.num_features, 1)", "n = max(len(x), 1)"),
    ("weight forgotten in dx: right for weight 1", "rstd if weight is None else rstd * weight", "rstd"),
    (
        "dbias averaged over the rows",
        "self.add_grad(self.bias, dbias)",
        "self.add_grad(self.bias, dbias / max(len(x), 1))",
    ),
)
