"""The losses against torch.nn's, for every reduction and option."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from handgrad import (
    MSE,
    ArgumentError,
    BCEWithLogits,
    CrossEntropy,
    DtypeError,
    Embedding,
    IndexRangeError,
    LinearCrossEntropy,
    ShapeError,
    TrainStep,
)
from handgrad.optim import SGD
from tests.reference import close, draw, strided

REDUCTIONS = ["mean", "sum", "none"]


def compare(loss, reference, batches):
    """Every batch forward, then backward in reverse order, twice, with the default dout and with a random one."""
    loss.to(torch.float64)
    reference.double().load_state_dict(loss.state_dict())
    for _ in range(2):
        expected = []
        for x, target in batches:
            leaf = x.clone().requires_grad_()
            truth = reference(leaf, target)
            before = x.clone(), target.clone()
            out = loss(strided(x), strided(target))
            assert torch.equal(before[0], x)
            assert torch.equal(before[1], target)
            close(out, truth.detach(), "out")
            expected.append((leaf, truth))
        for i, (leaf, truth) in enumerate(reversed(expected)):
            dout = None if truth.dim() == 0 and i % 2 == 0 else draw(*truth.shape)
            truth.backward(dout)
            close(loss.backward(dout), leaf.grad, "dx")
    assert loss.pending == 0
    named = dict(reference.named_parameters())
    for name, param in loss.named_parameters():
        close(param.grad, named[name].grad, name)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mse_agrees_with_torch(reduction):
    batches = [(draw(*shape), draw(*shape)) for shape in ((4,), (3, 5), (), (2, 3, 4), (1,), (0, 3))]
    compare(MSE(reduction), nn.MSELoss(reduction=reduction), batches)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("weight", "pos_weight"), [(None, None), ((3,), None), (None, (3,)), ((2, 3), (1,)), ((2, 1), (3,)), ((), ())]
)
def test_bce_agrees_with_torch(reduction, weight, pos_weight):
    weight, pos_weight = (None if shape is None else torch.rand(shape) * 3 for shape in (weight, pos_weight))
    batches = [(draw(2, 3) * 3, torch.rand(2, 3).double()) for _ in range(2)]
    batches += [(draw(2, 3), torch.randint(2, (2, 3)).double())]
    if weight is None and pos_weight is None:
        batches += [(draw(*shape), torch.rand(shape).double()) for shape in ((), (5,), (0, 3))]
    loss = BCEWithLogits(weight, reduction, pos_weight)
    compare(loss, nn.BCEWithLogitsLoss(weight, reduction=reduction, pos_weight=pos_weight), batches)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pos_weight", [None, 2.5])
def test_bce_at_extremes_agrees_with_torch(dtype, pos_weight):
    x = torch.tensor([0.0, -0.0, 30.0, -30.0, 800.0, -800.0, 1e4, -1e4], dtype=dtype)
    pos_weight = None if pos_weight is None else torch.tensor(pos_weight, dtype=dtype)
    for y in (0.0, 0.25, 1.0):
        target = torch.full_like(x, y)
        leaf = x.clone().requires_grad_()
        truth = nn.functional.binary_cross_entropy_with_logits(leaf, target, reduction="none", pos_weight=pos_weight)
        dout = torch.linspace(-1, 2, len(x), dtype=dtype)
        truth.backward(dout)
        loss = BCEWithLogits(None, "none", pos_weight)
        torch.testing.assert_close(loss(x, target), truth.detach())
        torch.testing.assert_close(loss.backward(dout), leaf.grad, rtol=1e-6, atol=1e-7)


def head(D, V, bias, **options):
    """Torch's own linear cross-entropy, without chunks and with CrossEntropyLoss's ignore_index."""

    class Reference(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, V, bias)

        def forward(self, x, target):
            z = self.linear(x).reshape(-1, V)
            loss = nn.functional.cross_entropy(z, target.reshape(-1), **options)
            return loss.reshape(target.shape) if options["reduction"] == "none" else loss

    return Reference()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
@pytest.mark.parametrize("ignore_index", [-100, 1, -1])
def test_linear_cross_entropy_agrees_with_torch(reduction, bias, chunk_size, ignore_index):
    loss = LinearCrossEntropy(3, 5, bias=bias, ignore_index=ignore_index, reduction=reduction, chunk_size=chunk_size)
    batches = [(draw(*shape, 3) * 2, torch.randint(5, shape)) for shape in ((7,), (2, 3), (), (1,))]
    for _, target in batches[:2]:
        target[..., -1] = ignore_index
    batches += [(draw(2, 3), torch.full((2,), ignore_index))]  # nothing but ignored rows
    compare(loss, head(3, 5, bias, reduction=reduction, ignore_index=ignore_index), batches)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, -1, 1, 7])
def test_cross_entropy_ignores_what_is_no_class(reduction, weighted, ignore_index):
    """Beside rows that count, in several dimensions, and nothing but ignored rows."""
    weight = torch.tensor([0.3, 1.0, 2.0]) if weighted else None
    options = {"ignore_index": ignore_index, "label_smoothing": 0.2, "reduction": reduction}
    targets = [torch.tensor([0, ignore_index, 2, 0]), torch.tensor([[2, ignore_index], [ignore_index, 0]])]
    targets.append(torch.full((2,), ignore_index))
    batches = [(draw(len(t), 3, *t.shape[1:]), t) for t in targets]
    compare(CrossEntropy(weight, **options), nn.CrossEntropyLoss(weight, **options), batches)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.2}, {"ignore_index": 1}])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label", [-1, 3, 1 << 40])
def test_cross_entropy_refuses_what_is_no_class(shape, options, weighted, label):
    """Whatever the shape; nothing is recorded, and an ignored row beside it changes nothing."""
    loss = CrossEntropy(torch.ones(3) if weighted else None, **options)
    x, target = draw(*shape).float(), torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64)
    for first in (0, loss.ignore_index):
        target.view(-1)[0], target.view(-1)[-1] = first, label
        with pytest.raises(IndexRangeError, match=rf"targets must be in 0\.\.2 or ignore_index=.*, got {label}"):
            loss(x, target)
    assert loss.pending == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_keeps_float64s_precision_beside_ignored_rows(weighted, smoothing):
    """Neither the count of rows nor the weights of classes pass through float32, where 1/5 and 1/3 are 1e-8 off."""
    logits, target = draw(7, 3), torch.tensor([0, 2, 1, 0, 2, 1, 2])
    w = [1 / 3, 0.7, 0.1] if weighted else [1.0, 1.0, 1.0]
    rows = [(n, y) for n, y in enumerate(target.tolist()) if y != 1]
    total = math.fsum(w[y] for _, y in rows)
    value, dx = [], [[0.0] * 3 for _ in range(7)]
    for n, y in rows:
        e = [math.exp(z - max(logits[n].tolist())) for z in logits[n].tolist()]
        p = [each / math.fsum(e) for each in e]
        q = [(1 - smoothing) * w[y] * (c == y) + smoothing / 3 * w[c] for c in range(3)]
        value += [-q[c] * math.log(p[c]) / total for c in range(3)]
        dx[n] = [(p[c] * math.fsum(q) - q[c]) / total for c in range(3)]
    weight = torch.tensor(w, dtype=torch.float64) if weighted else None
    loss = CrossEntropy(weight, ignore_index=1, label_smoothing=smoothing)
    out = loss(logits, target)
    torch.testing.assert_close(out, torch.tensor(math.fsum(value), dtype=torch.float64), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(loss.backward(), torch.tensor(dx, dtype=torch.float64), rtol=1e-14, atol=1e-15)


def test_linear_cross_entropy_has_torchs_keys_and_weights():
    torch.manual_seed(5)
    loss = LinearCrossEntropy(3, 5, bias=True)
    torch.manual_seed(5)
    reference = nn.Linear(3, 5)
    assert list(loss.state_dict()) == ["linear.weight", "linear.bias"]
    assert torch.equal(loss.linear.weight, reference.weight)
    if hasattr(nn, "LinearCrossEntropyLoss"):
        state = nn.LinearCrossEntropyLoss(3, 5, bias=True).state_dict()
        assert list(loss.state_dict()) == list(state)


def test_linear_cross_entropy_without_rows():
    loss = LinearCrossEntropy(3, 5, reduction="sum")
    assert loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == 0
    assert loss.backward().shape == (0, 3)
    assert not loss.linear.weight.grad.any()


def test_linear_cross_entropy_survives_large_logits():
    loss = LinearCrossEntropy(3, 5)
    assert loss(torch.randn(4, 3) * 1e4, torch.tensor([0, 1, 2, 3])).isfinite()
    assert loss.backward().isfinite().all()


def test_a_head_tied_to_the_embedding_is_one_parameter():
    """Both uses add to the same gradient, in either order, and it is listed once."""
    embedding, loss = Embedding(5, 3), LinearCrossEntropy(3, 5)
    loss.linear.weight = embedding.weight
    x, target = torch.tensor([1, 4, 4]), torch.tensor([0, 2, 4])
    leaf = embedding.weight.clone().requires_grad_()
    nn.functional.cross_entropy(leaf[x] @ leaf.t(), target).backward()
    loss(embedding(x), target)
    embedding.backward(loss.backward())
    torch.testing.assert_close(embedding.weight.grad, leaf.grad)


def test_a_train_step_clears_the_gradients_of_the_loss_too():
    """Else they would add up from step to step."""
    torch.manual_seed(0)
    embedding, loss = Embedding(5, 3), LinearCrossEntropy(3, 5)
    params = [*embedding.parameters(), *loss.parameters()]
    step, x = TrainStep(embedding, loss, SGD(params, lr=0.0)), torch.tensor([1, 4, 4])
    step(x, x)
    first = loss.linear.weight.grad.clone()
    step(x, x)
    assert torch.equal(loss.linear.weight.grad, first)


def test_losses_train():
    for loss, target in ((MSE(), torch.ones(4, 3)), (BCEWithLogits(), torch.ones(4, 3))):
        model = Embedding(6, 3)
        step = TrainStep(model, loss, SGD(model.parameters(), lr=1.0))
        losses = [float(step(torch.arange(4), target)) for _ in range(30)]
        assert losses[-1] < 0.7 * losses[0]


def test_errors_and_repr():
    for loss in (MSE(), BCEWithLogits()):
        with pytest.raises(ShapeError, match=r"target must have x's shape, \(4, 1\), got \(4,\)"):
            loss(torch.zeros(4, 1), torch.zeros(4))
        with pytest.raises(DtypeError, match=r"target must be a tensor of x's dtype, torch\.float32, got torch\.int64"):
            loss(torch.zeros(4), torch.zeros(4, dtype=torch.int64))
        with pytest.raises(DtypeError, match="x must have a floating dtype"):
            loss(torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    with pytest.raises(ArgumentError, match="MSE: reduction must be one of"):
        MSE("avg")
    with pytest.raises(ShapeError, match="only a scalar loss has a default dout"):
        backward_of_rows()
    with pytest.raises(ShapeError, match=r"pos_weight of shape \(2,\) must broadcast to x, got shape \(4, 3\)"):
        BCEWithLogits(pos_weight=torch.ones(2))(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(DtypeError, match=r"x must have the dtype of weight, torch\.float64, got torch\.float32"):
        BCEWithLogits(torch.ones(3).double())(torch.zeros(4, 3), torch.zeros(4, 3))
    loss = LinearCrossEntropy(3, 5)
    with pytest.raises(ShapeError, match=r"x must be \(\.\.\., 3\) and target \(\.\.\.\), got \(4, 2\) and \(4,\)"):
        loss(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(IndexRangeError, match=r"targets must be in 0\.\.4 or ignore_index=-100, got 5"):
        loss(torch.zeros(2, 3), torch.tensor([0, 5]))
    with pytest.raises(DtypeError, match="target must be an int64 tensor of class indices, got int"):
        loss(torch.zeros(2, 3), 3)
    with pytest.raises(ArgumentError, match="LinearCrossEntropy: chunk_size must be at least 1, got 0"):
        LinearCrossEntropy(3, 5, chunk_size=0)
    assert repr(MSE("sum")) == "MSE(reduction='sum')"
    assert repr(BCEWithLogits(torch.ones(3), "sum")) == "BCEWithLogits(weight of shape (3,), reduction='sum')"
    assert repr(LinearCrossEntropy(3, 5)) == "LinearCrossEntropy(3 -> 5)"
    assert (
        repr(LinearCrossEntropy(3, 5, bias=True, chunk_size=8)) == "LinearCrossEntropy(3 -> 5, bias=True, chunk_size=8)"
    )


def backward_of_rows():
    loss = MSE("none")
    loss(torch.zeros(4), torch.zeros(4))
    loss.backward()
