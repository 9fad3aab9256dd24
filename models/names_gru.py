"""Train a recurrent model on names, every backward pass written by hand, back through time.

A gated recurrent unit (Cho et al. 2014) reads a name character by character and predicts the next one at each place.
Names of different lengths are padded, and the padding is ignored in the loss.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from names.terminal import prepare

    prepare()

import torch

from handgrad import GRU, Embedding, Flatten, Layer, Linear, Sequential
from names.command_line import main
from names.run import Config, Recipe


def build(config: Config, vocabulary: int, generator: torch.Generator) -> Layer:
    """One row of logits for each place of each name."""
    return Sequential(
        Embedding(vocabulary, config.embedding_dim, generator=generator),
        GRU(config.embedding_dim, config.hidden_dim, batch_first=True, generator=generator),
        Flatten(0, 1),
        Linear(config.hidden_dim, vocabulary, generator=generator),
    )


DEFAULTS = Config(block_size=16, embedding_dim=32, hidden_dim=128, steps=8_000, lr=3e-3)
RECIPE = Recipe("names_gru", __doc__, build, DEFAULTS, sequences=True, optimizer=torch.optim.AdamW)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
