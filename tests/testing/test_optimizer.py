"""The check of an optimizer can fail."""

from __future__ import annotations

import pytest
import torch

import handgrad
from handgrad.testing import VacuousCheck, check_optimizer


def test_an_optimizer_that_never_moves_is_no_proof():
    """Nothing was compared."""
    with pytest.raises(VacuousCheck):
        check_optimizer(handgrad.SGD, torch.optim.SGD, options={"lr": [0.0]}, examples=5)


def test_options_are_drawn_in_many_combinations():
    """Not in the few that hypothesis returns to."""
    seen = set()
    options = {"lr": [0.1, 0.5], "momentum": [0.0, 0.5, 0.9], "weight_decay": [0.0, 0.2], "maximize": [True, False]}
    check_optimizer(handgrad.SGD, torch.optim.SGD, options=options, refuses=lambda values: seen.add(str(values)))
    assert len(seen) >= 12
