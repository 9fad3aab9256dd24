"""The training step as one callable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from handgrad.errors import ArgumentError, CompileError, ShapeError, StateError
from handgrad.layer import Layer
from handgrad.losses.loss import Loss
from handgrad.optim import SGD, descend

Group = tuple[list[Tensor], list["Tensor | None"], dict[str, Any]]
"""What one parameter group's update reads in a compiled graph: parameters, momentum buffers, and the options."""

SCHEDULED = ("lr", "momentum")  # what schedulers change: tensors in a graph, or each value would be compiled anew
COMPILING = "2.13"  # the least torch for compile(): the graphs of all from 2.6 to 2.12 take an index of -1
GRAPHS = 256  # that one compiled step may hold: one for each shape of a minibatch; torch's own limit is 8


class TrainStep:
    """Forward, loss, backward and update: ``loss_value = step(x, target)``.

    The gradients are cleared before the backward, so each step stands alone, and stay in `.grad` after the update.
    An interruption (an error, Ctrl-C) leaves no half-used record behind.

    ``step.many(xs, targets)`` does the steps of several minibatches, ``step.compile()`` gives the same two calls with
    the whole step in one compiled graph. Any optimizer of torch.optim can be used whose `step()` needs no closure; the
    SGD of handgrad costs least. A model of large tensors is faster after one call of `handgrad.keep_freed_memory()`.

    Raises StateError where an earlier forward of the model still waits for its backward; ArgumentError for a loss that
    is none of handgrad's, and for an optimizer that has none of the parameters or, as LBFGS, wants a closure.

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

    def __call__(self, x: Any, target: Any) -> Tensor:
        """Do one step; returns the loss, as it was before the update."""
        self._refuse_leftovers()
        try:
            out = self._forward_backward(x, target)
        except BaseException:
            self.model.drop_records()
            self.loss.drop_records()
            raise
        if _bare(self.optimizer):
            self.optimizer.update()
        else:
            self.optimizer.step()
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
        - With handgrad's SGD the update is in the graph, but a momentum buffer is made by a first step outside. Any
          other optimizer, or one with step hooks, runs as it is, after the graph of forward, loss and backward.
        - Changes that only Python sees (a print in a layer, a record pushed and never popped) happen when compiling.
        - An error is the one that the step gives without compile(): after a failure, the layers run once more on a copy
          of the model, to say what was wrong. In `many`, steps before it may or may not be done already.

        Raises CompileError with a torch older than 2.13; on a CPU, without a C++ compiler.
        """
        return CompiledTrainStep(self, chunk)

    def _forward_backward(self, x: Any, target: Any) -> Tensor:
        out: Tensor = self.loss.forward(self.model.forward_at(None, x), target)
        for param in self.params:
            param.grad = None
        self.model.backward_at(None, self.loss.backward(), need_dx=False)
        if self.params and self.params[0].grad is None and all(p.grad is None for p in self.params):
            problem = "no parameter got a gradient, for all are frozen; unfreeze() what is to be trained"
            raise StateError(f"TrainStep: {problem}")
        return out

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
        if any(p.device.type == "cpu" for p in self.params):
            _require_compiler()
        # without Python between the kernels, and all intermediates in one piece of memory
        options: dict[str, Any] = {"cpp_wrapper": True, "memory_planning": True, "memory_pool": "intermediates"}
        how: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": options}
        how |= {"recompile_limit": GRAPHS, "isolate_recompiles": True}
        self._one, self._many = torch.compile(self._graph, **how), torch.compile(self._graph_many, **how)

    def __call__(self, x: Any, target: Any) -> Tensor:
        groups = self._groups()
        if groups is None:
            return super().__call__(x, target)
        self._refuse_leftovers()
        loss = self._run(self._one, x, target, groups)
        self._after(groups)
        return loss

    def many(self, xs: Any, targets: Any) -> Tensor:
        """Do as TrainStep.many does, `chunk` steps in a graph."""
        steps, done, losses = _length(xs, targets), 0, []
        while done < steps:
            groups = self._groups()
            end = done + self.chunk
            if groups and end <= steps:
                self._refuse_leftovers()
                x, target = (_minibatches(many, slice(done, end)) for many in (xs, targets))
                losses.append(self._run(self._many, x, target, groups))
                self._after(groups)
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
            grads: list[Any] = [params[i].grad for i in held]
            descend([params[i] for i in held], grads, [buffers[i] for i in held] if buffers else [], options)
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
                buffers = [self.optimizer.state[p].get("momentum_buffer") for p in params]
                if any(b is None for b in buffers):
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
        try:
            return graph(x, target, groups)
        except Exception:
            self._explain(x, target, many=graph is self._many)
            raise

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
                model.backward_at(None, loss.backward())
            except Exception as plain:
                raise plain from None

    def _after(self, groups: list[Group]) -> None:
        if groups and isinstance(self.optimizer, SGD):
            self.optimizer._opt_called = True
        else:
            self.optimizer.step()


def _bare(optimizer: torch.optim.Optimizer) -> TypeGuard[SGD]:
    """Whether `optimizer.step()` does nothing but handgrad's SGD update, so that nobody misses the rest of it."""
    return type(optimizer) is SGD and not (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


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
