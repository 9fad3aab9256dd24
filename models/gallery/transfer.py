"""A base that torch has trained on the digits 0 to 4, and a head on it that learns 5 to 9 from few examples."""

from __future__ import annotations

import digits
import torch
from fitting import accuracy, fit, rows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import trange

from handgrad import Constant, CrossEntropy, Layer, Linear, Sequential, TrainStep, from_torch

EXAMPLES = 10  # of each of the digits 5 to 9


def make_base(C: int = 16) -> nn.Module:
    """A convolutional net of torch: images (N, 1, 8, 8) to features (N, 4 C)."""
    return nn.Sequential(
        nn.Conv2d(1, C, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(C, 4 * C, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )


def build(base: nn.Module, F: int) -> Layer:
    """The base as it is, and a head with logits of five digits."""
    return Sequential(Constant(from_torch(base)), Linear(F, 5))


def pretrain(base: nn.Module, F: int, x: Tensor, y: Tensor, steps: int) -> None:
    """What somebody else has done, with autograd."""
    whole = nn.Sequential(base, nn.Linear(F, 5))
    optimizer = torch.optim.AdamW(whole.parameters(), lr=3e-3)
    for _ in trange(steps, unit="step", disable=None, dynamic_ncols=True):
        some, target = rows(64, x, y)
        optimizer.zero_grad()
        cross_entropy(whole(some), target).backward()
        optimizer.step()


def train(steps: int = 400, F: int = 64) -> tuple[float, float]:
    """Accuracy on held-out images of 5 to 9, in percent: of a head on the base, and of all trained from scratch."""
    known, held_out = digits.load()
    low, high, high_held_out = known.y < 5, known.y >= 5, held_out.y >= 5
    base = make_base()
    pretrain(base, F, known.x[low], known.y[low], steps)
    few = torch.cat([torch.nonzero(known.y == digit)[:EXAMPLES, 0] for digit in range(5, 10)])
    results = []
    for model in (build(base, F), Sequential(from_torch(make_base()), Linear(F, 5))):
        step = TrainStep(model, CrossEntropy(), torch.optim.AdamW(model.parameters(), lr=1e-2))
        fit(step, lambda: (known.x[few], known.y[few] - 5), steps)
        with torch.no_grad():
            results.append(accuracy(model(held_out.x[high_held_out]), held_out.y[high_held_out] - 5))
    return tuple(results)


if __name__ == "__main__":
    torch.manual_seed(0)
    transferred, scratch = train()
    print(f"with {EXAMPLES} examples of each, {transferred:.1f} % of the held-out 5 to 9 are read right on the base, "
          f"{scratch:.1f} % from scratch")
