"""Minibatches in tensors, lists and tuples."""

from __future__ import annotations

import pytest
import torch

from handgrad import ShapeError
from handgrad.minibatches import ends_of_alike, joined, length, minibatches, rebuilt, taken_apart

A, B = torch.arange(24.0).view(2, 3, 4), torch.arange(6.0).view(2, 3)


def test_one_and_several_of_each_part() -> None:
    assert torch.equal(minibatches((A, [B[0], B[1]]), 1)[1], B[1])
    assert torch.equal(minibatches((A, B), slice(1, 2))[0], A[1:])


def test_all_parts_hold_as_many() -> None:
    assert length((A, list(B)), B) == 2
    with pytest.raises(ShapeError, match=r"K minibatches each, at least one, got 2 and 1"):
        length(A, B[:1])
    with pytest.raises(ShapeError, match="at least one, got 0 and 0"):
        length([], [])


@pytest.mark.parametrize("many", [A, list(A), [list(part) for part in A]], ids=["tensor", "list", "nested list"])
def test_joined_one_after_the_other(many) -> None:
    assert torch.equal(joined(many, 2), A.view(6, 4))
    assert torch.equal(joined((B, many), 2)[1], A.view(6, 4))


def test_joined_of_a_list_of_tuples() -> None:
    a, b = joined([(A[0], B[0]), (A[1], B[1])], 1)
    assert torch.equal(a, A)
    assert torch.equal(b, B)
    assert torch.equal(joined(A, 0), A.unsqueeze(0))


def test_stretches_of_the_same_shapes() -> None:
    assert ends_of_alike(A, B, 2) == [2]
    xs = [A[0], A[1], A[0][:2], A[0]]
    assert ends_of_alike(xs, [0, 0, 0, 0], 4) == [2, 3, 4]


def test_taken_apart_and_rebuilt() -> None:
    value = (A, (None, B), 3)
    parts, structure = taken_apart(value)
    assert [id(part) for part in parts] == [id(A), id(B)]
    other = rebuilt(structure, iter([B, A]))
    assert other[0] is B
    assert other[1][0] is None
    assert other[1][1] is A
    assert other[2] == 3
