"""Cross-entropy of a linear map's output, without ever holding that output whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from handgrad.arguments import integer, refused
from handgrad.errors import ShapeError
from handgrad.layers.linear import Linear, rows
from handgrad.losses.loss import ClassLoss, where_used
from handgrad.pieces import eager_on_cpu


class LinearCrossEntropy(ClassLoss):
    """The last Linear of a classifier and its CrossEntropy in one, a few rows at a time: for a large vocabulary.

    Forward:   z = x @ linear.weight.T + linear.bias,  logp = log_softmax(z)
               losses[n] = -sum_v q[v] logp[n, v],  q[v] = w[v] ((1 - s) [v = y] + s/V)  for a row n with target y;
               0 where y = ignore_index. Here s = label_smoothing and w = weight (or ones); for s = 0 and w = 1 that is
               -logp[n, y].
               "sum" adds the rows up, "mean" divides that by the sum of w[y] over the rows not ignored, "none" returns
               them. Rows are taken `chunk_size` at a time; of logp only numbers per row outlive their chunk.
    Shapes:    x (..., D); target (...) int64; linear a Linear(D -> V); weight (V,); loss () or like target
    Backward:  z is computed again, chunk by chunk. With p = softmax(z),
               dz[n, v] = dlosses[n] (p[n, v] sum_u q[u] - q[v]), where dlosses is dout, divided for the mean by what it
               divides by, and 0 where y = ignore_index;  dx = dz @ linear.weight,  and with sums over n
               dweight = dz^T x,  dbias = sum_n dz[n]  of linear
    Recorded:  x, target, weight and those of linear: nothing of the size of z
    Raises:    ShapeError; DtypeError; on a CPU IndexRangeError for a target that is neither a class nor
               ignore_index (another device asserts so itself, late and fatally); ArgumentError; StateError.
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
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        chunk_size: int = 1024,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        ignored = -100 if ignore_index is None else ignore_index  # None is torch's default, and means the same
        super().__init__(weight, ignore_index=ignored, label_smoothing=label_smoothing, reduction=reduction)
        self.in_features = integer(self, "in_features", in_features)
        self.num_classes = integer(self, "num_classes", num_classes)
        self.bias, self.chunk_size = bias, integer(self, "chunk_size", chunk_size)
        if weight is not None and len(weight) != num_classes:
            raise refused(self, f"weight must be ({num_classes},), one per class, got shape {tuple(weight.shape)}")
        self.linear = Linear(in_features, num_classes, bias, generator=generator, dtype=dtype, device=device)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        self._check(x, target)
        W, bias, xs = self.linear.weight, self.linear.bias, rows(x)
        used, y = self.labels(target.reshape(-1))
        if eager_on_cpu(y):
            self.check_range(y, self.num_classes)
        q_y, q_all, _ = self._q(y)
        at_y, everywhere = [xs.new_zeros(0, 1)], [xs.new_zeros(0, 1)]
        for a, b in self._chunks(len(y)):
            logp = torch.log_softmax(linear(xs[a:b], W, bias), 1)  # (chunk, V)
            at_y.append(logp.gather(1, y[a:b, None]))
            if q_all is not None:
                everywhere.append(logp @ q_all)
        loss: Tensor = -q_y * torch.cat(at_y)  # (N, 1)
        if q_all is not None:
            loss -= torch.cat(everywhere)
        loss = where_used(loss[:, 0], used)
        if self.reduction == "mean":
            out = loss.sum() / self.count(y, used, x.dtype)
        else:
            out = self.reduce(loss.view(target.shape))
        self.push(x, y, used, self.weight, W, bias, out=out)
        return out

    def backward(self, dout: Tensor | None = None) -> Tensor:
        x, y, used, _, W, bias = self.pop(dout)
        xs = rows(x)
        dlosses = self.row_dlosses(None if dout is None else dout.reshape(-1), x, y, used)
        dlosses = dlosses.to(x.dtype).expand(len(y)).unsqueeze(1)  # (N, 1)
        q_y, q_all, sum_q = self._q(y)
        at_y, everywhere = -dlosses * q_y, dlosses * sum_q
        dx, dweight = torch.empty_like(xs), torch.zeros_like(W)
        dbias = None if bias is None else torch.zeros_like(bias)
        for a, b in self._chunks(len(y)):
            # losses[n] = -sum_v q[v] logp[n, v],  logp = log_softmax(z)
            p = torch.softmax(linear(xs[a:b], W, bias), 1)
            dz = p.mul_(everywhere[a:b])
            dz.scatter_add_(1, y[a:b, None], at_y[a:b])
            if q_all is not None:
                dz.addmm_(dlosses[a:b], q_all.t(), alpha=-1)
            # z = x @ linear.weight.T + linear.bias
            dx[a:b] = dz @ W
            dweight.addmm_(dz.t(), xs[a:b])
            if dbias is not None:
                dbias += dz.sum(0)
        self.add_grad(W, dweight)
        if dbias is not None:
            self.add_grad(bias, dbias)
        return dx.view_as(x)

    def _q(self, y: Tensor) -> tuple[Any, Tensor | None, Any]:
        """Of q[v] = q_y [v = y] + q_all[v]: q_y, q_all (V, 1) or None for zeros, and the sum over v.

        The first and the last are (N, 1), or numbers where they are the same for all rows.
        """
        s, w = self.label_smoothing, self.weight
        q_y: Any = 1 - s if w is None else (1 - s) * w[y].unsqueeze(1)
        if s == 0:
            return q_y, None, q_y
        ones = self.linear.weight.new_ones(self.num_classes, 1)
        q_all = s / self.num_classes * (ones if w is None else w.unsqueeze(1))
        return q_y, q_all, q_y + q_all.sum()

    def _chunks(self, rows: int) -> Iterator[tuple[int, int]]:
        return ((a, min(a + self.chunk_size, rows)) for a in range(0, rows, self.chunk_size))

    def _check(self, x: Tensor, target: Tensor) -> None:
        self.check_input(x, self.linear.weight.dtype)
        D = self.in_features
        self.check_target(target)
        if x.dim() == 0 or x.shape[-1] != D or target.shape != x.shape[:-1]:
            problem = f"x must be (..., {D}) and target (...), got {tuple(x.shape)} and {tuple(target.shape)}"
            raise self.error(ShapeError, "forward", problem)
