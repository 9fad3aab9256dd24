"""A diffusion model of points on a spiral, told how far the noise has come (Ho et al. 2020, arXiv:2006.11239)."""

from __future__ import annotations

import torch
from torch import Tensor

from fitting import fit
from handgrad import MSE, Add, Embedding, Graph, Layer, Linear, Sequential, SiLU, TrainStep

STEPS = 100
BETA = torch.linspace(1e-4, 0.1, STEPS)  # the variance of the noise that each step adds
KEPT = (1 - BETA).cumprod(0)  # the share of the variance that is still the point's


def build(T: int = STEPS, H: int = 128) -> Layer:
    """Points with noise x (N, 2) and their steps t (N,) to the noise in them (N, 2)."""
    return Graph(
        "x t",
        "noise",
        h=(Linear(2, H), "x"),
        e=(Embedding(T, H), "t"),
        s=(Add(), "h e"),
        noise=(Sequential(SiLU(), Linear(H, H), SiLU(), Linear(H, H), SiLU(), Linear(H, 2)), "s"),
    )


def spiral(size: int) -> Tensor:
    """Points on a spiral, with a little noise."""
    angle = 3 + 9 * torch.rand(size)
    return torch.stack([angle.cos(), angle.sin()], 1) * angle[:, None] / 7 + 0.03 * torch.randn(size, 2)


@torch.no_grad()
def sample(model: Layer, size: int) -> Tensor:
    """New points, from noise backwards step by step."""
    x = torch.randn(size, 2)
    for t in reversed(range(STEPS)):
        noise = model(x, torch.full((size,), t))
        x = (x - BETA[t] / (1 - KEPT[t]).sqrt() * noise) / (1 - BETA[t]).sqrt()
        if t:
            x += BETA[t].sqrt() * torch.randn(size, 2)
    return x


def distance(a: Tensor, b: Tensor) -> float:
    """The energy distance between two clouds of points; 0 for the same distribution."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def train(steps: int = 4000, size: int = 2000) -> tuple[float, float, float]:
    """Energy distances from points of the spiral: of made points, of other points of the spiral, of plain noise."""
    model = build()
    step = TrainStep(model, MSE(), torch.optim.AdamW(model.parameters(), lr=3e-3))

    def draw() -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, noise, t = spiral(256), torch.randn(256, 2), torch.randint(STEPS, (256,))
        kept = KEPT[t][:, None]
        return (kept.sqrt() * x + (1 - kept).sqrt() * noise, t), noise

    fit(step, draw, steps)
    points = spiral(size)
    return tuple(distance(points, others) for others in (sample(model, size), spiral(size), torch.randn(size, 2)))


if __name__ == "__main__":
    torch.manual_seed(0)
    made, others, noise = train()
    print(f"energy distance from the spiral: {made:.4f} made, {others:.4f} other points of it, {noise:.4f} noise")
