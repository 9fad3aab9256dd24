"""Which method notices which planted fault: ``python -m tests.testing.planted --write benchmarks/faults``."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import handgrad as hg
from handgrad.errors import HandgradError
from handgrad.tracked import tracked_by_autograd
from tests.cases import CASES, OPTIMIZERS
from tests.mutate import first_failure, quick
from tests.testing.faults import PLANTED, Fault

CHECKERS = ("handgrad", "y.sum()", "random dout", "gradcheck")
COMPARED = {hg.Linear, hg.Embedding, hg.Flatten, hg.Tanh, hg.BatchNorm1d, hg.CrossEntropy, hg.Sequential, hg.SGD}


def noticed_by(fault: Fault) -> str:
    """The first property that fails in the cases of the class; empty for none."""
    with fault.planted(), quick():
        return first_failure(case for case in [*CASES.values(), *OPTIMIZERS.values()] if case.covers is fault.layer)


def ordinary(layer: type) -> tuple[Any, tuple[Tensor, ...]]:
    """A layer as its constructor makes it, and one ordinary input: what a quick check by hand would take."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(0, 6, (8,), generator=generator)
    made = {
        hg.Linear: lambda: (hg.Linear(5, 4, generator=generator), (draw(8, 5),)),
        hg.Embedding: lambda: (hg.Embedding(6, 4, generator=generator), (labels,)),
        hg.Flatten: lambda: (hg.Flatten(), (draw(8, 3, 2),)),
        hg.Tanh: lambda: (hg.Tanh(), (draw(8, 5),)),
        hg.BatchNorm1d: lambda: (hg.BatchNorm1d(5), (draw(8, 5),)),
        hg.CrossEntropy: lambda: (hg.CrossEntropy(), (draw(8, 6), labels)),
        hg.Sequential: lambda: (hg.Sequential(hg.Linear(5, 4, generator=generator), hg.Tanh()), (draw(8, 5),)),
    }
    model, inputs = made[layer]()
    return model.to(torch.float64), inputs


def one_pass(fault: Fault, dout: Callable[[Tensor], Tensor]) -> bool:
    """Whether one forward and backward with this dout shows the fault, as a comparison with autograd."""
    layer, inputs = ordinary(fault.layer)
    twin = copy.deepcopy(layer)
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    params = [p.requires_grad_() for p in twin.parameters()]
    with tracked_by_autograd():
        out = twin.forward(*leaves)
    d = dout(out.detach())
    out.backward(d)
    with fault.planted():
        try:
            layer.forward(*inputs)
            dx = layer.backward(d.clone())
        except (RuntimeError, ValueError, TypeError, HandgradError):
            return True
    pairs = [(p.grad, q.grad) for p, q in zip(layer.parameters(), params)]
    if leaves[0].is_floating_point():
        pairs.append((dx, leaves[0].grad))
    return not all(a is not None and a.shape == b.shape and torch.allclose(a.to(b), b, 1e-7, 1e-9) for a, b in pairs)


def gradcheck(fault: Fault) -> bool:
    """Whether torch.autograd.gradcheck shows the fault, the layer wrapped in an autograd.Function."""
    layer, inputs = ordinary(fault.layer)

    class Wrapped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.layer = copy.deepcopy(layer)
            for p, value in zip(ctx.layer.parameters(), tensors[len(inputs) :]):
                p.copy_(value)
            with torch.enable_grad():
                out: Tensor = ctx.layer.forward(*[t.detach().clone() for t in tensors[: len(inputs)]])
            return out.detach().clone()

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> Any:
            ctx.layer = copy.deepcopy(ctx.layer) if not ctx.layer.pending else ctx.layer
            records = copy.copy(ctx.layer._records)
            ctx.layer.zero_grad()
            inner = [(each, copy.copy(each._records)) for _, each in ctx.layer.named_layers()]
            dx = ctx.layer.backward(dout)
            for each, kept in inner:  # gradcheck goes back through one forward several times
                each._records = kept
            ctx.layer._records = records
            rest = [None] * (len(inputs) - 1)
            return (dx, *rest, *[p.grad.clone() for p in ctx.layer.parameters()])

    tensors = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    params = [p.clone().requires_grad_() for p in layer.parameters()]
    with fault.planted():
        try:
            return not torch.autograd.gradcheck(Wrapped.apply, (*tensors, *params), raise_exception=False)
        except Exception:  # whatever it raises, the fault has been noticed
            return True


def row(fault: Fault) -> dict[str, str]:
    """The fault and who notices it."""
    if fault.layer is hg.SGD:
        others = dict.fromkeys(CHECKERS[1:], "not made for it")
    else:
        generator = torch.Generator().manual_seed(1)
        random = lambda out: torch.randn(out.shape, generator=generator, dtype=out.dtype)  # noqa: E731
        found = (one_pass(fault, torch.ones_like), one_pass(fault, random), gradcheck(fault))
        others = {method: "noticed" if yes else "missed" for method, yes in zip(CHECKERS[1:], found)}
    return {"layer": fault.layer.__name__, "fault": fault.name, "handgrad": noticed_by(fault) or "missed", **others}


def table(rows: list[dict[str, str]]) -> str:
    """The rows in markdown, and how many faults each method misses."""
    lines = ["| layer | fault | " + " | ".join(CHECKERS) + " |", "| --- " * (2 + len(CHECKERS)) + "|"]
    lines += [f"| {r['layer']} | {r['fault']} | " + " | ".join(r[m] for m in CHECKERS) + " |" for r in rows]
    counted = [r for r in rows if r["layer"] != "SGD"]
    totals = [f"{sum(r[m] == 'missed' for r in counted)} of {len(counted)}" for m in CHECKERS]
    lines.append("| | **missed, of the faults in layers** | " + " | ".join(totals) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the table; exit code 1 where handgrad misses a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", metavar="PATH", help="write PATH.md and PATH.json")
    given = parser.parse_args()
    rows = [row(fault) for fault in PLANTED if fault.layer in COMPARED]
    text = table(rows)
    print(text)
    if given.write:
        head = "# Planted faults, and who notices them\n\n"
        how = (
            "Made by `python -m tests.testing.planted --write benchmarks/faults`. `handgrad`: the property that fails "
            "in the layer's own `check_layer`. The other three take one ordinary sample and the parameters that the\n"
            "constructor gives: `y.sum()` and one random dout compare with autograd, `gradcheck` wraps the layer in an "
            "`autograd.Function`. A word on losses: `y.sum()` of a scalar loss is the plain `loss.backward()`.\n\n"
        )
        Path(f"{given.write}.md").write_text(head + how + text)
        Path(f"{given.write}.json").write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(r["handgrad"] == "missed" for r in rows))


if __name__ == "__main__":
    sys.exit(main())
