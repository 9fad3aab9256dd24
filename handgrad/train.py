"""The training step as one callable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from handgrad.errors import StateError
from handgrad.layer import Layer
from handgrad.losses.loss import Loss
from handgrad.optim import SGD


class TrainStep:
    """Forward, loss, backward and update: ``loss_value = step(x, target)``.

    The gradients are cleared before the backward, so each step stands alone, and stay in `.grad` after the update.
    An interruption (an error, Ctrl-C) leaves no half-used record behind.

    Raises StateError where an earlier forward of the model still waits for its backward.

    >>> from handgrad import SGD, CrossEntropy, Linear
    >>> model = Linear(2, 3)
    >>> step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=0.5))
    >>> x, target = torch.eye(2), torch.tensor([0, 2])
    >>> losses = [float(step(x, target)) for _ in range(20)]
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(self, model: Layer, loss: Loss, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.params = list(model.parameters())

    def __call__(self, x: Any, target: Any) -> Tensor:
        self._refuse_leftovers()
        try:
            out: Tensor = self.loss.forward(self.model.forward(x), target)
            for param in self.params:
                param.grad = None
            dout = self.loss.backward()
            if self.model.takes_need_dx:
                self.model.backward(dout, need_dx=False)
            else:
                self.model.backward(dout)
        except BaseException:
            self.model.drop_records()
            self.loss.drop_records()
            raise
        self._update()
        return out

    def _update(self) -> None:
        """`optimizer.step()`, without its wrapper where that is known to do nothing."""
        optimizer = self.optimizer
        if type(optimizer) is SGD and not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks):
            optimizer.update()
        else:
            optimizer.step()

    def _refuse_leftovers(self) -> None:
        for layer in (self.model, self.loss):
            if layer._records:
                problem = f"{len(layer._records)} earlier forward(s) still wait for their backward; "
                raise layer.error(StateError, "forward", problem + "evaluate under torch.no_grad(), or drop_records()")
