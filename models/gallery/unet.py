"""A U-Net that takes the noise out of images of digits (Ronneberger et al. 2015, arXiv:1505.04597)."""

from __future__ import annotations

import torch
from torch import Tensor

import digits
from fitting import fit, rows
from handgrad import MSE, Cat, Conv2d, Graph, Layer, MaxPool2d, ReLU, Sequential, TrainStep, Upsample


def conv(C_in: int, C_out: int) -> Layer:
    """A 3x3 convolution that keeps the size."""
    return Sequential(Conv2d(C_in, C_out, 3, padding=1), ReLU())


def build(C: int = 16) -> Layer:
    """Images (N, 1, H, W), H and W multiples of 4, to images alike."""
    return Graph(
        "x",
        "out",
        a=(conv(1, C), "x"),
        b=(Sequential(MaxPool2d(2), conv(C, 2 * C)), "a"),
        c=(Sequential(MaxPool2d(2), conv(2 * C, 4 * C), Upsample(scale_factor=2)), "b"),
        bc=(Cat(1), "b c"),
        d=(Sequential(conv(6 * C, 2 * C), Upsample(scale_factor=2)), "bc"),
        ad=(Cat(1), "a d"),
        out=(Sequential(conv(3 * C, C), Conv2d(C, 1, 1)), "ad"),
    )


def train(steps: int = 600) -> tuple[float, float]:
    """The mean squared error of held-out images with noise, and of what the model makes of them."""
    known, held_out = digits.load()
    model = build()
    step = TrainStep(model, MSE(), torch.optim.AdamW(model.parameters(), lr=4e-3))

    def draw() -> tuple[Tensor, Tensor]:
        (x,) = rows(64, known.x)
        return x + 0.4 * torch.randn_like(x), x

    fit(step, draw, steps)
    noisy = held_out.x + 0.4 * torch.randn_like(held_out.x)
    with torch.no_grad():
        return float(MSE()(noisy, held_out.x)), float(MSE()(model(noisy), held_out.x))


if __name__ == "__main__":
    torch.manual_seed(0)
    noisy, cleaned = train()
    print(f"mean squared error of held-out images: {noisy:.4f} with noise, {cleaned:.4f} cleaned")
