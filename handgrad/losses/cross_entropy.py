"""Cross-entropy between logits and class indices, or probabilities of classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from handgrad.errors import ArgumentError, DtypeError, ShapeError
from handgrad.losses.loss import ClassLoss, where_used
from handgrad.pieces import exp


class CrossEntropy(ClassLoss):
    """Negative log-likelihood of the target class, or of a distribution over the classes, under softmax(x).

    Forward:   logp = log_softmax(x) over the classes, and for a row n with t = onehot(y) of its target y, or with t the
               target itself where that is a row of probabilities,
               losses[n] = -sum_c q[c] logp[n, c],  q[c] = w[c] ((1 - s) t[c] + s/C)
               with s = label_smoothing and w = weight (or ones); 0 where y = ignore_index.
               "sum" adds the rows up, "mean" divides that by the sum of w[y] over the rows not ignored
               (no such row: 0/0, a loss of NaN, and a gradient of zero), or for probabilities by the number of rows,
               "none" returns the rows.
    Shapes:    x (C,), (N, C) or (N, C, d1, ...); target the same without C, int64, or like x, of x's dtype; loss () or
               like x without C
    Backward:  d logp[n, c] / d x[n, k] = [c = k] - p[n, k] with p = exp(logp): the softmax. Hence
               dx[n, k] = dlosses[n] (p[n, k] sum_c q[c] - q[k])
               where dlosses is dout, divided for the mean by what it divides by, and 0 where y = ignore_index.
               For w = 1, s = 0 that is the familiar dlosses[n] (p - onehot(y)), dlosses[n] = 1/N for the mean.
               The target has no gradient.
    Recorded:  logp, the target, weight; where rows are ignored, the mask of the others
    Raises:    ShapeError; DtypeError; on a CPU IndexRangeError for a target that is neither a class nor
               ignore_index (another device asserts so itself, late and fatally); ArgumentError, also for
               probabilities where ignore_index is a class; StateError.
    Source:    torch.nn.CrossEntropyLoss for the semantics; makemore lecture 4 for the simplified gradient.

    >>> loss = CrossEntropy()
    >>> loss(torch.zeros(2, 4), torch.tensor([1, 3]))  # log 4
    tensor(1.3863)
    >>> loss.backward()
    tensor([[ 0.1250, -0.3750,  0.1250,  0.1250],
            [ 0.1250,  0.1250,  0.1250, -0.3750]])
    >>> loss(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]])), loss.backward()
    (tensor(1.3863), tensor([[-0.2500, -0.2500,  0.2500,  0.2500]]))
    """

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        if isinstance(target, Tensor) and target.is_floating_point():
            return self._forward_of_probabilities(x, target)
        dim = self._check(x, target)
        used, y = self.labels(target)
        logp = torch.log_softmax(x, dim)
        try:
            # -w[y] logp[n, y], reduced
            out = nll_loss(logp, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction)
        except IndexError:
            self.check_range(y, x.shape[dim])
            raise
        s = self.label_smoothing
        if s > 0:
            smooth = (logp if self.weight is None else logp * _by_class(self.weight, logp, dim)).sum(dim)
            smooth = where_used(smooth, used)
            if self.reduction != "none":
                smooth = smooth.sum()
            if self.reduction == "mean":
                smooth = smooth / self.count(y, used, x.dtype)
            out = (1 - s) * out - s / x.shape[dim] * smooth
        self.push(logp, y, self.weight, used, out=out)
        return out

    def backward(self, dout: Tensor | None = None) -> Tensor:
        logp, y, weight, used = self.pop(dout)
        if y.is_floating_point():
            return self._backward_of_probabilities(dout, logp, y)
        dim = min(logp.dim() - 1, 1)
        s, C, column = self.label_smoothing, logp.shape[dim], y.unsqueeze(dim)
        # losses[n] = -sum_c q[c] logp[n, c],  q[c] = (1 - s) w[y] [c = y] + s/C w[c] = q_y [c = y] + q_all[c]
        dx = exp(logp)  # p
        if weight is None:
            minus_q_y, q_all = torch.full_like(column, s - 1, dtype=dx.dtype), s / C  # and sum_c q[c] = 1
        else:
            minus_q_y, q_all = (s - 1) * weight[column], s / C * _by_class(weight, logp, dim)
            dx = dx * (q_all.sum() - minus_q_y)
        if s > 0:
            dx = dx - q_all
        dx.scatter_add_(dim, column, minus_q_y)
        dlosses = self.row_dlosses(dout, logp, y, used)
        return dx.mul_(dlosses.unsqueeze(dim) if dlosses.dim() else dlosses)  # dlosses (p sum_c q[c] - q)

    def _forward_of_probabilities(self, x: Tensor, target: Tensor) -> Tensor:
        dim = self._check_probabilities(x, target)
        logp = torch.log_softmax(x, dim)
        out = self.reduce(-(self._q(target, dim) * logp).sum(dim))
        self.push(logp, target, self.weight, None, out=out)
        return out

    def _backward_of_probabilities(self, dout: Tensor | None, logp: Tensor, target: Tensor) -> Tensor:
        dim = min(logp.dim() - 1, 1)
        q = self._q(target, dim)
        sum_q = q.sum(dim, keepdim=True)  # a number for each row
        dlosses = self.dlosses(dout, logp, max(sum_q.numel(), 1))
        dlosses = dlosses.unsqueeze(dim) if dlosses.dim() else dlosses
        # losses[n] = -sum_c q[c] logp[n, c]
        return dlosses * (exp(logp) * sum_q - q)

    def _q(self, target: Tensor, dim: int) -> Tensor:
        """What multiplies -logp: w[c] ((1 - s) t[c] + s/C)."""
        s = self.label_smoothing
        q = (1 - s) * target + s / target.shape[dim] if s > 0 else target
        return q if self.weight is None else q * _by_class(self.weight, target, dim)

    def _check(self, x: Tensor, target: Tensor) -> int:
        """Check both inputs; the dimension of x that holds the classes."""
        self.check_input(x, None if self.weight is None else self.weight.dtype)
        self.check_target(target)
        dim, rows = min(x.dim() - 1, 1), [*x.shape]
        classes = rows.pop(dim) if rows else 0
        if dim < 0 or [*target.shape] != rows:
            problem = f"x must be (C,) or (N, C, ...) and target the same without C, got {tuple(x.shape)} and "
            raise self.error(ShapeError, "forward", problem + f"{tuple(target.shape)}")
        self._check_classes(x, classes)
        return dim

    def _check_probabilities(self, x: Tensor, target: Tensor) -> int:
        """The same for a target of probabilities."""
        self.check_input(x, None if self.weight is None else self.weight.dtype)
        if x.dim() == 0 or target.shape != x.shape or target.dtype is not x.dtype:
            problem = "target must be int64, the indices of classes, or their probabilities, of the shape and dtype of "
            came = f"x, {tuple(x.shape)} {x.dtype}; got {tuple(target.shape)} {target.dtype}"
            misshaped = target.dtype is x.dtype and target.dim() == x.dim()
            raise self.error(ShapeError if misshaped else DtypeError, "forward", problem + came)
        if self.ignore_index >= 0:
            problem = f"ignore_index must be left out where the target is probabilities, got {self.ignore_index}"
            raise self.error(ArgumentError, "forward", problem)
        dim = min(x.dim() - 1, 1)
        self._check_classes(x, x.shape[dim])
        return dim

    def _check_classes(self, x: Tensor, classes: int) -> None:
        if classes == 0:
            raise self.error(ShapeError, "forward", f"x must have at least one class, got shape {tuple(x.shape)}")
        if self.weight is not None and self.weight.shape[0] != classes:
            problem = f"x must have {self.weight.shape[0]} classes, one per weight, got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)


def _by_class(weight: Tensor, x: Tensor, dim: int) -> Tensor:
    """The weights, to broadcast against x."""
    return weight.view(-1, *[1] * (x.dim() - dim - 1))
