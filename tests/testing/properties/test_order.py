"""Reuse: records in attributes, and records that nobody takes."""

from __future__ import annotations

import pytest
import torch

from handgrad import Layer
from handgrad.testing import CheckFailure, ContractError, check_layer
from tests.testing.strangers import Double


@pytest.mark.parametrize("stack", [True, False], ids=["beside an empty record", "alone"])
def test_a_record_in_an_attribute_is_told_the_contract(stack):
    """In whatever the attribute holds; the cause is established by putting it back."""

    class Square(Layer):
        def forward(self, x):
            self.cache = (x, "anything")
            out = x * x
            if stack:
                self.push(out=out)
            return out

        def backward(self, dout):
            if stack:
                self.pop(dout)
            return 2 * self.cache[0] * dout

    with pytest.raises(ContractError) as caught:
        check_layer(Square, x="*N")
    text = str(caught.value)
    assert "forward keeps cache in attributes, where the next forward overwrites" in text
    assert "It is right once each backward finds cache as its own forward left it" in text
    assert "self.push(cache, out=out)\nin forward, (cache,) = self.pop(dout) in backward" in text
    assert "The contract of a layer" in text
    assert isinstance(caught.value.__cause__, CheckFailure)


def test_another_mistake_of_reuse_is_not_blamed_on_attributes():
    """A counter in an attribute is no record."""

    class Queue(Layer):
        uses = 0

        def forward(self, x):
            self.uses += 1
            self.queue = [*getattr(self, "queue", []), x] if torch.is_grad_enabled() else self.queue
            out = x * x
            self.push(out=out)
            return out

        def backward(self, dout):
            self.pop(dout)
            x, *self.queue = self.queue  # the oldest, not the latest
            return 2 * x * dout

        def __getstate__(self):
            return {**super().__getstate__(), "queue": []}

    with pytest.raises(CheckFailure) as caught:
        check_layer(Queue, x="N", sizes={"N": (2, 2)})
    assert caught.value.details["property"] == "reuse"
    assert not isinstance(caught.value, ContractError)


def test_a_record_must_be_taken():
    """Each backward takes its own off the stack."""

    class Peeks(Double):
        def backward(self, dout):
            return 2 * dout

    with pytest.raises(ContractError, match="after two forwards and two backwards 2 record\\(s\\) still wait"):
        check_layer(Peeks, x="*N")
