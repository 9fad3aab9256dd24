"""An encoder and a decoder with attention, which write names backwards (Bahdanau et al. 2014, arXiv:1409.0473)."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor

from fitting import fit, rows
from handgrad import (
    GRU,
    Cat,
    CrossEntropy,
    Embedding,
    Flatten,
    Graph,
    Layer,
    Linear,
    MultiheadAttention,
    Sequential,
    TrainStep,
)

NAMES = Path(__file__).parents[1] / "data" / "names.txt"
LONGEST, VOCABULARY = 16, 27  # 0 begins and ends a name, and fills up the row


def build(V: int = VOCABULARY, D: int = 64) -> Layer:
    """What to read (N, S) and what has been written so far (N, T), to the logits of what comes next (N T, V)."""
    return Graph(
        "source target",
        "logits",
        s=(Embedding(V, D), "source"),
        memory=(GRU(D, D, batch_first=True, return_state=True), "s"),
        t=(Embedding(V, D), "target"),
        h=(GRU(D, D, batch_first=True), "t memory.1"),
        read=(MultiheadAttention(D, 1, batch_first=True), "h memory.0 memory.0"),
        both=(Cat(-1), "h read"),
        logits=(Sequential(Flatten(0, 1), Linear(2 * D, V)), "both"),
    )


def load() -> tuple[Tensor, Tensor]:
    """The distinct names as rows of letters, shuffled: those to train on, and a tenth that is held out."""
    names = sorted({name for name in NAMES.read_text().split() if len(name) < LONGEST})
    random.Random(0).shuffle(names)
    table = torch.zeros(len(names), LONGEST, dtype=torch.int64)
    for row, name in zip(table, names):
        row[: len(name)] = torch.tensor([ord(letter) - 96 for letter in name])
    held_out = len(names) // 10
    return table[held_out:], table[:held_out]


def backwards(source: Tensor) -> Tensor:
    """Each row of letters turned round, the zeros still behind it."""
    lengths = (source > 0).sum(1, keepdim=True)
    places = lengths - 1 - torch.arange(source.shape[1])
    return source.gather(1, places.clamp(min=0)).where(places >= 0, 0)


@torch.no_grad()
def write(model: Layer, source: Tensor) -> Tensor:
    """What the model writes, letter by letter, the likeliest each time."""
    written = torch.zeros(len(source), 1, dtype=torch.int64)
    for _ in range(LONGEST):
        logits = model(source, written).view(*written.shape, -1)[:, -1]
        written = torch.cat([written, logits.argmax(-1, keepdim=True)], 1)
    return written[:, 1:]


def train(steps: int = 1500) -> float:
    """The share of held-out names that are written backwards without a mistake, in percent."""
    known, held_out = load()
    model = build()
    step = TrainStep(model, CrossEntropy(), torch.optim.AdamW(model.parameters(), lr=4e-3))

    def draw() -> tuple[tuple[Tensor, Tensor], Tensor]:
        (source,) = rows(64, known)
        target = backwards(source)
        return (source, torch.nn.functional.pad(target, (1, -1))), target.flatten()

    fit(step, draw, steps)
    return 100 * float((write(model, held_out) == backwards(held_out)).all(1).double().mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{train():.1f} % of the held-out names are written backwards without a mistake")
