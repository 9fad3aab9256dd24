"""Graph: what it refuses, how it shows its flow, unused outputs, shared layers; its gradients are in the cases."""

from __future__ import annotations

import copy

import pytest
import torch

from handgrad import (
    GRU,
    LSTM,
    SGD,
    Add,
    ArgumentError,
    BatchNorm1d,
    Cat,
    Constant,
    CrossEntropy,
    DtypeError,
    Embedding,
    Flatten,
    Graph,
    Linear,
    Multiply,
    Parallel,
    Sequential,
    ShapeError,
    Tanh,
    TrainStep,
)
from tests.versions import COMPILES


def of(**nodes):
    """A graph of one input x and one output, the last node."""
    return Graph("x", list(nodes)[-1], **nodes)


WRONG = [
    (
        lambda: Graph("a, b", "y", y=(Add(), "a b")),
        "Graph: a name must be an identifier, names stand apart by spaces alone, got 'a,'",
    ),
    (
        lambda: Graph(["a"], "y", y=(Tanh(), "a")),
        "Graph: inputs and outputs must be names with spaces between, got ['a'] and 'y'",
    ),
    (lambda: of(y=(Tanh(), "z")), "Graph: node 'y' reads 'z', which is neither an input nor a node; there are x, y"),
    (
        lambda: Graph("x", "y", y=(Tanh(), "h"), h=(Tanh(), "x")),
        "Graph: node 'y' reads 'h', which is not there yet; write 'h' before it",
    ),
    (lambda: of(y=(Tanh(), "y")), "Graph: node 'y' reads 'y', which is not there yet; write 'y' before it"),
    (
        lambda: Graph("x x", "y", y=(Tanh(), "x")),
        "Graph: the name 'x' is used twice, for inputs or nodes; each needs its own",
    ),
    (lambda: of(x=(Tanh(), "x")), "Graph: the name 'x' is used twice, for inputs or nodes; each needs its own"),
    (
        lambda: Graph("x t", "y", y=(Tanh(), "x")),
        "Graph: nothing that leads to the result reads the input 't'; leave it out",
    ),
    (
        lambda: Graph("x", "y", y=(Tanh(), "x"), z=(Tanh(), "y")),
        "Graph: nothing that leads to the result reads the node 'z'; leave it out",
    ),
    (
        lambda: Graph("x", "y", y=(Tanh(), "x"), a=(Tanh(), "y"), b=(Tanh(), "a")),
        "Graph: nothing that leads to the result reads the node 'a'; leave it out",
    ),
    (
        lambda: Graph("x", "z", y=(Tanh(), "x")),
        "Graph: the result reads 'z', which is neither an input nor a node; there are x, y",
    ),
    (lambda: of(y=(Tanh(), "x.first")), "Graph: node 'y' reads 'x.first'; a part is a number, as in 'x.0'"),
    (lambda: of(y=(Tanh(), " ")), "Graph: node 'y' reads nothing; name an input or an earlier node"),
    (lambda: of(y=Tanh()), "Graph: node 'y' must be (layer, \"names of what it reads\"), got Tanh()"),
    (lambda: of(y=(torch.tanh, "x")), "Graph: node 'y' must be (layer, \"names of what it reads\"), got (<built-in"),
    (
        lambda: Graph("", "y", y=(Tanh(), "x")),
        "Graph: inputs and outputs must be names with spaces between, got ''",
    ),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_graph_that_cannot_be_is_refused_by_the_name_of_the_node(make, message):
    with pytest.raises(ArgumentError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_what_cannot_be_read_is_refused_in_forward():
    with pytest.raises(ShapeError, match=r"^Graph\(x -> y\)\.forward: y reads x\.1, but x is a Tensor$"):
        of(y=(Tanh(), "x.1"))(torch.zeros(2))
    with pytest.raises(ShapeError, match=r"takes 2 inputs, a, b, one by one or as a tuple, got a list"):
        Graph("a b", "y", y=(Add(), "a b"))([torch.zeros(1)] * 2)
    with pytest.raises(ArgumentError, match=r"Graph: there is no node 'z'; there are y"):
        of(y=(Tanh(), "x"))["z"]
    graph = of(s=(GRU(2, 3, return_state=True), "x"), y=(Tanh(), "s.2"))
    with pytest.raises(ShapeError, match=r"y reads s\.2, but s is a tuple of 2"):
        graph(torch.zeros(4, 1, 2))
    with pytest.raises(ShapeError, match=r"takes 2 inputs, a, b, one by one or as a tuple, got 3"):
        Graph("a b", "y", y=(Add(), "a b"))(*[torch.zeros(1)] * 3)
    with pytest.raises(ShapeError, match=r"^in y \(Linear\(4 -> 5\)\): Linear\(4 -> 5\)\.forward: last dimension"):
        of(h=(Linear(2, 3), "x"), y=(Linear(4, 5), "h"))(torch.zeros(1, 2))
    with pytest.raises(ShapeError, match=r"in y \(GRU\(2 -> 3\)\): GRU\(2 -> 3\)\.forward: takes 1 to 2 inputs"):
        Graph("a b c", "y", y=(GRU(2, 3), "a b c"))(*[torch.zeros(4, 1, 2)] * 3)
    with pytest.raises(ShapeError, match=r"in y \(Add\(\)\): Add\(\)\.forward: x\[0\] and x\[1\] must have one shape"):
        Graph("a b", "y", y=(Add(), "a b"))(torch.zeros(2), torch.zeros(3))
    with pytest.raises(DtypeError, match=r"x\[0\] and x\[1\] must have one dtype"):
        Multiply()(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"x\[0\] and x\[1\] must have one shape apart from dimension 1"):
        Cat(1)(torch.zeros(2, 1), torch.zeros(3, 1))


def test_nodes_may_be_called_inputs_and_outputs():
    graph = Graph("x", "outputs", inputs=(Tanh(), "x"), self=(Tanh(), "inputs"), outputs=(Add(), "inputs self"))
    x = torch.randn(3)
    torch.testing.assert_close(graph(x), x.tanh() + x.tanh().tanh())


def test_repr_shows_the_flow_one_node_a_line_and_keys_are_the_names_of_nodes():
    graph = Graph("x t", "out aux", h=(Linear(2, 3), "x"), s=(Add(), "h t"), out=(Tanh(), "s"), aux=(Linear(3, 1), "s"))
    assert repr(graph).splitlines() == [
        "Graph(x, t -> out, aux",
        "  h = Linear(2 -> 3)(x)",
        "  s = Add()(h, t)",
        "  out = Tanh()(s)",
        "  aux = Linear(3 -> 1)(s)",
        ")",
    ]
    assert list(graph.state_dict()) == ["h.weight", "h.bias", "aux.weight", "aux.bias"]
    assert graph["aux"].out_features == 1


def test_a_layer_at_several_nodes_is_one_layer():
    tower = Linear(2, 3)
    graph = Graph("a b", "y", left=(tower, "a"), right=(tower, "b"), y=(Multiply(), "left right"))
    assert len(list(graph.parameters())) == 2
    a, b, dout = torch.randn(4, 2), torch.randn(4, 2), torch.randn(4, 3)
    graph(a, b)
    graph.backward(dout)
    left, right = torch.nn.functional.linear(a, tower.weight, tower.bias), b @ tower.weight.T + tower.bias
    torch.testing.assert_close(tower.weight.grad, (dout * right).T @ a + (dout * left).T @ b)
    assert graph.pending == 0


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "model",
    [
        Sequential(GRU(2, 3, return_state=True)),
        Graph("x", "s.0 s.1", s=(GRU(2, 3, return_state=True), "x")),
        Graph("x", "a b", a=(Linear(2, 3), "x"), b=(Tanh(), "a")),
        Sequential(Linear(2, 2), Graph("x", "a b", a=(Linear(2, 3), "x"), b=(Tanh(), "a"))),
        Graph("x", "p.0 p.1", a=(Linear(2, 3), "x"), p=(Parallel(Tanh(), Linear(2, 1)), "a x")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_none_inside_a_tuple_of_douts_counts_as_zeros(model, which):
    x, results = torch.randn(4, 1, 2), []
    for unused in (None, torch.zeros_like):
        model.zero_grad()
        out = model(x)
        douts = [torch.ones_like(o) for o in out]
        douts[which] = None if unused is None else unused(out[which])
        dx = model.backward(tuple(douts))
        results.append([dx, *[p.grad for p in model.parameters()]])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert results[0][0].any()


NESTED = {
    "LSTM": lambda: LSTM(2, 3, return_state=True),
    "Graph": lambda: Graph("x", "l.0 l.1", l=(LSTM(2, 3, return_state=True), "x")),
    "Sequential of Parallel": lambda: Sequential(
        LSTM(2, 3, return_state=True), Parallel(Tanh(), Parallel(Linear(3, 3), Tanh()))
    ),
}


@pytest.mark.parametrize("unused", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), "state"])
@pytest.mark.parametrize("name", NESTED)
def test_none_anywhere_in_nested_douts_counts_as_zeros(name, unused):
    """Of (out, (h, c)): each of the three, two of them, or the state as a whole."""
    model, x, results = NESTED[name](), torch.randn(4, 1, 2), []
    out, (h, c) = model(x)
    model.drop_records()
    for absent in (None, torch.zeros_like):
        model.zero_grad()
        model(x)
        places = (1, 2) if unused == "state" else unused
        parts = [torch.ones_like(o) if i not in places else absent and absent(o) for i, o in enumerate((out, h, c))]
        whole = None if unused == "state" and absent is None else (parts[1], parts[2])
        dx = model.backward_at(None, (parts[0], whole))
        results.append([dx, *[p.grad for p in model.parameters()]])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert results[0][0].any()
    assert model.pending == 0


def test_a_state_that_is_a_tuple_may_be_unused_whole():
    graph = Graph("x", "s.0", s=(LSTM(2, 3, return_state=True), "x"))
    plain = Sequential(LSTM(2, 3))
    plain.load_state_dict({f"0.{key.removeprefix('s.')}": t for key, t in graph.state_dict().items()})
    x, dout = torch.randn(4, 1, 2), torch.randn(4, 1, 3)
    torch.testing.assert_close(graph(x), plain(x))
    torch.testing.assert_close(graph.backward(dout), plain.backward(dout))


def test_inputs_that_get_nothing_back():
    """Indices have no gradient; what only a constant reads has zeros."""
    graph = Graph(
        "x t c",
        "out",
        e=(Embedding(5, 3), "t"),
        k=(Constant(Linear(3, 3)), "c"),
        out=(Add(), "x e k"),
    )
    out = graph(torch.ones(2, 3), torch.tensor([1, 4]), torch.ones(2, 3))
    dx, dt, dc = graph.backward(torch.ones_like(out))
    assert dt is None
    assert torch.equal(dx, torch.ones(2, 3))
    assert torch.equal(dc, torch.zeros(2, 3))
    assert graph["k"].body.weight.grad is None


def test_what_nobody_wants_is_not_computed():
    """The layer above a constant, and those that read inputs alone under need_dx=False, are told."""
    told = []

    class Told(Linear):
        def backward(self, dout, need_dx=True):
            told.append((self.out_features, need_dx))
            return super().backward(dout, need_dx)

    graph = Graph(
        "x",
        "out",
        base=(Constant(Tanh()), "x"),
        a=(Told(3, 4), "base"),
        b=(Told(3, 5), "x"),
        c=(Told(5, 4), "b"),
        out=(Add(), "a c"),
    )
    graph(torch.ones(2, 3))
    assert graph.backward(torch.ones(2, 4), need_dx=False) is None
    assert told == [(4, True), (5, False), (4, False)]  # c feeds b; b reads x; a reads a constant
    model = Sequential(Constant(Tanh()), Told(3, 6))
    model(torch.ones(2, 3))
    assert not model.backward(torch.ones(2, 6)).any()
    assert told[-1] == (6, False)


def names_mlp():
    """The model of the lectures twice, with the same weights."""
    torch.manual_seed(0)
    e, f, h, n, t, out = Embedding(27, 10), Flatten(), Linear(30, 64), BatchNorm1d(64), Tanh(), Linear(64, 27)
    plain = Sequential(e, f, h, n, t, out)
    graph = Graph("x", "out", e=(e, "x"), f=(f, "e"), h=(h, "f"), n=(n, "h"), t=(t, "n"), out=(out, "t"))
    return copy.deepcopy(plain), copy.deepcopy(graph)


@COMPILES
def test_the_names_mlp_as_a_graph_trains_as_the_sequential_does_compiled_too():
    x, y, losses = torch.randint(27, (32, 3)), torch.randint(27, (32,)), []
    plain, graph = names_mlp()
    for model in (plain, graph):
        step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=0.1))
        losses.append([step(x, y) for _ in range(3)])
        compiled = step.compile()
        losses[-1] += [compiled(x, y) for _ in range(3)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    for a, b in zip(plain.parameters(), graph.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
