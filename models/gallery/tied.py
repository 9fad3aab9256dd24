"""Tied, frozen and grouped parameters: a model of girls' names is adapted to boys' names (Bengio et al. 2003)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitting import fit, rows
from handgrad import CrossEntropy, Embedding, Flatten, Linear, Sequential, Tanh, TrainStep

NAMES = Path(__file__).parents[1] / "data" / "names.txt"
GIRLS = 18_309  # the names before those of boys
CONTEXT, VOCABULARY = 3, 27  # 0 stands before and behind a name


def build(V: int = VOCABULARY, T: int = CONTEXT, D: int = 32, H: int = 128) -> Sequential:
    """The letters before (N, T) to the logits of the next one (N, V); one table at both ends."""
    table, head = Embedding(V, D), Linear(D, V)
    head.weight = table.weight.mul_(D**-0.5)
    return Sequential(table, Flatten(), Linear(T * D, H), Tanh(), Linear(H, D), head)


def adaptable(model: Sequential) -> list[dict[str, Any]]:
    """Groups for an optimizer: the frozen table in none, matrices with weight decay, biases faster and without."""
    model[0].freeze()  # and so the head's weight, which is the same tensor
    free = [p for p in model.parameters() if p is not model[0].weight]
    return [
        {"params": [p for p in free if p.dim() > 1], "lr": 1e-3, "weight_decay": 0.1},
        {"params": [p for p in free if p.dim() == 1], "lr": 1e-2, "weight_decay": 0.0},
    ]


def windows(names: list[str]) -> tuple[Tensor, Tensor]:
    """Each letter of each name, and the end, with the letters before it."""
    x, y = [], []
    for name in names:
        letters = [0] * CONTEXT + [ord(letter) - 96 for letter in name] + [0]
        x += [letters[i : i + CONTEXT] for i in range(len(name) + 1)]
        y += letters[CONTEXT:]
    return torch.tensor(x), torch.tensor(y)


def train(steps: int = 3000) -> tuple[float, float]:
    """Nats a letter of held-out boys' names, before and after."""
    names = NAMES.read_text().split()
    girls, boys = names[:GIRLS], names[GIRLS:]
    held_out, known = windows(boys[::10]), windows([name for i, name in enumerate(boys) if i % 10])
    model, loss = build(), CrossEntropy()

    def evaluate() -> float:
        with torch.no_grad():
            return float(loss(model(held_out[0]), held_out[1]))

    data = windows(girls)
    fit(TrainStep(model, loss, torch.optim.AdamW(model.parameters(), lr=5e-3)), lambda: rows(128, *data), steps)
    before = evaluate()
    fit(TrainStep(model, loss, torch.optim.AdamW(adaptable(model))), lambda: rows(128, *known), steps // 3)
    return before, evaluate()


if __name__ == "__main__":
    torch.manual_seed(0)
    before, after = train()
    print(f"held-out boys' names cost {before:.3f} nats a letter after girls' names alone, {after:.3f} when adapted")
