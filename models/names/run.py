"""What a model script defines, its recipe, and a training run of it with everything that changes from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from handgrad import SGD, Layer
from names.data import Split, Vocabulary, sequences, windows
from names.errors import InputError

RANGES = {
    "block_size": (1, 1024),
    "embedding_dim": (1, 65_536),
    "hidden_dim": (1, 65_536),
    "batch_size": (2, 2**20),
    "steps": (0, 10**9),
    "seed": (0, 2**63 - 1),
}
"""The smallest and the largest value of each whole number in Config."""
LARGEST_RATE = 1e37  # ten times that is still a float32
OPTIONS = ("unbiased", "tied", "dropout")
"""The fields of Config that only some models have: see Recipe.options."""


@dataclass
class Config:
    """What determines the result of a run; a checkpoint carries it. ValueError for what no run can have."""

    block_size: int = 3
    embedding_dim: int = 10
    hidden_dim: int = 64
    batch_size: int = 32
    steps: int = 200_000
    lr: float = 0.1
    seed: int = 42
    unbiased: bool = False
    tied: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) is not type(each.default):
                raise ValueError(f"{each.name} must be of type {type(each.default).__name__}, got {value!r}")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low:,} to {high:,}, got {getattr(self, name)!r}")
        if not 0 < self.lr <= LARGEST_RATE:
            raise ValueError(f"lr must be a number above 0, up to {LARGEST_RATE:g}, got {self.lr!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number from 0 up to 1, got {self.dropout!r}")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: a tenth in the second half."""
        return self.lr if step < self.steps // 2 else self.lr / 10


@dataclass(frozen=True)
class Recipe:
    """What a model script defines; everything else is shared."""

    name: str
    description: str
    build: Callable[[Config, int, torch.Generator], Layer]  # takes the configuration, the vocabulary size, a generator
    defaults: Config = field(default_factory=Config)
    options: tuple[str, ...] = ()  # which of the OPTIONS the model has
    sequences: bool = False  # the model reads whole names and predicts at each place; otherwise it reads windows
    optimizer: Callable[[Iterable[Tensor], float], torch.optim.Optimizer] = SGD

    def settings(self, config: Config) -> dict[str, Any]:
        """The configuration without the options that the model does not have."""
        absent = set(OPTIONS) - set(self.options)
        return {each.name: getattr(config, each.name) for each in fields(config) if each.name not in absent}

    def split(self, names: Sequence[str], vocabulary: Vocabulary, block_size: int, device: torch.device) -> Split:
        """The names as the model reads them."""
        split = (sequences if self.sequences else windows)(names, vocabulary, block_size)
        return Split(split.x.to(device), split.y.to(device))


@dataclass
class Run:
    """A training run: everything that changes from step to step, and so everything that a checkpoint holds."""

    recipe: Recipe
    config: Config
    vocabulary: Vocabulary
    model: Layer
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    losses: Tensor  # (steps,), filled up to `step`
    step: int = 0
    validations: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    rates: list[tuple[int, float]] = field(default_factory=list)  # (steps before it, learning rate), of each change
    timed_steps: int = 0
    seconds: float = 0.0  # that the timed steps took

    @classmethod
    def new(cls, recipe: Recipe, config: Config, vocabulary: Vocabulary, device: torch.device) -> Run:
        """A run before its first step."""
        generator = torch.Generator().manual_seed(config.seed)
        try:
            model = recipe.build(config, len(vocabulary), generator).to(device)
            losses = torch.zeros(config.steps)
        except (RuntimeError, MemoryError) as error:
            raise InputError(f"the model does not fit into memory: {str(error).splitlines()[0]}") from None
        optimizer = recipe.optimizer(model.parameters(), config.lr)
        return cls(recipe, config, vocabulary, model, optimizer, generator, losses)

    def set_steps(self, steps: int) -> None:
        """Make the run longer or shorter; InputError where it has already taken more steps."""
        if steps < self.step:
            raise InputError(f"the run has already taken {self.step:,} steps, more than --steps {steps:,}")
        losses = torch.zeros(steps)
        losses[: self.step] = self.losses[: self.step]
        self.config.steps, self.losses = steps, losses

    def note_rate(self, rate: float) -> None:
        """Note the learning rate of the next step."""
        self.rates = [(before, used) for before, used in self.rates if before < self.step]
        if not self.rates or self.rates[-1][1] != rate:
            self.rates.append((self.step, rate))

    def schedule(self) -> str:
        """The learning rates of the steps that were taken, and of those to come."""
        changes = [(before, rate) for before, rate in self.rates if before < self.step]
        for before in (self.step, self.config.steps // 2):
            rate = self.config.lr_at(before)
            if self.step <= before < self.config.steps and (not changes or changes[-1][1] != rate):
                changes.append((before, rate))
        return ", ".join(f"after step {before:,} {rate:g}" if before else f"{rate:g}" for before, rate in changes)

    @property
    def diverged_at(self) -> int | None:
        """The first step whose loss was infinite or not a number; None where there is none."""
        wrong = (~self.losses[: self.step].isfinite()).nonzero()
        return int(wrong[0]) + 1 if len(wrong) else None

    @property
    def steps_per_second(self) -> float | None:
        """The speed of training, without evaluations and checkpoints; None before any step was timed."""
        return self.timed_steps / self.seconds if self.seconds else None

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters())
