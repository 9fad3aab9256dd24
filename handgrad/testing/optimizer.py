"""`check_optimizer`: an optimizer beside a reference, over many steps."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from handgrad.testing import judge
from handgrad.testing.errors import CheckFailure, ContractError, OutputMismatch, VacuousCheck
from handgrad.testing.strategies import tensors

STEPS = 5


def check_optimizer(
    make: Callable[..., Any],
    reference: Callable[..., Any],
    *,
    options: Mapping[str, Any],
    refuses: Callable[[dict[str, Any]], bool] | None = None,
    examples: int = 60,
) -> int:
    """Prove an optimizer's step against a reference: ``check_optimizer(SGD, torch.optim.SGD, options={...})``.

    make and reference are called with the parameters and with one value for each of `options` (a list of values or a
    hypothesis strategy). `refuses(values)` says which combinations both of them must refuse with a ValueError.

    Checked over five steps with fresh gradients: every parameter in float64; gradients that are None for some steps,
    which then leave the parameter and its state as they are; gradients never written to, neither in value nor in
    version; the same tensor objects throughout; `state_dict` carried over to a new optimizer in the middle; every other
    parameter group with a learning rate of its own; a learning rate changed between steps, as schedulers do.

    Returns how many distinct examples were compared. Raises OutputMismatch for a wrong parameter, ContractError for a
    broken rule, VacuousCheck where no parameter ever moved.

    >>> from handgrad import SGD
    >>> n = check_optimizer(SGD, torch.optim.SGD, options={"lr": [0.1, 0.5], "momentum": [0.0, 0.9]}, examples=10)
    """
    __tracebackhide__ = True
    seen: set[str] = set()
    moved = [False]

    @hypothesis.settings(
        max_examples=max(2, examples * hypothesis.settings().max_examples // 100),
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(st.data())
    def run(data: st.DataObject) -> None:
        start = [data.draw(tensors(shape)) for shape in ((2, 3), (3,), (), (2,))]
        grads = [[data.draw(tensors(p.shape)) for p in start] for _ in range(2)]
        absent = data.draw(st.integers(0, 15), label="parameters without a gradient, as bits")
        # By all numbers drawn: hypothesis' own draws of options, or of a seed for them, keep returning to the same few.
        generator = random.Random(f"{start} {grads}")
        values = {
            name: data.draw(choice, label=name)
            if isinstance(choice, SearchStrategy)
            else generator.choice(list(choice))
            for name, choice in options.items()
        }
        if refuses is not None and refuses(values):
            _both_refuse(make, reference, values)
            return
        seen.add(f"{values} {absent} {start} {grads}")
        moved[0] |= _side_by_side(make, reference, values, start, grads, absent)

    try:
        run()
    except CheckFailure as failure:
        notes = getattr(failure, "__notes__", [])
        text = "\n  ".join([failure.message, *(n for n in notes if ":" in n and "reproduce_failure" not in n)])
        raise type(failure)(text, **failure.details) from None
    if not moved[0]:
        raise VacuousCheck("no step moved a parameter, so nothing was compared; give options with a learning rate")
    return len(seen)


def _side_by_side(
    make: Callable[..., Any],
    reference: Callable[..., Any],
    values: dict[str, Any],
    start: list[Tensor],
    grads: list[list[Tensor]],
    absent: int,
) -> bool:
    """Five steps of both; whether a parameter moved at all."""
    ours, theirs = [p.clone() for p in start], [p.clone() for p in start]
    mine, want = (
        f([{"params": ps[:2]}, {"params": ps[2:]}], **values) for f, ps in ((make, ours), (reference, theirs))
    )
    for optimizer in (mine, want):
        optimizer.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"] * 0.5
    held: list[tuple[Tensor, int, Tensor]] = []  # every gradient given so far, its version and its value
    for step in range(STEPS):
        if step == 2:
            mine = _reloaded(make, mine, ours, values)
        if step == 3:
            for optimizer in (mine, want):
                optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.1
        for i, grad in enumerate(grads[step % 2]):
            none = step < 3 and absent >> i & 1
            ours[i].grad, theirs[i].grad = (None, None) if none else (grad.clone(), grad.clone())
        held += [(p.grad, p.grad._version, p.grad.clone()) for p in ours if p.grad is not None]
        ids = [id(p) for group in mine.param_groups for p in group["params"]]
        mine.step()
        want.step()
        where = f" after step {step + 1} with {values}"
        if ids != [id(p) for p in ours]:
            raise ContractError(f"the optimizer must update the tensors it was given in place; it replaced one{where}")
        for grad, version, value in held:
            if grad._version != version or not judge.identical(grad, value):
                raise ContractError(f"step() wrote to a gradient{where}; gradients belong to whoever made them")
        named = [{f"parameter {i} {tuple(p.shape)}": p for i, p in enumerate(ps)} for ps in (ours, theirs)]
        judge.judge(named[0], named[1], judge.within(judge.SAME_CODE), where, OutputMismatch)
    return any(not torch.equal(p, q) for p, q in zip(ours, start))


def _reloaded(make: Callable[..., Any], old: Any, params: list[Tensor], values: dict[str, Any]) -> Any:
    """A new optimizer over the same tensors that goes on where the old one was."""
    new = make([{"params": params[:2]}, {"params": params[2:]}], **values)
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    return new


def _both_refuse(make: Callable[..., Any], reference: Callable[..., Any], values: dict[str, Any]) -> None:
    for what, optimizer in (("the reference", reference), ("the optimizer", make)):
        try:
            optimizer([torch.zeros(1)], **values)
        except ValueError:
            judge.compared(1)
        else:
            raise ContractError(f"{what} must refuse {values} with a ValueError")
