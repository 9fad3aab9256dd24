"""The lookup table."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from handgrad.arguments import integer, refused
from handgrad.errors import DtypeError, IndexRangeError
from handgrad.layer import Layer, parameter


class Embedding(Layer):
    """Rows of a table, looked up by index.

    Forward:   out[n] = weight[x[n]]
    Shapes:    x (...) int64 or int32, 0 <= x < V; weight (V, D); out (..., D)
    Backward:  weight[v] was copied to every n with x[n] = v, hence
               dweight[v] = sum over those n of dout[n]; zero for v = padding_idx.
               An index has no gradient: dx is None.
    Recorded:  x
    Raises:    ArgumentError; on a CPU IndexRangeError for an index outside the table, negative ones included (another
               device asserts so itself, late and fatally); DtypeError for one that is no integer; StateError from a
               backward without a forward.

    The table is drawn as torch.nn.Embedding draws it, from the standard normal, with row `padding_idx` zero. A
    negative `padding_idx` counts from the end. The row itself may be assigned; it just gets no gradient. A `max_norm`
    is refused, with what to do instead.

    >>> layer = Embedding(5, 2)
    >>> layer(torch.tensor([3, 3, 0])).shape
    torch.Size([3, 2])
    >>> layer.backward(torch.ones(3, 2))
    >>> layer.weight.grad[:, 0]
    tensor([1., 0., 0., 2., 0.])
    """

    shown = ("num_embeddings", "embedding_dim")
    weight: Tensor = parameter("V", "D")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: None = None,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.num_embeddings = V = integer(self, "num_embeddings", num_embeddings)
        self.embedding_dim = integer(self, "embedding_dim", embedding_dim)
        self.padding_idx = None if padding_idx is None else integer(self, "padding_idx", padding_idx, -V) % V
        if padding_idx is not None and padding_idx >= V:
            raise refused(self, f"padding_idx must be within the {V} rows, got {padding_idx}")
        if max_norm is not None:
            how = f"instead call layer.weight.renorm_(2, 0, {max_norm}) after each optimizer step"
            raise refused(self, f"max_norm must be None, for a forward does not change its table; {how}")
        self.weight = torch.empty(V, self.embedding_dim, dtype=dtype, device=device)
        self.weight.normal_(generator=generator)
        if self.padding_idx is not None:
            self.weight[self.padding_idx].zero_()

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.dtype not in (torch.int64, torch.int32):
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise self.error(DtypeError, "forward", f"x must be an int64 or int32 tensor of indices, got {came}")
        try:
            out = embedding(x, self.weight)  # weight[x], (..., D)
        except IndexError:
            self._check_range(x)
            raise
        self.push(x, out=out)
        return out

    def backward(self, dout: Tensor) -> None:
        (x,) = self.pop(dout)
        # out[n] = weight[x[n]]: each dout[n] flows back to the row that was read
        dweight = torch.zeros_like(self.weight)  # (V, D)
        dweight.index_add_(0, x.reshape(-1), dout.reshape(-1, self.embedding_dim))
        if self.padding_idx is not None:
            dweight[self.padding_idx].zero_()
        self.add_grad(self.weight, dweight)

    def _check_range(self, x: Tensor) -> None:
        low, high = (int(limit) for limit in x.aminmax()) if x.numel() else (0, 0)
        if low < 0 or high >= self.num_embeddings:
            problem = f"indices must be in 0..{self.num_embeddings - 1}, got {low if low < 0 else high}"
            raise self.error(IndexRangeError, "forward", problem)
