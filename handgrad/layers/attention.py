"""Attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from handgrad.errors import ArgumentError, ShapeError
from handgrad.layer import Layer, parameter
from handgrad.layers.linear import Linear


class SelfAttention(Layer):
    """Multi-head self-attention over time: every step reads from all steps or, if `causal`, from those up to its own.

    Forward:   q, k, v = the thirds of x @ in_proj_weight.T + in_proj_bias, each cut into heads of d = D/num_heads
               s = q k^T / sqrt(d), per head;  s[t, u] = -inf for u > t if causal
               p = softmax(s) over u;  y = p v, the heads side by side again;  out = out_proj(y)
    Shapes:    x (..., T, D); in_proj_weight (3 D, D); in_proj_bias (3 D,); out_proj a Linear(D -> D); out like x;
               inside, q, k, v, y are (N heads, T, d) and s, p are (N heads, T, T)
    Backward:  dy = out_proj.backward(dout), cut into heads;
               y = p v:               dv = p^T dy,  dp = dy v^T
               p = softmax(s):        ds = p (dp - sum_u dp p); zero where masked, since p is
               s = q k^T / sqrt(d):   dq = ds k / sqrt(d),  dk = ds^T q / sqrt(d)
               x -> q, k, v affine:   with dqkv the three side by side,
               dx = dqkv @ in_proj_weight,  din_proj_weight = dqkv^T x,  din_proj_bias = sum dqkv
    Recorded:  x, q / sqrt(d), k, v, p, in_proj_weight; out_proj records y
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

    shown = ("embed_dim",)
    in_proj_weight: Tensor = parameter("3D", "D")
    in_proj_bias: Tensor | None = parameter("3D")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        *,
        causal: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            problem = f"num_heads must divide embed_dim, got {num_heads} and {embed_dim}"
            raise ArgumentError(f"SelfAttention: {problem}")
        self.embed_dim, self.num_heads, self.bias, self.causal = embed_dim, num_heads, bias, causal
        self.in_proj_weight = torch.empty(3 * embed_dim, embed_dim, dtype=dtype, device=device)
        self.in_proj_bias = torch.zeros(3 * embed_dim, dtype=dtype, device=device) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias, generator=generator, dtype=dtype, device=device)
        bound = math.sqrt(6 / (embed_dim + 3 * embed_dim))  # Glorot and Bengio 2010
        self.in_proj_weight.uniform_(-bound, bound, generator=generator)
        if self.out_proj.bias is not None:
            self.out_proj.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x, self.in_proj_weight.dtype)
        if x.dim() < 2 or x.shape[-1] != self.embed_dim:
            problem = f"x must be (..., T, {self.embed_dim}), got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)
        q, k, v = self._split(linear(x, self.in_proj_weight, self.in_proj_bias), 3)  # (N heads, T, d) each
        q = q / math.sqrt(q.shape[-1])
        s = q.bmm(k.mT)  # (N heads, T, T)
        if self.causal:
            s = s.masked_fill_(torch.ones_like(s[0], dtype=torch.bool).triu(1) if s.numel() else s > 0, -math.inf)
        p = torch.softmax(s, -1)
        y = self._merge(p.bmm(v)).view_as(x)
        out: Tensor = self.out_proj.forward_at("out_proj", y)
        self.push(x, q, k, v, p, self.in_proj_weight, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Tensor | None:
        x, q, k, v, p, in_proj_weight = self.pop(dout)
        (dy,) = self._split(self.out_proj.backward_at("out_proj", dout), 1)
        # y = p v
        dv = p.mT.bmm(dy)
        dp = dy.bmm(v.mT)
        # p = softmax(s)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True))
        # s = q k^T / sqrt(d), and the recorded q is q / sqrt(d)
        dq = ds.bmm(k) / math.sqrt(q.shape[-1])
        dk = ds.mT.bmm(q)
        # (q, k, v) = x @ in_proj_weight.T + in_proj_bias
        dqkv = self._merge(dq, dk, dv)  # (N T, 3 D)
        self.add_grad(in_proj_weight, dqkv.t() @ x.reshape(-1, self.embed_dim))
        if self.in_proj_bias is not None:
            self.add_grad(self.in_proj_bias, dqkv.sum(0))
        return (dqkv @ in_proj_weight).view_as(x) if need_dx else None

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(..., T, parts D) into `parts` tensors (N heads, T, d), each in one piece, as matrix products want it."""
        N, T, d = math.prod(x.shape[:-2]), x.shape[-2], self.embed_dim // self.num_heads
        by_head = x.reshape(N, T, parts, self.num_heads, d).permute(2, 0, 3, 1, 4)
        return by_head.reshape(parts, N * self.num_heads, T, d).unbind()

    def _merge(self, *parts: Tensor) -> Tensor:
        """Undo `_split`, with the leading dimensions as one: (N T, parts D)."""
        rows, T, d = parts[0].shape
        N = rows // self.num_heads
        by_step = [p.view(N, self.num_heads, T, d).transpose(1, 2) for p in parts]  # (N, T, heads, d)
        return torch.stack(by_step, 2).view(N * T, len(parts) * self.embed_dim)
