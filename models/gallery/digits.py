"""The handwritten digits in models/data: 1,797 images of 8x8 pixels."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fitting import accuracy, fit, rows
from handgrad import CrossEntropy, Layer, TrainStep

DATA = Path(__file__).parents[1] / "data" / "digits.csv.gz"
HELD_OUT = 360  # the last images of the file


class Digits(NamedTuple):
    """Images x (N, 1, 8, 8) with values from 0 to 1, and which digit each shows, y (N,)."""

    x: Tensor
    y: Tensor


def load() -> tuple[Digits, Digits]:
    """The images to train on, 1,437, and the last 360 of the file, which are held out."""
    with gzip.open(DATA, "rt") as lines:
        table = torch.tensor([[int(number) for number in line.split(",")] for line in lines])
    x, y = table[:, :64].view(-1, 1, 8, 8) / 16, table[:, 64]
    return Digits(x[:-HELD_OUT], y[:-HELD_OUT]), Digits(x[-HELD_OUT:], y[-HELD_OUT:])


def train(model: Layer, steps: int, lr: float = 3e-3) -> float:
    """Train a model of images to logits (N, 10); its accuracy on the held-out images, in percent."""
    known, held_out = load()
    step = TrainStep(model, CrossEntropy(), torch.optim.AdamW(model.parameters(), lr=lr))
    fit(step, lambda: rows(64, *known), steps)
    with torch.no_grad():
        return accuracy(model.eval()(held_out.x), held_out.y)
