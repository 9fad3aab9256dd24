"""What needs a newer torch than handgrad itself."""

from __future__ import annotations

import pytest
import torch

from handgrad.train import COMPILING

COMPILES = pytest.mark.skipif(torch.__version__ < COMPILING, reason=f"TrainStep.compile needs torch {COMPILING}")
