"""Several losses at once, and losses of one's own, in a training step."""

from __future__ import annotations

import pytest
import torch

from handgrad import (
    MSE,
    SGD,
    ArgumentError,
    CrossEntropy,
    Graph,
    Linear,
    Loss,
    Losses,
    ShapeError,
    Tanh,
    TrainStep,
)


def test_what_cannot_be_is_refused():
    with pytest.raises(ArgumentError, match=r"Losses: every argument must be a Loss of one number, got Tanh at 1"):
        Losses(MSE(), Tanh())
    with pytest.raises(ArgumentError, match=r'Loss of one number, got reduction="none" at 0'):
        Losses(MSE(reduction="none"))
    with pytest.raises(ArgumentError, match=r"one weight per loss if any; got 2 losses and 1 weights"):
        Losses(MSE(), MSE(), weights=(1,))
    with pytest.raises(ArgumentError, match=r"one or more losses are needed"):
        Losses()
    loss = Losses(MSE(), CrossEntropy())
    with pytest.raises(ShapeError, match=r"x must be a tuple of 2, one entry per loss, got Tensor"):
        loss(torch.zeros(2), (torch.zeros(2), torch.zeros(2)))
    with pytest.raises(ShapeError, match=r"target must be a tuple of 2, one entry per loss, got a tuple of 1"):
        loss((torch.zeros(2), torch.zeros(2, 3)), (torch.zeros(2),))
    with pytest.raises(ShapeError, match=r"^in 0 \(MSE\(\)\): MSE\(\)\.forward: target must have x's shape"):
        loss((torch.zeros(2), torch.zeros(2, 3)), (torch.zeros(3), torch.tensor([0, 1])))
    assert repr(loss) == "Losses(weights=(1.0, 1.0)\n  (0): MSE()\n  (1): CrossEntropy()\n)"


def test_two_outputs_with_a_loss_each_train_as_written_out():
    model = Graph("x", "a b", h=(Linear(3, 4), "x"), t=(Tanh(), "h"), a=(Linear(4, 5), "t"), b=(Linear(4, 1), "t"))
    x, targets = torch.randn(8, 3), (torch.randint(5, (8,)), torch.randn(8, 1))
    step = TrainStep(model, Losses(CrossEntropy(), MSE(), weights=(1, 0.5)), SGD(model.parameters(), lr=0.0))
    value = step(x, targets)
    params = {name: p.clone().requires_grad_() for name, p in model.named_parameters()}
    t = torch.tanh(x @ params["h.weight"].T + params["h.bias"])
    a, b = (t @ params[f"{n}.weight"].T + params[f"{n}.bias"] for n in "ab")
    wanted = torch.nn.functional.cross_entropy(a, targets[0]) + 0.5 * torch.nn.functional.mse_loss(b, targets[1])
    wanted.backward()
    torch.testing.assert_close(value, wanted.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, params[name].grad, msg=lambda m, name=name: f"{name}: {m}")


class Distance(Loss):
    """The mean distance between two outputs, less a margin: a loss of two inputs and no constructor."""

    def forward(self, x, target):
        a, b = x
        diff = a - b
        out = (diff * diff).sum() * target
        self.push(diff, target, out=out)
        return out

    def backward(self, dout=None):
        diff, target = self.pop(dout)
        dx = 2 * diff * target * (1.0 if dout is None else dout)
        return dx, -dx


def test_a_loss_of_ones_own_needs_no_constructor():
    tower = Linear(3, 2)
    model = Graph("a b", "l r", l=(tower, "a"), r=(tower, "b"))
    step = TrainStep(model, Distance(), SGD(model.parameters(), lr=0.01))
    xs = torch.randn(6, 5, 3), torch.randn(6, 5, 3)
    before = [float(v) for v in step.many(xs, torch.ones(6))]
    after = [float(v) for v in step.many(xs, torch.ones(6))]
    assert sum(after) < sum(before)
    assert step.loss.reduction == "mean"
