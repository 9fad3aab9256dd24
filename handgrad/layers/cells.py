"""Recurrent cells: one time step each. `Unroll` runs a cell over a sequence; `RNN`, `GRU` and `LSTM` do so fast."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from handgrad.arguments import integer
from handgrad.errors import ArgumentError, ShapeError
from handgrad.layer import Layer, parameter
from handgrad.layers.linear import rows


class Cell(Layer):
    """What the three cells share: their parameters, and the check of their inputs.

    Both weights have the rows of the `gates` one above the other: weight_ih (gates H, D), weight_hh (gates H, H).
    """

    gates: ClassVar[int] = 1
    shown = ("input_size", "hidden_size")

    weight_ih: Tensor = parameter("G*H", "D")
    weight_hh: Tensor = parameter("G*H", "H")
    bias_ih: Tensor | None = parameter("G*H")
    bias_hh: Tensor | None = parameter("G*H")

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
        self.input_size = integer(self, "input_size", input_size)
        self.hidden_size, self.bias = integer(self, "hidden_size", hidden_size), bias
        self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh = recurrent_parameters(
            self, self.gates, generator=generator, dtype=dtype, device=device
        )

    def start(self, x: Tensor, **state: Tensor | None) -> list[Tensor]:
        """Check x (..., D) and the state before it, each tensor (..., H); zeros for what is not given."""
        self.check_input(x, self.weight_ih.dtype)
        if x.dim() == 0 or x.shape[-1] != self.input_size:
            problem = f"last dimension of x must be {self.input_size}, got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)
        return started(self, x, (*x.shape[:-1], self.hidden_size), state)


class RNNCell(Cell):
    """One step of the plain recurrent net.

    Forward:   a = x @ weight_ih.T + bias_ih,  b = h @ weight_hh.T + bias_hh,  out = tanh(a + b), or relu(a + b)
    Shapes:    x (..., D); h, out (..., H); weight_ih (H, D); weight_hh (H, H); bias_ih, bias_hh (H,)
    Backward:  da = db = dout (1 - out^2), or for relu dout where out > 0, else 0; with n over the leading dimensions,
               dx = da @ weight_ih,  dweight_ih = sum_n da[n] x[n]^T,  dbias_ih = sum_n da[n],
               dh = db @ weight_hh,  dweight_hh = sum_n db[n] h[n]^T,  dbias_hh = sum_n db[n]
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
        check_nonlinearity("RNNCell", nonlinearity)
        super().__init__(input_size, hidden_size, bias, generator=generator, dtype=dtype, device=device)
        self.nonlinearity = nonlinearity

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        given, (h,) = h is not None, self.start(x, h=h)
        a = linear(x, self.weight_ih, self.bias_ih)
        b = linear(h, self.weight_hh, self.bias_hh)
        out = torch.tanh(a + b) if self.nonlinearity == "tanh" else torch.relu(a + b)
        self.push(x, h, out, self.weight_ih, self.weight_hh, given, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Any:
        x, h, out, weight_ih, weight_hh, given = self.pop(dout)
        # out = tanh(a + b), or relu(a + b)
        da = db = dout * (1 - out * out) if self.nonlinearity == "tanh" else dout.where(out > 0, 0)
        # a = x @ weight_ih.T + bias_ih
        dx = da @ weight_ih if need_dx else None
        self.add_grad(weight_ih, rows(da).t() @ rows(x))
        self.add_grad(self.bias_ih, rows(da).sum(0))
        # b = h @ weight_hh.T + bias_hh
        dh = db @ weight_hh if given else None
        self.add_grad(weight_hh, rows(db).t() @ rows(h))
        self.add_grad(self.bias_hh, rows(db).sum(0))
        return (dx, dh) if given else dx


class GRUCell(Cell):
    """One step of the gated recurrent unit.

    Forward:   a = x @ weight_ih.T + bias_ih = (ar, az, an),  b = h @ weight_hh.T + bias_hh = (br, bz, bn),  in thirds
               r = sigmoid(ar + br),  z = sigmoid(az + bz),  n = tanh(an + r bn)
               out = (1 - z) n + z h
    Shapes:    x (..., D); h, out (..., H); weight_ih (3 H, D); weight_hh (3 H, H); bias_ih, bias_hh (3 H,)
    Backward:  out = (1 - z) n + z h:   dn = dout (1 - z),  dz = dout (h - n),  and dh = dout z as its first share
               n = tanh(an + r bn):     dan = dn (1 - n^2),  dr = dan bn,  dbn = dan r
               r, z = sigmoid(...):     dar = dbr = dr r (1 - r),  daz = dbz = dz z (1 - z)
               with da = (dar, daz, dan), db = (dbr, dbz, dbn) and m over the leading dimensions,
               dx = da @ weight_ih,         dweight_ih = sum_m da[m] x[m]^T,  dbias_ih = sum_m da[m],
               dh = dout z + db @ weight_hh,  dweight_hh = sum_m db[m] h[m]^T,  dbias_hh = sum_m db[m]
    Recorded:  x, h, r, z, n, bn, weight_ih, weight_hh
    Raises:    ArgumentError; ShapeError, DtypeError; StateError.
    Source:    Cho et al. 2014, arXiv:1406.1078, in the form of torch.nn.GRUCell: r acts after weight_hh.

    Without h the step starts from zeros, and backward returns dx alone.

    >>> cell = GRUCell(3, 4)
    >>> cell(torch.randn(2, 3), torch.zeros(2, 4)).shape
    torch.Size([2, 4])
    >>> dx, dh = cell.backward(torch.randn(2, 4))
    >>> dx.shape, dh.shape
    (torch.Size([2, 3]), torch.Size([2, 4]))
    """

    gates = 3

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        given, (h,) = h is not None, self.start(x, h=h)
        ar, az, an = linear(x, self.weight_ih, self.bias_ih).chunk(3, -1)
        br, bz, bn = linear(h, self.weight_hh, self.bias_hh).chunk(3, -1)
        r, z = torch.sigmoid(ar + br), torch.sigmoid(az + bz)
        n = torch.tanh(an + r * bn)
        out = torch.lerp(n, h, z)  # (1 - z) n + z h
        self.push(x, h, r, z, n, bn, self.weight_ih, self.weight_hh, given, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Any:
        x, h, r, z, n, bn, weight_ih, weight_hh, given = self.pop(dout)
        # out = (1 - z) n + z h
        dn, dz = dout * (1 - z), dout * (h - n)
        # n = tanh(an + r bn)
        dan = dn * (1 - n * n)
        dr, dbn = dan * bn, dan * r
        # r = sigmoid(ar + br),  z = sigmoid(az + bz)
        dar = dbr = dr * r * (1 - r)
        daz = dbz = dz * z * (1 - z)
        # a = x @ weight_ih.T + bias_ih
        da = torch.cat([dar, daz, dan], -1)
        dx = da @ weight_ih if need_dx else None
        self.add_grad(weight_ih, rows(da).t() @ rows(x))
        self.add_grad(self.bias_ih, rows(da).sum(0))
        # b = h @ weight_hh.T + bias_hh
        db = torch.cat([dbr, dbz, dbn], -1)
        dh = dout * z + db @ weight_hh if given else None
        self.add_grad(weight_hh, rows(db).t() @ rows(h))
        self.add_grad(self.bias_hh, rows(db).sum(0))
        return (dx, dh) if given else dx


class LSTMCell(Cell):
    """One step of the long short-term memory.

    Forward:   a = x @ weight_ih.T + bias_ih,  b = h @ weight_hh.T + bias_hh,  (ai, af, ag, ao) = a + b,  in quarters
               i = sigmoid(ai),  f = sigmoid(af),  g = tanh(ag),  o = sigmoid(ao)
               c_out = f c + i g,  u = tanh(c_out),  h_out = o u
    Shapes:    x (..., D); state (h, c) and output (h_out, c_out) of (..., H); weight_ih (4 H, D); weight_hh (4 H, H);
               bias_ih, bias_hh (4 H,)
    Backward:  dout is (dh_out, dc_out), and c_out also acts through h_out:
               h_out = o u:             do = dh_out u,  du = dh_out o
               u = tanh(c_out):         dc_out' = dc_out + du (1 - u^2)
               c_out = f c + i g:       df = dc_out' c,  dc = dc_out' f,  di = dc_out' g,  dg = dc_out' i
               i, f, o = sigmoid(...):  dai = di i (1 - i),  daf = df f (1 - f),  dao = do o (1 - o)
               g = tanh(ag):            dag = dg (1 - g^2)
               with da = db = (dai, daf, dag, dao) and n over the leading dimensions,
               dx = da @ weight_ih,  dweight_ih = sum_n da[n] x[n]^T,  dbias_ih = sum_n da[n],
               dh = db @ weight_hh,  dweight_hh = sum_n db[n] h[n]^T,  dbias_hh = sum_n db[n]
    Recorded:  x, h, c, i, f, g, o, u, weight_ih, weight_hh
    Raises:    ArgumentError; ShapeError, DtypeError; StateError.
    Source:    Hochreiter and Schmidhuber 1997; torch.nn.LSTMCell for parameters and initialisation.

    Without a state the step starts from zeros, and backward returns dx alone.

    >>> cell = LSTMCell(3, 4)
    >>> state = cell(torch.randn(2, 3), (torch.zeros(2, 4), torch.zeros(2, 4)))
    >>> dx, (dh, dc) = cell.backward((torch.randn(2, 4), torch.randn(2, 4)))
    >>> dx.shape, dh.shape, dc.shape
    (torch.Size([2, 3]), torch.Size([2, 4]), torch.Size([2, 4]))
    """

    gates = 4

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        given, (h, c) = state is not None, self.start(x, **pair(self, state))
        a, b = linear(x, self.weight_ih, self.bias_ih), linear(h, self.weight_hh, self.bias_hh)
        ai, af, ag, ao = (a + b).chunk(4, -1)
        i, f, g, o = torch.sigmoid(ai), torch.sigmoid(af), torch.tanh(ag), torch.sigmoid(ao)
        c_out = f * c + i * g
        u = torch.tanh(c_out)
        out = (o * u, c_out)
        self.push(x, h, c, i, f, g, o, u, self.weight_ih, self.weight_hh, given, out=out)
        return out

    def backward(self, dout: tuple[Tensor, Tensor], need_dx: bool = True) -> Any:
        x, h, c, i, f, g, o, u, weight_ih, weight_hh, given = self.pop(dout)
        dh_out, dc_out = dout
        # h_out = o u,  u = tanh(c_out)
        do, du = dh_out * u, dh_out * o
        dc_out = dc_out + du * (1 - u * u)
        # c_out = f c + i g
        df, dc, di, dg = dc_out * c, dc_out * f, dc_out * g, dc_out * i
        # i = sigmoid(ai),  f = sigmoid(af),  g = tanh(ag),  o = sigmoid(ao)
        dai, daf, dag, dao = di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)
        da = db = torch.cat([dai, daf, dag, dao], -1)
        # a = x @ weight_ih.T + bias_ih
        dx = da @ weight_ih if need_dx else None
        self.add_grad(weight_ih, rows(da).t() @ rows(x))
        self.add_grad(self.bias_ih, rows(da).sum(0))
        # b = h @ weight_hh.T + bias_hh
        dh = db @ weight_hh if given else None
        self.add_grad(weight_hh, rows(db).t() @ rows(h))
        self.add_grad(self.bias_hh, rows(db).sum(0))
        return (dx, (dh, dc)) if given else dx


def recurrent_parameters(
    layer: Any,
    gates: int,
    *,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The two weights and the two biases of a recurrent layer, drawn uniformly within 1/sqrt(H)."""
    D, H = layer.input_size, layer.hidden_size

    def draw(*shape: int) -> Tensor:
        bound = 1 / math.sqrt(H)
        return torch.empty(gates * H, *shape, dtype=dtype, device=device).uniform_(-bound, bound, generator=generator)

    weight_ih, weight_hh = draw(D), draw(H)
    return (weight_ih, weight_hh, draw(), draw()) if layer.bias else (weight_ih, weight_hh, None, None)


def check_nonlinearity(name: str, nonlinearity: str) -> None:
    """Raise ArgumentError unless it is one that a plain recurrent net has."""
    if nonlinearity not in ("tanh", "relu"):
        raise ArgumentError(f"{name}: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")


def started(layer: Layer, x: Tensor, wanted: tuple[int, ...], state: dict[str, Tensor | None]) -> list[Tensor]:
    """The tensors of the state, each checked to have the shape wanted and x's dtype; zeros for None."""
    found = []
    for name, t in state.items():
        if t is None:
            t = x.new_zeros(wanted)
        layer.check_input(t, x.dtype, name)
        if tuple(t.shape) != wanted:
            problem = f"{name} must have shape {wanted} for x of shape {tuple(x.shape)}, got {tuple(t.shape)}"
            raise layer.error(ShapeError, "forward", problem)
        found.append(t)
    return found


def pair(layer: Layer, state: Any) -> dict[str, Tensor | None]:
    """The state of an LSTM, (h, c), by name; None for both where there is none."""
    if state is None:
        return {"h": None, "c": None}
    if not isinstance(state, tuple) or len(state) != 2:
        raise layer.error(ShapeError, "forward", f"state must be the tuple (h, c), got {type(state).__name__}")
    return dict(zip("hc", state))
