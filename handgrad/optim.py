"""Stochastic gradient descent. Any optimizer of torch.optim works on the same parameters.

An exponential moving average of the weights is a copy of the model, moved a little after each step:

>>> import copy
>>> from handgrad import BatchNorm1d, Linear, Sequential
>>> model = Sequential(Linear(2, 3), BatchNorm1d(3))
>>> average = copy.deepcopy(model)
>>> def follow(decay=0.99):
...     for p, q in zip(average.parameters(), model.parameters()):
...         _ = p.lerp_(q, 1 - decay)
...     for (_, b), (_, c) in zip(average.named_buffers(), model.named_buffers()):
...         _ = b.copy_(c)
>>> follow()

torch.optim.swa_utils.AveragedModel takes modules alone: ``AveragedModel(to_torch(model))``, and update it with a
`to_torch(model)`, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from handgrad.errors import ArgumentError
from handgrad.tracked import any_tracked, profiling


class SGD(torch.optim.Optimizer):
    """Stochastic gradient descent with momentum, to the letter of torch.optim.SGD.

    Step:     g = grad (its negative if `maximize`) + weight_decay p
              with momentum: buf = momentum buf + (1 - dampening) g (in the first step buf = g), then
              g = g + momentum buf if `nesterov`, else g = buf
              p = p - lr g
    Raises:   ArgumentError for a negative lr, momentum or weight_decay, or nesterov without momentum or with dampening.
    Source:   torch.optim.SGD; Sutskever et al. 2013 (proceedings.mlr.press/v28/sutskever13) for momentum.

    It is a torch.optim.Optimizer, so `param_groups`, `state_dict()` and the schedulers of
    torch.optim.lr_scheduler work as usual. A parameter whose `.grad` is None is left alone.

    >>> from handgrad import Linear
    >>> layer = Linear(1, 1, bias=False)
    >>> _ = layer.weight.fill_(1.0)
    >>> optimizer = SGD(layer.parameters(), lr=0.1)
    >>> _ = layer(torch.tensor([[2.0]])), layer.backward(torch.tensor([[1.0]]))
    >>> optimizer.step()
    >>> layer.weight  # 1 - 0.1 * 2
    tensor([[0.8000]])
    """

    _opt_called: bool  # what an LR scheduler looks at, which sets it in each step, to warn of its own step before one

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ArgumentError(f"SGD: {name} must be at least 0, got {value}")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ArgumentError(f"SGD: nesterov needs momentum above 0 and dampening 0, got {momentum} and {dampening}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns closure()'s result where a closure is given.

        What torch.optim wraps round a step, its hooks and a range for the profiler, costs as much as the update of a
        small model. So it is there only where somebody looks. (An override has torch's own wrapper.)
        """
        if type(self).step is SGD.step and (hooked(self) or profiling()):
            return self._step_seen(closure)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # says to torch.optim that the wrapper need not be put on

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set every gradient to None, or with set_to_none=False to zero."""
        if not set_to_none or profiling():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads = [], []
            for p in group["params"]:
                if (grad := p.grad) is not None:
                    params.append(p)
                    grads.append(grad)
            if any_tracked(params):  # handgrad's never are, and no_grad would cost a small model 4 % of its step
                with torch.no_grad():
                    self._update(params, grads, group)
            elif params:
                self._update(params, grads, group)
        return loss

    _step_seen = torch.optim.Optimizer.profile_hook_step(_step)  # the same with the hooks, in a profiler range

    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        if not isinstance(group["momentum"], Tensor) and group["momentum"] == 0:
            descend(params, grads, [], group)
            return
        states = [self.state[p] for p in params]
        buffers = descend(params, grads, [s.get("momentum_buffer") for s in states], group)
        for state, buffer in zip(states, buffers):
            state["momentum_buffer"] = buffer


def hooked(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody is to be called before or after each step of the optimizer."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


def descend(
    params: list[Tensor], grads: list[Tensor], buffers: Sequence[Tensor | None], group: dict[str, Any]
) -> list[Tensor]:
    """The formula of SGD: change params and buffers in place, and return the buffers; grads are never written to.

    One multi-tensor operation a line. A buffer is None before its parameter's first step, and there are none without
    momentum. An lr or momentum that is a tensor is read anew by a compiled graph at each call.
    """
    lr, momentum, share = group["lr"], group["momentum"], 1 - group["dampening"]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if group["weight_decay"] != 0:
        grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
    moved: list[Tensor] = []
    if buffers:
        begun = [b for b in buffers if b is not None]
        if len(begun) == len(buffers):
            moved = begun
            torch._foreach_mul_(moved, momentum)
            torch._foreach_add_(moved, grads, alpha=share)
        else:
            moved = [g.clone() if b is None else b.mul_(momentum).add_(g, alpha=share) for b, g in zip(buffers, grads)]
        grads = _plus(grads, moved, momentum) if group["nesterov"] else moved
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(grads, lr))
    else:
        torch._foreach_add_(params, grads, alpha=-lr)
    return moved


def _plus(tensors: list[Tensor], others: list[Tensor], factor: float | Tensor) -> list[Tensor]:
    """``tensors + factor others``: in one operation, unless the factor is a tensor."""
    if isinstance(factor, Tensor):
        return list(torch._foreach_add(tensors, torch._foreach_mul(others, factor)))
    return list(torch._foreach_add(tensors, others, alpha=factor))
