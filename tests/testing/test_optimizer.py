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
