"""The table of the makemore lecture's `cmp`: every gradient of one training step, by hand and by autograd."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handgrad.layer import is_frozen
from handgrad.testing import subject
from handgrad.tracked import tracked_by_autograd


@dataclass(frozen=True)
class Row:
    """One tensor: is the hand-written gradient bitwise autograd's, is it equal up to rounding, how far is it off."""

    name: str
    exact: bool
    approximate: bool
    max_difference: float
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.exact!s:>6} {self.approximate!s:>12} {self.max_difference:>15.3g}"
        return f"{text}  {self.note}" if self.note else text


@dataclass(frozen=True)
class GradientTable:
    """The rows of `gradient_table`. `str()` prints the table; `ok` says whether every row is approximate."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether there are rows and every one of them agrees with autograd up to rounding."""
        return bool(self.rows) and all(row.approximate for row in self.rows)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows], default=4)
        head = f"{'':<{width}}  {'exact':>6} {'approximate':>12} {'max difference':>15}"
        return "\n".join([head, *(f"{row.name:<{width}}  {row}" for row in self.rows)])


def gradient_table(model: Any, loss: Any, x: Any, target: Any) -> GradientTable:
    """Compare every gradient of one training step with autograd run through the model's own forward.

    The rows are, as the backward meets them: the loss, dx of the loss (the gradient of the model's output), and for
    each layer from the last to the first dx and its parameters. A layer without layers inside has a dx row for every
    use; a layer whose input is integer has none.

    `exact` is bitwise equality. `approximate` allows ``sqrt(eps) S`` of rounding, eps of the tensor's dtype (3.5e-4 S
    in float32, 1.5e-8 S in float64), where S is the largest element of autograd's tensor, or a hundredth of the
    largest one of dx of the loss where that is more. A gradient that is missing, misshaped, of another dtype or not
    finite is never approximate. The sharp proof is `check_layer`, or this table of a model in float64.

    Both runs use copies: the caller's model, its buffers and gradients and torch's global generator stay as they are.
    The loss must be reduced to a scalar.

    >>> from handgrad import CrossEntropy, Linear, Sequential, Tanh
    >>> generator = torch.Generator().manual_seed(1)
    >>> model = Sequential(Linear(3, 4, generator=generator), Tanh())
    >>> x = torch.randn(5, 3, generator=generator)
    >>> table = gradient_table(model, CrossEntropy(), x, torch.tensor([0, 3, 1, 1, 2]))
    >>> [row.name for row in table.rows]
    ['loss', 'dx of the loss', '1.dx (Tanh)', '0.dx (Linear)', '0.weight', '0.bias']
    >>> table.ok
    True
    """
    with torch.enable_grad(), tracked_by_autograd():
        with subject.private_rng():
            by_hand = _by_hand(subject.clone(model), subject.clone(loss), _detached(x), target)
        with subject.private_rng():
            by_autograd = _by_autograd(subject.clone(model), subject.clone(loss), _detached(x), target)
    names = [*by_autograd, *(name for name in by_hand if name not in by_autograd)]
    dout = by_autograd["dx of the loss"]
    floor = 0.0 if dout is None else 1e-2 * _max_abs(dout)  # what is 0 but for rounding: a bias before a batch norm
    return GradientTable(tuple(_row(name, by_hand.get(name), by_autograd.get(name), floor) for name in names))


Gradients = dict[str, "Tensor | None"]


def _by_hand(model: Any, loss: Any, x: Any, target: Any) -> Gradients:
    """Run the model's and the loss's own backward, and note what each layer returns."""
    uses: dict[str, list[Tensor | None]] = defaultdict(list)

    def note(path: str, layer: Any) -> None:
        backward = layer.backward

        def noting(*args: Any, **kwargs: Any) -> Any:
            dx = backward(*args, **kwargs)
            first = dx[0] if isinstance(dx, tuple) else dx  # of several inputs the first, as for autograd below
            uses[path].append(first if isinstance(first, Tensor) else None)
            return dx

        layer.backward = noting

    _wrap_leaves(model, note)
    value = loss.forward(model.forward(x), target)
    dout = loss.backward()
    model.backward(dout.clone())
    return _assemble(model, value, dout, uses)


def _by_autograd(model: Any, loss: Any, x: Any, target: Any) -> Gradients:
    """Run forward with autograd recording; each layer reads its input through an alias that keeps the gradient."""
    aliases: dict[str, list[Tensor | None]] = defaultdict(list)

    def note(path: str, layer: Any) -> None:
        forward = layer.forward

        def noting(x: Any, *args: Any, **kwargs: Any) -> Any:
            alias = None
            if isinstance(x, Tensor) and x.is_floating_point():
                x = alias = x.view_as(x)
                alias.retain_grad()
            aliases[path].insert(0, alias)
            return forward(x, *args, **kwargs)

        layer.forward = noting

    _wrap_leaves(model, note)
    for param in subject.parameters(model).values():
        param.requires_grad_(not is_frozen(param))
    out = model.forward(x.requires_grad_() if x.is_floating_point() else x)
    out.retain_grad()
    value = loss.forward(out, target)
    value.backward()
    uses = {path: [None if t is None else t.grad for t in used] for path, used in aliases.items()}
    return _assemble(model, value.detach(), out.grad, uses)


def _wrap_leaves(model: Any, wrap: Callable[[str, Any], None]) -> None:
    for path, layer in subject.named_layers(model):
        if not (hasattr(layer, "named_children") and any(True for _ in layer.named_children())):
            wrap(path, layer)


def _assemble(model: Any, value: Tensor, dout: Tensor | None, uses: dict[str, list[Tensor | None]]) -> Gradients:
    """Name the gradients, in the order in which a backward meets them."""
    gradients: Gradients = {"loss": value, "dx of the loss": dout}
    params = subject.parameters(model)
    for path, layer in reversed(subject.named_layers(model)):
        used = [t for t in uses.get(path, []) if t is not None]
        for i, dx in enumerate(used):
            nth = f", use {len(used) - i}" if len(used) > 1 else ""
            gradients[f"{_join(path, 'dx')} ({type(layer).__name__}{nth})"] = dx
        for name, param in params.items():
            if name.rpartition(".")[0] == path:
                gradients[name] = param.grad
    return {**gradients, **{name: param.grad for name, param in params.items() if name not in gradients}}


def _row(name: str, got: Tensor | None, want: Tensor | None, floor: float) -> Row:
    if got is None and want is None:
        return Row(name, True, True, 0.0, "no gradient")
    if got is None or want is None:
        return Row(name, False, False, float("inf"), "missing by hand" if got is None else "none by autograd")
    if got.shape != want.shape or got.dtype is not want.dtype:
        note = f"{tuple(got.shape)} {got.dtype} instead of {tuple(want.shape)} {want.dtype}"
        return Row(name, False, False, float("inf"), note)
    difference = _max_abs(got - want)
    limit = torch.finfo(want.dtype).eps ** 0.5 * max(_max_abs(want), floor)
    return Row(name, torch.equal(got, want), difference <= limit, difference)


def _max_abs(t: Tensor) -> float:
    """The largest magnitude; NaN where there is one, 0 for an empty tensor."""
    return float(t.detach().abs().max()) if t.numel() else 0.0


def _detached(x: Any) -> Any:
    return x.detach().clone()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
