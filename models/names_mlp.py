"""Train a character-level MLP on names, every backward pass written by hand.

The model of the makemore lectures (after Bengio et al. 2003): a few characters of context are embedded, joined, sent
through one hidden layer with batch normalisation and tanh, and turned into logits for the next character.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from names.terminal import prepare

    prepare()

import torch

from handgrad import BatchNorm1d, Embedding, Flatten, Layer, Linear, Sequential, Tanh
from names.command_line import main
from names.run import Config, Recipe


def build(config: Config, vocabulary: int, generator: torch.Generator) -> Layer:
    """The model with the lecture's initial weights: gain 5/3 before tanh, small logits at the start."""
    context = config.block_size * config.embedding_dim
    return Sequential(
        Embedding(vocabulary, config.embedding_dim, generator=generator),
        Flatten(),
        Linear(context, config.hidden_dim, gain=5 / 3, generator=generator),
        BatchNorm1d(config.hidden_dim, unbiased=config.unbiased),
        Tanh(),
        Linear(config.hidden_dim, vocabulary, gain=0.1, generator=generator),
    )


RECIPE = Recipe("names_mlp", __doc__, build, options=("unbiased",))
"""`main` reads the flags and trains this model; the training loop is `train` in models/names/training.py."""

if __name__ == "__main__":
    sys.exit(main(RECIPE))
