"""Attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from handgrad.arguments import integer, number, refused
from handgrad.errors import DtypeError, ShapeError
from handgrad.layer import Layer, parameter
from handgrad.layers.dropout import drawn_mask
from handgrad.layers.linear import Linear, rows
from handgrad.pieces import in_float32


class Attention(Layer):
    """What MultiheadAttention and SelfAttention share: the parameters, and all that is done with them.

    Forward:   q = query @ W_q.T + b_q,  k = key @ W_k.T + b_k,  v = value @ W_v.T + b_v,  where W_q, W_k, W_v are the
               thirds of in_proj_weight, b_q, b_k, b_v those of in_proj_bias; each cut into heads of d = D/num_heads
               s = q k^T / sqrt(d) + mask, per head; the mask is -inf where query t may not read key u
               p = softmax(s) over u; 0 for a query that may read nothing
               a = p, or in training with dropout p m, m drawn as in Dropout
               y = a v, the heads side by side again;  out = out_proj(y)
    Shapes:    query, out (N, T, D); key, value (N, S, D); in_proj_weight (3 D, D); in_proj_bias (3 D,); out_proj a
               Linear(D -> D); inside, q, y are (N heads, T, d), k, v (N heads, S, d) and s, p, a (N heads, T, S)
    Backward:  dy = out_proj.backward(dout), cut into heads;
               y = a v:               dv = a^T dy,  da = dy v^T
               a = p m:               dp = da m
               p = softmax(s):        ds = p (dp - sum_u dp p) = da a - p sum_u da a; zero where masked, since p is
               s = q k^T / sqrt(d):   dq = ds k / sqrt(d),  dk = ds^T q / sqrt(d)
               q = query @ W_q.T + b_q:  dquery = dq @ W_q,  dW_q = dq^T query,  db_q = sum dq;  likewise for k and v
    Recorded:  query, key, value, q / sqrt(d), k, v, p, a where it is not p, in_proj_weight; out_proj records y
    Raises:    ArgumentError where num_heads does not divide embed_dim; ShapeError, DtypeError; StateError.
    Source:    Vaswani et al. 2017, arXiv:1706.03762

    Initialisation and keys are those of torch.nn.MultiheadAttention. In half precision all between the projections is
    computed in float32 (and recorded so), as in torch's own kernels.
    """

    shown = ("embed_dim",)
    in_proj_weight: Tensor = parameter("3D", "D")
    in_proj_bias: Tensor | None = parameter("3D")
    dropout: float = 0.0
    batch_first: bool = True
    generator: torch.Generator | None = None  # what dropout draws from

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool,
        *,
        generator: torch.Generator | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        self.embed_dim = embed_dim = integer(self, "embed_dim", embed_dim)
        self.num_heads, self.bias = integer(self, "num_heads", num_heads), bias
        if embed_dim % self.num_heads:
            raise refused(self, f"num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
        self.in_proj_weight = torch.empty(3 * embed_dim, embed_dim, dtype=dtype, device=device)
        self.in_proj_bias = torch.zeros(3 * embed_dim, dtype=dtype, device=device) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias, generator=generator, dtype=dtype, device=device)
        bound = math.sqrt(6 / (embed_dim + 3 * embed_dim))  # Glorot and Bengio 2010
        self.in_proj_weight.uniform_(-bound, bound, generator=generator)
        if self.out_proj.bias is not None:
            self.out_proj.bias.zero_()

    def attend(self, inputs: tuple[Tensor, ...], mask: Tensor | None = None, nothing: Tensor | None = None) -> Tensor:
        """The output for (query, key, value), or for one tensor that is all three.

        `mask` is added to s, or of bools and True for what may not be read; `nothing` says which queries may read
        nothing. Both broadcast to (N heads, T, S).
        """
        xs, n = [self._by_batch(x) for x in inputs], len(inputs)
        heads: list[Tensor] = []
        for x, W, b in zip(xs, _cut(self.in_proj_weight, n), _cut(self.in_proj_bias, n)):
            heads += self._split(linear(x, W, b), 3 // n)
        q, k, v = map(in_float32, heads)  # as torch's own kernels compute s and p
        q = q / math.sqrt(q.shape[-1])
        s = q.bmm(k.mT)
        if mask is not None:
            s = s.masked_fill_(mask, -math.inf) if mask.dtype is torch.bool else s.add_(mask)
        p = torch.softmax(s, -1)
        if nothing is not None:
            p.masked_fill_(nothing, 0)
        a = p * drawn_mask(p, self.dropout, self.generator) if self.dropout > 0 and self.training else p
        y = self._merge(a.bmm(v)).view_as(xs[0]).to(xs[0].dtype)
        out: Tensor = self._by_batch(self.out_proj.forward_at("out_proj", y))
        self.push(q, k, v, p, a, self.in_proj_weight, *xs, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Any:
        q, k, v, p, a, in_proj_weight, *xs = self.pop(dout)
        (dy,) = self._split(self.out_proj.backward_at("out_proj", self._by_batch(dout)), 1)
        dy = in_float32(dy)
        # y = a v
        dv = a.mT.bmm(dy)
        da = dy.bmm(v.mT)
        # a = p m,  p = softmax(s)
        ds = da * a
        ds = torch.addcmul(ds, p, ds.sum(-1, keepdim=True), value=-1)
        # s = q k^T / sqrt(d), and the recorded q is q / sqrt(d)
        dq = ds.bmm(k) / math.sqrt(q.shape[-1])
        dk = ds.mT.bmm(q)
        # q = query @ W_q.T + b_q, and k and v likewise, or all three of one x
        dweights, dbiases = [], []
        dxs: list[Tensor | None] = []
        parts = [(dq, dk, dv)] if len(xs) == 1 else [(dq,), (dk,), (dv,)]
        for x, dqkv, W in zip(xs, parts, _cut(in_proj_weight, len(xs))):
            d = self._merge(*dqkv).to(x.dtype)  # (N T, D), or (N T, 3 D)
            dweights.append(d.t() @ rows(x))
            dbiases.append(d.sum(0))
            dxs.append(self._by_batch((d @ W).view_as(x)) if need_dx or dxs else None)
        self.add_grad(in_proj_weight, _joined(dweights))
        self.add_grad(self.in_proj_bias, _joined(dbiases))
        return tuple(dxs) if len(xs) > 1 else dxs[0]

    def _by_batch(self, x: Tensor) -> Tensor:
        """(N, T, D) from the layer's layout, or back again: its own inverse."""
        return x if self.batch_first or x.dim() < 3 else x.transpose(0, 1)

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(..., T, parts D) into `parts` tensors (N heads, T, d), each in one piece, as matrix products want it."""
        N, T, d = math.prod(x.shape[:-2]), x.shape[-2], self.embed_dim // self.num_heads
        by_head = x.reshape(N, T, parts, self.num_heads, d).permute(2, 0, 3, 1, 4)
        return by_head.reshape(parts, N * self.num_heads, T, d).unbind()

    def _merge(self, *parts: Tensor) -> Tensor:
        """Undo `_split`, with the leading dimensions as one: (N T, parts D)."""
        heads, T, d = parts[0].shape
        N = heads // self.num_heads
        by_step = [p.view(N, self.num_heads, T, d).transpose(1, 2) for p in parts]  # (N, T, heads, d)
        return _joined(by_step, 2).reshape(N * T, len(parts) * self.embed_dim)


class MultiheadAttention(Attention):
    """Multi-head attention: every query reads from all keys, or from those that the masks leave it.

    Forward:   p = softmax(q k^T / sqrt(d) + mask),  out = out_proj(p v)  per head, with q, k and v affine maps of
               query, key and value; in training, `dropout` is applied to p
    Shapes:    query, out (T, N, D); key, value (S, N, D); with `batch_first` N first; or all three without N.
               in_proj_weight (3 D, D); in_proj_bias (3 D,); out_proj a Linear(D -> D)
               key_padding_mask (N, S), or (S,); attn_mask (T, S), or (N num_heads, T, S), without N (num_heads, T, S)
    Backward:  derived at Attention; returns (dquery, dkey, dvalue). A mask is a constant and has no gradient.
    Recorded:  query, key, value, q / sqrt(d), k, v, p, in_proj_weight; in training with dropout p after it, too;
               out_proj records its input
    Raises:    ArgumentError; ShapeError; DtypeError, also for a mask that is neither bool nor of query's dtype;
               StateError.
    Source:    Vaswani et al. 2017, arXiv:1706.03762; torch.nn.MultiheadAttention for the semantics.

    A mask of bools is True where a key may not be read, any other is added to the scores. A query that may read no key
    gets zeros for p v, as in torch, and sends no gradient. Beside torch's, `generator` is what initialisation and
    dropout draw from; there are no weights in the output, no other sizes of key and value, and no bias_k and bias_v.

    >>> layer = MultiheadAttention(6, num_heads=2, batch_first=True)
    >>> x, memory, padded = torch.randn(4, 3, 6), torch.randn(4, 5, 6), torch.tensor([[False] * 3 + [True] * 2] * 4)
    >>> layer(x, memory, memory, key_padding_mask=padded).shape
    torch.Size([4, 3, 6])
    >>> dx, dkey, dvalue = layer.backward(torch.randn(4, 3, 6))
    >>> dx.shape, dkey.shape, bool(dkey[:, 3:].any())  # no gradient where nobody reads
    (torch.Size([4, 3, 6]), torch.Size([4, 5, 6]), False)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        batch_first: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, bias, generator=generator, dtype=dtype, device=device)
        self.dropout = number(self, "dropout", dropout, 0, 1)
        self.batch_first, self.generator = batch_first, generator

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        self._check(query, key, value)
        *batch, T, _ = self._by_batch(query).shape
        N, S = math.prod(batch), self._by_batch(key).shape[-2]
        masks = []
        if key_padding_mask is not None:
            mask = self._added("key_padding_mask", key_padding_mask, query, (*batch, S))
            masks.append(mask.reshape(N, 1, S).repeat_interleave(self.num_heads, 0))
        if attn_mask is not None:
            masks.append(self._added("attn_mask", attn_mask, query, (T, S), (N * self.num_heads, T, S)))
        if not masks:
            return self.attend((query, key, value))
        mask = masks[0] if len(masks) == 1 else masks[0] + masks[1]
        return self.attend((query, key, value), mask, (mask == -math.inf).all(-1, keepdim=True))

    def _added(self, name: str, mask: Tensor, query: Tensor, *shapes: tuple[int, ...]) -> Tensor:
        """The mask as numbers to be added to the scores."""
        if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, query.dtype):
            came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            problem = (
                f"{name} must be a tensor of bools, True for what may not be read, or of {query.dtype}, got {came}"
            )
            raise self.error(DtypeError, "forward", problem)
        if tuple(mask.shape) not in shapes:
            wanted = " or ".join(str(shape) for shape in shapes)
            raise self.error(ShapeError, "forward", f"{name} must have shape {wanted}, got {tuple(mask.shape)}")
        return query.new_zeros(mask.shape).masked_fill_(mask, -math.inf) if mask.dtype is torch.bool else mask

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            self.check_input(x, self.in_proj_weight.dtype, name)
        D, N = self.embed_dim, 0 if self.batch_first else 1
        fits = query.dim() in (2, 3) and query.dim() == key.dim() and query.shape[-1] == key.shape[-1] == D
        if not fits or key.shape != value.shape or (query.dim() == 3 and query.shape[N] != key.shape[N]):
            form = f"(N, T, {D})" if self.batch_first else f"(T, N, {D})"
            problem = f"query must be {form} or (T, {D}), key and value the same with S for T, got shapes "
            shapes = f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            raise self.error(ShapeError, "forward", problem + shapes)


class SelfAttention(Attention):
    """Multi-head self-attention over time: every step reads from all steps or, if `causal`, from those up to its own.

    Forward:   p = softmax(q k^T / sqrt(d)),  out = out_proj(p v)  per head, with q, k and v affine maps of x;
               p[t, u] = 0 for u > t if causal
    Shapes:    x (..., T, D); in_proj_weight (3 D, D); in_proj_bias (3 D,); out_proj a Linear(D -> D); out like x
    Backward:  derived at Attention, with x for query, key and value: dx is the sum of what is sent to the three, and as
               (q, k, v) = x @ in_proj_weight.T + in_proj_bias are computed at once, dx = (dq, dk, dv) @ in_proj_weight
    Recorded:  x, q / sqrt(d), k, v, p, in_proj_weight; out_proj records its input
    Raises:    ArgumentError where num_heads does not divide embed_dim; ShapeError, DtypeError; StateError.
    Source:    Vaswani et al. 2017, arXiv:1706.03762

    Initialisation and keys are those of torch.nn.MultiheadAttention, and `layer(x)` is its output for
    ``batch_first=True`` and query, key and value all x.

    >>> layer = SelfAttention(6, num_heads=2, causal=True)
    >>> x = torch.randn(4, 5, 6)
    >>> out = layer(x)
    >>> later = x.clone()
    >>> later[:, 3:] = 0  # what comes later changes nothing
    >>> bool(torch.allclose(layer(later)[:, :3], out[:, :3], atol=1e-6))
    True
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        causal: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, bias, generator=generator, dtype=dtype, device=device)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x, self.in_proj_weight.dtype)
        if x.dim() < 2 or x.shape[-1] != self.embed_dim:
            problem = f"x must be (..., T, {self.embed_dim}), got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)
        T = x.shape[-2]
        later = x.new_ones((T, T), dtype=torch.bool).triu_(1) if self.causal else None
        return self.attend((x,), later)


def _cut(rows: Any, n: int) -> Sequence[Any]:
    """All rows, or their thirds; Nones for a bias that is not there."""
    return [rows] * n if n == 1 or rows is None else rows.chunk(n)


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """All parts, one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
