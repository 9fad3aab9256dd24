"""How small a fault the checks notice: ``python benchmarks/sensitivity.py --json benchmarks/results/sensitivity.json``.

In every case of tests/cases.py, one gradient at a time (dx, or that of one parameter) is multiplied by 1 + eps, and eps
made smaller until no example of the property notices it. The figure of a case is that of its least watched gradient.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from handgrad.bench.report import write_json  # noqa: E402  # found by the path above
from handgrad.testing import Sample, check_loss, subject  # noqa: E402
from handgrad.testing.check import examples_of  # noqa: E402
from handgrad.testing.plan import Plan, plan_of  # noqa: E402
from handgrad.testing.sensitivity import Faulty, GenericFault, noticed  # noqa: E402
from tests.mutate import load_cases, quick  # noqa: E402

MEASURED = {"gradients": "P1", "dtypes": "P9", "special": "P11"}
SIZES = [round(10 ** (-exponent / 2), 12) for exponent in range(2, 21)]  # 0.1 to 1e-10, two a decade


def scaled(name: str) -> GenericFault:
    """The fault of one gradient times 1 + size."""

    def backward(faulty: Faulty, dout: Any, **keywords: Any) -> Any:
        dx = faulty.wrapped_layer.backward(dout, **keywords)
        parameter = subject.parameters(faulty).get(name)
        if parameter is not None:
            if parameter.grad is not None:
                parameter.grad.mul_(1 + faulty.size)
            return dx
        grads = subject.named("dx", subject.as_tuple(dx))
        if isinstance(grads.get(name), Tensor):  # None where dx was declined
            grads[name] = grads[name] * (1 + faulty.size)
        return tuple(grads.values()) if isinstance(dx, tuple) else grads["dx"]

    return GenericFault(f"{name} scaled", "", (), backward)


def plan_of_case(case: Any) -> Plan:
    """What a case of tests/cases.py draws from."""
    make, *inputs = case.args
    known = {field.name for field in fields(Plan)}
    what = {name: value for name, value in case.keywords.items() if name in known}
    return plan_of(make, inputs if case.check is check_loss else inputs[0], **what)


def smallest(name: str, drawn: list[Sample], gradient: str) -> float | None:
    """The smallest factor's eps that the property notices in one of the examples; None where it misses all."""
    found, watchful = None, list(drawn)
    for size in SIZES:
        seen = next((s for s in watchful if noticed(scaled(gradient), s, name, size)), None)
        if seen is None:
            break
        watchful.remove(seen)
        watchful.insert(0, seen)  # the next size is tried on it first
        found = size
    return found


def gradients_of(sample: Sample) -> list[str]:
    """The names of the gradients that are not zero all over in this example."""
    return [n for n, g in sample.result.grads.items() if isinstance(g, Tensor) and g.count_nonzero()]


def measure(case: Any) -> Iterator[tuple[str, str, float | None]]:
    """Each property, each gradient of the case, and the smallest fault noticed."""
    plan = plan_of_case(case)
    for name in MEASURED:
        if name in case.keywords.get("skip", {}):
            continue
        drawn = [replace(s, policed=False) for s in examples_of(plan, name)]
        by_gradient: dict[str, list[Sample]] = {}
        for sample in drawn:
            for gradient in gradients_of(sample):
                by_gradient.setdefault(gradient, []).append(sample)
        for gradient, samples in by_gradient.items():
            yield name, gradient, smallest(name, samples, gradient)


def main() -> int:
    """Print a row per case: the smallest fault noticed by each property, and at last the worst of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=str(ROOT / "tests" / "cases.py"))
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'case':<40}" + "".join(f"{number:>10}" for number in MEASURED.values()))
    for title, case in load_cases(given.cases).items():
        if given.only not in title or issubclass(case.covers, torch.optim.Optimizer):
            continue
        with quick():
            found = list(measure(case))
        row: dict[str, Any] = {"case": title}
        for name, number in MEASURED.items():
            sizes = [size for property_name, _, size in found if property_name == name]
            row[number] = None if not sizes else max(size or float("inf") for size in sizes)
        row["gradients"] = {f"{MEASURED[name]} {gradient}": size for name, gradient, size in found}
        rows.append(row)
        print(f"{title:<40}" + "".join(_cell(row[number]) for number in MEASURED.values()), flush=True)
    worst = {number: max(row[number] or 0 for row in rows) for number in MEASURED.values()}
    print(f"{'worst':<40}" + "".join(_cell(worst[number]) for number in MEASURED.values()))
    if given.json:
        write_json(given.json, rows, worst=worst)
    return 0


def _cell(size: float | None) -> str:
    return f"{'-' if size is None else f'{size:.1g}':>10}"


if __name__ == "__main__":
    sys.exit(main())
