"""The table of the makemore lecture's `cmp`: every gradient of one training step, by hand and by autograd."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handgrad.layer import Layer
from handgrad.tables import Shown, Table
from handgrad.testing import subject
from handgrad.testing.operations import InFloat64, Lowers
from handgrad.tracked import tracked_by_autograd


@dataclass(frozen=True)
class Row:
    """One tensor: is the hand-written gradient bitwise autograd's, is it equal up to rounding, how far is it off."""

    name: str
    exact: bool
    approximate: bool
    max_difference: float
    note: str = ""


@dataclass(frozen=True, repr=False)
class GradientTable(Shown):
    """The rows of `gradient_table`: printed as a table, in a notebook as HTML; `ok`: is every row approximate."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether there are rows and every one of them agrees with autograd up to rounding."""
        return bool(self.rows) and all(row.approximate for row in self.rows)

    def parts(self) -> list[str | Table]:
        """The table: as in the lecture, with a note where there is more to say."""
        head = ["", "exact", "approximate", "max difference", ""]
        body = [
            [
                row.name,
                str(row.exact),
                str(row.approximate),
                f"{row.max_difference:.3g}",
                row.note or ("" if row.approximate else "wrong"),
            ]
            for row in self.rows
        ]
        return [Table([head, *body], "lrrrl")]


def gradient_table(model: Any, loss: Any, x: Any, target: Any) -> GradientTable:
    """Compare every gradient of one training step with autograd run through the model's own forward.

    The rows are, as the backward meets them: the loss, dx of the loss (the gradient of the model's output), the loss's
    parameters, and for each layer from the last to the first dx and its parameters. A layer without layers inside has a
    dx row for every use, and for each of several inputs: dx[0], dx[1]. An input that is integer has none, and so has
    one that nobody wants the gradient of. A frozen parameter has no gradient, and its row says so.

    `exact` is bitwise equality. `approximate` allows ``sqrt(eps) S`` of rounding, eps of the tensor's dtype (3.5e-4 S
    in float32, 1.5e-8 S in float64), where S is the largest element of autograd's tensor, or a hundredth of the
    largest one of dx of the loss where that is more. A gradient that is missing, misshaped, of another dtype or not
    finite is never approximate. The sharp proof is `check_layer`, or this table of a model in float64. There, layers
    that compute in float32 whatever comes in do so in float64.

    Both runs use copies: the caller's model, its buffers and gradients and torch's global generator stay as they are.
    x, target and the model's output may be tuples. The loss must be reduced to a scalar.

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
    with subject.private_rng(), torch.no_grad(), Lowers() as lowers:
        _call(subject.clone(model), _each(_copied, x))
    precise = InFloat64() if lowers.to is not None else nullcontext()
    with torch.enable_grad(), tracked_by_autograd(), precise:
        with subject.private_rng():
            by_hand, declined = _by_hand(subject.clone(model), subject.clone(loss), _each(_copied, x), target)
        with subject.private_rng():
            by_autograd = _by_autograd(subject.clone(model), subject.clone(loss), _each(_copied, x), target, declined)
    names = [*by_autograd, *(name for name in by_hand if name not in by_autograd)]
    # what is 0 but for rounding: a bias before a batch norm
    douts = [t for name, t in by_autograd.items() if name.endswith(OF_LOSS) and t is not None]
    floor = 1e-2 * max(map(_max_abs, douts), default=0.0)
    frozen = subject.frozen(model) | {f"loss.{name}" for name in subject.frozen(loss)}
    return GradientTable(
        tuple(_row(name, by_hand.get(name), by_autograd.get(name), floor, name in frozen) for name in names)
    )


OF_LOSS = " of the loss"
Gradients = dict[str, "Tensor | None"]
Uses = dict[str, list[dict[str, Any]]]
"""For each layer by its path: the gradients of its inputs by name, in one dict per use, the last use first."""
Declined = set[tuple[str, int]]
"""The uses, by path and number, of which nobody wants dx."""


def _by_hand(model: Any, loss: Any, x: Any, target: Any) -> tuple[Gradients, Declined]:
    """Run the model's and the loss's own backward, and note what each layer returns."""
    uses: Uses = defaultdict(list)

    def note(path: str, layer: Any) -> None:
        backward, told = layer.backward, getattr(layer, "takes_need_dx", False)
        layer.takes_need_dx = True  # so that it is known where nobody wants dx

        def noting(*args: Any, need_dx: bool = True, **kwargs: Any) -> Any:
            dx = backward(*args, need_dx=need_dx, **kwargs) if told else backward(*args, **kwargs)
            uses[path].append(subject.named("dx", subject.flatten(dx)) if need_dx else {})
            return dx

        layer.backward = noting

    _wrap_leaves(model, note)
    value = loss.forward(_call(model, x), target)
    dout = loss.backward()
    model.backward(_each(_copied, dout))
    declined = {(path, i) for path, several in uses.items() for i, used in enumerate(several) if not used}
    return _assemble(model, loss, value, dout, uses), declined


def _by_autograd(model: Any, loss: Any, x: Any, target: Any, declined: Declined) -> Gradients:
    """Run forward with autograd recording; each layer reads its inputs through aliases that keep the gradient."""
    aliases: Uses = defaultdict(list)

    def note(path: str, layer: Any) -> None:
        forward = layer.forward

        def noting(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():  # inside a Constant nothing goes back
                args = _each(_alias, args)
                given = tuple(x for x in subject.flatten(args) if isinstance(x, Tensor))
                aliases[path].insert(0, subject.named("dx", given))
            return forward(*args, **kwargs)

        layer.forward = noting

    _wrap_leaves(model, note)
    for owner in (model, loss):
        frozen = subject.frozen(owner)
        for name, param in subject.parameters(owner).items():
            param.requires_grad_(name not in frozen)
    out = _each(_alias, _call(model, x))
    value = loss.forward(out, target)
    value.backward()
    uses = {
        path: [{} if (path, i) in declined else {n: t.grad for n, t in used.items()} for i, used in enumerate(several)]
        for path, several in aliases.items()
    }
    return _assemble(model, loss, value.detach(), _each(lambda t: t.grad, out), uses)


def _call(model: Any, x: Any) -> Any:
    """The model's output; a tuple is spread over several inputs as in a container."""
    return model.forward_at(None, x) if isinstance(model, Layer) else model.forward(x)


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """The function of a value, or of each one in nested tuples."""
    return tuple(_each(function, v) for v in value) if isinstance(value, tuple) else function(value)


def _copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _alias(x: Any) -> Any:
    """Another tensor object for the same values, whose gradient autograd keeps; of what has none, x itself."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    alias = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    alias.retain_grad()
    return alias


def _wrap_leaves(model: Any, wrap: Callable[[str, Any], None]) -> None:
    for path, layer in subject.named_layers(model):
        if not (hasattr(layer, "named_children") and any(True for _ in layer.named_children())):
            wrap(path, layer)


def _assemble(model: Any, loss: Any, value: Tensor, dout: Any, uses: Uses) -> Gradients:
    """Name the gradients, in the order in which a backward meets them."""
    gradients: Gradients = {"loss": value}
    gradients |= {f"{name}{OF_LOSS}": d for name, d in subject.named("dx", subject.flatten(dout)).items()}
    gradients |= {f"loss.{name}": param.grad for name, param in subject.parameters(loss).items()}
    params = subject.parameters(model)
    for path, layer in reversed(subject.named_layers(model)):
        several = uses.get(path, [])
        for i, used in enumerate(several):
            nth = f", use {len(several) - i}" if len(several) > 1 else ""
            rows = {f"{_join(path, name)} ({type(layer).__name__}{nth})": dx for name, dx in used.items()}
            gradients |= {name: dx for name, dx in rows.items() if isinstance(dx, Tensor)}
        for name, param in params.items():
            if name.rpartition(".")[0] == path:
                gradients[name] = param.grad
    return {**gradients, **{name: param.grad for name, param in params.items() if name not in gradients}}


def _row(name: str, got: Tensor | None, want: Tensor | None, floor: float, frozen: bool) -> Row:
    if want is None and (got is None or (not frozen and _max_abs(got) == 0)):
        return Row(name, True, True, 0.0, "frozen" if frozen else "no gradient")
    if got is None or want is None:
        extra = "frozen, yet there is one by hand" if frozen else "none by autograd"
        return Row(name, False, False, float("inf"), "missing by hand" if got is None else extra)
    if got.shape != want.shape or got.dtype is not want.dtype:
        note = f"{tuple(got.shape)} {got.dtype} instead of {tuple(want.shape)} {want.dtype}"
        return Row(name, False, False, float("inf"), note)
    difference = _max_abs(got - want)
    limit = torch.finfo(want.dtype).eps ** 0.5 * max(_max_abs(want), floor)
    return Row(name, torch.equal(got, want), difference <= limit, difference)


def _max_abs(t: Tensor) -> float:
    """The largest magnitude; NaN where there is one, 0 for an empty tensor."""
    return float(t.detach().abs().max()) if t.numel() else 0.0


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
