"""A deep net with a second loss in its middle, which helps the layers below (Szegedy et al. 2014, arXiv:1409.4842)."""

from __future__ import annotations

import torch
from torch import Tensor

import digits
from fitting import accuracy, fit, rows
from handgrad import CrossEntropy, Flatten, Graph, Layer, Linear, Losses, Sequential, Sigmoid, TrainStep


def deep(H: int, layers: int) -> Layer:
    """Layers of sigmoids, through which little of a gradient gets."""
    return Sequential(*[layer for _ in range(layers) for layer in (Linear(H, H), Sigmoid())])


def build(H: int = 64, layers: int = 3) -> Layer:
    """Images (N, 1, 8, 8) to logits (N, 10) twice, at the end and in the middle."""
    return Graph(
        "x",
        "end middle",
        lower=(Sequential(Flatten(), Linear(64, H), Sigmoid(), deep(H, layers)), "x"),
        upper=(deep(H, layers), "lower"),
        middle=(Linear(H, 10), "lower"),
        end=(Linear(H, 10), "upper"),
    )


def train(weight: float, steps: int = 1500) -> float:
    """Accuracy at the end on the held-out images, in percent, with this weight of the loss in the middle."""
    known, held_out = digits.load()
    model = build()
    loss = Losses(CrossEntropy(), CrossEntropy(), weights=(1, weight))
    step = TrainStep(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3))

    def draw() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, y = rows(64, *known)
        return x, (y, y)

    fit(step, draw, steps)
    with torch.no_grad():
        end, _ = model(held_out.x)
    return accuracy(end, held_out.y)


if __name__ == "__main__":
    for weight in (0.3, 0):
        torch.manual_seed(0)
        print(f"{train(weight):.1f} % of the held-out images are read right with {weight} of the loss in the middle")
