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
    Recorded:  the number of steps and the shapes of the state; the cell records its steps
    Raises:    ArgumentError for steps below 1; ShapeError for no time step; what the cell raises, "in cell (...)".
    Source:    Werbos 1990, Backpropagation through time; torch.nn.RNN's layout is dim=0, its batch_first dim=1.

    The cell may be any layer whose forward takes (x) and (x, state) and returns the new state, a tensor or a tuple, and
    whose backward returns dx and (dx, dstate) in turn. A cell can do better with many steps at hand than one by one, as
    RNNCell, GRUCell and LSTMCell do, if its class defines beside forward and backward
    ``scan(x, state) -> (out, state_T)``, with x (T, N, D), out (T, N, H), None for the state to start from zeros, and
    ``scan_backward(dout, dstate_T) -> (dx, dstate_0)``, with need_dx if its backward has it.

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
        x, given = x.movedim(self.dim, 0), state is not None  # x (T, N, D)
        outs: list[Tensor] = []
        T, steps = len(x), self.steps or len(x)
        try:
            for piece in torch.split(x, steps):
                out, state = _scan(self.cell, piece, _detached(state) if outs else state)
                outs.append(out)
        except Exception as error:
            locate(error, "cell", self.cell)
            raise
        out = _joined(outs).movedim(0, self.dim)
        rest = [s.shape for s in state[1:]] if isinstance(state, tuple) else None  # what out does not show of the state
        self.push(T, steps, given, rest, out=(out, state) if given else out)
        return (out, state) if given else out

    def backward(self, dout: Any, need_dx: bool = True) -> Any:
        T, steps, given, rest = self.pop(dout)
        dout, dstate = dout if given else (dout, None)
        dout, dxs = dout.movedim(self.dim, 0), []  # dout (T, N, H)
        options = {} if need_dx or not self.cell.takes_need_dx else {"need_dx": False}
        try:
            for start in range((T - 1) // steps * steps, -1, -steps):
                after = _zeros(dout[0], rest) if dstate is None else dstate
                piece = dout[start : start + steps]
                dx, dstate = _scan_backward(self.cell, piece, after, given or start > 0, options)
                dstate = dstate if start == 0 else None  # cut
                dxs.append(dx)
        except Exception as error:
            locate(error, "cell", self.cell)
            raise
        dx = _joined(dxs[::-1]).movedim(0, self.dim) if need_dx else None
        return (dx, dstate) if given else dx

    def __repr__(self) -> str:
        options = ("" if self.dim == 1 else f"dim={self.dim}", "" if self.steps is None else f"steps={self.steps}")
        head = ", ".join(filter(None, options))
        return f"Unroll({head}\n  (cell): " + repr(self.cell).replace("\n", "\n  ") + "\n)"


def _scan(cell: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The steps of x (T, N, D): out (T, N, H) and the last state, by the cell's scan or one by one."""
    if _has_scan(cell):
        out, state = cell.scan(x, state)
        return out, state
    outs = []
    for x_t in x.unbind():
        state = cell.forward(x_t) if state is None else cell.forward(x_t, state)
        outs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outs), state


def _scan_backward(cell: Any, dout: Tensor, dstate: Any, given: bool, options: dict[str, bool]) -> tuple[Any, Any]:
    """Dx of the latest scan and the gradient of its first state, which is of no use if none was given."""
    if _has_scan(cell):
        dx, dstate = cell.scan_backward(dout, dstate, **options)
        return dx, dstate
    dxs = []
    for t in range(len(dout) - 1, -1, -1):
        # out_t = state_t, and state_t went into the next step
        dstate = (dstate[0] + dout[t], *dstate[1:]) if isinstance(dstate, tuple) else dstate + dout[t]
        # state_t = cell(x_t, state_{t-1})
        dx_t = cell.backward(dstate, **options)
        dx_t, dstate = dx_t if given or t > 0 else (dx_t, None)
        dxs.append(dx_t)
    return None if options else torch.stack(dxs[::-1]), dstate


def _has_scan(cell: Layer) -> bool:
    """Whether the class that defines the cell's steps defines its scan; a subclass may redefine the steps alone."""
    owner = next(c for c in type(cell).__mro__ if vars(c).keys() & {"forward", "backward", "scan"})
    return "scan" in vars(owner)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _detached(state: Any) -> Any:
    return tuple([s.detach() for s in state]) if isinstance(state, tuple) else state.detach()


def _zeros(dout_t: Tensor, rest: list[torch.Size] | None) -> Any:
    """The gradient of a last state that went nowhere but out."""
    zeros = torch.zeros_like(dout_t)
    return zeros if rest is None else (zeros, *[zeros.new_zeros(shape) for shape in rest])
