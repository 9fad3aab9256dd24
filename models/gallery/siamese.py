"""Two towers with the same weights, which tell whether two images show the same digit (Bromley et al. 1993)."""

from __future__ import annotations

import torch
from torch import Tensor

import digits
from fitting import fit, rows
from handgrad import BCEWithLogits, Flatten, Graph, Layer, Linear, Multiply, ReLU, Sequential, TrainStep


def build(H: int = 128, D: int = 64) -> Layer:
    """Two images (N, 1, 8, 8) to a logit (N, 1)."""
    tower = Sequential(Flatten(), Linear(64, H), ReLU(), Linear(H, D))
    return Graph(
        "a b",
        "same",
        u=(tower, "a"),
        v=(tower, "b"),
        uv=(Multiply(), "u v"),
        same=(Linear(D, 1), "uv"),
    )


def pairs(x: Tensor, y: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Pairs of images, half of them of the same digit, and 1 for those, else 0."""
    a, a_digit = rows(size, x, y)
    weights = (a_digit[:, None] == y) == (torch.arange(size) % 2 == 0)[:, None]
    b = weights.double().multinomial(1).squeeze(1)
    return (a, x[b]), (a_digit == y[b]).to(x.dtype)[:, None]


def train(steps: int = 1500) -> float:
    """Accuracy on pairs of held-out images, in percent."""
    known, held_out = digits.load()
    model = build()
    step = TrainStep(model, BCEWithLogits(), torch.optim.AdamW(model.parameters(), lr=3e-3))
    fit(step, lambda: pairs(*known, 128), steps)
    x, same = pairs(*held_out, 4000)
    with torch.no_grad():
        return 100 * float(((model(x) > 0) == same.bool()).double().mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{train():.1f} % of the held-out pairs are told right; a guess is right in 50 %")
