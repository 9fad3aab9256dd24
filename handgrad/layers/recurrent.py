"""Recurrence over a sequence: `Unroll` runs any cell step by step; `RNN`, `GRU` and `LSTM` are whole layers, and fast.

What makes them fast: one matrix product for the inputs of all steps, and in backward one for each gradient. Only what
needs the step before goes step by step: b = h @ weight_hh.T + bias_hh and the new state; in backward db @ weight_hh.
All that forward alone determines (the slopes sr, sz, ... below) is computed for all steps at once.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from handgrad.arguments import integer, number
from handgrad.errors import ArgumentError, ShapeError
from handgrad.layer import Layer, parameter
from handgrad.layers.cells import check_nonlinearity, pair, recurrent_parameters, started
from handgrad.layers.linear import rows


class Unroll(Layer):
    """One cell, applied to every time step after the other, its state handed on from step to step.

    Forward:   state_t = cell(x_t, state_{t-1}),  out_t = state_t, or its first tensor where it is a tuple (an LSTM's h)
               The first step gets no state: cell(x_0), which starts from zeros. With a state given,
               ``unroll(x, state)`` starts from it. With `return_state` the result is (out, state_T).
    Shapes:    x (N, T, D) with time along `dim`, by default 1; out (N, T, H) likewise; T at least 1
    Backward:  backpropagation through time: state_t acts through out_t and through the next step, hence from the last
               step to the first, with dstate_T = 0, or the one that is given beside dout,
               (dx_t, dstate_{t-1}) = cell.backward(dstate_t + dout_t)
               Returns dx, or (dx, dstate_0) where a state was given.
               Truncated: with `steps`, state_{t-1} counts as a constant at every t divisible by steps (but the first).
    Recorded:  the number of steps and the state's last; the cell records its steps
    Raises:    ArgumentError for steps below 1; ShapeError for no time step; what the cell raises, "in cell (...)".
    Source:    Werbos 1990, Backpropagation through time; torch.nn.RNN's layout is dim=0, its batch_first dim=1.

    The cell may be any layer whose forward takes (x) and (x, state) and returns the new state, a tensor or a tuple, and
    whose backward returns dx or (dx, dstate), respectively.

    >>> from handgrad import GRUCell
    >>> layer = Unroll(GRUCell(3, 4), return_state=True)
    >>> out, state = layer(torch.randn(2, 7, 3))
    >>> out.shape, bool((out[:, -1] == state).all())
    (torch.Size([2, 7, 4]), True)
    >>> layer.backward((torch.randn(2, 7, 4), torch.zeros(2, 4))).shape
    torch.Size([2, 7, 3])
    """

    def __init__(self, cell: Layer, dim: int = 1, *, steps: int | None = None, return_state: bool = False) -> None:
        if not isinstance(cell, Layer):
            raise ArgumentError(f"Unroll: cell must be a Layer, got {type(cell).__name__}")
        self.cell, self.dim, self.return_state = cell, integer(self, "dim", dim, None), return_state
        self.steps = None if steps is None else integer(self, "steps", steps)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        if not isinstance(x, Tensor) or not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] == 0:
            came = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            problem = f"x must have at least one time step along dimension {self.dim}, got {came}"
            raise self.error(ShapeError, "forward", problem)
        given, outs = state is not None, []
        for t, x_t in enumerate(x.unbind(self.dim)):
            if t and self.steps and t % self.steps == 0:
                state = _each(Tensor.detach, state)
            state = self.cell.forward_at("cell", x_t if state is None else (x_t, state))
            outs.append(state[0] if isinstance(state, tuple) else state)
        out = torch.stack(outs, self.dim)
        last = _each(Tensor.size, state)
        self.push(last, given, self.return_state, out=(out, state) if self.return_state else out)
        return (out, state) if self.return_state else out

    def backward(self, dout: Any, need_dx: bool = True) -> Any:
        last, given, returned = self.pop(dout)
        dout, dstate = dout if returned else (dout, _each(dout.new_zeros, last))
        dxs: list[Any] = []
        for t in reversed(range(dout.shape[self.dim])):
            # out_t = state_t, and state_t went into the next step
            dout_t = dout.select(self.dim, t)
            dstate = (dstate[0] + dout_t, *dstate[1:]) if isinstance(dstate, tuple) else dstate + dout_t
            # state_t = cell(x_t, state_{t-1})
            dx_t = self.cell.backward_at("cell", dstate, need_dx)
            dx_t, dstate = dx_t if given or t else (dx_t, None)
            if t and self.steps and t % self.steps == 0:
                dstate = _each(torch.zeros_like, dstate)  # cut
            dxs.append(dx_t)
        dx = torch.stack(dxs[::-1], self.dim) if need_dx else None
        return (dx, dstate) if given else dx


def _each(function: Any, state: Any) -> Any:
    """The function of a state, or of each tensor in one that is a tuple."""
    return tuple([function(s) for s in state]) if type(state) is tuple else function(state)


class Recurrent(Layer):
    """What RNN, GRU and LSTM share: parameters under torch.nn's names, and the checks of what they are given."""

    gates: ClassVar[int] = 1
    shown = ("input_size", "hidden_size")

    weight_ih_l0: Tensor = parameter("G*H", "D")
    weight_hh_l0: Tensor = parameter("G*H", "H")
    bias_ih_l0: Tensor | None = parameter("G*H")
    bias_hh_l0: Tensor | None = parameter("G*H")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        *,
        dropout: float = 0.0,
        bidirectional: bool = False,
        return_state: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        kind = type(self).__name__
        if integer(self, "num_layers", num_layers) != 1 or number(self, "dropout", dropout, 0, 1):
            how = f"Sequential({kind}({input_size}, {hidden_size}), Dropout(p), {kind}({hidden_size}, {hidden_size}))"
            raise ArgumentError(f"{kind}: one layer without dropout is what it has; compose several: {how}")
        if bidirectional:
            how = (
                f"Concat({kind}(...), Sequential(flip, {kind}(...), flip), dim=-1), flip a layer that turns time round"
            )
            raise ArgumentError(f"{kind}: one direction is what it has; compose two: {how}")
        self.input_size = integer(self, "input_size", input_size)
        self.hidden_size, self.bias = integer(self, "hidden_size", hidden_size), bias
        self.batch_first, self.return_state = batch_first, return_state
        self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0 = recurrent_parameters(
            self, self.gates, generator=generator, dtype=dtype, device=device
        )

    def start(self, x: Tensor, **state: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Check x and the state before its first step; x as (T, N, D), or (T, D), and the state, zeros if not given."""
        self.check_input(x, self.weight_ih_l0.dtype)
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            form = f"(N, T, {self.input_size})" if self.batch_first else f"(T, N, {self.input_size})"
            raise self.error(
                ShapeError, "forward", f"x must be {form} or (T, {self.input_size}), got shape {tuple(x.shape)}"
            )
        by_step = self.by_step(x).contiguous()
        if len(by_step) == 0:
            raise self.error(ShapeError, "forward", f"x must have at least one time step, got shape {tuple(x.shape)}")
        return by_step, started(self, x, (*by_step.shape[1:-1], self.hidden_size), state)

    def by_step(self, x: Tensor) -> Tensor:
        """Time first, or back again: its own inverse."""
        return x.transpose(0, 1) if self.batch_first and x.dim() == 3 else x

    def add_grads(self, x: Tensor, h: Tensor, da: Tensor, db: Tensor) -> None:
        """Add the parameters' gradients; a is x @ weight_ih_l0.T + bias_ih_l0, b the same of h, all of all steps."""
        self.add_grad(self.weight_ih_l0, rows(da).t() @ rows(x))
        self.add_grad(self.weight_hh_l0, rows(db).t() @ rows(h))
        if self.bias:
            self.add_grad(self.bias_ih_l0, rows(da).sum(0))
            self.add_grad(self.bias_hh_l0, rows(db).sum(0))


class RNN(Recurrent):
    """The plain recurrent net over a sequence.

    Forward:   for t = 0 .. T - 1:  a_t = x_t @ weight_ih_l0.T + bias_ih_l0,  b_t = h_t @ weight_hh_l0.T + bias_hh_l0,
               h_{t+1} = tanh(a_t + b_t), or relu;  out_t = h_{t+1};  h_0 given, or zeros
    Shapes:    x (T, N, D), or (N, T, D) if `batch_first`, or (T, D); h_0, h_T (N, H); out (T, N, H) likewise;
               weight_ih_l0 (H, D); weight_hh_l0 (H, H); bias_ih_l0, bias_hh_l0 (H,)
    Backward:  h_{t+1} acts through out_t and through step t + 1. From the last step to the first,
               dh_{t+1} = dout_t + db_{t+1} @ weight_hh_l0, with dh_T = dout_{T-1} + the dstate given, if any,
               da_t = db_t = dh_{t+1} s_t,  s = 1 - out^2, or [out > 0] for relu;  and with sums over all t and n
               dx = da @ weight_ih_l0,  dweight_ih_l0 = sum da x^T,  dbias_ih_l0 = sum da,
               dh_0 = db_0 @ weight_hh_l0,  dweight_hh_l0 = sum db h^T,  dbias_hh_l0 = sum db
    Recorded:  x, h of all steps, weight_ih_l0, weight_hh_l0
    Raises:    ArgumentError for what torch.nn.RNN has beyond one layer in one direction; ShapeError, DtypeError.
    Source:    Elman 1990; torch.nn.RNN for parameters and initialisation.

    ``rnn(x)`` or ``rnn(x, h)`` gives out, or (out, h_T) if `return_state`; backward takes a dout like that, and returns
    dx, or (dx, dh_0) where h was given.

    >>> layer = RNN(3, 4, batch_first=True)
    >>> layer(torch.randn(2, 7, 3)).shape, layer.backward(torch.randn(2, 7, 4)).shape
    (torch.Size([2, 7, 4]), torch.Size([2, 7, 3]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        **options: Any,
    ) -> None:
        check_nonlinearity("RNN", nonlinearity)
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, **options)
        self.nonlinearity = nonlinearity

    def forward(self, x: Tensor, h: Tensor | None = None) -> Any:
        given, (x, hs) = h is not None, self.start(x, h=h)  # x (T, N, D)
        weight_ih, weight_hh, tanh = self.weight_ih_l0, self.weight_hh_l0, self.nonlinearity == "tanh"
        by_columns = weight_hh.t().contiguous().t()  # laid out as a small product reads it fastest
        for a in linear(x, weight_ih, self.bias_ih_l0).unbind():
            ab = a + linear(hs[-1], by_columns, self.bias_hh_l0)
            hs.append(torch.tanh(ab) if tanh else torch.relu(ab))
        h = torch.stack(hs)  # (T + 1, N, H)
        out = self.by_step(h[1:])
        result = (out, hs[-1]) if self.return_state else out
        self.push(x, h, weight_ih, weight_hh, given, self.return_state, out=result)
        return result

    def backward(self, dout: Any, need_dx: bool = True) -> Any:
        x, h, weight_ih, weight_hh, given, returned = self.pop(dout)
        dout, dh = dout if returned else (dout, 0)
        # h_{t+1} = tanh(a_t + b_t), or relu
        tanh = self.nonlinearity == "tanh"
        s = 1 - h[1:] * h[1:] if tanh else h[1:] > 0
        das = []
        for dout_t, s_t in zip(reversed(self.by_step(dout).unbind()), reversed(s.unbind())):
            dh = dout_t + dh
            das.append(dh * s_t if tanh else dh.where(s_t, 0))
            dh = das[-1] @ weight_hh
        da = torch.stack(das[::-1])
        self.add_grads(x, h[:-1], da, da)
        dx = self.by_step(da @ weight_ih) if need_dx else None
        return (dx, dh) if given else dx


class GRU(Recurrent):
    """The gated recurrent unit over a sequence.

    Forward:   for t = 0 .. T - 1, the thirds of a_t = x_t @ weight_ih_l0.T + bias_ih_l0 being ar, az, an,
               and those of b_t = h_t @ weight_hh_l0.T + bias_hh_l0 being br, bz, bn,
               r = sigmoid(ar + br),  z = sigmoid(az + bz),  n = tanh(an + r bn),  h_{t+1} = (1 - z) n + z h_t
               out_t = h_{t+1};  h_0 given, or zeros
    Shapes:    x (T, N, D), or (N, T, D) if `batch_first`, or (T, D); h_0, h_T (N, H); out (T, N, H) likewise;
               weight_ih_l0 (3 H, D); weight_hh_l0 (3 H, H); bias_ih_l0, bias_hh_l0 (3 H,)
    Backward:  as in GRUCell, h_{t+1} has the slopes
               sn = (1 - z) (1 - n^2) by an,  sn r by bn,  sr = sn bn r (1 - r) by ar and br,
               sz = (h_t - n) z (1 - z) by az and bz,  and z by h_t itself.
               It acts through out_t and through step t + 1. From the last step to the first,
               dh_{t+1} = dout_t + dh_{t+2} z_{t+1} + db_{t+1} @ weight_hh_l0, beginning with the dstate given, if any,
               db_t = dh_{t+1} (sr, sz, sn r),  da_t = dh_{t+1} (sr, sz, sn);  and with sums over all t and n
               dx = da @ weight_ih_l0,  dweight_ih_l0 = sum da x^T,  dbias_ih_l0 = sum da,
               dweight_hh_l0 = sum db h^T,  dbias_hh_l0 = sum db
    Recorded:  x, h, (r, z), n, bn of all steps, weight_ih_l0, weight_hh_l0
    Raises:    ArgumentError for what torch.nn.GRU has beyond one layer in one direction; ShapeError, DtypeError.
    Source:    Cho et al. 2014, arXiv:1406.1078; torch.nn.GRU for parameters and initialisation.

    ``gru(x)`` or ``gru(x, h)`` gives out, or (out, h_T) if `return_state`; backward takes a dout like that, and returns
    dx, or (dx, dh_0) where h was given.

    >>> layer = GRU(3, 4, batch_first=True)
    >>> layer(torch.randn(2, 7, 3)).shape, layer.backward(torch.randn(2, 7, 4)).shape
    (torch.Size([2, 7, 4]), torch.Size([2, 7, 3]))
    """

    gates = 3

    def forward(self, x: Tensor, h: Tensor | None = None) -> Any:
        given, (x, hs) = h is not None, self.start(x, h=h)  # x (T, N, D)
        H, weight_ih, weight_hh = self.hidden_size, self.weight_ih_l0, self.weight_hh_l0
        by_columns = weight_hh.t().contiguous().t()  # laid out as a small product reads it fastest
        a_rz, a_n = linear(x, weight_ih, self.bias_ih_l0).split_with_sizes([2 * H, H], -1)
        rzs, ns, bns = [], [], []
        for arz, an in zip(a_rz.unbind(), a_n.unbind()):
            brz, bn = linear(hs[-1], by_columns, self.bias_hh_l0).split_with_sizes([2 * H, H], -1)
            rz = torch.sigmoid(arz + brz)
            r, z = rz.chunk(2, -1)
            n = torch.tanh(torch.addcmul(an, r, bn))
            hs.append(torch.lerp(n, hs[-1], z))  # (1 - z) n + z h
            rzs.append(rz)
            ns.append(n)
            bns.append(bn)
        h, rz, n, bn = map(torch.stack, (hs, rzs, ns, bns))  # h (T + 1, N, H), the others (T, N, ...)
        out = self.by_step(h[1:])
        result = (out, hs[-1]) if self.return_state else out
        self.push(x, h, rz, n, bn, weight_ih, weight_hh, given, self.return_state, out=result)
        return result

    def backward(self, dout: Any, need_dx: bool = True) -> Any:
        x, h, rz, n, bn, weight_ih, weight_hh, given, returned = self.pop(dout)
        dout, dh = dout if returned else (dout, torch.zeros_like(h[0]))
        r, z = rz.chunk(2, -1)
        # h_{t+1} = (1 - z) n + z h_t,  n = tanh(an + r bn),  r = sigmoid(ar + br),  z = sigmoid(az + bz)
        sn = (1 - z) * (1 - n * n)
        sr = sn * bn * r * (1 - r)
        sz = (h[:-1] - n) * z * (1 - z)
        s = torch.stack([sr, sz, sn * r], -2)  # (T, N, 3, H)
        dhs = []
        for dout_t, s_t, z_t in zip(*[reversed(t.unbind()) for t in (self.by_step(dout), s, z)]):
            dhs.append(dout_t + dh)
            db_t = (dhs[-1].unsqueeze(-2) * s_t).flatten(-2)
            dh = torch.addcmul(db_t @ weight_hh, dhs[-1], z_t)
        dh_all = torch.stack(dhs[::-1])  # by all steps at once, which costs less than to stack db_t and da_t
        db = (dh_all.unsqueeze(-2) * s).flatten(-2)
        da = torch.cat([db[..., : 2 * self.hidden_size], dh_all * sn], -1)
        self.add_grads(x, h[:-1], da, db)
        dx = self.by_step(da @ weight_ih) if need_dx else None
        return (dx, dh) if given else dx


class LSTM(Recurrent):
    """The long short-term memory over a sequence.

    Forward:   for t = 0 .. T - 1, with the quarters (ai, af, ag, ao) of
               x_t @ weight_ih_l0.T + bias_ih_l0 + h_t @ weight_hh_l0.T + bias_hh_l0,
               i = sigmoid(ai),  f = sigmoid(af),  g = tanh(ag),  o = sigmoid(ao)
               c_{t+1} = f c_t + i g,  u = tanh(c_{t+1}),  h_{t+1} = o u
               out_t = h_{t+1};  (h_0, c_0) given, or zeros
    Shapes:    x (T, N, D), or (N, T, D) if `batch_first`, or (T, D); h_0, c_0, h_T, c_T (N, H); out (T, N, H) likewise;
               weight_ih_l0 (4 H, D); weight_hh_l0 (4 H, H); bias_ih_l0, bias_hh_l0 (4 H,)
    Backward:  as in LSTMCell, c_{t+1} has the slopes
               si = g i (1 - i) by ai,  sf = c_t f (1 - f) by af,  sg = i (1 - g^2) by ag,  and f by c_t;
               h_{t+1} has so = u o (1 - o) by ao,  and su = o (1 - u^2) by c_{t+1}.
               h_{t+1} acts through out_t and through step t + 1. From the last step to the first,
               dh_{t+1} = dout_t + da_{t+1} @ weight_hh_l0,  dc_{t+1} = dc_{t+2} f_{t+1} + dh_{t+1} su_t,
               beginning with the dstate given, if any,
               da_t = (dc_{t+1} (si, sf, sg), dh_{t+1} so);  and with sums over all t and n
               dx = da @ weight_ih_l0,  dweight_ih_l0 = sum da x^T,  dweight_hh_l0 = sum da h^T,
               dbias_ih_l0 = dbias_hh_l0 = sum da
    Recorded:  x, h, c, (i, f), g, o, u of all steps, weight_ih_l0, weight_hh_l0
    Raises:    ArgumentError for what torch.nn.LSTM has beyond one layer in one direction; ShapeError, DtypeError.
    Source:    Hochreiter and Schmidhuber 1997; torch.nn.LSTM for parameters and initialisation.

    ``lstm(x)`` or ``lstm(x, (h, c))`` gives out, or (out, (h_T, c_T)) if `return_state`; backward takes a dout like
    that, and returns dx, or (dx, (dh_0, dc_0)) where a state was given.

    >>> layer = LSTM(3, 4, batch_first=True, return_state=True)
    >>> out, (h, c) = layer(torch.randn(2, 7, 3))
    >>> out.shape, h.shape, layer.backward((torch.randn(2, 7, 4), (torch.randn(2, 4), torch.randn(2, 4)))).shape
    (torch.Size([2, 7, 4]), torch.Size([2, 4]), torch.Size([2, 7, 3]))
    """

    gates = 4

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Any:
        given, (x, (h_0, c_0)) = state is not None, self.start(x, **pair(self, state))  # x (T, N, D)
        H, weight_ih, weight_hh = self.hidden_size, self.weight_ih_l0, self.weight_hh_l0
        by_columns = weight_hh.t().contiguous().t()  # laid out as a small product reads it fastest
        hs, cs, i_fs, gs, os, us = [h_0], [c_0], [], [], [], []
        for a in linear(x, weight_ih, self.bias_ih_l0).unbind():
            aif, ag, ao = (a + linear(hs[-1], by_columns, self.bias_hh_l0)).split_with_sizes([2 * H, H, H], -1)
            i_f, g, o = torch.sigmoid(aif), torch.tanh(ag), torch.sigmoid(ao)
            i, f = i_f.chunk(2, -1)
            cs.append(torch.addcmul(f * cs[-1], i, g))
            us.append(torch.tanh(cs[-1]))
            hs.append(o * us[-1])
            i_fs.append(i_f)
            gs.append(g)
            os.append(o)
        h, c, i_f, g, o, u = map(torch.stack, (hs, cs, i_fs, gs, os, us))  # h, c (T + 1, N, H), the others (T, N, ...)
        out = self.by_step(h[1:])
        result = (out, (hs[-1], cs[-1])) if self.return_state else out
        self.push(x, h, c, i_f, g, o, u, weight_ih, weight_hh, given, self.return_state, out=result)
        return result

    def backward(self, dout: Any, need_dx: bool = True) -> Any:
        x, h, c, i_f, g, o, u, weight_ih, weight_hh, given, returned = self.pop(dout)
        dout, (dh, dc) = dout if returned else (dout, torch.zeros_like(h[:2]).unbind())
        i, f = i_f.chunk(2, -1)
        # c_{t+1} = f c_t + i g,  i = sigmoid(ai),  f = sigmoid(af),  g = tanh(ag)
        si, sf, sg = g * i * (1 - i), c[:-1] * f * (1 - f), i * (1 - g * g)
        # h_{t+1} = o u,  u = tanh(c_{t+1}),  o = sigmoid(ao)
        so, su = u * o * (1 - o), o * (1 - u * u)
        sc = torch.stack([si, sf, sg], -2)  # (T, N, 3, H)
        das = []
        for dout_t, sc_t, so_t, su_t, f_t in zip(*[reversed(t.unbind()) for t in (self.by_step(dout), sc, so, su, f)]):
            dh = dout_t + dh
            dc = torch.addcmul(dc, dh, su_t)
            das.append(torch.cat([(dc.unsqueeze(-2) * sc_t).flatten(-2), dh * so_t], -1))
            dh, dc = das[-1] @ weight_hh, dc * f_t
        da = torch.stack(das[::-1])
        self.add_grads(x, h[:-1], da, da)
        dx = self.by_step(da @ weight_ih) if need_dx else None
        return (dx, (dh, dc)) if given else dx
