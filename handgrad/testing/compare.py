"""`compare`: a layer beside the equal torch.nn.Module, step by step."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from handgrad.testing import judge, subject
from handgrad.testing.errors import OutputMismatch
from handgrad.testing.oracle import Oracle


def compare(layer: Any, module: torch.nn.Module, x: Any, *, steps: int = 3, seed: int = 0) -> None:
    """Run a layer and the equal torch module over the same batches, and compare everything, in float64.

    Each of `steps` training steps, and then one in evaluation, forwards a batch made of x (scaled and shifted anew
    each time), sends back a random dout, and compares outputs, dx, the gradient of every parameter (which add up over
    the steps) and every buffer, by name. The module gets the layer's parameters and buffers; what is frozen in the
    layer is so in the module. Both are copied first: the caller's stay as they are, and so does torch's global
    generator.

    x is one input, or a tuple of inputs, any of which may be a tuple itself. Raises OutputMismatch or GradientMismatch
    with the step and the tensor; OracleError where the module's names or shapes differ.

    >>> from handgrad import BatchNorm1d
    >>> compare(BatchNorm1d(3), torch.nn.BatchNorm1d(3), torch.randn(5, 3))
    """
    subject.check_contract(layer)
    ours = subject.Packed(subject.cast(subject.clone(layer), torch.float64), subject.form_of(subject.as_tuple(x)))
    subject.study(ours, tuple(_vary(t, 0) for t in subject.flatten(x)))
    call, theirs = Oracle(module=lambda: subject.clone(module)).bind(ours)
    frozen = subject.frozen(ours)
    for name, param in subject.parameters(theirs).items():
        param.requires_grad_(name not in frozen)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps + 1):
        training = step < steps
        subject.set_mode(ours, training)
        theirs.train(training)
        where = f" in {'training' if training else 'evaluation'} step {step + 1}"
        inputs = tuple(_vary(t, step) for t in subject.flatten(x))
        with subject.private_rng(seed + step), torch.enable_grad():
            outs = subject.forward(ours, inputs)
            douts = tuple(_dout(o, generator) for o in outs)
            dx = subject.backward(ours, inputs, douts)
        names = subject.input_names(ours, inputs)
        leaves = {n: t.requires_grad_() for n, t in zip(names, map(torch.clone, inputs)) if n in dx}
        with subject.private_rng(seed + step), torch.enable_grad():
            wanted = call(*[leaves.get(n, t) for n, t in zip(names, inputs)])
            _same_number(outs, wanted, where)
            tracked = [o.requires_grad for o in wanted]
            if any(tracked):
                torch.autograd.backward(list(compress(wanted, tracked)), list(compress(douts, tracked)))
        limit = judge.within(judge.AGAINST_ORACLE, 1e-3 * max(map(judge.largest, douts), default=0.0))
        detached = subject.named("out", tuple(o.detach() for o in wanted))
        judge.judge(subject.named("out", outs), detached, limit, where, OutputMismatch)
        truth: dict[str, Tensor | None] = {n: t.grad for n, t in {**leaves, **subject.parameters(theirs)}.items()}
        judge.judge({**dx, **subject.gradients(ours)}, truth, limit, where)
        judge.judge(subject.copies(subject.buffers(ours)), subject.buffers(theirs), limit, where, OutputMismatch)


def _vary(t: Tensor, step: int) -> Tensor:
    return t.detach().to(torch.float64) * (1 + 0.5 * step) + 0.25 * step if t.is_floating_point() else t


def _dout(out: Tensor, generator: torch.Generator) -> Tensor:
    """A random dout; of zeros for what has no gradient, which is not given it."""
    if not out.is_floating_point():
        return torch.zeros(out.shape)
    return torch.randn(out.shape, generator=generator, dtype=out.dtype)


def _same_number(outs: tuple[Tensor, ...], wanted: tuple[Tensor, ...], where: str) -> None:
    ours, theirs = [tuple(o.shape) for o in outs], [tuple(o.shape) for o in wanted]
    if ours != theirs:
        raise OutputMismatch(f"forward gives outputs of shapes {ours}{where}, the module {theirs}")
