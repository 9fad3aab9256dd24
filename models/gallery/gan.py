"""A generator, and a critic that is frozen while the generator learns from it.

Goodfellow et al. 2014, arXiv:1406.2661
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tqdm import trange

from handgrad import BCEWithLogits, Layer, LeakyReLU, Linear, Sequential, TrainStep

MODES, WIDTH = 8, 0.05  # normal distributions around a circle of radius 1


def build(Z: int = 2, H: int = 128) -> tuple[Layer, Layer]:
    """From noise (N, Z) to points (N, 2), and from points to the logit of "it is real" (N, 1)."""
    generator = Sequential(Linear(Z, H), LeakyReLU(0.2), Linear(H, H), LeakyReLU(0.2), Linear(H, 2))
    critic = Sequential(Linear(2, H), LeakyReLU(0.2), Linear(H, H), LeakyReLU(0.2), Linear(H, 1))
    return generator, critic


def centres() -> Tensor:
    """The middle of each mode."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    return torch.stack([angle.cos(), angle.sin()], 1)


def real(size: int) -> Tensor:
    """Points of the distribution to be learned."""
    return centres()[torch.randint(MODES, (size,))] + WIDTH * torch.randn(size, 2)


def train(steps: int = 4000, size: int = 128) -> tuple[float, int]:
    """The share of made points that lie within four widths of a mode, in percent; and how many modes have points."""
    generator, critic = build()
    both = Sequential(generator, critic)
    options = {"lr": 1e-3, "betas": (0.5, 0.9)}
    criticize = TrainStep(critic, BCEWithLogits(), torch.optim.Adam(critic.parameters(), **options))
    generate = TrainStep(both, BCEWithLogits(), torch.optim.Adam(generator.parameters(), **options))
    is_real, is_made = torch.ones(size, 1), torch.zeros(size, 1)
    for _ in trange(steps, unit="step", disable=None, dynamic_ncols=True):
        with torch.no_grad():
            made = generator(torch.randn(size, 2))
        criticize(torch.cat([real(size), made]), torch.cat([is_real, is_made]))
        critic.freeze()
        generate(torch.randn(size, 2), is_real)
        critic.unfreeze()
    with torch.no_grad():
        distance, mode = torch.cdist(generator(torch.randn(4000, 2)), centres()).min(1)
    near = distance < 4 * WIDTH
    return 100 * float(near.double().mean()), int((mode[near].bincount(minlength=MODES) >= 40).sum())


if __name__ == "__main__":
    torch.manual_seed(0)
    near, modes = train()
    print(f"{near:.1f} % of the made points lie near a mode; {modes} of {MODES} modes have at least 1 % of them")
