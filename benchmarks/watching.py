"""What looking inside costs: a step of the names MLP plain, with the tripwire, with all statistics, in turns.

``python benchmarks/watching.py`` prints a table and, with --json, writes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from handgrad import (
    SGD,
    BatchNorm1d,
    CrossEntropy,
    Embedding,
    Flatten,
    Linear,
    Sequential,
    Statistics,
    Tanh,
    TrainStep,
    tripwire,
)
from handgrad.bench.report import write_json
from handgrad.bench.timing import Contender, interleave, ratio, timed
from handgrad.tables import seconds_text, text_table


def contenders() -> dict[str, Contender]:
    """Steps with each of the watchers; entering is not counted."""
    model = Sequential(Embedding(27, 10), Flatten(), Linear(30, 64), BatchNorm1d(64), Tanh(), Linear(64, 27))
    loss = CrossEntropy()
    step = TrainStep(model, loss, SGD(model.parameters(), lr=0.1))
    x, y = torch.randint(0, 27, (32, 3)), torch.randint(0, 27, (32,))

    def steps(watching: Callable[[], AbstractContextManager[object]]) -> Contender:
        def run(n: int) -> tuple[float]:
            with watching():
                return timed(lambda: step(x, y))(n)

        return run

    return {
        "nobody watching": steps(nullcontext),
        "tripwire(model, loss)": steps(lambda: tripwire(model, loss)),
        "Statistics(model)": steps(lambda: Statistics(model)),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for all together (default 20)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    times = interleave(contenders(), args.seconds)
    plain = times["nobody watching"].rounds()
    results = [
        {"by": name, "seconds": t.median(), "times the plain step": ratio(plain, t.rounds()).value}
        for name, t in times.items()
    ]
    head = ["", "a step", "times the plain one"]
    body = [[r["by"], seconds_text(r["seconds"]), f"{r['times the plain step']:.2f}"] for r in results]
    print(text_table([head, *body], "lrr"))
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
