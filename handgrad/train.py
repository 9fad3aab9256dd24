"""The training step as one callable."""

from __future__ import annotations

import copy
import sys
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handgrad.arguments import integer, number
from handgrad.errors import ArgumentError, CompileError, HandgradError, IndexRangeError, ShapeError, StateError
from handgrad.export import write
from handgrad.fingerprint import Fingerprint
from handgrad.layer import ONE_THREAD, Layer, is_any_autocast_enabled, is_frozen
from handgrad.losses.loss import Loss
from handgrad.memory import Release, Snapshot
from handgrad.minibatches import ends_of_alike, joined, length, minibatches, taken_apart
from handgrad.optim import SGD, hooked
from handgrad.parallel import Processes, SyncBatchNorm, numbers_near
from handgrad.program import SCHEDULED, Program, Progress, Stage, Traced, begin, compiled, numbers, trace

COMPILING = "2.13"  # the least torch for compile(): the graphs of all from 2.6 to 2.12 take an index of -1
KEPT = 64  # of how many states of the model (modes, options, ...) a compiled step remembers the programs
_at_work: dict[int, object] = {}  # by the id of a model: the call of a step that is under way


class TrainStep:
    """Forward, loss, backward and update: ``loss_value = step(x, target)``.

    The gradients are cleared at the beginning, so each step stands alone, and stay in `.grad` after the update.

    A step that fails before its update (an input is refused, by the loss or by a layer in the middle; Ctrl-C) changes
    nothing: no record is left behind, and buffers, such as the running statistics of a batch norm before the layer that
    refused, are as they were. For that each step notes the buffers, which costs a small model 1 to 2 % of the step.
    (Gradients may be cleared or in parts then, which the next step clears anyway; random generators have moved on.)

    With `max_norm` the gradients are scaled down to that norm where that of all together is larger
    (torch.nn.utils.clip_grad_norm_). With `accumulate` above 1 a step takes so many minibatches, ``x[a]`` and
    ``target[a]``, one after the other, and updates once: for a mean, by the mean of their losses, so that equally large
    ones give the gradient of all joined; for a sum, by their sum.

    With `release_gradients` each parameter is updated as soon as its gradient is complete, while the backward of the
    rest still runs, and the gradient is freed: few are there at once, and after the step `.grad` is None. The results
    are the same, bit by bit; but a step that fails in its backward may have updated some parameters. There is then no
    `max_norm`, which needs all gradients, no `accumulate` or `process_group`, no compile(), and no optimizer but SGD
    and those of torch.optim that update each parameter by itself (all but LBFGS and SparseAdam), without step hooks.

    With `process_group`, one of torch.distributed or True for that of all processes, each process gives the step its
    part of the minibatch (see handgrad.parallel), and all take the step of the joined one. Parts may be of any size, or
    empty. All start with the parameters and buffers of the first process. The gradients are added up once per step,
    before their norm is limited; a step that fails in one process changes nothing in any. The loss returned is that of
    the own part, or with `joined_loss` of the joined minibatch. Statistics are joined by SyncBatchNorm alone; random
    masks are each process's own.

    ``step.many(xs, targets)`` does the steps of several minibatches, ``step.compile()`` gives the same two calls as one
    compiled program. Any optimizer of torch.optim can be used whose `step()` needs no closure; the
    SGD of handgrad costs least. A model of large tensors is faster after one call of `handgrad.keep_freed_memory()`.

    Copies and pickles of a step, compiled or not, train the copy of the model.

    Raises StateError where an earlier forward of the model still waits for its backward, or another step of the model
    is under way, in another thread; ArgumentError for a loss that is none of handgrad's, and for an optimizer that has
    none of the parameters or, as LBFGS, wants a closure. With a process group also what `handgrad.broadcast_model` and
    `handgrad.average_gradients` raise.

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

    def __init__(
        self,
        model: Layer,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None = None,
        accumulate: int = 1,
        release_gradients: bool = False,
        process_group: Any = None,
        joined_loss: bool = False,
    ) -> None:
        if not isinstance(loss, Loss):
            problem = f"a loss of handgrad, such as CrossEntropy(), got {type(loss).__name__}"
            raise ArgumentError(f"TrainStep: the loss must be {problem}")
        if loss.reduction == "none":
            raise ArgumentError('TrainStep: the loss must be one number, got a loss with reduction="none"')
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ArgumentError("TrainStep: LBFGS takes several steps of its own through a closure; write the loop out")
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.max_norm = None if max_norm is None else float(number(self, "max_norm", max_norm, 0))
        self.accumulate = integer(self, "accumulate", accumulate)
        needing = {
            "max_norm": (max_norm is not None, "needs the gradients of all parameters"),
            "accumulate": (self.accumulate > 1, "adds to them in each minibatch"),
            "process_group": (process_group is not None, "adds them up when all are there"),
        }
        for option, (given, why) in needing.items() if release_gradients else ():
            if given:
                problem = f"no {option}, which {why}; choose one of the two"
                raise ArgumentError(f"TrainStep: with release_gradients there must be {problem}")
        self._release = Release(model, loss, optimizer) if release_gradients else None
        both = (*model.parameters(), *loss.parameters())  # a loss may have some, or share the model's
        self.params = list({id(p): p for p in both}.values())
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if self.params and not updated & {id(p) for p in self.params}:
            problem = "none of the parameters of model and loss; make it of model.parameters()"
            raise ArgumentError(f"TrainStep: the optimizer updates {problem}")
        buffers = [b for part in (model, loss) for _, b in part.named_buffers() if not is_frozen(b)]
        self.buffers = Snapshot({id(b): b for b in buffers}.values())
        self.joined_loss = joined_loss
        self.processes = None
        if process_group is not None:
            self.processes = Processes(None if process_group is True else process_group, "TrainStep")
            options = {"accumulate": accumulate, "max_norm": max_norm, "the loss's reduction": loss.reduction}
            self.processes.make_same([model, loss], options)

    def __call__(self, x: Any, target: Any) -> Tensor:
        """Do one step; returns the loss, as it was before the update."""
        self._begin()
        try:
            self.buffers.take()
            try:
                out = self._gradients(x, target)
            except BaseException:
                self.model.drop_records()
                self.loss.drop_records()
                self.buffers.put_back()
                raise
            if self._release is None:
                self.optimizer.step()
        finally:
            del _at_work[id(self.model)]
        return out

    def many(self, xs: Any, targets: Any) -> Tensor:
        """Do a step for each pair of the K minibatches xs[k], targets[k], in order; returns the K losses.

        Each of the two is a tensor with a leading dimension K, or a list of K minibatches. A tuple stands for several
        inputs, or several targets, each of them one of these. An error says how many of the steps are done.
        """
        steps, losses = length(xs, targets), []
        for k in range(steps):
            try:
                losses.append(self(minibatches(xs, k), minibatches(targets, k)))
            except Exception as error:
                _say_done(error, k, steps)
                raise
        return torch.stack(losses)

    def compile(self, *, progress: bool | None = None) -> TrainStep:
        """Return the same step, on the same model and optimizer, as one compiled program.

        The program is made in the first call: the step is traced as one graph of tensors, put in a loop over
        minibatches, and compiled to C++ (some ten seconds for a small model). It serves a single step and `many` of any
        K. Its file stays in the cache of torch's compiler, so that another process has it in a second or two. With
        `progress`, by default where stderr is a terminal, a line there says what is under way.

        - Results equal the eager ones up to the rounding of floats; of Adam in float64, to seven digits.
        - On a CPU, large float32 products are left to oneDNN where it is faster than torch's own library, which is
          measured once a process. A small step gains a fifth from a faster allocator of memory, preloaded (tcmalloc).
        - A step is traced anew, and compiled where it is a new one, for minibatches of another shape or dtype, and
          after a change of whatever else decides what it computes: a layer's mode and attributes, freezing, which
          tensors are held, an option of the optimizer. But lr, momentum and betas are inputs of the program, as all
          tensors are: what changes in each step should be a tensor that the layer holds, changed in place.
        - With handgrad's SGD, and torch.optim's Adam and AdamW, the update is in the program. Any other optimizer, or
          one with step hooks, runs as it is after each step.
        - A call that fails changes nothing, `many` included. Its error is the one that the step gives without
          compile(), for the failed minibatch is then looked at on a copy of the model.
        - Random numbers of Dropout and the attentions are repeatable by the same generators, but are others than
          without compile(). What a layer draws by torch.rand itself comes from torch's global generator.
        - A layer must be a graph of tensors: an `.item()`, or an `if` on a value, is a CompileError. What it does to
          Python objects (a print, a counter of its own) happens when it is traced, and then no more.
        - A change that no attribute shows is not seen: of a global variable, or of what a closure holds.
        - With a process group, each process compiles forward, loss and backward of its part. Messages and update are as
          without compile(), and `many` is a loop over the steps. All wait for the last one to compile: in the first
          step, so the time limit of the group must allow for that. Parts without rows run as without compile().

        Raises CompileError with a torch older than 2.13; on a CPU, without a C++ compiler; with a process group and a
        SyncBatchNorm, which has messages to wait for in the middle of the program.
        """
        self._refuse_what_no_program_can("compile")
        return (CompiledTrainStep if self.processes is None else CompiledPart)(self, progress)

    def export(self, path: str | PathLike[str], x: Any, target: Any, *, progress: bool | None = None) -> None:
        """Write the step for a minibatch like (x, target) as a program that needs neither handgrad nor Python.

        Three files: ``step.pt2``, a package of AOTInductor, which torch loads in Python and in C++; beside it
        ``step.safetensors``, the model's `state_dict()`, and ``step.training.safetensors``, the other tensors that the
        program starts with: the optimizer's (and loss's) state under ``optimizer.`` and the parameter's name, and the
        rates, such as ``lr``. (For x and target only shapes and dtypes count; with `accumulate`, give one minibatch.)

        The package's metadata hold JSON: under "inputs" the names of its inputs in order, which are those tensors and

        - ``x`` and ``target`` (or ``x.0``, ``x.1``, ... of a tuple): K minibatches, the size of each fixed, K any
          multiple of `accumulate`;
        - ``seeds``, where random numbers are drawn: (K,) int64, one for each minibatch, from 0 up to 2^31;
        - ``first`` and ``last``, () int64: it does the steps of the minibatches first to last - 1;

        under "shapes" those of the tensors, and of one minibatch; under "outputs" ``losses`` (one per step), ``wrong``,
        and the gradients of the last step; under "same" which names of the state_dict are further names of a tensor;
        and under "accumulate" how many minibatches make a step. The program changes its inputs in place. Where
        ``wrong`` is not -1 but the number of a minibatch, that one has an index out of range, and nothing has changed.
        Set the variable AOTI_RUNTIME_CHECK_INPUTS=1 in the environment, and a wrong shape or dtype is an error before
        anything changes; without, they are not looked at. (models/cpp is a program in C++ that trains with these
        files.)

        The optimizer must be handgrad's SGD, or torch.optim's Adam or AdamW. Raises ArgumentError; what `compile` and
        its first call raise. It needs safetensors.
        """
        self._refuse_what_no_program_can("export")
        if not _in_program(self.optimizer):
            problem = "handgrad's SGD, torch.optim.Adam or AdamW, without step hooks, for the program does the update"
            raise ArgumentError(
                f"TrainStep.export: the optimizer must be {problem}; got {type(self.optimizer).__name__}"
            )
        if _must_begin_outside(self.optimizer):
            problem = "the first step with dampening is unlike the others; take it before the export"
            raise StateError(f"TrainStep.export: {problem}")
        self._begin()
        try:
            with Progress(sys.stderr.isatty() if progress is None else progress) as shown:
                traced, stage, new = self._traced(x, target, shown)
                try:
                    write(Path(path), traced, stage, self.model, self.loss, (x, target), shown)
                finally:
                    for p in new:
                        del self.optimizer.state[p]
        finally:
            del _at_work[id(self.model)]

    def _gradients(self, x: Any, target: Any) -> Tensor:
        """Forward, loss and backward of all minibatches of a step; the gradients as the update takes them."""
        if self.processes is not None:
            losses = self._joined_losses(self.processes, x, target)
        elif self.accumulate > 1:
            losses = self._losses(x, target)
        else:
            losses = [self._forward_backward(x, target)]
        params = self.params
        if params and params[0].grad is None and not (self._release and self._release.updated):
            _refuse_no_gradient(params)
        if self.accumulate > 1 or self.max_norm is not None:
            self._finish([p for p in params if p.grad is not None])
        if self.accumulate == 1:
            return losses[0]
        return torch.stack(losses).mean() if self._mean else torch.stack(losses).sum()

    def _losses(self, x: Any, target: Any, shares: Tensor | None = None) -> list[Tensor]:
        """Forward, loss and backward of each minibatch, which has its share in the gradient, by default all."""
        return [
            self._forward_backward(x_a, target_a, a == 0, None if shares is None else shares[a])
            for a, (x_a, target_a) in enumerate(self._pairs(x, target))
        ]

    def _pairs(self, x: Any, target: Any) -> list[tuple[Any, Any]]:
        """The minibatches of a step."""
        if self.accumulate == 1:
            return [(x, target)]
        self._check_accumulated(x, target)
        return [(minibatches(x, a), minibatches(target, a)) for a in range(self.accumulate)]

    def _joined_losses(self, processes: Processes, x: Any, target: Any) -> list[Tensor]:
        """The same of the minibatches that all processes have together, of which x and target are this one's parts.

        The loss's own gradient is multiplied by the part's share in the mean. So what goes back through a
        SyncBatchNorm, to other processes, too, is right as well.
        """
        A, params = self.accumulate, self.params
        announce = not self._joins_batches

        def divisors() -> Tensor:
            each = [float(self.loss.divisor(t)) if self._mean else 1.0 for _, t in self._pairs(x, target)]
            return numbers_near(each, params)

        def work() -> Tensor:
            losses[:] = self._losses(x, target, shares)
            parts = torch.where(shares > 0, shares * torch.stack(losses), 0)  # of no rows the loss may be NaN
            return torch.cat([numbers_near([p.grad is not None for p in params], params), parts])

        losses: list[Tensor] = []
        own = numbers_near([0.0] * A, params)
        total = processes.add_after(lambda: own.copy_(divisors()), A, params, announce)
        shares = torch.where(total > 0, own / total, 0) if self._mean else torch.ones_like(own)
        told = processes.add_after(work, len(params) + A, params, announce)
        having = told[: len(params)].tolist()
        processes.add_gradients([p for p, h in zip(params, having) if h > 0])
        return [joined.to(loss.dtype) for joined, loss in zip(told[-A:], losses)] if self.joined_loss else losses

    def _forward_backward(self, x: Any, target: Any, first: bool = True, share: Tensor | None = None) -> Tensor:
        """Forward, loss and backward of one minibatch; before the first of a step, earlier gradients are freed."""
        if first:
            for param in self.params:
                param.grad = None
        out: Tensor = self.loss.forward(self.model.forward_at(None, x), target)
        dloss = self.loss.backward() if share is None else self.loss.backward(share.to(out.dtype))
        if self._release is None:
            self.model.backward_at(None, dloss, need_dx=False)
        else:
            with self._release:
                self.model.backward_at(None, dloss, need_dx=False)
        return out

    def _finish(self, params: list[Tensor]) -> None:
        """Make the sum of the gradients of several minibatches a mean, where the loss is one, and limit the norm."""
        if self.accumulate > 1 and self._mean:
            for p in params:
                p.grad.div_(self.accumulate)  # type: ignore[union-attr]
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.max_norm)

    @property
    def _mean(self) -> bool:
        return self.loss.reduction == "mean"

    @property
    def _joins_batches(self) -> bool:
        """Whether a layer has messages of its own to other processes, in forward and backward."""
        return any(isinstance(layer, SyncBatchNorm) for _, layer in self.model.named_layers())

    def _check_accumulated(self, x: Any, target: Any) -> None:
        if length(x, target) != self.accumulate:
            problem = f"a step takes {self.accumulate} minibatches, got {length(x, target)}"
            raise ShapeError(f"TrainStep(accumulate={self.accumulate}): {problem}")

    def _traced(self, x: Any, target: Any, progress: Progress) -> tuple[Traced, Stage, list[Tensor]]:
        """The step as a graph; also the parameters that were given a new optimizer state for that."""
        layers = list({id(la): la for part in (self.model, self.loss) for _, la in part.named_layers()}.values())
        if any(layer._watchers for layer in layers):
            problem = "a compiled step cannot be watched, for its program has no place to look at; "
            raise StateError(f"TrainStep.compile: {problem}look inside the step as it was before compile()")
        stage = self._stage(layers)
        new = [] if stage.optimizer is None else begin(stage.optimizer, self.params)
        progress.tell("tracing the step")
        try:
            traced = trace(stage, x, target)
            if not traced.graded:
                _refuse_no_gradient(self.params)
        except BaseException as error:
            for p in new:
                del self.optimizer.state[p]
            if isinstance(error, HandgradError) or not isinstance(error, Exception):
                raise
            self._explain(x, target)
            problem = "the step is not one graph of tensors (a layer may read a value, by .item() or if): "
            raise CompileError(f"TrainStep.compile: {problem}{error}") from error
        return traced, stage, new

    def _stage(self, layers: list[Layer]) -> Stage:
        """What the program does."""
        optimizer = self.optimizer if _in_program(self.optimizer) else None
        return Stage(layers, self.params, optimizer, self.accumulate, self._mean, self._forward_backward, self._finish)

    def _explain(self, x: Any, target: Any) -> None:
        """Raise what the layers say of a minibatch when no program hides it, if they say anything; on a copy."""
        try:
            model, loss = copy.deepcopy((self.model, self.loss))
        except Exception:  # it holds what cannot be copied
            return
        try:
            loss(model.forward_at(None, x), target)
            model.zero_grad()
            loss.zero_grad()
            model.backward_at(None, loss.backward())
            _refuse_no_gradient([*model.parameters(), *loss.parameters()])
        except Exception as plain:
            raise plain from None

    def _refuse_what_no_program_can(self, what: str) -> None:
        """Raise where there can be no program: for what the step does, or for what is installed here."""
        if self.processes is not None:
            problem = "messages to other processes are no part of a program; use the step as it is, or without a "
            if what == "export":
                raise CompileError(f"TrainStep.{what}: {problem}process_group")
            if self._joins_batches:
                raise CompileError(f"TrainStep.{what}: {problem}SyncBatchNorm")
        if torch.__version__ < COMPILING:
            problem = f"torch must be {COMPILING} or newer, for graphs of an older one take an index of -1, or crash; "
            problem += f"upgrade it, or use the step as it is; got {torch.__version__}"
            raise CompileError(f"TrainStep.{what}: {problem}")
        if self._release is not None:
            problem = "a program gives all gradients back at its end; leave out release_gradients"
            raise ArgumentError(f"TrainStep.{what}: {problem}")
        if any(p.device.type == "cpu" for p in self.params):
            _require_compiler(what)

    def _begin(self) -> None:
        """Claim the model for this step until `del _at_work[id(self.model)]`."""
        call, model = object(), self.model
        if _at_work.setdefault(id(model), call) is not call:
            raise StateError(f"TrainStep: another step of this model is under way; {ONE_THREAD}")
        if model._records or self.loss._records:
            del _at_work[id(model)]
            self._refuse_leftovers()

    def _refuse_leftovers(self) -> None:
        for layer in (self.model, self.loss):
            if layer._records:
                problem = f"{len(layer._records)} earlier forward(s) still wait for their backward; "
                raise layer.error(StateError, "forward", problem + "evaluate under torch.no_grad(), or drop_records()")


class CompiledTrainStep(TrainStep):
    """What `TrainStep.compile` returns: the same calls, by programs that are made when first needed."""

    def __init__(self, step: TrainStep, progress: bool | None) -> None:
        super().__init__(step.model, step.loss, step.optimizer, max_norm=step.max_norm, accumulate=step.accumulate)
        self._progress = sys.stderr.isatty() if progress is None else progress
        self._made: list[tuple[Fingerprint, dict[Any, Program]]] = []  # the latest used first

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry all but the programs, which are of this model; the copy makes its own."""
        return vars(self) | {"_made": []}

    def __call__(self, x: Any, target: Any) -> Tensor:
        if self.accumulate > 1:
            self._check_accumulated(x, target)
        levels = min(self.accumulate, 2) - 1
        return self._run(joined(x, levels), joined(target, levels))[0]

    def many(self, xs: Any, targets: Any) -> Tensor:
        """Do as TrainStep.many does, in one call of the program; in several where minibatches differ in shape."""
        steps = length(xs, targets)
        if not _in_program(self.optimizer):
            return super().many(xs, targets)
        ends, losses, done = ends_of_alike(xs, targets, steps), [], 0
        while done < steps:
            end = done + 1 if self._outside() else next(end for end in ends if end > done)
            some = [joined(minibatches(part, slice(done, end)), min(self.accumulate, 2)) for part in (xs, targets)]
            try:
                losses.append(self._run(*some))
            except Exception as error:
                _say_done(error, done, steps)
                raise
            done = end
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    def _run(self, xs: Any, targets: Any) -> Tensor:
        """The losses of the steps (one, where that is none for a program); minibatches lie one after the other."""
        if self._outside():
            minibatch = slice(None) if self.accumulate > 1 else 0
            return super().__call__(minibatches(xs, minibatch), minibatches(targets, minibatch)).unsqueeze(0)
        self._begin()
        try:
            parts, structure = taken_apart((xs, targets))
            program, losses, grads = self._results(xs, targets, parts, structure)
            for p in self.params:
                p.grad = None
            for i, grad in zip(program.traced.graded, grads):
                self.params[i].grad = grad
            if program.stage.optimizer is None:
                self._finish([p for p in self.params if p.grad is not None])
                self.optimizer.step()
            else:
                self.optimizer._opt_called = True  # type: ignore[attr-defined]  # or a scheduler warns
        finally:
            del _at_work[id(self.model)]
        return losses

    def _results(
        self, xs: Any, targets: Any, parts: list[Tensor], structure: Any
    ) -> tuple[Program, Tensor, list[Tensor]]:
        """What the program for such minibatches comes to: the losses and the last gradients; nothing after an error."""
        parts = [part.contiguous() for part in parts]
        program = self._program(xs, targets, parts, structure)
        try:
            losses, wrong, grads = program([*numbers(program.stage.optimizer).values()], parts)
        except RuntimeError as error:
            for k in range(len(parts[0])):
                self._explain(minibatches(xs, k), minibatches(targets, k))
            raise CompileError(f"TrainStep.compile: the program failed; nothing has changed; {error}") from error
        if wrong >= 0:
            self._explain(minibatches(xs, wrong), minibatches(targets, wrong))
            raise IndexRangeError(f"TrainStep.compile: an index in minibatch {wrong} is out of range")
        return program, losses, grads

    def _outside(self) -> bool:
        """Whether the next step is none for a program: one that layers refuse, or a first one with dampening."""
        return not torch.is_grad_enabled() or is_any_autocast_enabled() or _must_begin_outside(self.optimizer)

    def _program(self, xs: Any, targets: Any, parts: list[Tensor], structure: Any) -> Program:
        """The program for such minibatches and for the model as it is now."""
        kind = _in_program(self.optimizer), structure, *[(part.shape[1:], part.dtype, part.device) for part in parts]
        for i, (fingerprint, programs) in enumerate(self._made):
            if fingerprint.fits():
                if i > 0:
                    self._made.insert(0, self._made.pop(i))
                if kind not in programs:
                    programs[kind] = self._make(xs, targets)[1]
                return programs[kind]
        fingerprint, program = self._make(xs, targets)
        self._made[KEPT - 1 :] = []
        self._made.insert(0, (fingerprint, {kind: program}))
        return program

    def _make(self, xs: Any, targets: Any) -> tuple[Fingerprint, Program]:
        with Progress(self._progress) as progress:
            traced, stage, new = self._traced(minibatches(xs, 0), minibatches(targets, 0), progress)
            graded = {id(self.params[i]) for i in traced.graded}
            for p in new:
                if id(p) not in graded:
                    del self.optimizer.state[p]  # as without a program: no gradient, no state
            optimizer = self.optimizer if self.processes is None else None  # which is never in their program
            fingerprint = Fingerprint(stage.layers, self.params, traced.state, optimizer, SCHEDULED)
            return fingerprint, compiled(traced, stage, progress.tell)


class CompiledPart(CompiledTrainStep):
    """The compiled step of one of several processes: a program does forward, loss and backward of a minibatch's part.

    All else is as in `TrainStep`: what the processes tell each other, the update, and `many`, which is a loop here. (A
    program that itself waits for other processes can wait forever: torch runs it with Python's lock held, which the
    thread that brings their messages may need.)
    """

    def __init__(self, step: TrainStep, progress: bool | None) -> None:
        super().__init__(step, progress)
        self.processes, self.joined_loss = step.processes, step.joined_loss

    __call__ = TrainStep.__call__
    many = TrainStep.many

    def _forward_backward(self, x: Any, target: Any, first: bool = True, share: Tensor | None = None) -> Tensor:
        """Do as TrainStep does, by the program; but without it for a part of no rows."""
        xs, targets = joined(x, 0), joined((target, share), 0)
        parts, structure = taken_apart((xs, targets))
        if self._outside() or any(part.numel() == 0 for part in parts):
            return super()._forward_backward(x, target, first, share)
        before = [None if first else p.grad for p in self.params]
        program, losses, grads = self._results(xs, targets, parts, structure)
        for p, grad in zip(self.params, before):  # tracing frees them
            p.grad = grad
        for i, grad in zip(program.traced.graded, grads):
            p = self.params[i]
            p.grad = grad if p.grad is None else p.grad.add_(grad)
        return losses[0]

    def _stage(self, layers: list[Layer]) -> Stage:
        def one(x: Any, target_and_share: Any) -> Tensor:
            target, share = target_and_share
            return TrainStep._forward_backward(self, x, target, True, share)

        return Stage(layers, self.params, None, 1, self._mean, one, self._finish)

    def _explain(self, x: Any, target: Any) -> None:
        super()._explain(x, target[0])

    def _outside(self) -> bool:
        return not torch.is_grad_enabled() or is_any_autocast_enabled()


def _refuse_no_gradient(params: list[Tensor]) -> None:
    if params and all(p.grad is None for p in params):
        problem = "no parameter got a gradient, for all are frozen; unfreeze() what is to be trained"
        raise StateError(f"TrainStep: {problem}")


def _in_program(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a program does the optimizer's update: where it can be traced, and nobody is to be called beside it."""
    return type(optimizer) in (SGD, torch.optim.Adam, torch.optim.AdamW) and not hooked(optimizer)


def _must_begin_outside(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a momentum buffer is to be made with dampening: of the gradient, which zeros become only without."""
    return type(optimizer) is SGD and any(
        group["momentum"] != 0
        and group["dampening"] != 0
        and any(p not in optimizer.state and not is_frozen(p) for p in group["params"])
        for group in optimizer.param_groups
    )


def _say_done(error: Exception, done: int, steps: int) -> None:
    """Note on the error how far `many` came."""
    if hasattr(error, "add_note"):
        error.add_note(f"{done} of the {steps} steps of TrainStep.many are done")


def _require_compiler(what: str) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes seconds to import

    try:
        get_cpp_compiler()
    except Exception as error:
        problem = "a C++ compiler must be installed and on the path (g++ or clang++; the variable CXX names "
        problem += f"another), or use the step without compile(); torch says: {error}"
        raise CompileError(f"TrainStep.{what}: {problem}") from error
