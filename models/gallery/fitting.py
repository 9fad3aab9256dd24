"""What the models of the gallery share: the loop that trains them, and random minibatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import trange

from handgrad import TrainStep


def fit(step: TrainStep, draw: Callable[[], tuple[Any, Any]], steps: int) -> None:
    """Take so many steps, each on the (x, target) that `draw` gives, while the learning rate falls to zero."""
    schedule = torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda done: 1 - done / steps)
    with trange(steps, unit="step", disable=None, dynamic_ncols=True) as bar:  # on a terminal only
        for done in bar:
            loss = step(*draw())
            schedule.step()
            if done % 20 == 0:
                bar.set_postfix(loss=f"{float(loss):.4f}")


def rows(size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Some rows of the tensors, drawn with replacement: the same ones of each."""
    drawn = torch.randint(len(tensors[0]), (size,))
    return tuple(tensor[drawn] for tensor in tensors)


def accuracy(scores: Tensor, target: Tensor) -> float:
    """The share of rows whose largest score is that of the target class, in percent."""
    return 100 * float((scores.argmax(-1) == target).double().mean())
