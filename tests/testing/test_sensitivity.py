"""A check that could not have failed is refused."""

from __future__ import annotations

import pytest

from handgrad.testing import VacuousCheck, check_layer
from tests.testing.strangers import Double


def test_inputs_that_cannot_notice_a_fault_are_refused():
    """Zero gradients prove nothing."""

    class Zero(Double):
        def forward(self, x):
            out = 0 * x
            self.push(out=out)
            return out

        def backward(self, dout):
            self.pop(dout)
            return 0 * dout

    with pytest.raises(VacuousCheck, match=r"cannot notice dx slightly scaled"):
        check_layer(Zero, x="*N")
