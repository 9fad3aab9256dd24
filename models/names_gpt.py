"""Train a small causal transformer on names, every backward pass written by hand.

Blocks of self-attention and a two-layer perceptron with GELU, each behind a layer norm and beside a residual
connection (Vaswani et al. 2017, in the pre-norm form of GPT-2). `--tied` makes the table of the embedding the weight of
the output layer, too.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from names.terminal import prepare

    prepare()

import torch
from torch import Tensor

from handgrad import (
    GELU,
    Dropout,
    Embedding,
    Flatten,
    Layer,
    LayerNorm,
    Linear,
    Residual,
    SelfAttention,
    Sequential,
    ShapeError,
    parameter,
)
from names.command_line import main
from names.errors import InputError
from names.run import Config, Recipe

HEADS, BLOCKS = 4, 3


class Positions(Layer):
    """Add a trained vector to each place.

    Forward:   out[n, t] = x[n, t] + weight[t]
    Shapes:    x, out (N, T, D); weight (T_max, D)
    Backward:  dx = dout;  dweight[t] = sum_n dout[n, t], zero beyond T. dx is dout itself.
    Recorded:  nothing
    """

    weight: Tensor = parameter("T_max", "D")

    def __init__(self, longest: int, dim: int, generator: torch.Generator) -> None:
        self.weight = torch.randn(longest, dim, generator=generator) * 0.02

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x, self.weight.dtype)
        if x.dim() != 3 or x.shape[1] > self.weight.shape[0]:
            problem = f"x must be (N, T, D) with T up to {self.weight.shape[0]}, got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)
        out = x + self.weight[: x.shape[1]]
        self.push(out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        self.pop(dout)
        dweight = torch.zeros_like(self.weight)
        dweight[: dout.shape[1]] = dout.sum(0)
        self.add_grad(self.weight, dweight)
        return dout


def build(config: Config, vocabulary: int, generator: torch.Generator) -> Layer:
    """GPT-2 in small: the tables start small, everything else as torch.nn has it."""
    dim = config.embedding_dim
    if dim % HEADS:
        raise InputError(f"--embedding-dim must be a multiple of the {HEADS} heads, got {dim}")
    blocks = [
        layer
        for _ in range(BLOCKS)
        for layer in (
            Residual(
                Sequential(
                    LayerNorm(dim),
                    SelfAttention(dim, HEADS, causal=True, generator=generator),
                    Dropout(config.dropout, generator=generator),
                )
            ),
            Residual(
                Sequential(
                    LayerNorm(dim),
                    Linear(dim, config.hidden_dim, generator=generator),
                    GELU(approximate="tanh"),
                    Linear(config.hidden_dim, dim, generator=generator),
                    Dropout(config.dropout, generator=generator),
                )
            ),
        )
    ]
    table = Embedding(vocabulary, dim, generator=generator)
    table.weight.mul_(0.02)
    head = Linear(dim, vocabulary, bias=False, generator=generator)
    if config.tied:
        head.weight = table.weight
    return Sequential(table, Positions(config.block_size, dim, generator), *blocks, LayerNorm(dim), Flatten(0, 1), head)


DEFAULTS = Config(block_size=16, embedding_dim=64, hidden_dim=256, steps=15_000, lr=2e-3, dropout=0.1)
RECIPE = Recipe("names_gpt", __doc__, build, DEFAULTS, ("tied", "dropout"), sequences=True, optimizer=torch.optim.AdamW)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
