"""The cells against torch.nn's cells, and Unroll against torch.nn's recurrent layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from handgrad import (
    ArgumentError,
    DtypeError,
    GRUCell,
    Layer,
    Linear,
    LSTMCell,
    RNNCell,
    Sequential,
    ShapeError,
    StateError,
    Unroll,
    parameter,
)
from tests.reference import compare, draw, flat

CELLS = [
    (RNNCell, nn.RNNCell, {}),
    (RNNCell, nn.RNNCell, {"bias": False, "nonlinearity": "relu"}),
    (GRUCell, nn.GRUCell, {}),
    (GRUCell, nn.GRUCell, {"bias": False}),
    (LSTMCell, nn.LSTMCell, {}),
    (LSTMCell, nn.LSTMCell, {"bias": False}),
]


@pytest.mark.parametrize(("kind", "reference", "flags"), CELLS)
@pytest.mark.parametrize(("D", "H"), [(3, 5), (1, 1), (4, 2)])
def test_cells_agree_with_torch(kind, reference, flags, D, H):
    def state(*lead):
        return (draw(*lead, H), draw(*lead, H)) if kind is LSTMCell else draw(*lead, H)

    batches = [(draw(4, D), state(4)), (draw(2, D),), (draw(D), state()), (draw(D),), (draw(1, D) * 5, state(1))]
    compare(kind(D, H, **flags), reference(D, H, **flags), batches)


@pytest.mark.parametrize(("kind", "reference", "flags"), CELLS)
def test_the_same_seed_gives_torchs_weights(kind, reference, flags):
    torch.manual_seed(5)
    layer = kind(3, 5, **flags)
    torch.manual_seed(5)
    state = reference(3, 5, **flags).state_dict()
    assert list(layer.state_dict()) == list(state)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name]), name


SEQUENCES = {RNNCell: nn.RNN, GRUCell: nn.GRU, LSTMCell: nn.LSTM}


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("given", [False, True])
def test_unroll_agrees_with_torch(kind, dim, given):
    reference = SEQUENCES[kind](3, 4, batch_first=dim == 1)

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = reference

        def forward(self, x, state=None):
            if state is None:
                return self.rnn(x)[0]
            add = tuple(s.unsqueeze(0) for s in state) if isinstance(state, tuple) else state.unsqueeze(0)
            out, last = self.rnn(x, add)
            return out, tuple(s.squeeze(0) for s in last) if isinstance(last, tuple) else last.squeeze(0)

    def inputs(N, T):
        x = draw(*((T, N) if dim == 0 else (N, T)), 3)
        state = (draw(N, 4), draw(N, 4)) if kind is LSTMCell else draw(N, 4)
        return (x, state) if given else (x,)

    compare(
        Unroll(kind(3, 4), dim),
        Sequence(),
        [inputs(2, 5), inputs(3, 1), inputs(1, 2)],
        rename=lambda key: key.replace("cell.", "rnn.") + "_l0",
    )


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 9])
def test_truncation_cuts_the_state(kind, steps):
    reference = SEQUENCES[kind](3, 4, batch_first=True)

    class Truncated(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = reference

        def forward(self, x):
            outs, state = [], None
            for piece in x.split(steps, 1):
                if state is not None:
                    state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
                out, state = self.rnn(piece, state)
                outs.append(out)
            return torch.cat(outs, 1)

    compare(
        Unroll(kind(3, 4), steps=steps),
        Truncated(),
        [(draw(2, 7, 3),), (draw(1, 3, 3),)],
        rename=lambda key: key.replace("cell.", "rnn.") + "_l0",
    )


def test_stacked_layers_and_a_head_agree_with_torch():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    def rename(key):
        place, name = key.rsplit(".", 1)
        return {"0.cell": f"rnn.{name}_l0", "1.cell": f"rnn.{name}_l1", "2": f"head.{name}"}[place]

    layer = Sequential(Unroll(GRUCell(3, 4)), Unroll(GRUCell(4, 4)), Linear(4, 2))
    compare(layer, Stack(), [(draw(2, 5, 3),), (draw(3, 2, 3),)], rename)


def test_a_cell_of_ones_own():
    """A leaky integrator: state = decay state + x."""

    class Leaky(Layer):
        decay: Tensor = parameter("D")

        def __init__(self) -> None:
            self.decay = torch.rand(3)

        def forward(self, x, state=None):
            out = x if state is None else self.decay * state + x
            self.push(state, self.decay, out=out)
            return out

        def backward(self, dout):
            state, decay = self.pop(dout)
            if state is None:
                return dout
            self.add_grad(decay, (dout * state).sum(0))
            return dout, dout * decay

    class Reference(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Module()
            self.cell.decay = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            outs = [x[:, 0]]
            for t in range(1, x.shape[1]):
                outs.append(self.cell.decay * outs[-1] + x[:, t])
            return torch.stack(outs, 1)

    layer = Unroll(Leaky())
    compare(layer, Reference(), [(draw(2, 5, 3),), (draw(4, 2, 3),)])
    layer(draw(2, 5, 3))
    assert layer.backward(draw(2, 5, 3), need_dx=False) is None  # though the cell has no need_dx


def draw_state(kind, *shape):
    return (draw(*shape), draw(*shape)) if kind is LSTMCell else draw(*shape)


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("overridden", ["forward", "backward"])
@pytest.mark.parametrize("steps", [None, 2])
def test_a_subclass_with_a_step_of_its_own_is_asked_for_each_step(kind, overridden, steps):
    calls = []

    class Counted(kind):
        pass

    def counted(self, *args, **keywords):
        calls.append(overridden)
        return getattr(kind, overridden)(self, *args, **keywords)

    setattr(Counted, overridden, counted)
    state = draw_state(kind, 2, 4)
    whole, single = Unroll(kind(3, 4), steps=steps).to(torch.float64), Unroll(Counted(3, 4), steps=steps)
    single.to(torch.float64).load_state_dict(whole.state_dict())
    x, results = draw(2, 5, 3), []
    for layer in (whole, single):
        out, last = layer(x, state)
        dx, dstate = layer.backward((torch.cos(out), tuple(map(torch.sin, last)) if kind is LSTMCell else last.sin()))
        results.append([*flat(out), *flat(last), *flat(dx), *flat(dstate), *[p.grad for p in layer.parameters()]])
    torch.testing.assert_close(results[0], results[1])
    assert len(calls) == 5


@pytest.mark.parametrize("kind", SEQUENCES)
def test_time_may_be_the_last_dimension(kind):
    layer = Unroll(kind(3, 4))
    x, dout = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    out = layer(x)
    dx = layer.backward(dout)
    for dim in (-1, 2):
        layer.dim = dim
        assert torch.equal(layer(x.transpose(1, 2)), out.transpose(1, 2))
        assert torch.equal(layer.backward(dout.transpose(1, 2)), dx.transpose(1, 2))


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("changed", ["x", "out", "weight_ih", "weight_hh"])
def test_what_a_sequence_recorded_must_not_change(kind, changed):
    layer, x = Unroll(kind(3, 4)), torch.randn(2, 5, 3)
    out = layer(x)
    {"x": x, "out": out, **dict(layer.cell.named_parameters())}[changed].add_(1)
    with pytest.raises(StateError, match=rf"^in cell \({kind.__name__}.*was changed in place after the forward"):
        layer.backward(torch.randn(2, 5, 4))


@pytest.mark.parametrize("kind", SEQUENCES)
def test_the_states_given_and_returned_may_change(kind):
    layer = Unroll(kind(3, 4)).to(torch.float64)
    x, state = draw(2, 5, 3), draw_state(kind, 2, 4)
    results = []
    for change in (0, 1):
        out, last = layer(x, state)
        dout = (torch.cos(out), tuple(map(torch.sin, last)) if kind is LSTMCell else last.sin())
        for t in flat((state, last)):
            t.add_(change)
        results.append(flat(layer.backward(dout)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_sequence_is_one_record(kind):
    layer = Unroll(kind(3, 4))
    with torch.no_grad():
        layer(torch.randn(2, 5, 3))
    assert layer.pending == 0
    layer(torch.randn(2, 5, 3))
    assert (layer.pending, layer.cell.pending) == (2, 1)


def test_no_dx():
    for kind in SEQUENCES:
        layer = Unroll(kind(3, 4))
        layer(torch.randn(2, 5, 3))
        assert layer.backward(torch.randn(2, 5, 4), need_dx=False) is None
        assert layer.cell.weight_ih.grad is not None


def test_a_cell_asked_for_each_step_is_told_that_nobody_wants_its_dx():
    told = []

    class Told(GRUCell):
        def backward(self, dout, need_dx=True):
            told.append(need_dx)
            return super().backward(dout, need_dx)

    layer = Unroll(Told(3, 4))
    layer(torch.randn(2, 5, 3))
    assert layer.backward(torch.randn(2, 5, 4), need_dx=False) is None
    assert told == [False] * 5
    assert layer.cell.weight_hh.grad is not None


def test_errors_and_repr():
    with pytest.raises(ShapeError, match=r"GRUCell\(3 -> 4\)\.forward: last dimension of x must be 3, got shape"):
        GRUCell(3, 4)(torch.zeros(2, 5))
    with pytest.raises(ShapeError, match=r"h must have shape \(2, 4\) for x of shape \(2, 3\), got \(4,\)"):
        RNNCell(3, 4)(torch.zeros(2, 3), torch.zeros(4))
    with pytest.raises(ShapeError, match=r"c must have shape \(2, 4\) for x of shape \(2, 3\), got \(2, 3\)"):
        LSTMCell(3, 4)(torch.zeros(2, 3), (torch.zeros(2, 4), torch.zeros(2, 3)))
    with pytest.raises(ShapeError, match=r"state must be the tuple \(h, c\), got Tensor"):
        LSTMCell(3, 4)(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(DtypeError, match=r"must have torch\.float32, the dtype of the parameters"):
        GRUCell(3, 4)(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="RNNCell: nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        RNNCell(3, 4, nonlinearity="gelu")
    with pytest.raises(ArgumentError, match="GRUCell: sizes must be at least 1, got 3 -> 0"):
        GRUCell(3, 0)
    with pytest.raises(ShapeError, match=r"x must have at least one time step along dimension 1, got shape"):
        Unroll(GRUCell(3, 4))(torch.zeros(2, 0, 3))
    with pytest.raises(ShapeError, match=r"along dimension 1, got shape \(2,\)"):
        Unroll(GRUCell(3, 4))(torch.zeros(2))
    with pytest.raises(ShapeError, match=r"^in 0\.cell \(GRUCell\(3 -> 4\)\): GRUCell"):
        Sequential(Unroll(GRUCell(3, 4)))(torch.zeros(2, 5, 2))
    with pytest.raises(ArgumentError, match="Unroll: steps must be at least 1, got 0"):
        Unroll(GRUCell(3, 4), steps=0)
    with pytest.raises(ArgumentError, match="Unroll: cell must be a Layer, got int"):
        Unroll(3)
    assert repr(Unroll(RNNCell(3, 4, False, "relu"), 0, steps=5)) == (
        "Unroll(dim=0, steps=5\n  (cell): RNNCell(3 -> 4, bias=False, nonlinearity='relu')\n)"
    )
