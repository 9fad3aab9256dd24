"""A deep perceptron that starts badly beside one that starts well, seen from inside (makemore 3; arXiv:1502.03167)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fitting import rows
from handgrad import (
    SGD,
    BatchNorm1d,
    CrossEntropy,
    Embedding,
    Flatten,
    Layer,
    Linear,
    Sequential,
    Statistics,
    Tanh,
    TrainStep,
)
from tied import CONTEXT, NAMES, VOCABULARY, windows

PICTURE = Path(__file__).parents[1] / "results" / "initialisation.png"
BAD, GOOD = (3, False, 0.001), (5 / 3, True, 0.05)  # gain, norm, lr


def build(gain: float, norm: bool, H: int = 100, V: int = VOCABULARY, D: int = 10) -> Layer:
    """The lecture's six layers: the letters before (N, 3) to the logits of the next one (N, V)."""
    layers: list[Layer] = [Embedding(V, D), Flatten()]
    for width in (CONTEXT * D, H, H, H, H):
        layers += [Linear(width, H, bias=not norm, gain=gain), *([BatchNorm1d(H)] if norm else []), Tanh()]
    return Sequential(*layers, Linear(H, V, gain=gain))


def train(gain: float, norm: bool, lr: float, steps: int = 500) -> tuple[Statistics, float]:
    """What was seen inside, and the nats a letter of held-out names."""
    names = NAMES.read_text().split()
    held_out, known = windows(names[::10]), windows([name for i, name in enumerate(names) if i % 10])
    model, loss = build(gain, norm), CrossEntropy()
    step = TrainStep(model, loss, SGD(model.parameters(), lr=lr))
    stats = Statistics(model, step.optimizer)
    with stats:
        for _ in range(steps):
            step(*rows(32, *known))
    with torch.no_grad():
        return stats, float(loss(model.eval()(held_out[0]), held_out[1]))


if __name__ == "__main__":
    torch.set_num_threads(1)  # the fastest for a model this small
    titles = ["gain 3, no norm, lr 0.001", "gain 5/3, BatchNorm, lr 0.05"]
    torch.manual_seed(0)
    (bad, bad_nats), (good, good_nats) = train(*BAD), train(*GOOD)
    print(f"{bad_nats:.3f} nats a letter of held-out names with {titles[0]}; {good_nats:.3f} with {titles[1]}")
    for title, stats in zip(titles, (bad, good)):
        print(f"\n{title}: {stats}")
    path = Path(sys.argv[1]) if sys.argv[1:] else PICTURE
    bad.figure(good, titles=titles).savefig(path, dpi=80)
    print(f"\nbad beside good: {path}")
