"""Random numbers of a layer: drawn from a generator, or in a program computed from the seed of the step.

A program cannot hold a generator. It takes a seed per step instead, which the caller draws from the generators of the
layers; each place in the program that needs random numbers gets those of a seed of its own (Philox: Salmon et al. 2011,
doi.org/10.1145/2063384.2063405). So a run is repeatable by its generators, though with other numbers than without a
program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

SEEDS = 1 << 31  # that a step can have
_ODD = 0x9E3779B1  # the golden ratio of 2^32: spreads what follows each other over the seeds


class Seed:
    """The seed of a step that is being traced, and how many places have used it."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.places = value, 0

    def next(self) -> Tensor:
        """The seed of the next place."""
        self.places += 1
        return (self.value + self.places * _ODD) & 0xFFFFFFFF


_seed: Seed | None = None


@contextlib.contextmanager
def seeded(value: Tensor) -> Iterator[Seed]:
    """Compute random numbers from this seed, a () int64 tensor, for as long: while a step is traced."""
    global _seed
    _seed = Seed(value)
    try:
        yield _seed
    finally:
        _seed = None


def uniform(shape: torch.Size, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers from 0 up to 1, from the generator on its device, or from torch's global one."""
    if _seed is not None:
        from torch._inductor.inductor_prims import random

        numbers: Tensor = random(list(shape), _seed.next(), "rand")
        return numbers.to(dtype)
    home = device if generator is None else generator.device
    return torch.empty(shape, dtype=dtype, device=home).uniform_(generator=generator)
