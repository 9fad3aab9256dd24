"""The training step as a program: traced once as a pure graph, compiled as a loop over minibatches, run without Python.

A step has no tape, so it is one plain function of tensors: of those that the model, the loss and the optimizer hold,
and of a minibatch. `trace` finds that function, with stand-ins in the places of the tensors. `_Loop` puts it in a
`while_loop` over K minibatches. `Program` has AOTInductor compile the loop into a file, and runs it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import os
import sys
import tempfile
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx

from handgrad.errors import CompileError
from handgrad.layer import Layer, is_frozen
from handgrad.minibatches import rebuilt, taken_apart
from handgrad.randomness import SEEDS, seeded
from handgrad.records import tensors_in
from handgrad.rewrites import add_bias_apart, check_indices, products_by_onednn, tanh_by_exp

SCHEDULED = ("lr", "momentum", "betas")
"""The options of an optimizer that schedulers change: inputs of the program, or each value would be compiled anew."""
EXAMPLES = 4  # minibatches that the loop is exported with; any other number will do as well
_one_at_a_time = threading.RLock()  # torch exports and compiles in one thread at a time


Tensors: TypeAlias = list[Tensor]


class Number(NamedTuple):
    """A scheduled option: of which parameter group, its name, and where in a pair."""

    group: int
    name: str
    place: int | None


class Stage(NamedTuple):
    """What a step is made of."""

    layers: list[Layer]  # of the model and of the loss, each once
    params: list[Tensor]
    optimizer: torch.optim.Optimizer | None  # None: its update is no part of the program
    accumulate: int  # minibatches per step
    mean: bool  # whether the loss of a step is the mean over its minibatches, or their sum
    one: Callable[[Any, Any], Tensor]  # forward, loss and backward of a minibatch
    finish: Callable[[list[Tensor]], None]  # what happens to the gradients of these before the update


class Traced(NamedTuple):
    """The step as a pure graph of (state, numbers, sums of gradients, parts of x and target, seed).

    Its results: the changed state, the loss, the sums so far where several minibatches are accumulated, the gradients.
    """

    graph: fx.GraphModule
    state: list[Tensor]  # all that it reads
    numbers: list[Number]
    parts: list[Tensor]  # an example
    changed: list[int]  # which of the state it changes
    updated: set[int]  # which of those the optimizer changes
    graded: list[int]  # which of the parameters get a gradient
    check: fx.GraphModule | None  # whether an index is out of range, of the same inputs; None where there is no index
    seeded: bool  # whether it draws random numbers
    digest: str  # of everything that decides what is compiled


Place = tuple[dict[str, Any], str]
"""Where a tensor, or a list, tuple or dict with tensors, is held: the attributes of a layer, and the name there."""


def places(layers: Sequence[Layer]) -> list[Place]:
    """Where the layers hold tensors."""
    named = [(vars(layer), name) for layer in layers for name in vars(layer) if name != "_records"]
    return [(owner, name) for owner, name in named if any(True for _ in tensors_in(owner[name]))]


def numbers(optimizer: torch.optim.Optimizer | None) -> dict[Number, float]:
    """The scheduled options and their values; a momentum of 0 is none, for without it there are no buffers."""
    found: dict[Number, float] = {}
    for i, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
        for name in SCHEDULED:
            value = group.get(name, 0)
            if isinstance(value, tuple):
                found |= {Number(i, name, j): float(part) for j, part in enumerate(value)}
            elif name == "lr" or value != 0:
                found[Number(i, name, None)] = float(value)
    return found


def replaced(value: Any, new: dict[int, Tensor]) -> Any:
    """The value, which may be a list, tuple or dict, with other tensors in it."""
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    if type(value) in (list, tuple):
        return type(value)(replaced(part, new) for part in value)
    return {key: replaced(part, new) for key, part in value.items()} if type(value) is dict else value


@contextlib.contextmanager
def stand_ins(layers: Sequence[Layer], new: dict[int, Tensor]) -> Iterator[None]:
    """Put other tensors in the places of the layers' own for as long, and leave no record behind."""
    held = [(owner, name, owner[name]) for owner, name in places(layers)]
    try:
        for owner, name, value in held:
            owner[name] = replaced(value, new)
        yield
    finally:
        for owner, name, value in held:
            owner[name] = value
        for layer in layers:
            layer._records.clear()


def update(optimizer: torch.optim.Optimizer, new: dict[int, Tensor], values: dict[Number, Tensor]) -> None:
    """Do the optimizer's own step on the stand-ins: by a copy that holds them, its scheduled options tensors."""
    twin = copy.copy(optimizer)
    twin.param_groups, twin.state = [], defaultdict(dict)
    for i, group in enumerate(optimizer.param_groups):
        params = [p for p in group["params"] if id(p) in new]
        options: dict[str, Any] = {**group, "params": [new[id(p)] for p in params]}
        for number, value in values.items():
            if number.group == i and number.place is None:
                options[number.name] = value
            elif number.group == i:
                pair = list(options[number.name])
                pair[number.place or 0] = value
                options[number.name] = tuple(pair)
        if "capturable" in options:  # torch's word for: the options may be tensors
            options |= {"capturable": True, "foreach": False, "fused": False}
        twin.param_groups.append(options)
        for p in params:
            if p in optimizer.state:
                twin.state[new[id(p)]] = replaced(optimizer.state[p], new)
    twin.step()


def begin(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """Give parameters without a state the one that the optimizer's first step would begin with; return these.

    For SGD's momentum buffers that is zeros, which the first step makes the gradient (without dampening).
    """
    new, known = [], set(map(id, params))
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) in known and not is_frozen(p) and not optimizer.state.get(p):
                if "betas" in group:
                    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
                    optimizer.state[p] = {"step": torch.tensor(0.0), **{name: torch.zeros_like(p) for name in names}}
                elif group["momentum"] != 0:
                    optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}
                else:
                    continue
                new.append(p)
    return new


class _Step(torch.nn.Module):
    """What is traced: a module, for torch.export takes nothing else."""

    def __init__(self, stage: Stage, state: list[Tensor], wanted: list[Number], structure: Any, found: Any) -> None:
        super().__init__()
        self.stage, self.state, self.wanted, self.structure = stage, state, wanted, structure
        self.found = found  # told which parameters got a gradient, and in how many places random numbers were drawn

    def forward(self, state: Tensors, values: Tensors, sums: Tensors, parts: Tensors, seed: Tensor) -> Any:
        stage, new = self.stage, {id(t): s for t, s in zip(self.state, state)}
        params = [new[id(p)] for p in stage.params]
        for p, stand_in in zip(stage.params, params):
            if is_frozen(p):
                stand_in.frozen = True  # type: ignore[attr-defined]
        with stand_ins(stage.layers, new), seeded(seed) as drawn:
            loss = stage.one(*rebuilt(self.structure, iter(parts)))
        graded = [i for i, p in enumerate(params) if p.grad is not None]
        for i in graded if sums else ():
            params[i].grad = params[i].grad + sums[i]  # type: ignore[operator]
        having = [params[i] for i in graded]
        so_far = [p.grad.clone() for p in having if p.grad is not None] if sums else []
        if stage.optimizer is not None:
            stage.finish(having)
            update(stage.optimizer, new, dict(zip(self.wanted, values)))
        self.found(graded, drawn.places)
        return loss.reshape(()), so_far, [p.grad for p in having]


def trace(stage: Stage, x: Any, target: Any) -> Traced:
    """Run a step on stand-ins for its tensors, and write down what it computes."""
    wanted = list(numbers(stage.optimizer))
    own: Any = {} if stage.optimizer is None else stage.optimizer.state
    optimized = [t for p in stage.params if p in own for t in tensors_in(own[p])]
    held = [*stage.params, *tensors_in([owner[name] for owner, name in places(stage.layers)]), *optimized]
    state = list({id(t): t for t in held}.values())
    _refuse_overlap(state)
    parts, structure = taken_apart((x, target))
    sums = [torch.zeros_like(p) for p in stage.params] if stage.accumulate > 1 else []
    seed = torch.tensor(0, device=parts[0].device)
    graded: list[int] = []
    drawn = 0

    def found(which: list[int], places: int) -> None:
        nonlocal drawn
        graded[:], drawn = which, places

    inputs = (state, [_number(0.5) for _ in wanted], sums, parts, seed)
    with _one_at_a_time, _quiet():
        for p in stage.params:
            p.grad = None  # or torch would take it for a part of the input
        exported = torch.export.export(_Step(stage, state, wanted, structure, found), inputs, strict=False)
        exported = exported.run_decompositions()
    graph, constants = exported.graph_module, {}
    names = []
    for spec in exported.graph_signature.input_specs:
        if spec.target is None:
            names.append(spec.arg.name)
        else:  # such as torch.tensor(0.5) in a layer
            constants[spec.arg.name] = exported.constants[spec.target]
    outputs = [spec.target for spec in exported.graph_signature.output_specs]
    changed = [names.index(name) for name in outputs if name is not None]
    moved = {id(t) for t in (*optimized, *[stage.params[i] for i in graded])}
    updated = {i for i in changed if id(state[i]) in moved}
    _move_inputs(graph, list(constants), before=names[len(state)])
    state += constants.values()
    check = check_indices(graph)
    if check is not None:
        _refuse_moving_indices(check, [names[i] for i in changed])
    add_bias_apart(graph)
    products_by_onednn(graph)
    tanh_by_exp(graph)
    what = graph.code, check and check.code, changed, updated, graded, drawn > 0
    digest = _digest(what, [*state, *parts], stage)
    return Traced(graph, state, wanted, parts, changed, updated, graded, check, drawn > 0, digest)


def _refuse_overlap(state: Tensors) -> None:
    """Raise CompileError where two tensors share memory, for a graph would see no change of one in the other."""
    spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t), tuple(t.shape)) for t in state if t.numel() > 0)
    for (_, end, shape), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            problem = (
                f"two tensors of the model or the optimizer, of shapes {shape} and {other}, share memory; give each "
            )
            raise CompileError(f"TrainStep.compile: {problem}its own, or let the layers hold the very same tensor")


def _refuse_moving_indices(check: fx.GraphModule, changed: Sequence[str]) -> None:
    """Raise CompileError where an index comes of what the steps change: it is looked at before the first of them."""
    used = [node.name for node in check.graph.nodes if node.op == "placeholder" and node.users]
    if set(used).intersection(changed):
        problem = "an index is computed of a tensor that the step changes; "
        raise CompileError(f"TrainStep.compile: {problem}use the step as it is, or compute it of the minibatch")


def _extent(t: Tensor) -> int:
    """The bytes from a tensor's first number to its last."""
    return t.element_size() * (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride())))


def _move_inputs(module: fx.GraphModule, names: Sequence[str], before: str) -> None:
    """Make some inputs of a graph come just before another one."""
    nodes = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    for name in names:
        nodes[before].prepend(nodes[name])
    module.recompile()


def _digest(what: tuple[Any, ...], tensors: Tensors, stage: Stage) -> str:
    """A name for what is compiled: of the graph, the tensors' kinds, and what torch compiles it with and for."""
    kinds = [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    machine = torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), os.environ.get("CXX")
    ways = stage.accumulate, stage.mean, Path(__file__).read_text()
    return hashlib.sha256(repr((*what, kinds, *machine, *ways)).encode()).hexdigest()


class _Loop(torch.nn.Module):
    """Do the steps of the minibatches `first` to `last` - 1, or none of them where one has an index out of range."""

    def __init__(self, traced: Traced, stage: Stage) -> None:
        super().__init__()
        from torch._higher_order_ops.while_loop import while_loop_op

        self.graph, self.traced, self.stage, self.repeat = traced.graph, traced, stage, while_loop_op

    def forward(
        self, state: Tensors, values: Tensors, parts: Tensors, seeds: Tensors, first: Tensor, last: Tensor
    ) -> Any:
        graph, traced, A = self.graph, self.traced, self.stage.accumulate
        changed, C, G = traced.changed, len(traced.changed), len(traced.graded)

        wrong, last = self._look(state, parts, first, last)
        # what the two functions below read comes as arguments, each tensor once: they are traced as graphs themselves
        kept = [i for i in range(len(state)) if i not in set(changed)]
        given = (*[state[i] for i in kept], *values, *parts, *seeds, last)
        moving, grads = _Packed([state[i] for i in changed]), _Packed([state[i] for i in traced.graded])
        M, size = len(moving), len(state)

        def goes_on(k: Tensor, *rest: Tensor) -> Tensor:
            return k < rest[-1]

        def step(k: Tensor, losses: Tensor, *rest: Tensor) -> Any:
            carried, earlier, rest = rest[:M], rest[M:][: len(grads)], rest[M + len(grads) :]
            numbers, many = rest[len(kept) :][: len(values)], rest[len(kept) + len(values) : -1]
            now: Any = [None] * size
            for i, t in (*zip(changed, moving.apart(carried)), *zip(kept, rest)):
                now[i] = t
            at = k.view(1)
            minibatch = [part.index_select(0, at).squeeze(0) for part in many]
            sums = [torch.zeros_like(t) for t in now[: len(self.stage.params)]] if A > 1 else []
            for i, grad in zip(traced.graded, grads.apart(earlier) if A > 1 else ()):
                sums[i] = torch.where(k % A == 0, sums[i], grad)
            results = graph(*now, *numbers, *sums, *minibatch, *([] if seeds else [k]))
            new, loss, having = list(results[:C]), results[C].view(1), list(results[C + 1 :])
            if A > 1:
                ends = k % A == A - 1
                new = [torch.where(ends, t, now[i]) if i in traced.updated else t for i, t in zip(changed, new)]
                having = [torch.where(ends, grad, so_far) for so_far, grad in zip(having[:G], having[G:])]
                losses = losses.index_add(0, (k // A).view(1), loss / A if self.stage.mean else loss)
            else:
                losses = losses.index_copy(0, at, loss)
            return (k + 1, losses, *moving.together(new), *grads.together(having))

        loss_node = next(reversed(graph.graph.nodes)).args[0][C]
        losses = torch.zeros(parts[0].shape[0] // A, dtype=loss_node.meta["val"].dtype, device=parts[0].device)
        before = [state[i] for i in changed]
        none_yet = [torch.zeros_like(state[i]) for i in traced.graded]
        begin: Any = (first.clone(), losses, *moving.together(before), *grads.together(none_yet))
        _, losses, *carried = self.repeat(goes_on, step, begin, given)
        for t, after in zip(before, moving.apart(carried[:M])):
            t.copy_(after)
        return losses, wrong, grads.apart(carried[M:])

    def _look(self, state: Tensors, parts: Tensors, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The first minibatch with an index out of range, or -1; and where to end: at once if there is one."""
        check = self.traced.check
        if check is None:
            return torch.full_like(first, -1), last
        rest = [node for node in check.graph.nodes if node.op == "placeholder"][len(state) :]
        others = [None] * (len(rest) - len(parts) - 1)  # numbers and sums; no index is computed of these
        outside = torch.vmap(lambda *parts: check(*state, *others, *parts, None))(*parts)
        at = torch.arange(parts[0].shape[0], device=first.device)
        found = torch.where(outside & (at >= first) & (at < last), at, last).amin()
        return torch.where(found < last, found, -1), torch.where(found < last, first, last)


class _Packed:
    """How tensors lie end to end, all of a dtype in one: of each that a loop carries it makes a new one per step."""

    def __init__(self, like: Tensors) -> None:
        self.shapes, self.dtypes = [t.shape for t in like], [t.dtype for t in like]

    def __len__(self) -> int:
        return len(set(self.dtypes))

    def together(self, tensors: Tensors) -> Tensors:
        """The tensors as the few that hold them."""
        kinds = dict.fromkeys(self.dtypes)
        return [torch.cat([t.reshape(-1) for t in tensors if t.dtype == dtype]) for dtype in kinds]

    def apart(self, packed: Sequence[Tensor]) -> Tensors:
        """The tensors, views of those that hold them."""
        holders, used = dict(zip(dict.fromkeys(self.dtypes), packed)), defaultdict[torch.dtype, int](int)
        tensors = []
        for shape, dtype in zip(self.shapes, self.dtypes):
            begin, used[dtype] = used[dtype], used[dtype] + shape.numel()
            tensors.append(holders[dtype][begin : used[dtype]].view(shape))
        return tensors


class Program:
    """The compiled loop of a traced step."""

    def __init__(self, traced: Traced, stage: Stage, run: Callable[[Tensors], Tensors]) -> None:
        """Take what runs the loop on a flat list of its inputs."""
        self.traced, self.stage, self._run = traced, stage, run
        device = traced.parts[0].device
        self._first = torch.tensor(0, device=device)
        self._lasts: dict[int, Tensor] = {}
        self._numbers = [_number(0.5) for _ in traced.numbers]
        self._values = [0.5 for _ in traced.numbers]
        held = [value for layer in stage.layers for value in vars(layer).values()]
        self._generators = list({id(g): g for g in held if isinstance(g, torch.Generator)}.values())

    def __call__(self, values: list[float], parts: list[Tensor]) -> tuple[Tensor, int, list[Tensor]]:
        """Do the steps of all minibatches: `parts` hold them one after the other.

        Returns the losses, the index of a minibatch in which an index was out of range, or -1, and the gradients of
        the last step. After any error, and with such a minibatch, nothing has changed.
        """
        count = len(parts[0])
        if values != self._values:
            for tensor, value in zip(self._numbers, values):
                tensor.fill_(value)
            self._values = values
        if count not in self._lasts:
            self._lasts[count] = torch.tensor(count, device=self._first.device)
        seeds = [self._seeds(count)] if self.traced.seeded else []
        inputs = [*self.traced.state, *self._numbers, *parts, *seeds, self._first, self._lasts[count]]
        losses, wrong, *grads = self._run(inputs)
        return losses, int(wrong), grads

    def _seeds(self, count: int) -> Tensor:
        """One per minibatch, drawn from each generator of the layers, or from torch's global one."""
        seeds = torch.zeros(count, dtype=torch.int64)
        generators: list[Any] = [*self._generators] or [None]
        for generator in generators:
            device = None if generator is None else generator.device
            seeds ^= torch.randint(SEEDS, (count,), generator=generator, device=device).cpu()
        return seeds.to(self._first.device)


def compiled(traced: Traced, stage: Stage, tell: Callable[[str], None]) -> Program:
    """The program from the cache on the disk, which is torch's; else compiled now. Errors are torch's own."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    path = Path(cache_dir()) / "handgrad" / f"{traced.digest}.pt2"
    if path.exists():
        with contextlib.suppress(RuntimeError, OSError):  # it is damaged: make it anew
            return Program(traced, stage, _loaded(path))
    tell("compiling")
    package(traced, stage, path)
    return Program(traced, stage, _loaded(path))


def package(traced: Traced, stage: Stage, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Compile the loop into a file, which appears when it is whole."""
    import torch._inductor

    K: Any = torch.export.Dim("K", min=1)
    K = K if stage.accumulate == 1 else stage.accumulate * K
    count = EXAMPLES * stage.accumulate
    parts = [torch.stack([part] * count) for part in traced.parts]
    device = parts[0].device
    seeds = [torch.zeros(count, dtype=torch.int64, device=device)] if traced.seeded else []
    first, last = (torch.tensor(k, device=device) for k in (0, count))
    inputs = (traced.state, [_number(0.5) for _ in traced.numbers], parts, seeds, first, last)
    same = [None] * len(traced.state), [None] * len(traced.numbers)
    shapes = (*same, [{0: K}] * len(parts), [{0: K}] * len(seeds), None, None)
    # or the check of the inputs refuses a single step: torch takes it that any K is 2 or more
    options: dict[str, Any] = {"aot_inductor.check_lowerbound": False, "aot_inductor.metadata": metadata or {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time, _quiet(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        exported = torch.export.export(_Loop(traced, stage), inputs, dynamic_shapes=shapes, strict=False)
        made = torch._inductor.aoti_compile_and_package(
            exported, package_path=os.path.join(folder, "program.pt2"), inductor_configs=options
        )
        os.replace(made, path)


class Progress:
    """A line on stderr that says what is under way, and how long it took."""

    def __init__(self, shown: bool) -> None:
        self.shown, self.begun = shown, 0.0

    def tell(self, what: str) -> None:
        """The next thing."""
        if self.shown:
            self._end(", ")
            print(f"{what} ...", end="", file=sys.stderr, flush=True)
            self.begun = time.perf_counter()

    def _end(self, then: str) -> None:
        if self.begun:
            print(f" {time.perf_counter() - self.begun:.1f} s", end=then, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._end("\n")


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's compiler warns of its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _loaded(path: Path) -> Callable[[Tensors], Tensors]:
    import torch._inductor

    with _quiet():
        package = torch._inductor.aoti_load_package(str(path))
    return package.loader.run
