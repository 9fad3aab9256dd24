"""Random numbers: from a generator, or from the seed of a step that is traced."""

from __future__ import annotations

import pytest
import torch

from handgrad.randomness import SEEDS, seeded, uniform

SHAPE, WHERE = torch.Size((3, 4)), {"dtype": torch.float64, "device": torch.device("cpu")}


def test_from_a_generator_and_from_the_global_one() -> None:
    expected = torch.rand(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(uniform(SHAPE, torch.Generator().manual_seed(1), **WHERE), expected)
    torch.manual_seed(1)
    assert torch.equal(uniform(SHAPE, None, **WHERE), expected)


def test_each_place_has_a_seed_of_its_own() -> None:
    with seeded(torch.tensor(SEEDS - 1)) as seed:
        seeds = [int(seed.next()) for _ in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= s < 2**32 for s in seeds)
    with seeded(torch.tensor(SEEDS - 1)) as seed:
        assert [int(seed.next()) for _ in range(100)] == seeds


def test_after_an_error_generators_draw_again() -> None:
    with pytest.raises(ZeroDivisionError), seeded(torch.tensor(1)):
        raise ZeroDivisionError
    drawn = uniform(SHAPE, torch.Generator().manual_seed(1), **WHERE)
    assert torch.equal(drawn, uniform(SHAPE, torch.Generator().manual_seed(1), **WHERE))
