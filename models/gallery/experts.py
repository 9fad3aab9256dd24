"""A mixture of experts, whose gate decides who answers (Jacobs et al. 1991)."""

from __future__ import annotations

import torch
from torch import Tensor

from fitting import fit
from handgrad import MSE, Concat, Graph, Layer, Linear, ReLU, Sequential, ShapeError, Softmax, TrainStep


class Mix(Layer):
    """The mean of several answers, weighted.

    Forward:   out[n, d] = sum_e weights[n, e] answers[n, e D + d]
    Shapes:    weights (N, E); answers (N, E D), those of one expert side by side; out (N, D)
    Backward:  dweights[n, e] = sum_d dout[n, d] answers[n, e D + d];  danswers[n, e D + d] = weights[n, e] dout[n, d]
    Recorded:  weights, answers as (N, E, D)
    """

    def forward(self, weights: Tensor, answers: Tensor) -> Tensor:
        self.check_input(weights)
        fits = weights.dim() == answers.dim() == 2 and len(weights) == len(answers)
        if not fits or weights.shape[1] == 0 or answers.shape[1] % weights.shape[1]:
            problem = "weights must be (N, E) with E at least 1, and answers (N, E D), got "
            raise self.error(ShapeError, "forward", f"{problem}{tuple(weights.shape)} and {tuple(answers.shape)}")
        answers = answers.unflatten(1, (weights.shape[1], answers.shape[1] // weights.shape[1]))
        out = torch.einsum("ne,ned->nd", weights, answers)
        self.push(weights, answers, out=out)
        return out

    def backward(self, dout: Tensor) -> tuple[Tensor, Tensor]:
        weights, answers = self.pop(dout)
        # out[n, d] = sum_e weights[n, e] answers[n, e, d]
        dweights = torch.einsum("nd,ned->ne", dout, answers)
        danswers = torch.einsum("ne,nd->ned", weights, dout)
        return dweights, danswers.flatten(1)


def build(D: int = 2, E: int = 4, H: int = 16) -> Layer:
    """Points (N, D) to points (N, D)."""
    return Graph(
        "x",
        "out",
        weights=(Sequential(Linear(D, H), ReLU(), Linear(H, E), Softmax(-1)), "x"),
        answers=(Concat(*[Linear(D, D) for _ in range(E)], dim=-1), "x"),
        out=(Mix(), "weights answers"),
    )


def perceptron(D: int = 2, H: int = 34) -> Layer:
    """What it is compared with: one net with more parameters, 172 instead of 140."""
    return Sequential(Linear(D, H), ReLU(), Linear(H, D))


def turned(x: Tensor) -> Tensor:
    """Each quadrant of the plane is turned by an angle of its own: four linear maps, with jumps between them."""
    quadrant = (x[:, 0] > 0) + 2 * (x[:, 1] > 0)
    angle = torch.tensor([0.0, 1.0, 2.0, 3.0])[quadrant]
    c, s = angle.cos(), angle.sin()
    return torch.stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]], 1)


def train(model: Layer, steps: int = 2000) -> float:
    """The mean squared error on new points."""
    step = TrainStep(model, MSE(), torch.optim.AdamW(model.parameters(), lr=2e-2))

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(256, 2)
        return x, turned(x)

    fit(step, draw, steps)
    x = torch.randn(10_000, 2)
    with torch.no_grad():
        return float(MSE()(model(x), turned(x)))


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"mean squared error of four experts {train(build()):.3f}, of one perceptron {train(perceptron()):.3f}")
