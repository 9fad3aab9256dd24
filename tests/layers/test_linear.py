"""How Linear begins."""

from __future__ import annotations

import pytest
import torch

from handgrad import Linear


def test_gain_sets_the_deviation():
    """Normal weights with deviation gain / sqrt(D_in), zero bias, and nothing from the global generator."""
    state = torch.get_rng_state()
    layer = Linear(400, 300, gain=5 / 3, generator=torch.Generator().manual_seed(3))
    assert float(layer.weight.std()) == pytest.approx(5 / 3 / 20, rel=0.02)
    assert not layer.bias.any()
    assert torch.equal(layer.weight, Linear(400, 300, gain=5 / 3, generator=torch.Generator().manual_seed(3)).weight)
    assert torch.equal(state, torch.get_rng_state())
