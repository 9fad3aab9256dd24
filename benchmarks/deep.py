"""One training step of a deep model, blocks of Linear, BatchNorm1d and Tanh; how is said in steps.py.

python benchmarks/deep.py            16 blocks of width 64, batch 32: the calls are what costs
python benchmarks/deep.py --wide     4 blocks of width 1024, batch 1024: the arithmetic is
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from steps import Row, Task, autograd, by_jax, jax_batch_norm, main, train_step

LR = 0.01
ROWS = 8192


def task_of(wide: bool) -> Task:
    """Random rows and labels, as many classes as columns."""
    depth, width, batch = (4, 1024, 1024) if wide else (16, 64, 32)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def build(lib: Any) -> Any:
        blocks = [(lib.Linear(width, width), lib.BatchNorm1d(width), lib.Tanh()) for _ in range(depth)]
        return lib.Sequential(*(layer for block in blocks for layer in block))

    def formula(w: Any, x: Any) -> tuple[Any, list[Any]]:
        from jax.numpy import tanh

        norms = []
        for i in range(0, 3 * depth, 3):
            h = x @ w[f"{i}.weight"].T + w[f"{i}.bias"]
            normed, norm = jax_batch_norm(h, w[f"{i + 1}.weight"], w[f"{i + 1}.bias"])
            x = tanh(normed)
            norms.append(norm)
        return x, norms

    weights = {}
    for i in range(0, 3 * depth, 3):
        weights[f"{i}.weight"] = normal(width, width) / np.float32(np.sqrt(width))
        weights[f"{i}.bias"] = 0.1 * normal(width)
        weights[f"{i + 1}.weight"] = 1 + 0.1 * normal(width)
        weights[f"{i + 1}.bias"] = 0.1 * normal(width)
    title = f"{depth} x (Linear({width}, {width}), BatchNorm1d({width}), Tanh), batch {batch}"
    norms = [f"{i + 1}" for i in range(0, 3 * depth, 3)]
    x, y = normal(ROWS, width), rng.integers(width, size=ROWS)
    return Task(title, build, formula, norms, x, y, weights, batch, LR)


def rows_of(task: Task, wide: bool) -> list[Row]:
    """Everybody, handgrad's TrainStep first."""
    return [
        Row("handgrad, TrainStep", partial(train_step, task)),
        Row("handgrad, compiled, one step a call", partial(train_step, task, compiled=True), compiles=True),
        Row("handgrad, compiled, .many of 32 steps", partial(train_step, task, compiled=True, many=32), compiles=True),
        Row("torch.nn, autograd, SGD", partial(autograd, task)),
        Row("JAX, jit of a step", partial(by_jax, task), compiles=True, needs="jax"),
        Row("JAX, scan of 32 steps", partial(by_jax, task, 32), compiles=True, needs="jax"),
    ]


if __name__ == "__main__":
    main(__doc__, task_of, rows_of, wide="4 blocks of width 1024, batch 1024")
