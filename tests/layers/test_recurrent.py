"""Unroll and the whole sequences: equal to each other, truncation, state in and out, and what they refuse.

Their gradients against torch.nn are in the cases.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from handgrad import (
    GRU,
    LSTM,
    RNN,
    ArgumentError,
    DtypeError,
    GRUCell,
    Layer,
    LSTMCell,
    RNNCell,
    Sequential,
    ShapeError,
    StateError,
    Unroll,
    parameter,
)

PAIRS = [(RNN, RNNCell), (GRU, GRUCell), (LSTM, LSTMCell)]
SEQUENCES = [RNN, GRU, LSTM]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def flat(value):
    """The tensors of a nested tuple."""
    return [item for part in value for item in flat(part)] if isinstance(value, tuple) else [value]


def state_of(kind, *shape):
    return (draw(*shape), draw(*shape)) if kind in (LSTM, LSTMCell) else draw(*shape)


def like(value):
    """A random dout for an output."""
    return tuple(map(like, value)) if isinstance(value, tuple) else torch.randn_like(value)


@pytest.mark.parametrize(("kind", "cell"), PAIRS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_sequence_equals_its_cell_unrolled(kind, cell, given, return_state, batch_first):
    whole = kind(3, 4, batch_first=batch_first, return_state=return_state).to(torch.float64)
    single = Unroll(cell(3, 4), int(batch_first), return_state=return_state).to(torch.float64)
    single.load_state_dict({f"cell.{key.removesuffix('_l0')}": t for key, t in whole.state_dict().items()})
    inputs = (draw(2, 5, 3) if batch_first else draw(5, 2, 3), *([state_of(kind, 2, 4)] if given else []))
    out, expected = whole(*inputs), single(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    dout = like(out)
    dx, dx_expected = whole.backward(dout), single.backward(dout)
    assert isinstance(dx, tuple) == given
    torch.testing.assert_close(dx, dx_expected, rtol=1e-12, atol=1e-12)
    for (name, p), (_, q) in zip(whole.named_parameters(), single.named_parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", SEQUENCES)
def test_the_state_dict_of_torchs_module_loads(kind):
    reference = getattr(nn, kind.__name__)(3, 4, batch_first=True)
    layer = kind(3, 4, batch_first=True)
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(layer(x), reference(x)[0].detach())
    torch.manual_seed(5)
    ours = kind(3, 4).state_dict()
    torch.manual_seed(5)
    theirs = getattr(nn, kind.__name__)(3, 4).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # the same seed gives torch's weights


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("changed", ["x", "out", "weight_ih_l0", "weight_hh_l0"])
def test_what_a_sequence_recorded_must_not_change(kind, changed):
    layer, x = kind(3, 4), torch.randn(2, 5, 3)
    out = layer(x)
    {"x": x, "out": out, **dict(layer.named_parameters())}[changed].add_(1)
    with pytest.raises(StateError, match=rf"^{kind.__name__}\(3 -> 4\).backward: .*was changed in place after"):
        layer.backward(torch.randn(2, 5, 4))


@pytest.mark.parametrize("kind", SEQUENCES)
def test_the_states_given_and_returned_may_change(kind):
    layer = kind(3, 4, return_state=True).to(torch.float64)
    x, state = draw(5, 2, 3), state_of(kind, 2, 4)
    results = []
    for change in (0, 1):
        out, last = layer(x, state)
        dout = (torch.cos(out), tuple(map(torch.sin, last)) if kind is LSTM else last.sin())
        for t in flat((state, last)):
            t.add_(change)
        results.append(flat(layer.backward(dout)))
        for t in flat(state):
            t.sub_(change)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_sequence_is_one_record(kind):
    layer = kind(3, 4)
    with torch.no_grad():
        layer(torch.randn(5, 2, 3))
    assert layer.pending == 0
    layer(torch.randn(5, 2, 3))
    assert layer.pending == 1


@pytest.mark.parametrize("layer", [*(kind(3, 4) for kind in SEQUENCES), Unroll(GRUCell(3, 4))], ids=repr)
def test_declined_dx_is_not_computed(layer):
    layer(torch.randn(2, 5, 3))
    assert layer.backward(torch.randn(2, 5, 4), need_dx=False) is None
    assert all(p.grad is not None for p in layer.parameters())


def test_what_a_sequence_does_not_have_is_refused_with_the_way_to_compose_it():
    with pytest.raises(ArgumentError, match=r"GRU: one layer .* compose several: Sequential\(GRU\(3, 4\), Dropout"):
        GRU(3, 4, 2)
    with pytest.raises(ArgumentError, match=r"RNN: one layer without dropout"):
        RNN(3, 4, dropout=0.5)
    with pytest.raises(
        ArgumentError, match=r"LSTM: one direction .* compose two: Concat\(LSTM\(...\), Sequential\(flip"
    ):
        LSTM(3, 4, bidirectional=True)
    with pytest.raises(ArgumentError, match="RNN: nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        RNN(3, 4, nonlinearity="gelu")
    with pytest.raises(ArgumentError, match="GRU: input_size must be an int of at least 1, got 0"):
        GRU(0, 4)
    with pytest.raises(TypeError, match="proj_size"):
        LSTM(3, 4, proj_size=2)


def test_a_sequence_refuses_other_shapes():
    with pytest.raises(ShapeError, match=r"x must be \(N, T, 3\) or \(T, 3\), got shape \(2, 5, 4\)"):
        GRU(3, 4, batch_first=True)(torch.zeros(2, 5, 4))
    with pytest.raises(ShapeError, match=r"x must be \(T, N, 3\) or \(T, 3\), got shape \(3,\)"):
        GRU(3, 4)(torch.zeros(3))
    with pytest.raises(ShapeError, match=r"x must have at least one time step, got shape \(0, 2, 3\)"):
        RNN(3, 4)(torch.zeros(0, 2, 3))
    with pytest.raises(ShapeError, match=r"h must have shape \(2, 4\) for x of shape \(5, 2, 3\), got \(1, 2, 4\)"):
        GRU(3, 4)(torch.zeros(5, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(ShapeError, match=r"state must be the tuple \(h, c\), got Tensor"):
        LSTM(3, 4)(torch.zeros(5, 2, 3), torch.zeros(2, 4))
    with pytest.raises(DtypeError, match=r"must have torch\.float32, the dtype of the parameters"):
        LSTM(3, 4)(torch.zeros(5, 2, 3, dtype=torch.float64))
    assert repr(LSTM(3, 4, bias=False, batch_first=True)) == "LSTM(3 -> 4, bias=False, batch_first=True)"


# ---------------------------------------------------------------------- any cell


@pytest.mark.parametrize("cell", [RNNCell, GRUCell, LSTMCell])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 9])
def test_truncation_cuts_the_state(cell, steps):
    """Torch's module runs over pieces of `steps`, its state detached in between."""
    layer = Unroll(cell(3, 4), steps=steps).to(torch.float64)
    reference = {RNNCell: nn.RNN, GRUCell: nn.GRU, LSTMCell: nn.LSTM}[cell](3, 4, batch_first=True).double()
    reference.load_state_dict({f"{k.removeprefix('cell.')}_l0": t for k, t in layer.state_dict().items()})
    x = draw(2, 7, 3)
    leaf, outs, state = x.clone().requires_grad_(), [], None
    for piece in leaf.split(steps, 1):
        if state is not None:
            state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        out, state = reference(piece, state)
        outs.append(out)
    expected, dout = torch.cat(outs, 1), draw(2, 7, 4)
    expected.backward(dout)
    torch.testing.assert_close(layer(x), expected.detach())
    torch.testing.assert_close(layer.backward(dout), leaf.grad)
    for (name, p), q in zip(layer.named_parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")


class Leaky(Layer):
    """A leaky integrator: state = decay state + x. Its backward does not know need_dx."""

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


def test_a_cell_of_ones_own():
    layer, x, dout = Unroll(Leaky()).to(torch.float64), draw(2, 5, 3), draw(2, 5, 3)
    decay, leaf = layer.cell.decay.clone().requires_grad_(), x.clone().requires_grad_()
    states = [leaf[:, 0]]
    for t in range(1, 5):
        states.append(decay * states[-1] + leaf[:, t])
    torch.stack(states, 1).backward(dout)
    torch.testing.assert_close(layer(x), torch.stack(states, 1).detach())
    torch.testing.assert_close(layer.backward(dout), leaf.grad)
    torch.testing.assert_close(layer.cell.decay.grad, decay.grad)
    layer(x)
    assert layer.backward(dout, need_dx=False) is None


def test_a_subclass_of_a_cell_is_asked_for_each_step():
    calls = []

    class Counted(GRUCell):
        def forward(self, x, h=None):
            calls.append("forward")
            return super().forward(x, h)

        def backward(self, dout, need_dx=True):
            calls.append(need_dx)
            return super().backward(dout, need_dx)

    layer = Unroll(Counted(3, 4))
    layer(torch.randn(2, 3, 3))
    layer.backward(torch.randn(2, 3, 4), need_dx=False)
    assert calls == ["forward"] * 3 + [False] * 3


@pytest.mark.parametrize("cell", [RNNCell, GRUCell, LSTMCell])
def test_time_may_be_the_last_dimension(cell):
    layer = Unroll(cell(3, 4))
    x, dout = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    out = layer(x)
    dx = layer.backward(dout)
    for dim in (-1, 2):
        layer.dim = dim
        torch.testing.assert_close(layer(x.transpose(1, 2)), out.transpose(1, 2))
        torch.testing.assert_close(layer.backward(dout.transpose(1, 2)), dx.transpose(1, 2))


def test_unroll_errors_and_repr():
    with pytest.raises(ShapeError, match=r"x must have at least one time step along dimension 1, got shape"):
        Unroll(GRUCell(3, 4))(torch.zeros(2, 0, 3))
    with pytest.raises(ShapeError, match=r"along dimension 1, got shape \(2,\)"):
        Unroll(GRUCell(3, 4))(torch.zeros(2))
    with pytest.raises(ShapeError, match=r"^in 0\.cell \(GRUCell\(3 -> 4\)\): GRUCell"):
        Sequential(Unroll(GRUCell(3, 4)))(torch.zeros(2, 5, 2))
    with pytest.raises(ArgumentError, match="Unroll: steps must be an int of at least 1, got 0"):
        Unroll(GRUCell(3, 4), steps=0)
    with pytest.raises(ArgumentError, match="Unroll: cell must be a Layer, got int"):
        Unroll(3)
    assert repr(Unroll(RNNCell(3, 4, False, "relu"), 0, steps=5)) == (
        "Unroll(dim=0, steps=5\n  (cell): RNNCell(3 -> 4, bias=False, nonlinearity='relu')\n)"
    )
