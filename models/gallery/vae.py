"""A variational autoencoder of handwritten digits (Kingma and Welling 2013, arXiv:1312.6114)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, logsigmoid

import digits
from fitting import fit, rows
from handgrad import Flatten, Graph, Layer, Linear, Loss, ReLU, Sequential, ShapeError, TrainStep


class Sample(Layer):
    """Draw from a normal distribution.

    Forward:   z = mean + exp(logvar/2) noise,  noise normal, drawn anew; in evaluation z = mean
    Shapes:    all the same, any
    Backward:  dmean = dz;  dlogvar = dz exp(logvar/2) noise / 2
    Recorded:  exp(logvar/2) noise
    """

    def forward(self, mean: Tensor, logvar: Tensor) -> Tensor:
        self.check_input(mean)
        if logvar.shape != mean.shape:
            problem = f"logvar must have mean's shape, {tuple(mean.shape)}, got {tuple(logvar.shape)}"
            raise self.error(ShapeError, "forward", problem)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        scaled = (logvar / 2).exp() * noise
        z = mean + scaled
        self.push(scaled, out=z)
        return z

    def backward(self, dz: Tensor) -> tuple[Tensor, Tensor]:
        (scaled,) = self.pop(dz)
        # z = mean + exp(logvar/2) noise
        return dz, dz * scaled / 2


class ELBO(Loss):
    """What a code costs: the nats of the image under sigmoid(logits), and the divergence of z from a standard normal.

    Forward:   loss = 1/N sum (-y log s - (1 - y) log(1 - s)) + 1/N sum (mean^2 + exp(logvar) - 1 - logvar)/2
               with y = target, s = sigmoid(logits), over the N rows
    Shapes:    x the tuple (logits (N, D), mean (N, Z), logvar (N, Z)); target (N, D); loss ()
    Backward:  dlogits = (s - y)/N;  dmean = mean/N;  dlogvar = (exp(logvar) - 1)/(2 N)
    Recorded:  logits, mean, logvar, target
    """

    def forward(self, x: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        logits, mean, logvar = x
        self.check_like(logits, target)
        nats = (1 - target) * logits - logsigmoid(logits)
        divergence = (mean**2 + logvar.exp() - 1 - logvar) / 2
        loss = (nats.sum() + divergence.sum()) / len(target)
        self.push(logits, mean, logvar, target, out=loss)
        return loss

    def backward(self, dout: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        logits, mean, logvar, target = self.pop(dout)
        dloss = (1.0 if dout is None else dout) / len(target)
        return (logits.sigmoid() - target) * dloss, mean * dloss, (logvar.exp() - 1) / 2 * dloss


def build(D: int = 64, H: int = 256, Z: int = 8) -> Layer:
    """Images to the logits of their pixels, and to the mean and log-variance of their code z."""
    return Graph(
        "x",
        "logits mean logvar",
        h=(Sequential(Flatten(), Linear(D, H), ReLU()), "x"),
        mean=(Linear(H, Z), "h"),
        logvar=(Linear(H, Z), "h"),
        z=(Sample(), "mean logvar"),
        logits=(Sequential(Linear(Z, H), ReLU(), Linear(H, D)), "z"),
    )


def train(steps: int = 3000) -> tuple[float, float]:
    """Nats for a held-out image: the bound of the model, and what pixels cost that know nothing of each other."""
    known, held_out = digits.load()
    model, loss = build(), ELBO()
    step = TrainStep(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3))

    def draw() -> tuple[Tensor, Tensor]:
        (x,) = rows(128, known.x)
        return x, x.flatten(1)

    fit(step, draw, steps)
    target = held_out.x.flatten(1)
    independent = known.x.flatten(1).mean(0).clamp(1e-3, 1 - 1e-3).expand_as(target)
    with torch.no_grad():  # in training mode, for z is drawn; the mean of 20 draws
        bound = sum(float(loss(model(held_out.x), target)) for _ in range(20)) / 20
    return bound, float(binary_cross_entropy(independent, target, reduction="sum")) / len(target)


if __name__ == "__main__":
    torch.manual_seed(0)
    bound, independent = train()
    print(f"a held-out image costs {bound:.2f} nats at the most; with independent pixels {independent:.2f}")
