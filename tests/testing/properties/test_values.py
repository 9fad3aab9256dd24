"""What the properties of values say where reference=, module= and kinks= know better than autograd."""

from __future__ import annotations

import pytest
from torch import nn

import handgrad
from handgrad import BatchNorm1d, Layer, Linear
from handgrad.testing import CheckFailure, GradientMismatch, LayerCrash, OutputMismatch, check_layer
from tests.testing.strangers import Double


def test_a_refusal_comes_from_forward():
    """What forward has taken, backward must manage: without rows, too."""

    class Refuses(Linear):
        def backward(self, dout, need_dx=True):
            if dout.numel() == 0:
                raise handgrad.ShapeError(f"{self!r}.backward: no rows, got {tuple(dout.shape)}")
            return super().backward(dout, need_dx)

    with pytest.raises(LayerCrash, match="backward raised ShapeError") as caught:
        check_layer(lambda D, K: Refuses(D, K), x="N D")
    assert caught.value.details["property"] == "edges"


def test_kinks_of_one_of_several_inputs_are_not_compared():
    class Added(Double):
        def forward(self, x, y):
            out = x.relu() + y
            self.push(x, out=out)
            return out

        def backward(self, dout):
            (x,) = self.pop(dout)
            return dout * (x > 0), dout.clone()

    report = check_layer(Added, x=["*N", "*N"], kinks={0.0: 0.0})
    notes = {p.name: p.note for p in report.properties}
    assert notes["special"] == "does not apply: kinks= describes an elementwise layer of one input"


def test_a_wrong_forward_needs_a_reference():
    """Its own autograd agrees with it; the reference does not."""

    class Twice(Double):
        pass

    check_layer(Twice, x="*N")
    with pytest.raises(CheckFailure, match="wrong"):
        check_layer(Twice, x="*N", reference=lambda x: 2 * x + 1e-3)


def test_buffers_are_compared_with_the_module():
    """A momentum that differs shows in the running statistics."""
    with pytest.raises(OutputMismatch, match=r"running_(mean|var) is wrong after forward number 1"):
        check_layer(lambda C: BatchNorm1d(C, momentum=0.2), x="N C", module=lambda C: nn.BatchNorm1d(C))


def test_the_slope_at_a_kink_is_declared():
    """Autograd's own slope there is one of several."""

    class Clamp(Layer):
        def forward(self, x):
            out = x.clamp_min(0)
            self.push(x, out=out)
            return out

        def backward(self, dout):
            (x,) = self.pop(dout)
            return dout * (x > 0)

    check_layer(Clamp, x="*N", kinks={0.0: 0.0})
    with pytest.raises(GradientMismatch, match="at special values"):
        check_layer(Clamp, x="*N", kinks={0.0: 1.0})
