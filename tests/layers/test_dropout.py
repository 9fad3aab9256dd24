"""Which elements Dropout keeps: its modes, its generator, the share of zeros."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, Dropout


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2), (2, 3, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_torchs_output_and_gradient_where_both_keep_an_element(p, shape, training):
    x, dout = torch.randn(2, *shape, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    layer, reference = Dropout(p).train(training), torch.nn.Dropout(p).train(training)
    truth = reference(leaf)
    truth.backward(dout)
    out, dx = layer(x), layer.backward(dout)
    kept, both = out != 0, (out != 0) & (truth != 0)
    torch.testing.assert_close(out[both], truth.detach()[both], rtol=1e-12, atol=0)
    torch.testing.assert_close(dx[both], leaf.grad[both], rtol=1e-12, atol=0)
    assert torch.equal(dx != 0, kept & (dout != 0))
    if p in (0, 1) or not training:
        assert torch.equal(kept, truth != 0)


def test_each_backward_uses_the_mask_of_its_own_forward():
    layer, x = Dropout(0.5), torch.ones(20, dtype=torch.float64)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    assert torch.equal(layer.backward(x), second)
    assert torch.equal(layer.backward(x), first)


def test_mode_is_that_of_the_forward():
    layer, x = Dropout(0.5), torch.randn(50)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.001, 0.3, 0.5, 0.9])
def test_share_and_scale(p, dtype):
    n = 1_000_000
    out = Dropout(p, generator=torch.Generator().manual_seed(0))(torch.ones(n, dtype=dtype))
    assert abs(int((out == 0).sum()) - p * n) < 4 * (n * p * (1 - p)) ** 0.5  # four deviations
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p), dtype=dtype).item()}


def test_elements_are_drawn_by_themselves():
    out = Dropout(0.5, generator=torch.Generator().manual_seed(0))(torch.ones(1000, 1000))
    kept = (out != 0).to(torch.float64)
    for one, next_to_it in ((kept[:, :-1], kept[:, 1:]), (kept[:-1], kept[1:])):
        assert abs((one * next_to_it).mean() - 0.25) < 4 * (0.25 * 0.75 / 1e6) ** 0.5 * 2


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_errors(p):
    with pytest.raises(ArgumentError, match=f"Dropout: p must be in 0..1, got {p}"):
        Dropout(p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_small_p_drops_its_share_in_half_precision_too(dtype):
    """Which has no uniform number between 0.996 and 1."""
    out = Dropout(0.002, generator=torch.Generator().manual_seed(1))(torch.ones(1_000_000, dtype=dtype))
    assert 1900 < int((out == 0).sum()) < 2100
    assert out.dtype is dtype
