"""Looking inside while a model runs: every output, every gradient on its way back, every gradient of a parameter.

All of it passes three places, `push`, `pop` and `add_grad` of `Layer`, where an attribute says who watches. Nobody
watching costs next to nothing. The two ends of a model, what it is given and the dx it returns, pass none of them:
there its own forward and backward are wrapped for as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor

from handgrad.errors import ArgumentError, NonFiniteError
from handgrad.layer import Layer, Watcher
from handgrad.records import tensors_in

Look: TypeAlias = Callable[[str, Layer, Tensor], None]
"""Called with the path of a layer ("" for the model itself), the layer, and a tensor."""


@contextmanager
def watch(
    *models: Layer,
    x: Look | None = None,
    out: Look | None = None,
    dout: Look | None = None,
    grad: Look | None = None,
    dx: Look | None = None,
) -> Iterator[None]:
    """Inside, a function is called with ``(path, layer, tensor)`` for what passes through the layers of the models.

    ======  ===================================================================================================
    out     every output of a forward, under torch.no_grad() too
    dout    every gradient that a backward is given
    grad    every gradient that is added to a parameter, with the path of the parameter: "2.weight"
    x, dx   what the model itself is given, and the gradient that its own backward returns, with the path ""
    ======  ===================================================================================================

    The tensors are those of the run itself: look, do not change, and copy what is to be kept (a first gradient becomes
    param.grad, and later ones are added to it). Of a tuple each tensor comes by itself. A layer that stands in several
    places has the path of the first. Several watchers may be at work at once; copies and pickles made
    meanwhile have none. A compiled step refuses to run while somebody watches: its graph has no place to look at.

    Raises ArgumentError where a model is no Layer.

    >>> import torch
    >>> from handgrad import Linear, Sequential, Tanh
    >>> model = Sequential(Linear(3, 4), Tanh())
    >>> with watch(model, out=lambda path, layer, t: print(path or "model", tuple(t.shape))):
    ...     _ = model(torch.ones(2, 3))
    0 (2, 4)
    1 (2, 4)
    model (2, 4)
    """
    for model in models:
        if not isinstance(model, Layer):
            raise ArgumentError(f"watch: a model must be a Layer, got {type(model).__name__}")
    watchers = [_Watcher(model, x, out, dout, grad, dx) for model in models]
    try:
        for watcher in watchers:
            watcher.begin()
        yield
    finally:
        for watcher in watchers:
            watcher.end()


def attach(watcher: Watcher, layers: Iterable[Layer]) -> None:
    """Let the watcher see what passes through the layers."""
    for layer in layers:
        layer._watchers = (*layer._watchers, watcher)


def detach(watcher: Watcher, layers: Iterable[Layer]) -> None:
    """Let it see nothing of them any more."""
    for layer in layers:
        layer._watchers = tuple(w for w in layer._watchers if w is not watcher)


class _Watcher:
    """Hands what passes through the layers of one model to the functions that want it, with paths."""

    def __init__(
        self, model: Layer, x: Look | None, out: Look | None, dout: Look | None, grad: Look | None, dx: Look | None
    ) -> None:
        self.model, self.layers = model, [layer for _, layer in model.named_layers()]
        self.paths = {id(layer): path for path, layer in model.named_layers()}
        self.names = {id(param): name for name, param in model.named_parameters()}
        self.x, self.out, self.dout, self.grad, self.dx = x, out, dout, grad, dx

    def begin(self) -> None:
        attach(self, self.layers)
        if self.x or self.dx:
            vars(self.model).update(_watched_ends(self.model))

    def end(self) -> None:
        detach(self, self.layers)
        if not any(isinstance(w, _Watcher) and w.model is self.model and (w.x or w.dx) for w in self.model._watchers):
            for name in ("forward", "backward"):
                vars(self.model).pop(name, None)

    def saw_out(self, layer: Layer, out: Any) -> None:
        self._show(self.out, layer, out)

    def saw_dout(self, layer: Layer, dout: Any) -> None:
        self._show(self.dout, layer, dout)

    def saw_grad(self, layer: Layer, param: Tensor, grad: Tensor) -> None:
        if self.grad is not None:
            self.grad(self.names.get(id(param)) or self.paths[id(layer)], layer, grad)

    def _show(self, look: Look | None, layer: Layer, value: Any) -> None:
        if look is not None:
            for t in (value,) if isinstance(value, Tensor) else tensors_in(value):
                look(self.paths[id(layer)], layer, t)


def _watched_ends(model: Layer) -> dict[str, Any]:
    """The model's own forward and backward, which show x and dx to those who watch this model."""
    plain = type(model)

    def show(what: str, value: Any) -> None:
        for watcher in model._watchers:
            if isinstance(watcher, _Watcher) and watcher.model is model:
                watcher._show(getattr(watcher, what), model, value)

    def forward(*inputs: Any, **options: Any) -> Any:
        show("x", inputs)
        return plain.forward(model, *inputs, **options)

    def backward(*douts: Any, **options: Any) -> Any:
        dx = plain.backward(model, *douts, **options)
        show("dx", dx)
        return dx

    return {"forward": forward, "backward": backward}


@contextmanager
def tripwire(*models: Layer, limit: float | None = None) -> Iterator[None]:
    """Inside, the first value that is not finite, in a forward, a backward or a gradient, is a NonFiniteError.

    It names the layer and its path, what it was (x, out, dout, dx, or the gradient of a parameter), where in it, how
    many there are, and where they came from: a parameter that is itself not finite, or what was looked at just before
    and was sound. With `limit`, values beyond it in magnitude count, too. ``tripwire(model, loss)`` watches the loss
    as well. After the error the records of that step are still there: `drop_records()`, or a TrainStep, which does.

    Raises ArgumentError where a model is no Layer, or the limit is not above 0.

    >>> import torch
    >>> from handgrad import Linear, Sequential, Tanh
    >>> model = Sequential(Linear(2, 2), Tanh())
    >>> _ = model[0].bias.fill_(float("inf"))
    >>> with tripwire(model):
    ...     model(torch.ones(1, 2))
    Traceback (most recent call last):
    handgrad.errors.NonFiniteError: out of 0 (Linear(2 -> 2)) is inf at [0, 0], and 2 of its 2 values are ...
    """
    if limit is not None and not limit > 0:
        raise ArgumentError(f"tripwire: limit must be above 0, got {limit}")
    before: tuple[str, str, Layer] | None = None  # what was looked at last

    def looking(what: str) -> Look:
        def look(path: str, layer: Layer, t: Tensor) -> None:
            nonlocal before
            if not _is_sound(t, limit):
                raise NonFiniteError(_report((what, path, layer), t, limit, before))
            before = what, path, layer

        return look

    with watch(*models, **{what: looking(what) for what in ("x", "out", "dout", "grad", "dx")}):
        yield


def _is_sound(t: Tensor, limit: float | None) -> bool:
    if not t.is_floating_point() or not t.numel():
        return True
    if limit is not None:
        return bool((t.abs() <= limit).all())
    # A sum is finite only where all its terms are. (A sum of finite terms can overflow: then look at each.)
    return math.isfinite(t.sum()) or bool(t.isfinite().all())


def _report(seen: tuple[str, str, Layer], t: Tensor, limit: float | None, before: tuple[str, str, Layer] | None) -> str:
    unsound = ~t.isfinite() if limit is None else ~(t.abs() <= limit)
    first = unsound.nonzero()[0].tolist()
    where = f" at {first}" if first else ""
    wanted = "not finite" if limit is None else f"not within {limit:g}"
    text = f"{_what(*seen)} is {float(t[tuple(first)]):g}{where}, and {int(unsound.sum())} of its {t.numel()} "
    text += f"values are {wanted}; "
    spoilt = [name for name, p in seen[2]._tensors("") if not _is_sound(p, limit)]
    if spoilt:
        return text + f"so are values of its own {' and '.join(spoilt)}"
    return text + (f"before it came {_what(*before)}, which was sound" if before else "nothing came before it")


def _what(what: str, path: str, layer: Layer) -> str:
    word = "the gradient" if what == "grad" else what
    return f"{word} of {f'{path} ({layer._head()})' if path else layer._head()}"
