"""Cross-entropy between logits and class indices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from handgrad.errors import ArgumentError, DtypeError, ShapeError
from handgrad.layer import buffer, exp
from handgrad.losses.loss import Loss, check_labels, labels


class CrossEntropy(Loss):
    """Negative log-likelihood of the target class under softmax(x).

    Forward:   logp = log_softmax(x) over the classes, and for a row n with target y,
               loss[n] = -(1 - s) w[y] logp[n, y] - s/C sum_c w[c] logp[n, c]
               with s = label_smoothing and w = weight (or ones); 0 where y = ignore_index.
               "sum" adds the rows up, "mean" divides that by the sum of w[y] over the rows not ignored
               (no such row: 0/0, a loss of NaN, and a gradient of zero), "none" returns the rows.
    Shapes:    x (C,), (N, C) or (N, C, d1, ...); target the same without C, int64; loss () or like target
    Backward:  d logp[n, c] / d x[n, k] = [c = k] - p[n, k] with p = exp(logp): the softmax. Hence with q the vector
               that multiplies -logp in loss[n]: q[c] = (1 - s) w[y] [c = y] + s/C w[c],
               dx[n, k] = dloss[n] (p[n, k] sum_c q[c] - q[k])
               which for w = 1, s = 0 is the familiar dloss[n] (p - onehot(y)), dloss[n] = 1/N for the mean.
    Recorded:  logp, the target, weight; where rows are ignored, the mask of the others
    Raises:    ShapeError; DtypeError; IndexRangeError for a target that is neither a class nor ignore_index;
               ArgumentError; StateError.
    Source:    torch.nn.CrossEntropyLoss for the semantics; makemore lecture 4 for the simplified gradient.

    >>> loss = CrossEntropy()
    >>> loss(torch.zeros(2, 4), torch.tensor([1, 3]))  # log 4
    tensor(1.3863)
    >>> loss.backward()
    tensor([[ 0.1250, -0.3750,  0.1250,  0.1250],
            [ 0.1250,  0.1250,  0.1250, -0.3750]])
    """

    weight: Tensor | None = buffer("C")

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction)
        if not 0 <= label_smoothing <= 1:
            raise ArgumentError(f"CrossEntropy: label_smoothing must be in 0..1, got {label_smoothing}")
        if weight is not None and weight.dim() != 1:
            raise ArgumentError(f"CrossEntropy: weight must be (C,), one a class, got shape {tuple(weight.shape)}")
        self.weight, self.ignore_index, self.label_smoothing = weight, ignore_index, label_smoothing

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        dim = self._check(x, target)
        used, y = labels(target, self.ignore_index)
        if x.is_cuda:
            check_labels(self, y, x.shape[dim], self.ignore_index)  # a device reports a bad label late and fatally
        logp = torch.log_softmax(x, dim)
        try:
            # -w[y] logp[n, y], reduced
            out = nll_loss(logp, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction)
        except IndexError:
            check_labels(self, y, x.shape[dim], self.ignore_index)
            raise
        s = self.label_smoothing
        if s > 0:
            rows = self._weighted(logp, dim).sum(dim)
            if used is not None:
                rows = rows.where(used, 0)
            if self.reduction != "none":
                rows = rows.sum()
            if self.reduction == "mean":
                rows = rows / self._total(y, used)
            out = (1 - s) * out - s / x.shape[dim] * rows
        self.push(logp, y, self.weight, used, out=out)
        return out

    def backward(self, dout: Tensor | None = None) -> Tensor:
        logp, y, weight, used = self.pop(dout)
        dim = min(logp.dim() - 1, 1)
        s, classes = self.label_smoothing, logp.shape[dim]
        column = y.unsqueeze(dim)
        # loss[n] = -sum_c q[c] logp[n, c], so dx = p sum_c q[c] - q
        dx = exp(logp)  # p
        if weight is not None:
            wy = weight[column]
            w = self._weighted(torch.ones_like(logp), dim) * (s / classes)
            dx.mul_(wy * (1 - s) + w.sum(dim, keepdim=True)).sub_(w).scatter_add_(dim, column, wy * (s - 1))
        else:
            if s > 0:
                dx.sub_(s / classes)
            dx.scatter_add_(dim, column, torch.full_like(column, s - 1, dtype=dx.dtype))
        # the reduction: dx[n] = dloss[n] dx[n], with dloss[n] = dout/total, and 0 for an ignored row
        dloss: Tensor | float | None = dout
        if self.reduction == "mean":
            total = self._total(y, used)  # 0 where no row counts: then nothing has a gradient, whatever divides it
            if isinstance(total, Tensor):
                share: Tensor | float = total.to(logp.dtype).masked_fill(total == 0, 1).reciprocal()
            else:
                share = 1 / max(total, 1)
            dloss = share if dloss is None else dloss * share
        if used is not None:
            dloss = used.to(logp.dtype) if dloss is None else used * dloss
        if isinstance(dloss, Tensor) and dloss.dim():
            dloss = dloss.unsqueeze(dim)
        return dx if dloss is None else dx.mul_(dloss)

    def _weighted(self, x: Tensor, dim: int) -> Tensor:
        return x if self.weight is None else x * self.weight.view(-1, *[1] * (x.dim() - dim - 1))

    def _total(self, y: Tensor, used: Tensor | None) -> Tensor | int:
        """What the mean divides by: the sum of w[y] over the rows that are used."""
        if self.weight is None:
            return y.numel() if used is None else used.sum()
        return self.weight[y if used is None else y[used]].sum()

    def _check(self, x: Tensor, target: Tensor) -> int:
        """Check both inputs; the dimension of x that holds the classes."""
        self.check_input(x, None if self.weight is None else self.weight.dtype)
        if not isinstance(target, Tensor) or target.dtype is not torch.int64:
            came = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise self.error(DtypeError, "forward", f"target must be an int64 tensor of class indices, got {came}")
        dim, rows = min(x.dim() - 1, 1), [*x.shape]
        classes = rows.pop(dim) if rows else 0
        if dim < 0 or [*target.shape] != rows:
            problem = f"x must be (C,) or (N, C, ...) and target the same without C, got {tuple(x.shape)} and "
            raise self.error(ShapeError, "forward", problem + f"{tuple(target.shape)}")
        if self.weight is not None and self.weight.shape[0] != classes:
            problem = f"x must have {self.weight.shape[0]} classes, one a weight, got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)
        return dim

    def extra_repr(self) -> str:
        changes = [] if self.weight is None else [f"weight of {self.weight.shape[0]} classes"]
        defaults = {"ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean"}
        changes += [f"{k}={getattr(self, k)!r}" for k, default in defaults.items() if getattr(self, k) != default]
        return ", ".join(changes)
