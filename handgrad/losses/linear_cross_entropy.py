"""Cross-entropy of a linear map's output, without ever holding that output whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import linear

from handgrad.errors import ArgumentError, DtypeError, ShapeError
from handgrad.layers.linear import Linear
from handgrad.losses.loss import Loss, check_labels, labels


class LinearCrossEntropy(Loss):
    """The last Linear of a classifier and its CrossEntropy in one, a few rows at a time: for a large vocabulary.

    Forward:   z = x @ weight.T + bias with linear's weight and bias,  top[n] = max_v z[n, v]
               log[n] = log sum_v exp(z[n, v] - top[n])
               loss[n] = log[n] - (z[n, y] - top[n]) for a row n with target y; 0 where y = ignore_index.
               "sum" adds the rows up, "mean" divides that by the number of rows not ignored, "none" returns them.
               Rows are taken `chunk_size` at a time; of z only top, log and z[n, y] outlive their chunk.
    Shapes:    x (..., D); target (...) int64; linear a Linear(D -> V); loss () or like target
    Backward:  z is computed again, chunk by chunk. With p = exp(z - top - log), the softmax,
               dz[n, v] = dloss[n] (p[n, v] - [v = y]), with dloss = 0 where ignored and dout/(rows used) for the mean;
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
        self.ignore_index, self.chunk_size = ignore_index, chunk_size

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        self._check(x, target)
        weight, bias = self.linear.weight, self.linear.bias
        rows = x.reshape(-1, x.shape[-1])
        used, y = labels(target.reshape(-1), self.ignore_index)
        if not is_compiling():
            check_labels(self, y, self.linear.out_features, self.ignore_index)
        tops, logs, losses = [], [], []
        for a, b in self._chunks(len(y)):
            z = linear(rows[a:b], weight, bias)  # (chunk, V)
            tops.append(z.amax(1, keepdim=True))
            right = z.sub_(tops[-1]).gather(1, y[a:b, None])
            logs.append(z.exp_().sum(1, keepdim=True).log_())
            losses.append(logs[-1] - right)
        top, log, loss = (torch.cat(t)[:, 0] if t else rows.sum(1) for t in (tops, logs, losses))
        if used is not None:
            loss = loss.where(used, 0)
        if self.reduction == "none":
            out = loss.reshape(target.shape)
        elif self.reduction == "sum":
            out = loss.sum()
        else:
            out = loss.sum() / (len(y) if used is None else used.sum())
        self.push(x, y, used, top, log, weight, bias, out=out)
        return out

    def backward(self, dout: Tensor | None = None, need_dx: bool = True) -> Tensor | None:
        x, y, used, top, log, weight, bias = self.pop(dout)
        rows = x.reshape(-1, x.shape[-1])
        dloss = x.new_ones(len(y)) if used is None else used.to(x.dtype)
        if self.reduction == "mean":
            dloss.div_(dloss.sum().clamp_min_(1))
        if dout is not None:
            dloss.mul_(dout.reshape(-1))
        dx = torch.empty_like(rows) if need_dx else None
        dweight = torch.zeros_like(weight)
        dbias = None if bias is None else torch.zeros_like(bias)
        for a, b in self._chunks(len(y)):
            # loss = top + log - z[y], so dz = dloss (p - onehot(y)), p = exp(z - top - log)
            dz = linear(rows[a:b], weight, bias)
            dz.sub_(top[a:b, None]).sub_(log[a:b, None]).exp_().mul_(dloss[a:b, None])
            dz.scatter_add_(1, y[a:b, None], -dloss[a:b, None])
            # z = x @ weight.T + bias
            dweight.addmm_(dz.t(), rows[a:b])
            if dbias is not None:
                dbias.add_(dz.sum(0))
            if dx is not None:
                torch.mm(dz, weight, out=dx[a:b])
        self.add_grad(weight, dweight)
        if dbias is not None:
            self.add_grad(bias, dbias)
        return None if dx is None else dx.view_as(x)

    def _chunks(self, rows: int) -> Iterator[tuple[int, int]]:
        return ((a, min(a + self.chunk_size, rows)) for a in range(0, rows, self.chunk_size))

    def _check(self, x: Tensor, target: Tensor) -> None:
        self.check_input(x, self.linear.weight.dtype)
        D = self.linear.in_features
        if not isinstance(target, Tensor) or target.dtype is not torch.int64:
            came = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise self.error(DtypeError, "forward", f"target must be an int64 tensor of class indices, got {came}")
        if x.dim() == 0 or x.shape[-1] != D or target.shape != x.shape[:-1]:
            problem = f"x must be (..., {D}) and target (...), got {tuple(x.shape)} and {tuple(target.shape)}"
            raise self.error(ShapeError, "forward", problem)

    def extra_repr(self) -> str:
        changes = [self.linear.extra_repr() if self.linear.bias is None else f"{self.linear.extra_repr()}, bias=True"]
        defaults = {"ignore_index": -100, "reduction": "mean", "chunk_size": 1024}
        changes += [f"{k}={getattr(self, k)!r}" for k, default in defaults.items() if getattr(self, k) != default]
        return ", ".join(changes).replace(", bias=False", "")
