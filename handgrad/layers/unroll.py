"""A cell run over a sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from handgrad.errors import ArgumentError, ShapeError, locate
from handgrad.layer import Layer


class Unroll(Layer):
    """One cell, applied to every time step in turn, its state handed on from step to step.

    Forward:   state_t = cell(x_t, state_{t-1}),  out_t = state_t, or its first tensor where it is a tuple (an LSTM's h)
               The first step gets no state: cell(x_0), which starts from zeros. With a state given,
               ``unroll(x, state)`` starts from it and returns (out, state_T).
    Shapes:    x (N, T, D) with time along `dim`, by default 1; out (N, T, H) likewise; T at least 1
    Backward:  backpropagation through time: state_t acts through out_t and through the next step, hence from the last
               step to the first, with dstate_T = 0, or the one that is given beside dout,
               (dx_t, dstate_{t-1}) = cell.backward(dstate_t + dout_t)
               Returns dx, or (dx, dstate_0) where a state was given.
               Truncated: with `steps`, state_{t-1} counts as a constant at every t divisible by steps (but the first).
    Recorded:  the number of steps and the shapes of the state; the cell records once a step
    Raises:    ArgumentError for steps below 1; ShapeError for no time step; what the cell raises, "in cell (...)".
    Source:    Werbos 1990, Backpropagation through time; torch.nn.RNN's layout is dim=0, its batch_first dim=1.

    The cell may be any layer whose forward takes (x) and (x, state) and returns the new state, a tensor or a tuple, and
    whose backward returns dx and (dx, dstate) in turn. Only its parameters' gradients grow with the number of steps.

    >>> from handgrad import GRUCell
    >>> layer = Unroll(GRUCell(3, 4))
    >>> layer(torch.randn(2, 7, 3)).shape
    torch.Size([2, 7, 4])
    >>> layer.backward(torch.randn(2, 7, 4)).shape
    torch.Size([2, 7, 3])
    >>> out, state = layer(torch.randn(2, 7, 3), torch.zeros(2, 4))
    >>> bool((out[:, -1] == state).all())
    True
    """

    def __init__(self, cell: Layer, dim: int = 1, *, steps: int | None = None) -> None:
        if not isinstance(cell, Layer):
            raise ArgumentError(f"Unroll: cell must be a Layer, got {type(cell).__name__}")
        if steps is not None and steps < 1:
            raise ArgumentError(f"Unroll: steps must be at least 1, got {steps}")
        self.cell, self.dim, self.steps = cell, dim, steps

    def forward(self, x: Tensor, state: Any = None) -> Any:
        if not isinstance(x, Tensor) or not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] == 0:
            came = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            problem = f"x must have at least one time step along dimension {self.dim}, got {came}"
            raise self.error(ShapeError, "forward", problem)
        given, outs = state is not None, []
        for t, x_t in enumerate(x.unbind(self.dim)):
            if self._cut_before(t):
                state = _detached(state)
            state = self._step(x_t, state)
            outs.append(state[0] if isinstance(state, tuple) else state)
        out = torch.stack(outs, self.dim)
        rest = [s.shape for s in state[1:]] if isinstance(state, tuple) else None  # what out does not show of the state
        self.push(len(outs), given, rest, out=(out, state) if given else out)
        return (out, state) if given else out

    def backward(self, dout: Any, need_dx: bool = True) -> Any:
        T, given, rest = self.pop(dout)
        dout, dstate = dout if given else (dout, None)
        dxs: list[Any] = [None] * T
        for t in range(T - 1, -1, -1):
            # out_t = state_t, and state_t went into the next step
            dstate = _plus(dstate, dout.select(self.dim, t), rest)
            # state_t = cell(x_t, state_{t-1})
            dx_t = self._step_back(dstate, need_dx)
            dxs[t], dstate = dx_t if t > 0 or given else (dx_t, None)
            if self._cut_before(t):
                dstate = None
        dx = torch.stack(dxs, self.dim) if need_dx else None
        return (dx, dstate) if given else dx

    def _cut_before(self, t: int) -> bool:
        return self.steps is not None and t > 0 and t % self.steps == 0

    def _step(self, x_t: Tensor, state: Any) -> Any:
        try:
            return self.cell.forward(x_t) if state is None else self.cell.forward(x_t, state)
        except Exception as error:
            locate(error, "cell", self.cell)
            raise

    def _step_back(self, dstate: Any, need_dx: bool) -> Any:
        try:
            if need_dx or not self.cell.takes_need_dx:
                return self.cell.backward(dstate)
            return self.cell.backward(dstate, need_dx=False)
        except Exception as error:
            locate(error, "cell", self.cell)
            raise

    def __repr__(self) -> str:
        options = ("" if self.dim == 1 else f"dim={self.dim}", "" if self.steps is None else f"steps={self.steps}")
        head = ", ".join(filter(None, options))
        return f"Unroll({head}\n  (cell): " + repr(self.cell).replace("\n", "\n  ") + "\n)"


def _detached(state: Any) -> Any:
    return tuple([s.detach() for s in state]) if isinstance(state, tuple) else state.detach()


def _plus(dstate: Any, dout_t: Tensor, rest: list[torch.Size] | None) -> Any:
    """Dstate with dout_t added to its tensor, or to the first of its tuple; None stands for zeros."""
    if rest is None:
        return dout_t if dstate is None else dstate + dout_t
    if dstate is None:
        return (dout_t, *[dout_t.new_zeros(shape) for shape in rest])
    return (dstate[0] + dout_t, *dstate[1:])
