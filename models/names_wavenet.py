"""Train a hierarchical model on names, every backward pass written by hand.

The WaveNet of the makemore lectures (after van den Oord et al. 2016): eight characters of context are joined in pairs,
the pairs in pairs, and once more, with a linear layer, batch normalisation over batch and time, and tanh at each level.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from names.terminal import prepare

    prepare()

import torch

from handgrad import BatchNorm1d, Embedding, FlattenConsecutive, Layer, Linear, Sequential, Tanh
from names.command_line import main
from names.errors import InputError
from names.run import Config, Recipe


def build(config: Config, vocabulary: int, generator: torch.Generator) -> Layer:
    """A level for each halving of the context, down to one vector."""
    levels = config.block_size.bit_length() - 1
    if config.block_size != 2**levels or levels == 0:
        raise InputError(f"--block-size must be a power of two, at least 2, got {config.block_size}")
    layers: list[Layer] = [Embedding(vocabulary, config.embedding_dim, generator=generator)]
    width, hidden = config.embedding_dim, config.hidden_dim
    for _ in range(levels):
        layers += [
            FlattenConsecutive(2),
            Linear(2 * width, hidden, bias=False, gain=5 / 3, generator=generator),
            BatchNorm1d(hidden, channels_last=True, unbiased=config.unbiased),
            Tanh(),
        ]
        width = hidden
    return Sequential(*layers, Linear(hidden, vocabulary, gain=0.1, generator=generator))


DEFAULTS = Config(block_size=8, embedding_dim=24, hidden_dim=128)
RECIPE = Recipe("names_wavenet", __doc__, build, DEFAULTS, options=("unbiased",))

if __name__ == "__main__":
    sys.exit(main(RECIPE))
