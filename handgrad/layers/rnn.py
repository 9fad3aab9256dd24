"""Recurrent cells: one time step each. Unroll runs one over a sequence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from handgrad.errors import ArgumentError, ShapeError
from handgrad.layer import Layer, parameter


class Cell(Layer):
    """What the three cells share: their parameters, the check of their inputs, and the gradients of an affine map.

    A cell maps (x, state) to the new state. Its backward returns (dx, dstate), or dx alone where the forward had no
    state: it then started from zeros.
    """

    weight_ih: Tensor = parameter("G*H", "D")
    weight_hh: Tensor = parameter("G*H", "H")
    bias_ih: Tensor | None = parameter("G*H")
    bias_hh: Tensor | None = parameter("G*H")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        gates: int,
        generator: torch.Generator | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        if input_size < 1 or hidden_size < 1:
            name = type(self).__name__
            raise ArgumentError(f"{name}: sizes must be at least 1, got {input_size} -> {hidden_size}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.weight_ih = torch.empty(gates * hidden_size, input_size, dtype=dtype, device=device)
        self.weight_hh = torch.empty(gates * hidden_size, hidden_size, dtype=dtype, device=device)
        self.bias_ih = self.weight_ih.new_empty(gates * hidden_size) if bias else None
        self.bias_hh = self.weight_ih.new_empty(gates * hidden_size) if bias else None
        bound = 1 / math.sqrt(hidden_size)
        for param in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh):
            if param is not None:
                param.uniform_(-bound, bound, generator=generator)

    def _check(self, x: Tensor, **states: Tensor) -> None:
        self.check_input(x, self.weight_ih.dtype)
        if x.dim() == 0 or x.shape[-1] != self.input_size:
            problem = f"last dimension of x must be {self.input_size}, got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)
        for name, state in states.items():
            self.check_input(state, self.weight_ih.dtype)
            wanted = (*x.shape[:-1], self.hidden_size)
            if tuple(state.shape) != wanted:
                problem = f"{name} must have shape {wanted} for x of shape {tuple(x.shape)}, got {tuple(state.shape)}"
                raise self.error(ShapeError, "forward", problem)

    def _zeros(self, x: Tensor) -> Tensor:
        """The state before the first step."""
        return x.new_zeros(*x.shape[:-1], self.hidden_size)

    def _add_grads(self, weight: Tensor, bias: Tensor | None, x: Tensor, da: Tensor) -> None:
        """The gradients of weight and bias in a = x @ weight.T + bias, from da."""
        da = da.reshape(-1, da.shape[-1])
        self.add_grad(weight, da.t() @ x.reshape(-1, x.shape[-1]))
        if bias is not None:
            self.add_grad(bias, da.sum(0))

    def extra_repr(self) -> str:
        return f"{self.input_size} -> {self.hidden_size}" + ("" if self.bias_ih is not None else ", bias=False")


class RNNCell(Cell):
    """One step of the plain recurrent net.

    Forward:   a = x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh,  out = tanh(a), or relu(a)
    Shapes:    x (..., D); h, out (..., H); weight_ih (H, D); weight_hh (H, H); bias_ih, bias_hh (H,)
    Backward:  da = dout (1 - out^2), or dout where out > 0, else 0; with n over the leading dimensions,
               dx = da @ weight_ih,  dh = da @ weight_hh,
               dweight_ih = sum_n da[n] x[n]^T,  dweight_hh = sum_n da[n] h[n]^T,  dbias_ih = dbias_hh = sum_n da[n]
    Recorded:  x, h, out, weight_ih, weight_hh
    Raises:    ArgumentError for an unknown nonlinearity; ShapeError, DtypeError; StateError.
    Source:    Elman 1990; torch.nn.RNNCell for parameters and initialisation.

    Without h the step starts from zeros, and backward returns dx alone.

    >>> cell = RNNCell(3, 4)
    >>> h = cell(torch.randn(2, 3))
    >>> h = cell(torch.randn(2, 3), h)
    >>> dx, dh = cell.backward(torch.randn(2, 4))
    >>> dx.shape, cell.backward(dh).shape
    (torch.Size([2, 3]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ArgumentError(f"RNNCell: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(input_size, hidden_size, bias, 1, generator, dtype, device)
        self.nonlinearity = nonlinearity

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        self._check(x, **({} if h is None else {"h": h}))
        started = h is None
        h = self._zeros(x) if h is None else h
        a = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh, self.bias_hh)
        out = torch.tanh(a) if self.nonlinearity == "tanh" else torch.relu(a)
        self.push(x, h, out, self.weight_ih, self.weight_hh, started, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Any:
        x, h, out, weight_ih, weight_hh, started = self.pop(dout)
        # out = tanh(a), or relu(a)
        da = (1 - out * out).mul_(dout) if self.nonlinearity == "tanh" else dout.masked_fill(out <= 0, 0)
        # a = x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh
        self._add_grads(weight_ih, self.bias_ih, x, da)
        self._add_grads(weight_hh, self.bias_hh, h, da)
        dx = da @ weight_ih if need_dx else None
        return dx if started else (dx, da @ weight_hh)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity!r}")


class GRUCell(Cell):
    """One step of the gated recurrent unit.

    Forward:   (xr, xz, xn) = x @ weight_ih.T + bias_ih,  (hr, hz, hn) = h @ weight_hh.T + bias_hh,  in thirds
               r = sigmoid(xr + hr),  z = sigmoid(xz + hz),  n = tanh(xn + r hn)
               out = (1 - z) n + z h
    Shapes:    x (..., D); h, out (..., H); weight_ih (3 H, D); weight_hh (3 H, H); bias_ih, bias_hh (3 H,)
    Backward:  dz = dout (h - n),  dn = dout (1 - z),  dh = dout z + (what comes through hr, hz, hn)
               dxn = dn (1 - n^2),  dr = dxn hn,  dhn = dxn r
               dxz = dhz = dz z (1 - z),  dxr = dhr = dr r (1 - r)
               With da = (dxr, dxz, dxn) and db = (dhr, dhz, dhn) side by side, and m over the leading dimensions,
               dx = da @ weight_ih,  dh = dout z + db @ weight_hh,
               dweight_ih = sum_m da[m] x[m]^T,  dbias_ih = sum_m da[m];  dweight_hh and dbias_hh the same with db and h
    Recorded:  x, h, r, z, n, hn, weight_ih, weight_hh
    Raises:    ShapeError, DtypeError; StateError.
    Source:    Cho et al. 2014, arXiv:1406.1078, in the form of torch.nn.GRUCell: r acts after weight_hh.

    Without h the step starts from zeros, and backward returns dx alone.

    >>> cell = GRUCell(3, 4)
    >>> cell(torch.randn(2, 3), torch.zeros(2, 4)).shape
    torch.Size([2, 4])
    >>> dx, dh = cell.backward(torch.randn(2, 4))
    >>> dx.shape, dh.shape
    (torch.Size([2, 3]), torch.Size([2, 4]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 3, generator, dtype, device)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        self._check(x, **({} if h is None else {"h": h}))
        started = h is None
        h = self._zeros(x) if h is None else h
        H = self.hidden_size
        a, b = linear(x, self.weight_ih, self.bias_ih), linear(h, self.weight_hh, self.bias_hh)  # (..., 3 H)
        r, z = torch.sigmoid(a[..., : 2 * H] + b[..., : 2 * H]).chunk(2, -1)
        hn = b[..., 2 * H :]
        n = torch.tanh(torch.addcmul(a[..., 2 * H :], r, hn))
        out = torch.addcmul(n, z, h - n)  # (1 - z) n + z h
        self.push(x, h, r, z, n, hn, self.weight_ih, self.weight_hh, started, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Any:
        x, h, r, z, n, hn, weight_ih, weight_hh, started = self.pop(dout)
        # out = (1 - z) n + z h
        dz = dout * (h - n)
        dn = dout * (1 - z)
        # n = tanh(xn + r hn)
        dxn = (1 - n * n).mul_(dn)
        dr = dxn * hn
        # r = sigmoid(xr + hr), z = sigmoid(xz + hz)
        dxr = (1 - r).mul_(r).mul_(dr)
        dxz = (1 - z).mul_(z).mul_(dz)
        # (xr, xz, xn) = x @ weight_ih.T + bias_ih, (hr, hz, hn) = h @ weight_hh.T + bias_hh
        da = torch.cat([dxr, dxz, dxn], -1)
        db = torch.cat([dxr, dxz, dxn * r], -1)
        self._add_grads(weight_ih, self.bias_ih, x, da)
        self._add_grads(weight_hh, self.bias_hh, h, db)
        dx = da @ weight_ih if need_dx else None
        return dx if started else (dx, torch.addcmul(db @ weight_hh, dout, z))


class LSTMCell(Cell):
    """One step of the long short-term memory.

    Forward:   (ai, af, ag, ao) = x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh,  in quarters
               i = sigmoid(ai),  f = sigmoid(af),  g = tanh(ag),  o = sigmoid(ao)
               c_out = f c + i g,  h_out = o tanh(c_out)
    Shapes:    x (..., D); state (h, c) and output (h_out, c_out) of (..., H); weight_ih (4 H, D); weight_hh (4 H, H);
               bias_ih, bias_hh (4 H,)
    Backward:  dout is (dh_out, dc_out). c_out also acts through h_out, hence with u = tanh(c_out)
               do = dh_out u,  dc' = dc_out + dh_out o (1 - u^2)
               di = dc' g,  df = dc' c,  dg = dc' i,  dc = dc' f
               da = (di i (1 - i), df f (1 - f), dg (1 - g^2), do o (1 - o)) side by side; m over leading dimensions
               dx = da @ weight_ih,  dh = da @ weight_hh,
               dweight_ih = sum_m da[m] x[m]^T,  dweight_hh = sum_m da[m] h[m]^T,  dbias_ih = dbias_hh = sum_m da[m]
    Recorded:  x, h, c, i, f, g, o, u, weight_ih, weight_hh
    Raises:    ShapeError, DtypeError; StateError.
    Source:    Hochreiter and Schmidhuber 1997; torch.nn.LSTMCell for parameters and initialisation.

    Without a state the step starts from zeros, and backward returns dx alone.

    >>> cell = LSTMCell(3, 4)
    >>> state = cell(torch.randn(2, 3), (torch.zeros(2, 4), torch.zeros(2, 4)))
    >>> dx, (dh, dc) = cell.backward((torch.randn(2, 4), torch.randn(2, 4)))
    >>> dx.shape, dh.shape, dc.shape
    (torch.Size([2, 3]), torch.Size([2, 4]), torch.Size([2, 4]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, generator, dtype, device)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if state is not None and (not isinstance(state, tuple) or len(state) != 2):
            raise self.error(ShapeError, "forward", f"state must be the tuple (h, c), got {type(state).__name__}")
        self._check(x, **({} if state is None else {"h": state[0], "c": state[1]}))
        h, c = (self._zeros(x), self._zeros(x)) if state is None else state
        H = self.hidden_size
        a = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh, self.bias_hh)  # (..., 4 H)
        i, f = torch.sigmoid(a[..., : 2 * H]).chunk(2, -1)
        g, o = torch.tanh(a[..., 2 * H : 3 * H]), torch.sigmoid(a[..., 3 * H :])
        c_out = torch.addcmul(f * c, i, g)
        u = torch.tanh(c_out)
        out = (o * u, c_out)
        self.push(x, h, c, i, f, g, o, u, self.weight_ih, self.weight_hh, state is None, out=out)
        return out

    def backward(self, dout: tuple[Tensor, Tensor], need_dx: bool = True) -> Any:
        x, h, c, i, f, g, o, u, weight_ih, weight_hh, started = self.pop(dout)
        dh_out, dc_out = dout
        # h_out = o u, u = tanh(c_out)
        do = dh_out * u
        dc = (1 - u * u).mul_(o).mul_(dh_out).add_(dc_out)
        # c_out = f c + i g
        di, df, dg = dc * g, dc * c, dc * i
        # i = sigmoid(ai), f = sigmoid(af), g = tanh(ag), o = sigmoid(ao)
        dai, daf, dao = di.mul_(i).mul_(1 - i), df.mul_(f).mul_(1 - f), do.mul_(o).mul_(1 - o)
        da = torch.cat([dai, daf, dg.mul_(1 - g * g), dao], -1)
        # (ai, af, ag, ao) = x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh
        self._add_grads(weight_ih, self.bias_ih, x, da)
        self._add_grads(weight_hh, self.bias_hh, h, da)
        dx = da @ weight_ih if need_dx else None
        return dx if started else (dx, (da @ weight_hh, dc.mul_(f)))
