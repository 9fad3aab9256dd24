"""The training step as one callable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from handgrad.errors import ArgumentError, CompileError, ShapeError, StateError
from handgrad.layer import ONE_THREAD, Layer, is_frozen
from handgrad.losses.loss import Loss
from handgrad.memory import Snapshot
from handgrad.optim import SGD, descend, hooked

Group = tuple[list[Tensor], list["Tensor | None"], dict[str, Any]]
"""What one parameter group's update reads in a compiled graph: parameters, momentum buffers, and the options. A buffer
is None for a parameter that has had no gradient; the graph puts those there that it makes."""

SCHEDULED = ("lr", "momentum")  # what schedulers change: tensors in a graph, or each value would be compiled anew
COMPILING = "2.13"  # the least torch for compile(): the graphs of all from 2.6 to 2.12 take an index of -1
GRAPHS = 256  # that one compiled step may hold: one for each shape of a minibatch; torch's own limit is 8
_at_work: dict[int, object] = {}  # by the id of a model: the call of a step that is under way


class TrainStep:
    """Forward, loss, backward and update: ``loss_value = step(x, target)``.

    The gradients are cleared before the backward, so each step stands alone, and stay in `.grad` after the update.

    A step that fails before its update (an input is refused, by the loss or by a layer in the middle; Ctrl-C) changes
    nothing: no record is left behind, and buffers, such as the running statistics of a batch norm before the layer that
    refused, are as they were. For that each step notes the buffers, which costs a small model 1 to 2 % of the step.
    (Gradients may be cleared or in parts then, which the next step clears anyway; random generators have moved on.)

    ``step.many(xs, targets)`` does the steps of several minibatches, ``step.compile()`` gives the same two calls with
    the whole step in one compiled graph. Any optimizer of torch.optim can be used whose `step()` needs no closure; the
    SGD of handgrad costs least. A model of large tensors is faster after one call of `handgrad.keep_freed_memory()`.

    Copies and pickles of a step, compiled or not, train the copy of the model.

    Raises StateError where an earlier forward of the model still waits for its backward, or another step of the model
    is under way, in another thread; ArgumentError for a loss that is none of handgrad's, and for an optimizer that has
    none of the parameters or, as LBFGS, wants a closure.

    >>> from handgrad import SGD, CrossEntropy, Linear
    >>> model = Linear(2, 3)
    >>> step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=0.5))
    >>> x, target = torch.eye(2), torch.tensor([0, 2])
    >>> losses = [float(step(x, target)) for _ in range(20)]
    >>> losses[-1] < losses[0]
    True
    >>> step.many([x, x], [target, target]).shape  # the losses of two steps
    torch.Size([2])
    """

    def __init__(self, model: Layer, loss: Loss, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(loss, Loss):
            problem = f"a loss of handgrad, such as CrossEntropy(), got {type(loss).__name__}"
            raise ArgumentError(f"TrainStep: the loss must be {problem}")
        if loss.reduction == "none":
            raise ArgumentError('TrainStep: the loss must be one number, got a loss with reduction="none"')
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ArgumentError("TrainStep: LBFGS takes several steps of its own through a closure; write the loop out")
        self.model, self.loss, self.optimizer = model, loss, optimizer
        both = (*model.parameters(), *loss.parameters())  # a loss may have some, or share the model's
        self.params = list({id(p): p for p in both}.values())
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if self.params and not updated & {id(p) for p in self.params}:
            problem = "none of the parameters of model and loss; make it of model.parameters()"
            raise ArgumentError(f"TrainStep: the optimizer updates {problem}")
        buffers = [b for part in (model, loss) for _, b in part.named_buffers() if not is_frozen(b)]
        self.buffers = Snapshot({id(b): b for b in buffers}.values())

    def __call__(self, x: Any, target: Any) -> Tensor:
        """Do one step; returns the loss, as it was before the update."""
        self._begin()
        try:
            try:
                out = self._forward_backward(x, target)
            except BaseException:
                self.model.drop_records()
                self.loss.drop_records()
                self.buffers.put_back()
                raise
            self.optimizer.step()
        finally:
            del _at_work[id(self.model)]
        return out

    def many(self, xs: Any, targets: Any) -> Tensor:
        """Do a step for each pair of the K minibatches xs[k], targets[k], in order; returns the K losses.

        Each of the two is a tensor with a leading dimension K, or a list of K minibatches. A tuple stands for several
        inputs, or several targets, each of them one of these.
        """
        steps = _length(xs, targets)
        return torch.stack([self(_minibatches(xs, k), _minibatches(targets, k)) for k in range(steps)])

    def compile(self, chunk: int = 8) -> TrainStep:
        """Return the same step, on the same model and optimizer, as one compiled graph without breaks.

        Compiling happens in the first call of each kind and takes its time: on a small model some 20 seconds for a
        step, and about as long again for the graph of `chunk` steps that `many` runs. A graph of more steps is faster,
        but takes longer to compile; what `many` has left over it does step by step.

        - Results equal the eager ones up to the rounding of floats; two chunks of 4 round as one of 8 does not.
        - A minibatch of another shape is compiled anew (256 shapes at the most), and so is another dampening or
          weight_decay; a changed lr or momentum, or evaluation in between, is not.
        - With handgrad's SGD the update is in the graph, but the momentum buffers are made by a first step outside. Any
          other optimizer, or one with step hooks, runs as it is, after the graph of forward, loss and backward.
        - A layer must be what a graph can hold: a print in it, or an `.item()`, is torch's error when compiling. What
          it does to Python objects (a counter of its own) happens when compiling, or after the graph, as torch decides.
        - An error is the one that the step gives without compile(): after a failure, the layers run once more on a copy
          of the model, to say what was wrong. In `many`, steps before it may or may not be done already.

        Raises CompileError with a torch older than 2.13; on a CPU, without a C++ compiler.
        """
        return CompiledTrainStep(self, chunk)

    def _forward_backward(self, x: Any, target: Any) -> Tensor:
        out: Tensor = self.loss.forward(self.model.forward_at(None, x), target)
        params = self.params
        for param in params:
            param.grad = None
        self.model.backward_at(None, self.loss.backward(), need_dx=False)
        if params and params[0].grad is None:
            _refuse_no_gradient(params)
        return out

    def _begin(self) -> None:
        """Claim the model for this step until `del _at_work[id(self.model)]`, and note its buffers as they are."""
        call, model = object(), self.model
        if _at_work.setdefault(id(model), call) is not call:
            raise StateError(f"TrainStep: another step of this model is under way; {ONE_THREAD}")
        if model._records or self.loss._records:
            del _at_work[id(model)]
            self._refuse_leftovers()
        self.buffers.take()

    def _refuse_leftovers(self) -> None:
        for layer in (self.model, self.loss):
            if layer._records:
                problem = f"{len(layer._records)} earlier forward(s) still wait for their backward; "
                raise layer.error(StateError, "forward", problem + "evaluate under torch.no_grad(), or drop_records()")


class CompiledTrainStep(TrainStep):
    """What `TrainStep.compile` returns: the same calls, through graphs that are compiled when first needed."""

    def __init__(self, step: TrainStep, chunk: int) -> None:
        if chunk < 1:
            raise ArgumentError(f"TrainStep.compile: chunk must be at least 1, got {chunk}")
        if torch.__version__ < COMPILING:
            problem = f"torch must be {COMPILING} or newer, for graphs of an older one take an index of -1, or crash; "
            problem += f"upgrade it, or use the step without compile(); got {torch.__version__}"
            raise CompileError(f"TrainStep.compile: {problem}")
        super().__init__(step.model, step.loss, step.optimizer)
        self.chunk = chunk
        self._layers = [layer for part in (step.model, step.loss) for _, layer in part.named_layers()]
        self._scheduled: list[dict[str, Tensor]] = []  # by parameter group
        self._stepped = False  # outside, so that whatever gets a gradient has its momentum buffer
        self._prepare()

    def _prepare(self) -> None:
        if any(p.device.type == "cpu" for p in self.params):
            _require_compiler()
        # without Python between the kernels, and all intermediates in one piece of memory
        options: dict[str, Any] = {"cpp_wrapper": True, "memory_planning": True, "memory_pool": "intermediates"}
        how: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": options}
        how |= {"recompile_limit": GRAPHS, "isolate_recompiles": True}
        self._one, self._many = torch.compile(self._graph, **how), torch.compile(self._graph_many, **how)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry all but the graphs, which are of this model; the copy compiles its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_one", "_many")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    def __call__(self, x: Any, target: Any) -> Tensor:
        groups = self._groups()
        if groups is None:
            loss = super().__call__(x, target)
            self._stepped = True
            return loss
        return self._run(self._one, x, target, groups)

    def many(self, xs: Any, targets: Any) -> Tensor:
        """Do as TrainStep.many does, `chunk` steps in a graph."""
        steps, done, losses = _length(xs, targets), 0, []
        while done < steps:
            groups = self._groups()
            end = done + self.chunk
            if groups and end <= steps:
                x, target = (_minibatches(many, slice(done, end)) for many in (xs, targets))
                losses.append(self._run(self._many, x, target, groups))
            else:
                end = done + 1
                losses.append(self(_minibatches(xs, done), _minibatches(targets, done)).unsqueeze(0))
            done = end
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    def _graph(self, x: Any, target: Any, groups: list[Group]) -> Tensor:
        """One step; what is compiled."""
        out = self._forward_backward(x, target)
        for params, buffers, options in groups:
            held = [i for i, p in enumerate(params) if p.grad is not None]
            if not held:
                continue
            grads: list[Any] = [params[i].grad for i in held]
            for i, grad in zip(held, grads):
                if grad.shape != params[i].shape or grad.dtype is not params[i].dtype:
                    raise ShapeError("a gradient is unlike its parameter")  # the layers will say which
            moved = descend([params[i] for i in held], grads, [buffers[i] for i in held] if buffers else [], options)
            for i, buffer in zip(held, moved):
                if buffers[i] is None:
                    buffers[i] = buffer
        return out

    def _graph_many(self, xs: Any, targets: Any, groups: list[Group]) -> Tensor:
        pairs = [(_minibatches(xs, k), _minibatches(targets, k)) for k in range(self.chunk)]
        return torch.stack([self._graph(x, target, groups) for x, target in pairs])

    def _groups(self) -> list[Group] | None:
        """What the update in the graph needs; [] where the optimizer does its own, None for one step outside."""
        if not torch.is_grad_enabled():
            return None  # which ends in the error that says so
        if not _bare(self.optimizer):
            return []
        groups: list[Group] = []
        for i, group in enumerate(self.optimizer.param_groups):
            params, buffers = group["params"], []
            if group["momentum"] != 0:
                state: dict[Any, Any] = self.optimizer.state
                buffers = [state.get(p, {}).get("momentum_buffer") for p in params]
                if not self._stepped and any(b is None for b in buffers):
                    return None
            if i == len(self._scheduled):
                self._scheduled.append({key: torch.tensor(float(group[key]), dtype=torch.float64) for key in SCHEDULED})
            for key, tensor in self._scheduled[i].items():
                if tensor.item() != group[key]:
                    tensor.fill_(group[key])
            options = {key: group[key] for key in ("dampening", "weight_decay", "nesterov", "maximize")}
            groups.append((params, buffers, {**self._scheduled[i], **options}))
        return groups

    def _run(self, graph: Callable[..., Tensor], x: Any, target: Any, groups: list[Group]) -> Tensor:
        if any(layer._watchers for layer in self._layers):
            problem = "a compiled step cannot be watched, for its graph has no place to look at; "
            raise StateError(f"TrainStep.compile: {problem}look inside the step as it was before compile()")
        self._begin()
        try:
            missing = [(ps[i], bs, i) for ps, bs, _ in groups for i, b in enumerate(bs) if b is None]
            try:
                loss = graph(x, target, groups)
            except BaseException as error:
                self.buffers.put_back()
                if isinstance(error, Exception):
                    self._explain(x, target, many=graph is self._many)
                raise
            self._after(groups, missing)
        finally:
            del _at_work[id(self.model)]
        return loss

    def _explain(self, x: Any, target: Any, *, many: bool) -> None:
        """Raise what the layers say of these inputs when no graph hides it, if they say anything; on copies of them."""
        try:
            model, loss = copy.deepcopy((self.model, self.loss))
        except Exception:  # it holds what cannot be copied
            return
        steps = range(_length(x, target)) if many else [...]
        for k in steps:
            try:
                loss(model.forward_at(None, _minibatches(x, k)), _minibatches(target, k))
                model.zero_grad()
                loss.zero_grad()
                model.backward_at(None, loss.backward())
                _refuse_no_gradient([*model.parameters(), *loss.parameters()])
            except Exception as plain:
                raise plain from None

    def _after(self, groups: list[Group], missing: list[tuple[Tensor, list[Tensor | None], int]]) -> None:
        """Do the update where the graph has not done it; else note the momentum buffers that it made."""
        if not groups or not isinstance(self.optimizer, SGD):
            self.optimizer.step()
            return
        self.optimizer._opt_called = True
        for p, buffers, i in missing:
            if buffers[i] is not None:
                self.optimizer.state[p]["momentum_buffer"] = buffers[i]


def _refuse_no_gradient(params: list[Tensor]) -> None:
    if params and all(p.grad is None for p in params):
        problem = "no parameter got a gradient, for all are frozen; unfreeze() what is to be trained"
        raise StateError(f"TrainStep: {problem}")


def _bare(optimizer: torch.optim.Optimizer) -> TypeGuard[SGD]:
    """Whether `optimizer.step()` does nothing but handgrad's SGD update, so that a graph may do it in its place."""
    return type(optimizer) is SGD and not hooked(optimizer)


def _minibatches(many: Any, which: Any) -> Any:
    """One of the K minibatches, or several: of each part, where a tuple stands for several inputs; `...` for all."""
    if which is ...:
        return many
    return tuple([_minibatches(part, which) for part in many]) if isinstance(many, tuple) else many[which]


def _length(xs: Any, targets: Any) -> int:
    """K, which all parts of both must share."""
    lengths = [len(part) for many in (xs, targets) for part in (many if isinstance(many, tuple) else (many,))]
    if len(set(lengths)) != 1 or lengths[0] == 0:
        problem = f"xs and targets must hold K minibatches each, at least one, got {' and '.join(map(str, lengths))}"
        raise ShapeError(f"TrainStep.many: {problem} (a tuple stands for several inputs, a list for K minibatches)")
    return lengths[0]


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes seconds to import

    try:
        get_cpp_compiler()
    except Exception as error:
        problem = "a C++ compiler must be installed and on the path (g++ or clang++; the variable CXX names "
        problem += f"another), or use the step without compile(); torch says: {error}"
        raise CompileError(f"TrainStep.compile: {problem}") from error
