"""A base that torch has trained to read digits, and a head on it that learns another question from few examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import trange

import digits
from fitting import accuracy, fit, rows
from handgrad import Constant, CrossEntropy, Layer, Linear, Sequential, TrainStep, from_torch

EXAMPLES = 30
HOLES = torch.tensor([1, 0, 0, 0, 0, 0, 1, 0, 1, 1])  # which digits have a closed loop; a four counts as open


def make_base(C: int = 32, F: int = 32) -> nn.Module:
    """A net of torch's: images (N, 1, 8, 8) to features (N, F)."""
    images = nn.Sequential(nn.Conv2d(1, C, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(images, nn.Flatten(), nn.Linear(16 * C, F), nn.ReLU())


def build(base: nn.Module, F: int = 32) -> Layer:
    """The base as it is, and a head with two logits."""
    return Sequential(Constant(from_torch(base)), Linear(F, 2))


def pretrain(base: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """What somebody else has done, with autograd: a base that helps to read the digits."""
    whole = nn.Sequential(base, nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(whole.parameters(), lr=3e-3)
    for _ in trange(steps, unit="step", disable=None, dynamic_ncols=True):
        some, target = rows(64, x, y)
        optimizer.zero_grad()
        cross_entropy(whole(some), target).backward()
        optimizer.step()


def train(steps: int = 400) -> tuple[float, float]:
    """Accuracy on held-out images, in percent: of a head on the base, and of the same net trained from scratch."""
    known, held_out = digits.load()
    base = make_base()
    pretrain(base, *known, steps)
    x, target = known.x[:EXAMPLES], HOLES[known.y[:EXAMPLES]]

    def learn(model: Layer) -> float:
        step = TrainStep(model, CrossEntropy(), torch.optim.AdamW(model.parameters(), lr=3e-3))
        fit(step, lambda: (x, target), steps)
        with torch.no_grad():
            return accuracy(model(held_out.x), HOLES[held_out.y])

    return learn(build(base)), learn(Sequential(from_torch(make_base()), Linear(32, 2)))


if __name__ == "__main__":
    torch.manual_seed(0)
    transferred, scratch = train()
    print(f"whether a held-out digit has a hole, learned from {EXAMPLES} examples: ", end="")
    print(f"{transferred:.1f} % right on the base, {scratch:.1f} % from scratch")
