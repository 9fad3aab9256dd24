"""Oracles that autograd cannot serve, and oracles that lie."""

from __future__ import annotations

import pytest
import torch

from handgrad import Layer, parameter
from handgrad.testing import GradientMismatch, OracleError, check_layer
from handgrad.testing.oracle import Oracle, _Point
from tests.testing.strangers import Double


class Numpy(Layer):
    """A right layer that autograd cannot follow."""

    weight = parameter("D")
    slope = 3.0

    def __init__(self, size):
        self.weight = torch.ones(size)

    def forward(self, x):
        """The cube of x times w, by numpy."""
        out = torch.from_numpy(self.weight.detach().numpy() * x.detach().numpy() ** 3)
        self.push(x, self.weight, out=out)
        return out

    def backward(self, dout):
        """Thrice the square."""
        x, weight = self.pop(dout)
        self.add_grad(weight, (dout * x**3).reshape(-1, weight.numel()).sum(0))
        return self.slope * dout * weight * x**2


def test_finite_differences_judge_where_autograd_cannot_follow():
    """And the report says so."""
    assert check_layer(lambda D: Numpy(D), x="*N D").oracle == "finite differences"


def test_finite_differences_find_a_wrong_gradient():
    """Within their own, wider tolerance."""

    class Wrong(Numpy):
        slope = 3.001

    with pytest.raises(GradientMismatch, match="dx is wrong"):
        check_layer(lambda D: Wrong(D), x="*N D")


class Detached(Double):
    """Right, but autograd sees half of its forward."""

    def forward(self, x):
        out = x + x.detach()
        self.push(out=out)
        return out


def test_a_partly_detached_forward_is_the_oracles_fault():
    """Autograd would call a wrong backward right; differences tell that autograd is wrong."""

    class AsAutogradSays(Detached):
        def backward(self, dout):
            self.pop(dout)
            return dout

    with pytest.raises(OracleError, match="contradicts finite differences"):
        check_layer(AsAutogradSays, x="*N")


def test_a_kink_is_no_fault_of_the_oracle():
    """Differences contradict a slope that is another one at a single point; beside it, they agree."""
    kinked = Oracle(reference=lambda x: torch.where(x == 1, 5 * x - 3, 2 * x))
    x, dout = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64)
    truth = kinked.truth(Double(), (x,), (dout,))
    assert "contradicts finite differences" in _Point(kinked, Double(), (x,), (dout,), 0).contradiction(truth)
    kinked.police(Double(), (x,), (dout,), truth, 0)


def test_a_right_backward_of_a_partly_detached_forward_is_not_called_wrong():
    with pytest.raises(OracleError, match="hidden from autograd"):
        check_layer(Detached, x="*N")
    check_layer(Detached, x="*N", oracle="differences")


def test_an_oracles_fault_comes_with_its_example():
    with pytest.raises(OracleError, match=r"the smallest example found:\n  x +=") as caught:
        check_layer(Detached, x="*N")
    assert 'add reproduce="gradients ' in str(caught.value)
