"""CrossEntropy: probabilities as targets, which targets it ignores or refuses, and the full precision of float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from handgrad import CrossEntropy, IndexRangeError
from handgrad.testing import compare


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, -1, 1, 7])
def test_what_is_no_class_is_ignored(reduction, weighted, ignore_index):
    """Beside rows that count, in several dimensions, and nothing but ignored rows."""
    weight = torch.tensor([0.3, 1.0, 2.0]) if weighted else None
    options = {"ignore_index": ignore_index, "label_smoothing": 0.2, "reduction": reduction}
    targets = [torch.tensor([0, ignore_index, 2, 0]), torch.tensor([[2, ignore_index], [ignore_index, 0]])]
    targets += [torch.full((2,), ignore_index)] if reduction != "mean" else []
    for target in targets:
        x = torch.randn(len(target), 3, *target.shape[1:])
        compare(CrossEntropy(weight, **options), nn.CrossEntropyLoss(weight, **options), (x, target))


@pytest.mark.parametrize("weight", [None, torch.tensor([0.3, 1.0, 2.0])])
def test_where_nothing_counts_the_mean_is_nan_and_the_gradient_zero(weight):
    loss = CrossEntropy(weight, label_smoothing=0.2)
    assert loss(torch.randn(2, 3), torch.full((2,), -100)).isnan()
    assert not loss.backward().any()


def test_rows_of_classes_without_weight_count_as_little_as_ignored_ones():
    loss = CrossEntropy(torch.tensor([0.0, 1.0, 2.0]))
    assert loss(torch.randn(2, 3), torch.tensor([0, 0])).isnan()
    assert not loss.backward().any()


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.2}, {"ignore_index": 1}])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label", [-1, 3, 1 << 40])
def test_any_other_number_is_refused(shape, options, weighted, label):
    """Whatever the shape; nothing is recorded, and an ignored row beside it changes nothing."""
    loss = CrossEntropy(torch.ones(3) if weighted else None, **options)
    x, target = torch.randn(shape), torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64)
    for first in (0, loss.ignore_index):
        target.view(-1)[0], target.view(-1)[-1] = first, label
        with pytest.raises(IndexRangeError, match=rf"targets must be in 0\.\.2 or ignore_index=.*, got {label}"):
            loss(x, target)
    assert loss.pending == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_it_keeps_float64s_precision_beside_ignored_rows(weighted, smoothing):
    """Neither the count of rows nor the weights of classes pass through float32, where 1/5 and 1/3 are 1e-8 off."""
    logits, target = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 0, 2, 1, 2])
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


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"weight": torch.tensor([0.3, 1.0, 2.0])}])
def test_a_certain_distribution_is_its_class(options):
    """The same loss and gradient, row by row; the mean of probabilities is over the rows, whatever the weights."""
    by_class, by_probability = (CrossEntropy(**options, reduction="none") for _ in range(2))
    x, y, dout = torch.randn(5, 3, 2), torch.randint(3, (5, 2)), torch.randn(5, 2)
    onehot = nn.functional.one_hot(y, 3).movedim(-1, 1).float()
    torch.testing.assert_close(by_class(x, y), by_probability(x, onehot))
    torch.testing.assert_close(by_class.backward(dout), by_probability.backward(dout))
    losses = by_probability(x, onehot)
    torch.testing.assert_close(CrossEntropy(**options)(x, onehot), losses.mean())


def test_targets_of_both_kinds_may_wait_for_their_backward():
    loss, x, p = CrossEntropy(), torch.randn(4, 3), torch.rand(4, 3)
    loss(x, p)
    loss(x, torch.tensor([0, 1, 2, 0]))
    compare(CrossEntropy(), nn.CrossEntropyLoss(), (x, p))
    first = CrossEntropy()
    first(x, p)
    loss.backward()
    assert torch.equal(loss.backward(), first.backward())
