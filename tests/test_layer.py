"""The contract that all layers share: parameters, state, records, copies and conversions, shown on whole models."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

import handgrad as hg
from handgrad import DtypeError, Layer, ShapeError, StateError, buffer
from handgrad.layer import PILE


def build(dtype: torch.dtype = torch.float64) -> hg.Sequential:
    """The names MLP, small."""
    return hg.Sequential(
        hg.Embedding(11, 4), hg.Flatten(), hg.Linear(12, 16), hg.BatchNorm1d(16), hg.Tanh(), hg.Linear(16, 11)
    ).to(dtype)


def minibatch() -> tuple[torch.Tensor, torch.Tensor]:
    """Contexts and targets."""
    return torch.randint(11, (9, 3)), torch.randint(11, (9,))


def test_weights_go_to_torch_and_back() -> None:
    """The same keys in the same order, and the same outputs in both modes, from either side."""
    ours = build()
    layers = [nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 11)]
    theirs = nn.Sequential(*layers).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    step = hg.TrainStep(ours, hg.CrossEntropy(), hg.SGD(ours.parameters(), lr=0.1))
    for _ in range(5):
        step(*minibatch())
    theirs.load_state_dict(ours.state_dict())
    again = build()
    again.load_state_dict(theirs.state_dict())
    x, _ = minibatch()
    with torch.no_grad():
        for mode in (False, True):
            expected = theirs.train(mode)(x)
            torch.testing.assert_close(ours.train(mode)(x), expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(again.train(mode)(x), expected, rtol=1e-10, atol=1e-12)


def test_a_shared_tensor_is_one_parameter() -> None:
    """Listed once, updated once, and its gradients add up, as autograd's do."""
    torch.manual_seed(0)
    a, b = hg.Linear(5, 5, dtype=torch.float64), hg.Linear(5, 5, dtype=torch.float64)
    b.weight = a.weight
    model = hg.Sequential(a, hg.Tanh(), b)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.bias"]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    x, dout = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    weight = a.weight.clone().requires_grad_()
    out = torch.tanh(x @ weight.T + a.bias) @ weight.T + b.bias
    out.backward(dout)
    torch.testing.assert_close(model(x), out.detach())
    model.backward(dout)
    torch.testing.assert_close(a.weight.grad, weight.grad)
    before = a.weight.clone()
    hg.SGD(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(a.weight, before - 0.1 * weight.grad)


def test_copies_and_pickles_carry_the_layer_without_its_records() -> None:
    """A copy computes the same and waits for nothing; the original still has its record."""
    model = build()
    x, _ = minibatch()
    state = copy.deepcopy(model)
    out = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.pending == 0
        assert again[2].weight is not model[2].weight
        again.load_state_dict(state.state_dict())
        torch.testing.assert_close(again(x), out, rtol=0, atol=0)
        again.backward(torch.ones_like(out))
    model.backward(torch.ones_like(out))
    assert repr(copy.copy(model)) == repr(model)


def test_to_keeps_identity_so_an_optimizer_stays_valid() -> None:
    """Dtypes change, integers stay integers, gradients come along, and the same optimizer goes on."""
    model = build(torch.float32)
    optimizer = hg.SGD(model.parameters(), lr=0.1)
    before = list(model.parameters())
    x, y = minibatch()
    loss = hg.CrossEntropy()
    loss(model(x), y)
    model.backward(loss.backward())
    assert model.to(torch.float64) is model
    assert all(p is q for p, q in zip(before, model.parameters()))
    assert all(p.dtype is torch.float64 and p.grad is not None and p.grad.dtype is torch.float64 for p in before)
    assert model[3].num_batches_tracked.dtype is torch.int64
    weight = model[2].weight.clone()
    optimizer.step()
    assert not torch.equal(weight, model[2].weight)
    assert model(x).dtype is torch.float64


def test_no_grad_records_nothing_and_eval_still_records() -> None:
    """Two switches, two meanings."""
    model = build()
    x, _ = minibatch()
    with torch.no_grad():
        model(x)
    assert model.pending == 0
    out = model.eval()(x)
    assert model.pending == 7  # six layers and the Sequential itself
    model.backward(torch.ones_like(out))
    assert model.pending == 0


# ---------------------------------------------------------------------- a layer inside a layer


class Swap(Layer):
    """Two inputs, two outputs; its backward does not know need_dx."""

    def forward(self, a, b):
        self.push(out=(b, a))
        return b, a

    def backward(self, dout):
        self.pop(dout)
        return dout[1], dout[0]


def test_a_tuple_is_spread_over_several_inputs_and_no_other():
    a, b = torch.ones(2), torch.zeros(3)
    assert Swap().forward_at("s", (a, b)) == (b, a)
    with pytest.raises(ShapeError, match=r"^in s \(Swap\(\)\): Swap\(\)\.forward: takes 2 inputs, got a tuple of 3$"):
        Swap().forward_at("s", (a, b, a))
    with pytest.raises(ShapeError, match=r"GRUCell\(2 -> 3\)\.forward: takes 1 to 2 inputs, got a tuple of 3"):
        hg.GRUCell(2, 3).forward_at("cell", (a, a, a))
    assert hg.Parallel(hg.Tanh()).forward_at("p", (a,))[0].shape == (2,)  # one input, which is a tuple
    with pytest.raises(DtypeError, match=r"^in t \(Tanh\(\)\): .*x must be a torch\.Tensor, got tuple"):
        hg.Tanh().forward_at("t", (a, b))
    assert hg.Sequential(Swap(), hg.Parallel(hg.Tanh(), hg.Identity()), Swap())(a, b)[1].shape == (3,)
    bilinear = hg.from_torch(torch.nn.Bilinear(2, 3, 4))
    assert bilinear.forward_at("b", (torch.ones(5, 2), torch.ones(5, 3))).shape == (5, 4)


def test_a_dout_that_nobody_used_is_zeros_but_for_indices():
    class Half(Layer):
        def forward(self, x):
            out = x / 2, x.argmax(-1)
            self.push(out=out)
            return out

        def backward(self, dout):
            self.pop(dout)
            assert dout[1] is None
            return dout[0] / 2

    layer, x = Half(), torch.ones(2, 3)
    layer(x)
    assert torch.equal(layer.backward_at("h", (None, None)), torch.zeros(2, 3))
    layer(x)
    assert torch.equal(layer.backward_at("h", None), torch.zeros(2, 3))
    layer(x)
    assert torch.equal(layer.backward((x, None)), x / 2)


# ---------------------------------------------------------------------- frozen parameters


def test_freezing_marks_the_tensors_for_every_holder():
    table, head = hg.Embedding(5, 3), hg.Linear(3, 5)
    head.weight = table.weight
    model = hg.Sequential(table, head)
    table.freeze()
    assert repr(model).splitlines()[1:3] == ["  (0): Embedding(5 -> 3, frozen)", "  (1): Linear(3 -> 5)"]
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "1.bias"]
    model(torch.tensor([1, 4]))
    model.backward(torch.ones(2, 5))
    assert table.weight.grad is None
    assert head.bias.grad is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float64)):
        assert "frozen" in repr(twin)
    model.unfreeze()
    model(torch.tensor([1, 4]))
    model.backward(torch.ones(2, 5, dtype=torch.float64))
    assert table.weight.grad is not None
    table.weight.grad = torch.ones(5, 3, dtype=torch.float64)
    assert model.freeze() is model
    assert table.weight.grad is None


@pytest.mark.parametrize("optimizer", [hg.SGD, torch.optim.AdamW])
def test_a_frozen_parameter_stays_in_every_optimizer(optimizer):
    model = hg.Sequential(hg.Linear(3, 4).freeze(), hg.BatchNorm1d(4), hg.Linear(4, 2))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    step = hg.TrainStep(model, hg.MSE(), optimizer(model.parameters(), lr=0.1))
    for _ in range(3):
        step(torch.randn(5, 3), torch.randn(5, 2))
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == before.keys() - {"0.weight", "0.bias"}


def test_freezing_reaches_a_torch_module_made_before_and_after():
    layer = hg.Linear(3, 2)
    module = hg.to_torch(layer)
    module(torch.ones(1, 3))
    layer.freeze()
    x = torch.ones(1, 3, requires_grad=True)
    module(x).sum().backward()
    assert module.weight.grad is None
    assert x.grad is not None
    assert not module.weight.requires_grad
    layer.unfreeze()
    module(x).sum().backward()
    assert module.weight.grad is not None


def test_a_frozen_torch_module_is_not_differentiated_by_its_parameters():
    layer = hg.from_torch(torch.nn.Linear(3, 2)).freeze()
    layer(torch.ones(1, 3))
    assert layer.backward(torch.ones(1, 2)).shape == (1, 3)
    assert all(p.grad is None for p in layer.parameters())


# ---------------------------------------------------------------------- what is found


def test_layers_in_dicts_and_nested_lists_are_found():
    class Nest(Layer):
        def __init__(self):
            self.heads = {"a": hg.Linear(2, 1), "b": [hg.Linear(2, 1), (hg.Tanh(), hg.Linear(1, 1))]}

        def forward(self, x):
            return x

        def backward(self, dout):
            return dout

    nest = Nest()
    assert list(nest.state_dict()) == [
        f"heads.{path}.{name}" for path in ("a", "b.0", "b.1.1") for name in ("weight", "bias")
    ]
    assert repr(nest).splitlines()[1:] == [
        "  (heads.a): Linear(2 -> 1)",
        "  (heads.b.0): Linear(2 -> 1)",
        "  (heads.b.1.0): Tanh()",
        "  (heads.b.1.1): Linear(1 -> 1)",
        ")",
    ]


def test_a_buffer_that_is_not_persistent_moves_but_has_no_key():
    class Masked(Layer):
        mask = buffer("D", persistent=False)

        def __init__(self):
            self.mask = torch.ones(3)

    layer = Masked()
    assert layer.state_dict() == {}
    assert layer.to(torch.float64).mask.dtype is torch.float64
    assert [name for name, _ in layer.named_buffers()] == ["mask"]


def test_a_gradient_in_float32_is_rounded_for_a_parameter_in_half_precision_and_no_other():
    layer = hg.Linear(2, 1, dtype=torch.bfloat16)
    for _ in range(2):
        layer.add_grad(layer.weight, torch.full((1, 2), 1 / 3))
    assert layer.weight.grad.dtype is torch.bfloat16
    assert torch.equal(layer.weight.grad, torch.full((1, 2), 1 / 3).bfloat16() * 2)
    for dtype, wrong in ((torch.bfloat16, torch.float64), (torch.float32, torch.bfloat16), (torch.float64, None)):
        layer = hg.Linear(2, 1, dtype=dtype)
        with pytest.raises(DtypeError, match=r"the gradient of weight must be \(1, 2\)"):
            layer.add_grad(layer.weight, torch.ones(1, 2, dtype=wrong))


# ---------------------------------------------------------------------- several threads


@pytest.fixture
def _restless():
    """Threads that change places very often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(works):
    """Run each in a thread of its own; raise what one of them raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


MODELS = {
    "row": lambda: hg.Sequential(hg.Linear(3, 4), hg.Tanh(), hg.Linear(4, 3), hg.Softmax(-1)),
    "reuse": lambda: hg.Sequential(*[hg.Tanh()] * 3, hg.Residual(hg.Linear(3, 3))),
    "recurrent": lambda: hg.Unroll(hg.GRUCell(3, 3), dim=0),
    "several outputs": lambda: hg.Graph("x", "a b", a=(hg.Tanh(), "x"), b=(hg.Linear(3, 3), "a")),
}


@pytest.mark.usefixtures("_restless")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("threads", [2, 3])
def test_in_several_threads_every_dx_is_right_or_a_state_error(name, threads):
    torch.manual_seed(0)
    model, counts = MODELS[name](), Counter()
    xs = [torch.randn(4, 3) for _ in range(threads)]

    def step(layer, x):
        out = layer(x)
        return out, layer.backward(tuple(map(torch.ones_like, out)) if isinstance(out, tuple) else torch.ones_like(out))

    expected = [step(copy.deepcopy(model), x) for x in xs]

    def work(k):
        for _ in range(1200):
            try:
                got = step(model, xs[k])
            except StateError:
                counts["refused"] += 1
                model.drop_records()
            else:
                torch.testing.assert_close(got, expected[k], rtol=0, atol=0)
                counts["right"] += 1

    in_threads([partial(work, k) for k in range(threads)])
    assert sum(counts.values()) == 1200 * threads
    assert counts["right"] > 0
    model.drop_records()
    torch.testing.assert_close(step(model, xs[0]), expected[0], rtol=0, atol=0)  # nothing lasts


def test_a_record_of_another_thread_is_refused_with_the_remedy():
    model, x = hg.Linear(3, 2), torch.ones(1, 3)
    model(x)

    def other():
        remedy = r"one model belongs to one thread at a time; give each thread a copy \(copy.deepcopy\), or a lock "
        with pytest.raises(StateError, match=r"\.forward: a forward of another thread is under way; " + remedy):
            model(x)
        with pytest.raises(StateError, match=r"\.backward: the latest forward ran in another thread; " + remedy):
            model.backward(torch.ones(1, 2))
        with torch.no_grad():
            model(x)  # evaluation is nobody's business

    in_threads([other])
    assert model.pending == 1
    model.backward(torch.ones(1, 2))


def test_of_two_threads_that_push_at_once_the_later_is_refused():
    layer, x = hg.Tanh(), torch.ones(3)

    class Between(list):
        """The other thread's record comes between this one's look and its own record."""

        def append(self, record):
            super().append((*record[:3], record[3] + 1))
            super().append(record)

    layer._records = Between()
    with pytest.raises(StateError, match="a forward of another thread is under way"):
        layer(x)


def test_a_record_that_another_thread_dropped_is_a_state_error():
    layer = hg.Tanh()
    for dout in (torch.ones(3), None):
        with pytest.raises(StateError, match="no forward is waiting"):
            layer.backward_at("t", dout)


# ---------------------------------------------------------------------- records that pile up


def test_calls_without_a_backward_are_warned_of_once():
    model, x = hg.Sequential(hg.Linear(3, 4), hg.Tanh()), torch.ones(2, 3)
    for _ in range(PILE - 1):
        model(x)
    text = r"^Sequential\(\): 256 forwards wait for their backward, and hold .* KB; to evaluate, enter torch\.no_grad"
    with pytest.warns(UserWarning, match=text + r".* or drop_records\(\)$") as caught:
        model(x)
    assert [warning.filename for warning in caught] == [__file__]
    for _ in range(10):
        model(x)  # a warning would be an error here
    model.drop_records()
    with torch.no_grad():
        for _ in range(2 * PILE):
            model(x)


def test_a_loop_over_time_by_hand_and_a_long_unroll_are_no_pile():
    cell, h = hg.RNNCell(2, 3), torch.zeros(1, 3)
    x = torch.ones(1, 2)
    for _ in range(PILE - 1):
        h = cell(x, h)
    for _ in range(PILE - 1):
        cell.backward(torch.ones(1, 3))
    unroll = hg.Unroll(cell)
    unroll(torch.ones(1, 3 * PILE, 2))
    unroll.backward(torch.ones(1, 3 * PILE, 3))


@pytest.mark.parametrize("grad", [torch.ones(2, 4), torch.ones(4, 3), torch.ones(3), torch.ones(2, 3).double()])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_gradient_unlike_its_parameter_is_refused(grad, earlier):
    layer = hg.Linear(3, 2)
    layer.weight.grad = torch.zeros(2, 3) if earlier else None
    kind = ShapeError if grad.dtype is torch.float32 else DtypeError
    with pytest.raises(kind, match=r"the gradient of weight must be \(2, 3\) torch\.float32 like the parameter, got"):
        layer.add_grad(layer.weight, grad)
    assert layer.weight.grad is None or not layer.weight.grad.any()
