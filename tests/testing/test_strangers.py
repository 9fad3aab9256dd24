"""Layers that handgrad does not have: the right ones pass in one line, the wrong ones are told what is wrong."""

from __future__ import annotations

import pytest

from handgrad.testing import ContractError, GradientMismatch, check_layer
from tests.testing import strangers


def silu(layer):
    """One learnable slope a channel."""
    return check_layer(lambda D: layer(D), x="*N D")


def bilinear(layer):
    """Two inputs."""
    return check_layer(lambda I, J, H: layer(I, J, H), x=["N I", "N J"])  # noqa: E741  # the sizes' own names


def rownorm(layer):
    """No parameters."""
    return check_layer(layer, x="*N D")


def failure(check, layer, kind) -> str:
    """The text of the failure, without the example."""
    with pytest.raises(kind) as caught:
        check(layer)
    return str(caught.value).partition("the smallest example")[0]


@pytest.mark.parametrize("case", [(silu, "SiLU"), (rownorm, "RowNorm"), (bilinear, "Bilinear")], ids=lambda c: c[1])
def test_a_right_layer_passes(case):
    """And the report names the oracle and lists the planted faults."""
    check, name = case
    report = check(getattr(strangers, name))
    assert report.subject == name
    assert report.oracle == "autograd through forward"
    assert "noticed by reuse" in report.faults.values()


def test_a_forgotten_parameter_is_named():
    """Right for slope 1, so the hint names slope."""
    text = failure(silu, strangers.SiLUForgetsSlope, GradientMismatch)
    assert "dx is wrong" in text
    assert "the others: slope right" in text
    assert "hint: it is right when slope = 1: look for the mistake where slope is used, or should be" in text


def test_an_assigned_gradient_is_named():
    """The gradient is right the first time only."""
    text = failure(silu, strangers.SiLUOverwritesGradient, GradientMismatch)
    assert "slope is wrong where .grad was not empty (backward must add to it)" in text
    assert "backward assigns .grad where it must add" in text


def test_a_forgotten_path_is_named():
    """The length depends on x, too."""
    text = failure(rownorm, strangers.RowNormConstantLength, GradientMismatch)
    assert "dx is wrong" in text
    assert "it is off by a multiple of x all along dimension" in text
    assert "a sum or mean over it is missing, or not right" in text


def test_a_record_in_attributes_is_explained():
    """The attributes are listed, and the contract is told."""
    text = failure(rownorm, strangers.RowNormAttributes, ContractError)
    assert "forward keeps length, out in attributes, where the next forward overwrites what the backward" in text
    assert "self.push(length, out, out=out)\nin forward, (length, out) = self.pop(dout) in backward" in text
    assert "hint" not in text
    assert "records what backward needs on a stack" in text


def test_a_forgotten_input_is_explained():
    """With the contract."""
    text = failure(bilinear, strangers.BilinearForgetsInput, ContractError)
    assert "backward must return a tuple of 2, one entry per input of forward, got a Tensor" in text
    assert "The contract of a layer" in text


def test_a_mean_for_a_sum_is_named():
    """By the factor and what it equals."""
    text = failure(bilinear, strangers.BilinearMean, GradientMismatch)
    assert "weight is wrong" in text
    assert "times the right one, which is 1/(x[0].shape[0])" in text
