"""Layers that handgrad does not have, as a stranger would write them: right ones, and three with two mistakes each."""

from __future__ import annotations

import torch
from torch import Tensor

from handgrad import Layer, parameter


class Double(Layer):
    """The smallest right layer."""

    def forward(self, x):
        """Twice x."""
        out = 2 * x
        self.push(out=out)
        return out

    def backward(self, dout):
        """Twice dout."""
        self.pop(dout)
        return 2 * dout


class SiLU(Layer):
    """SiLU with a learnable slope a channel: out = x sigmoid(slope x)."""

    slope: Tensor = parameter("D")

    def __init__(self, size: int) -> None:
        self.slope = torch.ones(size)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.slope * x)
        out = x * gate
        self.push(x, gate, self.slope, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        x, gate, slope = self.pop(dout)
        dgate = dout * x * gate * (1 - gate)  # at slope x
        self.add_grad(slope, (dgate * x).reshape(-1, slope.numel()).sum(0))
        return dout * gate + dgate * slope


class SiLUForgetsSlope(SiLU):
    """Forgets that the gate's argument is slope times x: right for slope 1."""

    def backward(self, dout: Tensor) -> Tensor:
        x, gate, slope = self.pop(dout)
        dgate = dout * x * gate * (1 - gate)
        self.add_grad(slope, (dgate * x).reshape(-1, slope.numel()).sum(0))
        return dout * gate + dgate


class SiLUOverwritesGradient(SiLU):
    """Assigns the gradient where it should add to it."""

    def backward(self, dout: Tensor) -> Tensor:
        x, gate, slope = self.pop(dout)
        dgate = dout * x * gate * (1 - gate)
        slope.grad = (dgate * x).reshape(-1, slope.numel()).sum(0)
        return dout * gate + dgate * slope


class RowNorm(Layer):
    """Each row divided by its length: out = x / sqrt(sum x^2 + eps)."""

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        length = (x.square().sum(-1, keepdim=True) + self.eps).sqrt()
        out = x / length
        self.push(out, length, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        out, length = self.pop(dout)
        return (dout - out * (dout * out).sum(-1, keepdim=True)) / length


class RowNormConstantLength(RowNorm):
    """Takes the length for a constant."""

    def backward(self, dout: Tensor) -> Tensor:
        _out, length = self.pop(dout)
        return dout / length


class RowNormAttributes(RowNorm):
    """Keeps what backward needs in attributes, where the next forward overwrites it."""

    def forward(self, x: Tensor) -> Tensor:
        self.length = (x.square().sum(-1, keepdim=True) + self.eps).sqrt()
        self.out = x / self.length
        self.push(out=self.out)
        return self.out

    def backward(self, dout: Tensor) -> Tensor:
        self.pop(dout)
        return (dout - self.out * (dout * self.out).sum(-1, keepdim=True)) / self.length


class Bilinear(Layer):
    """Two inputs: out[n, o] = sum_ij x[n, i] weight[o, i, j] y[n, j]."""

    weight: Tensor = parameter("O", "I", "J")

    def __init__(self, size_x: int, size_y: int, size_out: int) -> None:
        self.weight = torch.randn(size_out, size_x, size_y)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = torch.einsum("ni,oij,nj->no", x, self.weight, y)
        self.push(x, y, self.weight, out=out)
        return out

    def backward(self, dout: Tensor) -> tuple[Tensor, Tensor]:
        x, y, weight = self.pop(dout)
        self.add_grad(weight, torch.einsum("no,ni,nj->oij", dout, x, y))
        return torch.einsum("no,oij,nj->ni", dout, weight, y), torch.einsum("no,oij,ni->nj", dout, weight, x)


class BilinearForgetsInput(Bilinear):
    """Returns the gradient of x alone."""

    def backward(self, dout: Tensor) -> Tensor:  # type: ignore[override]
        return super().backward(dout)[0]


class BilinearMean(Bilinear):
    """Averages the gradient of weight over the rows where it should add."""

    def backward(self, dout: Tensor) -> tuple[Tensor, Tensor]:
        x, y, weight = self.pop(dout)
        self.add_grad(weight, torch.einsum("no,ni,nj->oij", dout, x, y) / max(len(x), 1))
        return torch.einsum("no,oij,nj->ni", dout, weight, y), torch.einsum("no,oij,ni->nj", dout, weight, x)
