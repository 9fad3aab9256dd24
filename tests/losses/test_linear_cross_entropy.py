"""LinearCrossEntropy: ignored targets, a weight shared with an embedding, training with it; errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from handgrad import (
    SGD,
    ArgumentError,
    DtypeError,
    Embedding,
    IndexRangeError,
    LinearCrossEntropy,
    ShapeError,
    TrainStep,
    twins,
)
from handgrad.testing import compare


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_size", [1, 2, 100])
@pytest.mark.parametrize("ignore_index", [-100, -1, 1])
def test_what_is_no_class_is_ignored(reduction, chunk_size, ignore_index):
    """Beside rows that count, in several dimensions, and nothing but ignored rows."""
    options = {"ignore_index": ignore_index, "reduction": reduction, "chunk_size": chunk_size}
    targets = [
        torch.tensor([0, ignore_index, 4, 2, ignore_index]),
        torch.tensor([[4, ignore_index], [ignore_index, 0]]),
    ]
    targets += [torch.full((2,), ignore_index)] if reduction != "mean" else []
    for target in targets:
        x = torch.randn(*target.shape, 3)
        compare(LinearCrossEntropy(3, 5, **options), twins.LinearCrossEntropy(3, 5, **options), (x, target))


def test_where_nothing_counts_the_mean_is_nan_and_the_gradient_zero():
    loss = LinearCrossEntropy(3, 5)
    assert loss(torch.randn(2, 3), torch.full((2,), -100)).isnan()
    assert not loss.backward().any()
    assert not loss.linear.weight.grad.any()


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="newer than this torch")
def test_the_keys_are_torchs():
    state = nn.LinearCrossEntropyLoss(3, 5, bias=True).state_dict()
    assert list(LinearCrossEntropy(3, 5, bias=True).state_dict()) == list(state)


def test_large_logits_stay_finite():
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


def test_errors_and_repr():
    loss = LinearCrossEntropy(3, 5)
    with pytest.raises(ShapeError, match=r"x must be \(\.\.\., 3\) and target \(\.\.\.\), got \(4, 2\) and \(4,\)"):
        loss(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(IndexRangeError, match=r"targets must be in 0\.\.4 or ignore_index=-100, got 5"):
        loss(torch.zeros(2, 3), torch.tensor([0, 5]))
    with pytest.raises(DtypeError, match="target must be an int64 tensor of class indices, got int"):
        loss(torch.zeros(2, 3), 3)
    with pytest.raises(ArgumentError, match="LinearCrossEntropy: chunk_size must be an int of at least 1, got 0"):
        LinearCrossEntropy(3, 5, chunk_size=0)
    with pytest.raises(ArgumentError, match=r"LinearCrossEntropy: label_smoothing must be in 0\.\.1, got 2"):
        LinearCrossEntropy(3, 5, label_smoothing=2)
    for shape, came in (((4,), r"\(4,\)"), ((5, 1), r"\(5, 1\)")):
        with pytest.raises(
            ArgumentError, match=r"LinearCrossEntropy: weight must be \(.,\), one per class, got shape " + came
        ):
            LinearCrossEntropy(3, 5, weight=torch.ones(shape))
    assert repr(LinearCrossEntropy(3, 5)) == "LinearCrossEntropy(3 -> 5)"
    assert repr(LinearCrossEntropy(3, 5, bias=True, weight=torch.ones(5), label_smoothing=0.1, chunk_size=8)) == (
        "LinearCrossEntropy(3 -> 5, bias=True, weight of shape (5,), label_smoothing=0.1, chunk_size=8)"
    )
