"""Cross-entropy of a linear map's output, without ever holding that output whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import linear

from handgrad.errors import ArgumentError, ShapeError
from handgrad.layers.linear import Linear, rows
from handgrad.losses.loss import ClassLoss


class LinearCrossEntropy(ClassLoss):
    """The last Linear of a classifier and its CrossEntropy in one, a few rows at a time: for a large vocabulary.

    Forward:   z = x @ weight.T + bias with linear's weight and bias,  top[n] = max_v z[n, v]
               log[n] = log sum_v exp(z[n, v] - top[n])
               losses[n] = log[n] - (z[n, y] - top[n]) for a row n with target y; 0 where y = ignore_index.
               "sum" adds the rows up, "mean" divides that by the number of rows not ignored, "none" returns them.
               Rows are taken `chunk_size` at a time; of z only top, log and z[n, y] outlive their chunk.
    Shapes:    x (..., D); target (...) int64; linear a Linear(D -> V); loss () or like target
    Backward:  z is computed again, chunk by chunk. With p = exp(z - top - log), the softmax,
               dz[n, v] = dlosses[n] (p[n, v] - [v = y]), where dlosses is dout, divided for the mean by the number of
               rows not ignored, and 0 where y = ignore_index;
               dx = dz @ weight,  dweight = dz^T x,  dbias = sum_n dz[n]
    Recorded:  x, target, top, log, weight, bias: O(rows), not O(rows V)
    Raises:    ShapeError; DtypeError; IndexRangeError for a target that is neither a class nor ignore_index;
               ArgumentError; StateError.
    Source:    torch.nn.LinearCrossEntropyLoss for parameters, keys and semantics; Wijmans et al. 2024,
               arXiv:2411.09009, for the recomputation.

    The weight is the loss's own parameter, so an optimizer needs ``[*model.parameters(), *loss.parameters()]``. It may
    be tied to an embedding: ``loss.linear.weight = embedding.weight``.

    >>> loss = LinearCrossEntropy(3, 5, chunk_size=2)
    >>> x, target = torch.randn(4, 3), torch.tensor([0, 4, 1, -100])
    >>> logits = torch.nn.functional.linear(x, loss.linear.weight)
    >>> bool(torch.isclose(loss(x, target), torch.nn.functional.cross_entropy(logits, target)))
    True
    >>> loss.backward()[3]  # the ignored row
    tensor([0., 0., 0.])
    """

    shown = ("in_features", "num_classes")

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        chunk_size: int = 1024,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(reduction)
        if chunk_size < 1:
            raise ArgumentError(f"LinearCrossEntropy: chunk_size must be at least 1, got {chunk_size}")
        self.linear = Linear(in_features, num_classes, bias, generator=generator, dtype=dtype, device=device)
        self.in_features, self.num_classes, self.bias = in_features, num_classes, bias
        self.ignore_index, self.chunk_size = ignore_index, chunk_size

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        self._check(x, target)
        weight, bias, xs = self.linear.weight, self.linear.bias, rows(x)
        used, y = self.labels(target.reshape(-1))
        if not is_compiling():
            self.check_range(y, self.num_classes)
        tops, logs, losses = [], [], []
        for a, b in self._chunks(len(y)):
            z = linear(xs[a:b], weight, bias)  # (chunk, V)
            top = z.amax(1, keepdim=True)
            z = z.sub_(top)
            losses.append(-z.gather(1, y[a:b, None]))
            log = z.exp_().sum(1, keepdim=True).log_()
            losses[-1] += log
            tops.append(top)
            logs.append(log)
        top, log, loss = (torch.cat(t) if t else xs.new_zeros(0, 1) for t in (tops, logs, losses))  # (N, 1)
        loss = loss[:, 0] if used is None else loss[:, 0].where(used, 0)
        if self.reduction == "mean":
            out = loss.sum() / (len(y) if used is None else used.sum())
        else:
            out = self.reduce(loss.view(target.shape))
        self.push(x, y, used, top, log, weight, bias, out=out)
        return out

    def backward(self, dout: Tensor | None = None) -> Tensor:
        x, y, used, top, log, weight, bias = self.pop(dout)
        xs = rows(x)
        count = max(len(y), 1) if used is None else used.sum(dtype=x.dtype).clamp(min=1)
        dlosses = self.dlosses(dout, x, count).reshape(-1).expand(len(y))
        dlosses = (dlosses if used is None else dlosses.where(used, 0)).unsqueeze(1)  # (N, 1)
        dx, dweight = torch.empty_like(xs), torch.zeros_like(weight)
        dbias = None if bias is None else torch.zeros_like(bias)
        for a, b in self._chunks(len(y)):
            # losses[n] = log[n] - (z[n, y] - top[n]),  p = exp(z - top - log)
            z = linear(xs[a:b], weight, bias)
            dz = z.sub_(top[a:b]).sub_(log[a:b]).exp_().mul_(dlosses[a:b])  # dlosses p, in the one (chunk, V) there is
            dz.scatter_add_(1, y[a:b, None], -dlosses[a:b])
            # z = x @ weight.T + bias
            dx[a:b] = dz @ weight
            dweight.addmm_(dz.t(), xs[a:b])
            if dbias is not None:
                dbias += dz.sum(0)
        self.add_grad(weight, dweight)
        if dbias is not None:
            self.add_grad(bias, dbias)
        return dx.view_as(x)

    def _chunks(self, rows: int) -> Iterator[tuple[int, int]]:
        return ((a, min(a + self.chunk_size, rows)) for a in range(0, rows, self.chunk_size))

    def _check(self, x: Tensor, target: Tensor) -> None:
        self.check_input(x, self.linear.weight.dtype)
        D = self.in_features
        self.check_target(target)
        if x.dim() == 0 or x.shape[-1] != D or target.shape != x.shape[:-1]:
            problem = f"x must be (..., {D}) and target (...), got {tuple(x.shape)} and {tuple(target.shape)}"
            raise self.error(ShapeError, "forward", problem)
