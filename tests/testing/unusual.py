"""Right layers that are not like most: random in every mode, float32 inside, tied maxima, views, bool inputs, ..."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from handgrad import Layer, Linear, ShapeError, buffer, parameter


class Unusual(NamedTuple):
    """A right layer, and how it is checked."""

    make: Any
    x: Any
    more: dict[str, Any] = {}  # noqa: RUF012  # read only


class Noisy(Layer):
    """x + noise, in every mode."""

    def forward(self, x):
        out = x + 0.3 * torch.randn_like(x)
        self.push(out=out)
        return out

    def backward(self, dout):
        self.pop(dout)
        return dout


class Thinned(Layer):
    """Times random numbers in float32, whatever x is, in every mode."""

    def forward(self, x):
        keep = torch.rand(x.shape, dtype=x.dtype) < 0.7
        self.push(keep, out=x)
        return x * keep / 0.7

    def backward(self, dout):
        (keep,) = self.pop(dout)
        return dout * keep / 0.7


class Softmax32(Layer):
    """Softmax computed in float32."""

    def forward(self, x):
        p = torch.softmax(x, -1, dtype=torch.float32)
        self.push(p, out=x)
        return p.to(x.dtype)

    def backward(self, dout):
        (p,) = self.pop(dout)
        d = dout.float()
        return (p * (d - (p * d).sum(-1, keepdim=True))).to(dout.dtype)


class RMS32(Layer):
    """Root mean square normalisation computed in float32, with an accumulator of float32 in backward."""

    weight = parameter("D")

    def __init__(self, D):
        self.weight = torch.ones(D)

    def forward(self, x):
        h = x.float()
        rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + 0.1)
        xhat = h * rstd
        out = xhat.to(x.dtype) * self.weight
        self.push(xhat, rstd, self.weight, out=out)
        return out

    def backward(self, dout):
        xhat, rstd, weight = self.pop(dout)
        total = torch.zeros(weight.shape)
        total += (dout.float() * xhat).reshape(-1, weight.numel()).sum(0)
        self.add_grad(weight, total.to(weight.dtype))
        dxhat = (dout * weight).float()
        return (rstd * (dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True))).to(dout.dtype)


class Square16(Layer):
    """Squares in bfloat16."""

    def forward(self, x):
        h = x.bfloat16()
        self.push(h, out=x)
        return (h * h).to(x.dtype)

    def backward(self, dout):
        (h,) = self.pop(dout)
        return (2 * h * dout.bfloat16()).to(dout.dtype)


class StraightThrough(Layer):
    """Rounds, with the slope of no rounding."""

    def forward(self, x):
        out = x + (x.round() - x).detach()
        self.push(out=out)
        return out

    def backward(self, dout):
        self.pop(dout)
        return dout


class Masked(Layer):
    """Where a bool input says so, x; elsewhere 0."""

    def forward(self, x, mask):
        self.push(mask, out=x)
        return x.masked_fill(~mask, 0)

    def backward(self, dout):
        (mask,) = self.pop(dout)
        return dout * mask, None


class Chosen(Layer):
    """One of two inputs, by a bool mask."""

    def forward(self, mask, x, y):
        self.push(mask, out=x)
        return torch.where(mask, x, y)

    def backward(self, dout):
        (mask,) = self.pop(dout)
        return None, dout * mask, dout * ~mask


class Tied(Layer):
    """The largest of each row; equal ones share."""

    def forward(self, x):
        if x.shape[-1] == 0:
            raise self.error(ShapeError, "forward", f"x must have at least 1 column, got {tuple(x.shape)}")
        out = x.amax(-1)
        share = (x == out.unsqueeze(-1)).to(x.dtype)
        self.push(share / share.sum(-1, keepdim=True), out=out)
        return out

    def backward(self, dout):
        (share,) = self.pop(dout)
        return dout.unsqueeze(-1) * share


class Rescaled(Layer):
    """By the largest magnitude, taken for a constant."""

    def forward(self, x):
        scale = x.detach().abs().amax().clamp(min=0.5) if x.numel() else x.new_ones(())
        self.push(scale, out=x)
        return x / scale

    def backward(self, dout):
        (scale,) = self.pop(dout)
        return dout / scale


class InPlace(Layer):
    """Writes to tensors of its own."""

    def forward(self, x):
        out = x.clone()
        out.mul_(3).add_(1).tanh_()
        self.push(out.clone(), out=out)
        return out

    def backward(self, dout):
        (out,) = self.pop(dout)
        dx = out.mul(out).neg_().add_(1)
        return dx.mul_(dout).mul_(3)


class Turned(Layer):
    """A view of x; and of dout."""

    def forward(self, x):
        self.push(out=x.t())
        return x.t()

    def backward(self, dout):
        self.pop(dout)
        return dout.t()


class Picked(Layer):
    """Rows of a floating input by an integer one."""

    def forward(self, x, index):
        out = x[index]
        self.push(x.shape, index, out=out)
        return out

    def backward(self, dout):
        shape, index = self.pop(dout)
        return dout.new_zeros(shape).index_add_(0, index, dout), None


class Largest(Layer):
    """The largest of each row, and where it is, which has no gradient."""

    def forward(self, x):
        if x.shape[-1] == 0:
            raise self.error(ShapeError, "forward", f"x must have at least 1 column, got {tuple(x.shape)}")
        out, where = x.max(-1)
        self.push(where, x.shape, out=(out, where))
        return out, where

    def backward(self, dout):
        where, shape = self.pop(dout)
        return dout[0].new_zeros(shape).scatter_(-1, where.unsqueeze(-1), dout[0].unsqueeze(-1))


class Broadcast(Layer):
    """A parameter of shape (1, D, 1)."""

    gain = parameter(1, "D", 1)

    def __init__(self, D):
        self.gain = torch.ones(1, D, 1)

    def forward(self, x):
        self.push(x, self.gain, out=x)
        return x * self.gain

    def backward(self, dout):
        x, gain = self.pop(dout)
        self.add_grad(gain, (dout * x).sum((0, 2), keepdim=True))
        return dout * gain


class NoNumbers(Layer):
    """Has a parameter without elements beside one of one element."""

    none = parameter(0)
    scale = parameter()

    def __init__(self):
        self.none, self.scale = torch.zeros(0), torch.ones(())

    def forward(self, x):
        self.push(x, self.scale, out=x)
        return x * self.scale + self.none.sum()

    def backward(self, dout):
        x, scale = self.pop(dout)
        self.add_grad(self.none, torch.zeros_like(self.none))
        self.add_grad(scale, (dout * x).sum())
        return dout * scale


class Tracking(Layer):
    """Centres by a running mean; in training it learns the mean first, which it takes for a constant."""

    running = buffer("D")

    def __init__(self, D):
        self.running = torch.zeros(D)

    def forward(self, x):
        if self.training and x.numel():
            self.running.lerp_(x.detach().reshape(-1, x.shape[-1]).mean(0), 0.1)
        self.push(out=x)
        return x - self.running.clone()

    def backward(self, dout):
        self.pop(dout)
        return dout


class Twice(Layer):
    """One inner layer used twice."""

    def __init__(self, D):
        self.inner = Linear(D, D)

    def forward(self, x):
        out = self.inner(self.inner(x))
        self.push(out=out)
        return out

    def backward(self, dout):
        self.pop(dout)
        return self.inner.backward(self.inner.backward(dout))


class Loop(Layer):
    """A recurrence in a Python loop."""

    def forward(self, x):
        state, states = x.new_zeros(x.shape[1:]), []
        for row in x:
            state = torch.tanh(row + 0.5 * state)
            states.append(state)
        out = torch.stack(states) if states else x.clone()
        self.push(out, out=out)
        return out

    def backward(self, dout):
        (out,) = self.pop(dout)
        dx, carried = torch.zeros_like(out), torch.zeros_like(out[:1]).sum(0)
        for t in reversed(range(len(out))):
            dx[t] = (dout[t] + carried) * (1 - out[t] ** 2)
            carried = 0.5 * dx[t]
        return dx


class Spectrum(Layer):
    """The real part of a Fourier transform: complex inside."""

    def forward(self, x):
        if x.numel() == 0:
            raise self.error(ShapeError, "forward", f"x must not be empty, got {tuple(x.shape)}")
        self.push(out=x)
        return torch.fft.fft(x).real

    def backward(self, dout):
        self.pop(dout)
        return torch.fft.fft(dout).real


class ByNumpy(Layer):
    """The sine by numpy, which autograd cannot follow."""

    def forward(self, x):
        self.push(x, out=x)
        return torch.from_numpy(torch.asarray(x.detach().numpy()).sin().numpy())

    def backward(self, dout):
        (x,) = self.pop(dout)
        return dout * torch.cos(x)


class Nested(Layer):
    """Takes (x, (h, c)), returns (h, c)."""

    def forward(self, x, state):
        h, c = state
        out = x * h, h + c
        self.push(x, h, out=out)
        return out

    def backward(self, dout):
        x, h = self.pop(dout)
        da, db = dout
        return da * h, (da * x + db, db)


class Total(Layer):
    """One number of everything."""

    def forward(self, x):
        out = (x * x).sum()
        self.push(x, out=out)
        return out

    def backward(self, dout):
        (x,) = self.pop(dout)
        return 2 * x * dout


class HalfFrozen(Layer):
    """A frozen parameter beside one that learns."""

    weight = parameter("D")
    fixed = parameter("D")

    def __init__(self, D):
        self.weight, self.fixed = torch.ones(D), torch.ones(D)
        self.fixed.frozen = True

    def forward(self, x):
        self.push(x, self.weight, self.fixed, out=x)
        return x * self.weight * self.fixed

    def backward(self, dout):
        x, weight, fixed = self.pop(dout)
        self.add_grad(weight, (dout * x * fixed).reshape(-1, weight.numel()).sum(0))
        self.add_grad(fixed, (dout * x * weight).reshape(-1, fixed.numel()).sum(0))
        return dout * weight * fixed


NO_SLOPE = {"skip": {"differences": "by definition the gradient is not the slope"}}
UNUSUAL = {
    "noise in every mode": Unusual(Noisy, "*N"),
    "thinned in every mode": Unusual(Thinned, "*N"),
    "softmax in float32": Unusual(Softmax32, "*N D"),
    "normalised in float32": Unusual(lambda D: RMS32(D), "*N D"),
    "squares in bfloat16": Unusual(Square16, "*N"),
    "straight through": Unusual(StraightThrough, "*N", NO_SLOPE),
    "masked by a bool input": Unusual(Masked, ["*N", "*N bool"]),
    "chosen by a bool input": Unusual(Chosen, ["*N bool", "*N", "*N"]),
    "tied maxima": Unusual(Tied, "N D", {"sizes": {"D": (1, 4)}}),
    "a detached scale": Unusual(Rescaled, "*N", NO_SLOPE),
    "in place on its own tensors": Unusual(InPlace, "*N"),
    "a view": Unusual(Turned, "N D"),
    "integers and floats": Unusual(Picked, ["V D", "N < V"]),
    "two outputs, one of integers": Unusual(Largest, "N D", {"distinct": True, "sizes": {"D": (1, 4)}}),
    "a broadcast parameter": Unusual(lambda D: Broadcast(D), "N D L"),
    "a parameter without elements": Unusual(NoNumbers, "*N"),
    "a running mean": Unusual(lambda D: Tracking(D), "*N D", NO_SLOPE),
    "a layer used twice": Unusual(lambda D: Twice(D), "*N D"),
    "a loop": Unusual(Loop, "T D"),
    "complex inside": Unusual(Spectrum, "*N D"),
    "numpy inside": Unusual(ByNumpy, "*N", {"oracle": "differences", "sizes": {"*N": (0, 2)}}),
    "nested inputs": Unusual(Nested, ["*N", ("*N", "*N")]),
    "one number": Unusual(Total, "*N"),
    "half frozen": Unusual(lambda D: HalfFrozen(D), "*N D"),
}
