"""The affine map."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from handgrad.arguments import integer, number
from handgrad.errors import ShapeError
from handgrad.layer import Layer, parameter


class Linear(Layer):
    """Affine map of the last dimension.

    Forward:   out = x @ weight.T + bias
    Shapes:    x (..., D_in); weight (D_out, D_in); bias (D_out,); out (..., D_out)
    Backward:  with n over all leading dimensions,
               out[n, o] = sum_i x[n, i] weight[o, i] + bias[o], hence
               dx[n, i]      = sum_o dout[n, o] weight[o, i]
               dweight[o, i] = sum_n dout[n, o] x[n, i]
               dbias[o]      = sum_n dout[n, o]
    Recorded:  x, weight
    Raises:    ArgumentError; ShapeError, DtypeError; StateError from a backward without a forward.

    By default weight and bias are drawn as torch.nn.Linear draws them, uniformly within 1/sqrt(D_in). With `gain`,
    weight is normal with deviation gain/sqrt(D_in) and bias is zero (He et al. 2015, arXiv:1502.01852; the makemore
    lectures use gain 5/3 before tanh).

    >>> layer = Linear(3, 2)
    >>> layer
    Linear(3 -> 2)
    >>> x = torch.ones(4, 3)
    >>> out = layer(x)
    >>> layer.backward(torch.ones(4, 2)).shape, layer.bias.grad
    (torch.Size([4, 3]), tensor([4., 4.]))
    """

    shown = ("in_features", "out_features")
    weight: Tensor = parameter("D_out", "D_in")
    bias: Tensor | None = parameter("D_out")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gain: float | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.in_features = integer(self, "in_features", in_features)
        self.out_features = integer(self, "out_features", out_features)
        self.weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
        self.bias = torch.empty(self.out_features, dtype=dtype, device=device) if bias else None
        bound = 1 / math.sqrt(self.in_features)
        if gain is None:
            self.weight.uniform_(-bound, bound, generator=generator)
        else:
            self.weight.normal_(0, number(self, "gain", gain, 0) * bound, generator=generator)
        if self.bias is not None and gain is None:
            self.bias.uniform_(-bound, bound, generator=generator)
        elif self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x, self.weight.dtype)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            problem = f"last dimension of x must be {self.in_features}, got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)
        out = linear(x, self.weight, self.bias)  # x @ weight.T + bias, (..., D_out)
        self.push(x, self.weight, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Tensor | None:
        x, weight = self.pop(dout)
        # out = x @ weight.T + bias
        dout_rows = rows(dout)
        self.add_grad(weight, dout_rows.t() @ rows(x))  # (D_out, D_in)
        if self.bias is not None:
            self.add_grad(self.bias, dout_rows.sum(0))  # (D_out,)
        return dout @ weight if need_dx else None  # (..., D_in)


def rows(x: Tensor) -> Tensor:
    """All leading dimensions as one: (..., D) as (N, D)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
