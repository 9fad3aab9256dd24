"""What a model script defines, its recipe, and a training run of it with everything that changes from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from handgrad import SGD, Layer
from names.data import Split, Vocabulary, sequences, windows
from names.errors import InputError


@dataclass
class Config:
    """What determines the result of a run; a checkpoint carries it."""

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
    options: tuple[str, ...] = ()  # which of the OPTIONS in names/flags.py the model has
    sequences: bool = False  # the model reads whole names and predicts at each place; otherwise it reads windows
    optimizer: Callable[[Iterable[Tensor], float], torch.optim.Optimizer] = SGD

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
    timed_steps: int = 0
    seconds: float = 0.0  # that the timed steps took

    @classmethod
    def new(cls, recipe: Recipe, config: Config, vocabulary: Vocabulary, device: torch.device) -> Run:
        """A run before its first step."""
        generator = torch.Generator().manual_seed(config.seed)
        try:
            model = recipe.build(config, len(vocabulary), generator).to(device)
        except (RuntimeError, MemoryError) as error:
            raise InputError(f"the model does not fit into memory: {str(error).splitlines()[0]}") from None
        optimizer = recipe.optimizer(model.parameters(), config.lr)
        return cls(recipe, config, vocabulary, model, optimizer, generator, torch.zeros(config.steps))

    @property
    def steps_per_second(self) -> float | None:
        """The speed of training, without evaluations and checkpoints; None before any step was timed."""
        return self.timed_steps / self.seconds if self.seconds else None

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters())
