"""Dropout against torch.nn under the same seed, its modes, and its share of zeros."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, Dropout
from tests.reference import draw


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2), (2, 3, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_the_same_seed_gives_torchs_output_and_gradient(p, shape, training):
    x, dout = draw(*shape), draw(*shape)
    leaf = x.clone().requires_grad_()
    layer, reference = Dropout(p).train(training), torch.nn.Dropout(p).train(training)
    torch.manual_seed(3)
    truth = reference(leaf)
    truth.backward(dout)
    torch.manual_seed(3)
    assert torch.equal(layer(x), truth.detach())
    torch.randn(5)  # what is drawn in between changes nothing
    torch.testing.assert_close(layer.backward(dout), leaf.grad, rtol=1e-12, atol=0)


def test_each_backward_uses_the_mask_of_its_own_forward():
    layer, x = Dropout(0.5), torch.ones(20, dtype=torch.float64)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    assert torch.equal(layer.backward(x), second)
    assert torch.equal(layer.backward(x), first)


def test_mode_is_that_of_the_forward():
    layer, x = Dropout(0.5), draw(50)
    layer(x)
    layer.eval()
    assert (layer.backward(x) == 0).any()
    assert layer(x) is x
    layer.train()
    assert layer.backward(x) is x


def test_the_generator_decides_alone():
    state = torch.get_rng_state()
    one = Dropout(0.5, generator=torch.Generator().manual_seed(1))(torch.ones(99))
    two = Dropout(0.5, generator=torch.Generator().manual_seed(1))(torch.ones(99))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


def test_share_and_scale():
    out = Dropout(0.3, generator=torch.Generator().manual_seed(0))(torch.ones(20000))
    assert abs((out == 0).float().mean() - 0.3) < 0.015
    assert set(out.unique().tolist()) == {0.0, torch.ones(1).div(0.7).item()}


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_errors(p):
    with pytest.raises(ArgumentError, match=f"Dropout: p must be in 0..1, got {p}"):
        Dropout(p)
