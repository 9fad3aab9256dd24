"""Both ways between handgrad and torch.nn: a Layer as an nn.Module, and an nn.Module as a Layer.

`to_torch` puts a hand-written backward into any model that autograd differentiates. `from_torch` puts any module into a
model of handgrad; inside it, and nowhere else, autograd works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from handgrad.errors import ArgumentError, DtypeError, HandgradError, IndexRangeError, StateError
from handgrad.layer import Layer, Record, arity, buffer, is_frozen, parameter
from handgrad.layers.containers import Sequential
from handgrad.losses.loss import Loss

_one_at_a_time = RLock()  # a call of a layer as a module puts the tensors and records of that call into the layer


def to_torch(layer: Layer, *, layer_by_layer: bool = False) -> nn.Module:
    """The layer as a torch.nn.Module: usable inside any torch model, trained by autograd and torch.optim.

    The module's parameters are nn.Parameters under the layer's names, in the layer's memory: what an optimizer does
    to one, the other sees, and both have the same `state_dict`. Conversions, moves and `load_state_dict(assign=True)`
    give both the same new memory. Gradients go through autograd to the module's parameters (so hooks and
    DistributedDataParallel see them); the layer's own `.grad` stays as it was.

    Each call keeps its records in the graph, not in the layer: the backward passes may come in any order, repeatedly
    with retain_graph, never, and in any thread: calls take turns, also those of other layers. The backward itself is
    not differentiable: a double backward is an error that says so.
    `train()` and `eval()` reach the layer. A loss becomes a module of two inputs.

    With `layer_by_layer` a Sequential becomes an nn.Sequential of a module for each layer, with the same `state_dict`.
    So autograd has the gradients of the last layers while those of the first are still to be computed, and
    DistributedDataParallel sends them meanwhile.

    >>> from handgrad import Linear, Sequential, Tanh
    >>> module = nn.Sequential(to_torch(Sequential(Linear(3, 4), Tanh())), nn.Linear(4, 1))
    >>> [name for name, _ in module.named_parameters()]
    ['0.0.weight', '0.0.bias', '1.weight', '1.bias']
    >>> module(torch.randn(2, 3)).sum().backward()
    >>> module[0].get_parameter("0.weight").grad.shape
    torch.Size([4, 3])
    """
    if not isinstance(layer, Layer):
        raise ArgumentError(f"to_torch: expected a Layer, got {type(layer).__name__}")
    return _each_a_module(layer, {}) if layer_by_layer else LayerModule(layer)


def from_torch(module: nn.Module) -> Layer:
    """The module as a Layer: usable anywhere in a model of handgrad, its backward computed by autograd inside.

    The layer's parameters are plain tensors in the memory of the module's, under the module's names. Floating inputs
    get their dx, other inputs None; a parameter that the output does not depend on gets no gradient, and one that does
    not require grad is a buffer. Gradients are dense, also those of an nn.Embedding(sparse=True). Modes reach the
    module at the next forward, submodule by submodule. The output must be a tensor or a tuple of tensors.

    What the module refuses is an error that names the layer: IndexRangeError for its IndexError, DtypeError for its
    TypeError, else ArgumentError. A module that has `inplace=True` somewhere works on copies of its inputs; any other
    that changes an input in place is refused.

    >>> from handgrad import Linear, Sequential
    >>> model = Sequential(Linear(3, 4), from_torch(nn.LayerNorm(4)), Linear(4, 1))
    >>> [name for name, _ in model.named_parameters()]
    ['0.weight', '0.bias', '1.weight', '1.bias', '2.weight', '2.bias']
    >>> model(torch.randn(2, 3)).shape, model.backward(torch.randn(2, 1)).shape
    (torch.Size([2, 1]), torch.Size([2, 3]))
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"from_torch: expected a torch.nn.Module, got {type(module).__name__}")
    return ModuleLayer(module)


# ---------------------------------------------------------------------- a layer as a module


class LayerModule(nn.Module):
    """What `to_torch` returns. Its submodules only hold parameters and buffers, at the paths that the layer has."""

    def __init__(self, layer: Layer, params: dict[int, nn.Parameter] | None = None) -> None:
        """Make a module of the layer; `params` are those that other modules have already, by the layer's tensor."""
        super().__init__()
        self._layer = layer
        self._layers = [inner for _, inner in layer.named_layers()]
        self._places: list[tuple[Layer, str, nn.Module]] = []  # layer.name and module.name are one tensor
        self._frozen: set[int] = set()  # which of them autograd was told are frozen
        self.training = layer.training
        params = {} if params is None else params
        for path, inner in layer._walk():
            for name, declaration in inner._declared.items():
                tensor = getattr(inner, name)
                if tensor is None:
                    continue
                holder = self._holder(path)
                self._places.append((inner, name, holder))
                if declaration.kind == "parameter":
                    param = params.setdefault(id(tensor), nn.Parameter(tensor, tensor.is_floating_point()))
                    holder.register_parameter(name, param)
                else:
                    holder.register_buffer(name, tensor, declaration.persistent)
        self.register_load_state_dict_post_hook(LayerModule._follow)  # type: ignore[no-untyped-call]

    def forward(self, *inputs: Any) -> Any:
        """Run the layer's forward; autograd will run its backward."""
        self._follow_freezing()
        tensors = [getattr(holder, name) for _, name, holder in self._places]
        if not torch.is_grad_enabled():
            with _one_at_a_time, self._bound(tensors):
                return self._layer.forward(*inputs)
        form: list[Any] = []
        outs = _LayerCall.apply(self, inputs, form, len(_flat(inputs)), *_flat(inputs), *tensors)  # type: ignore[no-untyped-call]
        return _unflat(form[0], iter(outs))

    def train(self, mode: bool = True) -> LayerModule:
        """Switch the layer, too."""
        self._layer.train(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """Show the layer."""
        return repr(self._layer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerModule:
        """Conversions and moves give the module new memory: the layer follows."""
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:  # also where it failed halfway, as on a full device
            self._follow()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickle has the memory of the module's parameters and of the layer's apart: join them."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._follow()

    def _follow(self, *_: Any) -> None:
        """Give the layer's tensors the memory that the module's have by now, and each shared one a single parameter."""
        latest: dict[int, Tensor] = {}
        for layer, name, holder in self._places:
            own, new = getattr(layer, name), getattr(holder, name)
            if id(own) not in latest or new.data_ptr() != own.data_ptr():  # assign=True replaces place by place
                latest[id(own)] = new
        for layer, name, holder in self._places:
            own = getattr(layer, name)
            new = latest[id(own)]
            if own is not new:
                own.data = new.data
            setattr(holder, name, new if isinstance(new, nn.Parameter) else own)

    def _follow_freezing(self) -> None:
        """A parameter that the layer has frozen, or unfrozen, since the last forward is so for autograd, too."""
        for i, (layer, name, holder) in enumerate(self._places):
            frozen = is_frozen(getattr(layer, name))
            if frozen != (i in self._frozen):
                getattr(holder, name).requires_grad_(not frozen)
                self._frozen ^= {i}

    def _holder(self, path: str) -> nn.Module:
        """The submodule at the path, made where there is none yet."""
        module: nn.Module = self
        for step in filter(None, path.split(".")):
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        return module

    @contextmanager
    def _bound(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the layer's tensors are these."""
        own = [vars(layer)[name] for layer, name, _ in self._places]
        try:
            for (layer, name, _), tensor in zip(self._places, tensors):
                setattr(layer, name, tensor)
            yield
        finally:
            for (layer, name, _), tensor in zip(self._places, own):
                setattr(layer, name, tensor)

    @contextmanager
    def _with_records(self, records: list[list[Record]]) -> Iterator[list[list[Record]]]:
        """Inside, the layers' records are these; yields the lists, which the layers push to and pop from.

        Whichever thread autograd runs the backward in may take them.
        """
        own = [layer._records for layer in self._layers]
        inside: list[list[Record]] = [[(*record[:3], 0) for record in stack] for stack in records]
        try:
            for layer, stack in zip(self._layers, inside):
                layer._records = stack
            yield inside
        finally:
            for layer, stack in zip(self._layers, own):
                layer._records = stack


def _each_a_module(layer: Layer, params: dict[int, nn.Parameter]) -> nn.Module:
    if type(layer) is Sequential:
        return _ModulesInARow(*[_each_a_module(inner, params) for inner in layer])
    return LayerModule(layer, params)


class _ModulesInARow(nn.Sequential):
    """Modules made of the layers of a Sequential, which hand on tuples as those do."""

    def forward(self, *inputs: Any) -> Any:
        x = inputs[0] if len(inputs) == 1 else inputs
        for module in self:
            several = isinstance(module, _ModulesInARow) or (
                isinstance(module, LayerModule) and module._layer._arity[1] > 1
            )
            x = module(*x) if isinstance(x, tuple) and several else module(x)
        return x


class _LayerCall(torch.autograd.Function):
    """One forward of a layer, and its backward when autograd comes to it.

    Its inputs are the tensors among the module's inputs, and then the module's parameters and buffers. The layer works
    on detached aliases of them, which share their memory and their count of in-place changes.
    """

    @staticmethod
    def forward(ctx: Any, module: LayerModule, inputs: Any, form: list[Any], count: int, *tensors: Tensor) -> Any:
        aliases = {id(t): t.detach() for t in tensors}
        given = [aliases[id(t)] for t in tensors]  # a shared parameter has one alias: its gradients add up
        plain = _unflat(inputs, iter(given[:count]))
        # Function.forward runs without grad mode, in which nothing would be recorded. Nothing here requires grad.
        empty: list[list[Record]] = [[] for _ in module._layers]
        with _one_at_a_time, torch.enable_grad(), module._bound(given[count:]), module._with_records(empty) as records:
            out = module._layer.forward(*plain)
        ctx.module, ctx.count, ctx.records, ctx.bound = module, count, records, given[count:]
        ctx.inputs, ctx.out = _form(inputs), _form(out)
        form.append(ctx.out)
        outs = [o.detach() for o in _flat(out)]  # not the recorded objects: they would keep this graph alive for ever
        ctx.mark_non_differentiable(*[o for o in outs if not o.is_floating_point()])
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> Any:
        module: LayerModule = ctx.module
        layer, inputs = module._layer, ctx.inputs
        dout = _unflat(ctx.out, iter(douts))
        wanted = ctx.needs_input_grad[4:]
        need_dx = any(wanted[: ctx.count])
        create_graph = torch.is_grad_enabled()
        with _one_at_a_time, torch.no_grad(), module._bound(ctx.bound), module._with_records(ctx.records):
            try:
                dx = layer.backward_at(None, dout, need_dx)
                grads = [t.grad for t in ctx.bound]
            finally:
                for t in ctx.bound:
                    t.grad = None
        if isinstance(layer, Loss):
            dx = (dx, *[None] * (len(inputs) - 1))
        dxs = _flat_like(inputs, (dx,) if len(inputs) == 1 else dx)
        first = {id(t): i for i, t in reversed(list(enumerate(ctx.bound)))}
        shared = [g if first[id(t)] == i else None for i, (t, g) in enumerate(zip(ctx.bound, grads))]
        results = [g if w else None for g, w in zip((*dxs, *shared), wanted)]
        if create_graph:
            results = [None if g is None else _Once.apply(g.detach().requires_grad_(), repr(layer)) for g in results]  # type: ignore[no-untyped-call]
        return (None, None, None, None, *results)


class _Once(torch.autograd.Function):
    """The identity, for gradients under create_graph=True: differentiating them again would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, layer: str) -> Tensor:
        ctx.layer = layer
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> Any:
        raise StateError(
            f"{ctx.layer}.backward is written by hand and cannot be differentiated again (double backward)"
        )


# ---------------------------------------------------------------------- a module as a layer


class _Holder(Layer):
    """The tensors of one submodule, by their names there, and the holders of the submodules inside it."""

    def __init__(self, module: nn.Module) -> None:
        self.training = module.training
        self._inner = {name: _Holder(child) for name, child in module._modules.items() if child is not None}
        params = {name: param for name, param in module._parameters.items() if param is not None}
        names = {name: parameter() if param.requires_grad else buffer() for name, param in params.items()}
        kept = set(module.state_dict())
        names |= {name: buffer() for name in module._buffers if name in kept}
        vars(self)["_declared"] = names
        for name in names:
            if hasattr(Layer, name):
                raise ArgumentError(f"from_torch: {name!r} is taken by Layer and cannot name a tensor of the module")

    def named_children(self) -> Iterator[tuple[str, Layer]]:
        return iter(self._inner.items())


class ModuleLayer(_Holder):
    """What `from_torch` returns.

    Forward:   out = module(*inputs) under autograd, from inputs and parameters that are leaves of a graph of its own
    Backward:  torch.autograd.grad through that graph; parameter gradients are added to the layer's
    Recorded:  the graph
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.module = module
        self._arity = arity(module.forward)
        self._in_place = any(getattr(inner, "inplace", False) for inner in module.modules())
        plain: dict[int, Tensor] = {}  # a shared parameter is one tensor here, too
        for path, holder in self._walk():
            inner = module.get_submodule(path)
            for name in holder._declared:
                tensor = getattr(inner, name)
                alias = plain.setdefault(id(tensor), tensor.detach())
                if name in inner._parameters and not tensor.requires_grad:
                    alias.frozen = True  # type: ignore[attr-defined]  # a buffer that no forward changes
                setattr(holder, name, alias)

    def forward(self, *inputs: Any) -> Any:
        for path, holder in self._walk():
            self.module.get_submodule(path).training = holder.training
        tensors = dict(self._tensors(""))
        if not torch.is_grad_enabled():
            return self._call(tensors, inputs)
        params = list(self.parameters())
        leaves = {id(t): t if is_frozen(t) else _leaf(t) for t in params}
        flat = [_leaf(t) for t in _flat(inputs)]
        graph_inputs = _unflat(inputs, iter(flat))
        out = self._call({name: leaves.get(id(t), t) for name, t in tensors.items()}, graph_inputs)
        outs, form = _flat(out), _form(out)
        if not _is_of_tensors(form):
            raise self.error(DtypeError, "forward", "the module's output must be a tensor or a tuple of tensors")
        watched = any(t.requires_grad for t in (*_flat(inputs), *params))  # somebody else's autograd comes through here
        result = _unflat(form, iter(outs if watched else [o.detach() for o in outs]))
        self.push((outs, _form(inputs, other=None), params), *flat, *leaves.values(), out=result)
        return result

    def backward(self, dout: Any, need_dx: bool = True) -> Any:
        (outs, inputs, params), *leaves = self.pop(dout)
        count = len(leaves) - len(params)
        pairs = [(o, d) for o, d in zip(outs, _flat(dout)) if o.requires_grad]
        wanted = [t for t in leaves[0 if need_dx else count :] if t.requires_grad]
        grads: dict[int, Tensor | None] = {}
        if pairs and wanted:
            ends, douts = zip(*pairs)
            found = torch.autograd.grad(ends, wanted, douts, allow_unused=True)
            grads = {id(t): g for t, g in zip(wanted, _disjoint(found, douts))}
        for param, leaf in zip(params, leaves[count:]):
            grad = grads.get(id(leaf))
            if grad is not None:
                self.add_grad(param, grad)
        if not need_dx:
            return None
        dxs = [_or_zeros(grads.get(id(t)), t) if t.is_floating_point() else None for t in leaves[:count]]
        dx = _unflat(inputs, iter(dxs))
        return dx[0] if len(dx) == 1 else dx

    def _call(self, tensors: dict[str, Tensor], inputs: Any) -> Any:
        """The module's output; an error, with which it refuses the inputs, names the layer."""
        flat = _flat(inputs)
        versions = [None if t.is_inference() else t._version for t in flat]
        if self._in_place:
            inputs = _unflat(inputs, iter([t.clone() for t in flat]))
        try:
            out = functional_call(self.module, tensors, inputs)
        except HandgradError:  # from a layer inside the module
            raise
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            if "in-place operation" in str(error):
                raise self._in_place_error() from error
            kind = {IndexError: IndexRangeError, TypeError: DtypeError}.get(type(error), ArgumentError)
            shapes = ", ".join(str(tuple(t.shape)) for t in flat)
            raise self.error(kind, "forward", f"the module refuses inputs of shape {shapes}: {error}") from error
        if any(version not in (None, t._version) for version, t in zip(versions, flat)):
            raise self._in_place_error()
        return out

    def _in_place_error(self) -> HandgradError:
        return self.error(
            ArgumentError,
            "forward",
            "the module must not change an input or a parameter in place; let it work on x.clone()",
        )

    def extra_repr(self) -> str:
        return repr(self.module)


def _leaf(t: Tensor) -> Tensor:
    """An alias of t that autograd differentiates by; t itself where somebody's autograd already does."""
    return t if t.requires_grad or not t.is_floating_point() else t.detach().requires_grad_()


def _or_zeros(grad: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if grad is None else grad


def _disjoint(grads: Sequence[Tensor | None], douts: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, copied where two of them, or one and a dout, share memory, as they do behind an addition."""
    seen = {d.untyped_storage().data_ptr() for d in douts}
    result: list[Tensor | None] = []
    for grad in grads:
        if grad is not None:
            grad = grad.to_dense() if grad.is_sparse else grad
            place = grad.untyped_storage().data_ptr()
            if place in seen or 0 in grad.stride():
                grad = grad.clone(memory_format=torch.contiguous_format)
            seen.add(place)
        result.append(grad)
    return result


# ---------------------------------------------------------------------- nested tuples of tensors


def _flat(value: Any) -> list[Tensor]:
    """The tensors in a nested tuple, in order; anything else in it is left out."""
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _flat(part)]
    return [value] if isinstance(value, Tensor) else []


def _form(value: Any, other: Any = ...) -> Any:
    """The nested tuple with an empty tensor for each of its tensors: what `_unflat` needs, and no memory.

    Anything else in it stays, or `other` stands for it.
    """
    if isinstance(value, (tuple, list)):
        return tuple([_form(part, other) for part in value])
    return torch.empty(0) if isinstance(value, Tensor) else value if other is ... else other


def _is_of_tensors(form: Any) -> bool:
    return all(map(_is_of_tensors, form)) if isinstance(form, tuple) else isinstance(form, Tensor)


def _unflat(form: Any, tensors: Iterator[Any]) -> Any:
    """Nested like `form`, with the next of `tensors` for each of its tensors."""
    if isinstance(form, (tuple, list)):
        return tuple([_unflat(part, tensors) for part in form])
    return next(tensors) if isinstance(form, Tensor) else form


def _flat_like(form: Any, dx: Any) -> list[Tensor | None]:
    """The dx of each tensor in `form`, in order; a None stands for all that it spans."""
    if isinstance(form, (tuple, list)):
        return [d for i, part in enumerate(form) for d in _flat_like(part, None if dx is None else dx[i])]
    return [dx] if isinstance(form, Tensor) else []
