"""What every loss shares."""

from __future__ import annotations

import pytest
import torch

from handgrad import MSE, ArgumentError, ShapeError


def test_errors():
    with pytest.raises(ArgumentError, match="MSE: reduction must be one of"):
        MSE(reduction="avg")
    loss = MSE(reduction="none")
    loss(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ShapeError, match="only a scalar loss has a default dout"):
        loss.backward()
