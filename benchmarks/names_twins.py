"""The names models once more, in torch.nn and trained by autograd: what the tests and the benchmarks compare with.

Each twin has the parameters and buffers of the handgrad model in the same order, so `load` copies one into the other.
models/ must be on the path.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import names_gpt
import names_gru
import names_mlp
import names_wavenet
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from handgrad import Layer
from names.run import Config, Recipe


class FlattenPairs(nn.Module):
    """Join every two time steps; drop the time dimension with the last."""

    def forward(self, x: Tensor) -> Tensor:
        N, T, C = x.shape
        return x.reshape(N, 2 * C) if T == 2 else x.reshape(N, T // 2, 2 * C)


class BatchNormOverTime(nn.BatchNorm1d):
    """Normalise (N, T, C) over N and T."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class AllStates(nn.GRU):
    """The hidden states of all steps, without the last one that nn.GRU returns beside them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class Positions(nn.Module):
    """Add a trained vector to each place."""

    def __init__(self, longest: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(longest, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[1]]


class CausalAttention(nn.Module):
    """Self-attention through torch's fused kernel."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        N, T, D = x.shape
        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(N, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).reshape(N, T, D))


class Residual(nn.Module):
    """A body with a connection around it."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def mlp(config: Config, vocabulary: int) -> nn.Module:
    """names_mlp."""
    return nn.Sequential(
        nn.Embedding(vocabulary, config.embedding_dim),
        nn.Flatten(),
        nn.Linear(config.block_size * config.embedding_dim, config.hidden_dim),
        nn.BatchNorm1d(config.hidden_dim),
        nn.Tanh(),
        nn.Linear(config.hidden_dim, vocabulary),
    )


def wavenet(config: Config, vocabulary: int) -> nn.Module:
    """names_wavenet."""
    layers: list[nn.Module] = [nn.Embedding(vocabulary, config.embedding_dim)]
    width, hidden = config.embedding_dim, config.hidden_dim
    for _ in range(int(math.log2(config.block_size))):
        layers += [FlattenPairs(), nn.Linear(2 * width, hidden, bias=False), BatchNormOverTime(hidden), nn.Tanh()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(hidden, vocabulary))


def gru(config: Config, vocabulary: int) -> nn.Module:
    """names_gru."""
    return nn.Sequential(
        nn.Embedding(vocabulary, config.embedding_dim),
        AllStates(config.embedding_dim, config.hidden_dim, batch_first=True),
        nn.Flatten(0, 1),
        nn.Linear(config.hidden_dim, vocabulary),
    )


def gpt(config: Config, vocabulary: int) -> nn.Module:
    """names_gpt."""
    dim, hidden = config.embedding_dim, config.hidden_dim
    blocks: list[nn.Module] = []
    for _ in range(names_gpt.BLOCKS):
        attention = [CausalAttention(dim, names_gpt.HEADS), nn.Dropout(config.dropout)]
        perceptron = [nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim), nn.Dropout(config.dropout)]
        blocks.append(Residual(nn.LayerNorm(dim), *attention))
        blocks.append(Residual(nn.LayerNorm(dim), *perceptron))
    table, head = nn.Embedding(vocabulary, dim), nn.Linear(dim, vocabulary, bias=False)
    if config.tied:
        head.weight = table.weight
    positions = Positions(config.block_size, dim)
    return nn.Sequential(table, positions, *blocks, nn.LayerNorm(dim), nn.Flatten(0, 1), head)


TWINS: dict[str, tuple[Recipe, Callable[[Config, int], nn.Module]]] = {
    "mlp": (names_mlp.RECIPE, mlp),
    "wavenet": (names_wavenet.RECIPE, wavenet),
    "gru": (names_gru.RECIPE, gru),
    "gpt": (names_gpt.RECIPE, gpt),
}


def load(twin: nn.Module, model: Layer) -> None:
    """Give the twin the parameters and buffers of the model."""
    ours, theirs = model.state_dict(), twin.state_dict()
    if [t.shape for t in ours.values()] != [t.shape for t in theirs.values()]:
        raise ValueError(f"the twin has other tensors: {list(ours)} and {list(theirs)}")
    twin.load_state_dict(dict(zip(theirs, ours.values())))
