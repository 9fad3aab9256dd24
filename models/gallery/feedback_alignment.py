"""Another backward rule: errors go back through fixed random weights (Lillicrap et al. 2014, arXiv:1411.0247)."""

from __future__ import annotations

import torch
from torch import Tensor

import digits
from handgrad import Flatten, Layer, Linear, Sequential, Tanh, buffer


class FeedbackLinear(Linear):
    """A Linear whose backward does not know its weight.

    Forward:   out = x @ weight.T + bias
    Shapes:    x (..., D_in); weight, feedback (D_out, D_in); bias (D_out,); out (..., D_out)
    Backward:  dweight and dbias as ever, but dx = dout @ feedback, which is random and stays as it is
    Recorded:  x
    """

    feedback: Tensor = buffer("D_out", "D_in")

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.feedback = Linear(in_features, out_features).weight

    def backward(self, dout: Tensor) -> Tensor:
        super().backward(dout, need_dx=False)
        return dout @ self.feedback


def build(linear: type[Linear] = FeedbackLinear, H: int = 256) -> Layer:
    """Images (N, 1, 8, 8) to logits (N, 10)."""
    return Sequential(Flatten(), linear(64, H), Tanh(), linear(H, H), Tanh(), linear(H, 10))


def train(linear: type[Linear], steps: int = 1000) -> float:
    """Accuracy on the held-out images, in percent."""
    return digits.train(build(linear), steps, lr=1e-3)


if __name__ == "__main__":
    for linear in (FeedbackLinear, Linear):
        torch.manual_seed(0)
        print(f"{train(linear):.1f} % of the held-out images are read right with {linear.__name__}")
