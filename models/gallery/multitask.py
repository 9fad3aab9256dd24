"""Several inputs and several outputs: which digit is it, and is it larger than a given number."""

from __future__ import annotations

import torch
from torch import Tensor

import digits
from fitting import accuracy, fit, rows
from handgrad import (
    BCEWithLogits,
    Cat,
    CrossEntropy,
    Embedding,
    Flatten,
    Graph,
    Layer,
    Linear,
    Losses,
    ReLU,
    Sequential,
    TrainStep,
)


def build(H: int = 128, E: int = 16) -> Layer:
    """Images (N, 1, 8, 8) and numbers (N,) to the logits of the digit (N, 10) and of "it is larger" (N, 1)."""
    return Graph(
        "image number",
        "digit larger",
        h=(Sequential(Flatten(), Linear(64, H), ReLU()), "image"),
        e=(Embedding(10, E), "number"),
        digit=(Linear(H, 10), "h"),
        both=(Cat(-1), "h e"),
        larger=(Sequential(Linear(H + E, H), ReLU(), Linear(H, 1)), "both"),
    )


def questions(x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A number for each image; and the two answers."""
    number = torch.randint(10, y.shape)
    return (x, number), (y, (y > number).to(x.dtype)[:, None])


def train(steps: int = 1500) -> tuple[float, float]:
    """Accuracy of both answers for held-out images, in percent."""
    known, held_out = digits.load()
    model = build()
    loss = Losses(CrossEntropy(), BCEWithLogits())
    step = TrainStep(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3))
    fit(step, lambda: questions(*rows(64, *known)), steps)
    inputs, (y, larger) = questions(*held_out)
    with torch.no_grad():
        digit_logits, larger_logits = model(inputs)
    return accuracy(digit_logits, y), 100 * float(((larger_logits > 0) == larger.bool()).double().mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    digit, larger = train()
    print(f"of the held-out images, {digit:.1f} % are read right, {larger:.1f} % compared right with a number")
