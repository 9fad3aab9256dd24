"""Whole models against the same in torch.nn: many steps, every parameter and buffer, in float64."""

from __future__ import annotations

from dataclasses import replace

import names
import pytest
import torch
import twins
from torch import nn

from handgrad import CrossEntropy, TrainStep

SMALL = {"embedding_dim": 8, "hidden_dim": 12, "batch_size": 6}
CASES = [(name, {}) for name in twins.TWINS] + [("gpt", {"tied": True})]


@pytest.mark.parametrize(("name", "options"), CASES, ids=["mlp", "wavenet", "gru", "gpt", "gpt tied"])
def test_training_equals_the_twins(name: str, options: dict[str, bool]) -> None:
    """Twelve steps on real names with the model's own optimizer."""
    recipe, make_twin = twins.TWINS[name]
    config = replace(recipe.defaults, **SMALL, **options, dropout=0.0)
    generator = torch.Generator().manual_seed(3)
    people = names.read_names(names.DATA)[::400]
    vocabulary = names.Vocabulary.of(people)
    data = recipe.split(people, vocabulary, config.block_size, torch.device("cpu"))
    model = recipe.build(config, len(vocabulary), generator).to(torch.float64)
    twin = make_twin(config, len(vocabulary)).double()
    twins.load(twin, model)
    kind = torch.optim.SGD if name in ("mlp", "wavenet") else torch.optim.AdamW
    twin_optimizer = kind(twin.parameters(), lr=config.lr)
    step = TrainStep(model, CrossEntropy(), recipe.optimizer(model.parameters(), config.lr))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(12):
        x, y = names.minibatch(data, config.batch_size, generator)
        value = step(x, y)
        twin_value = nn.functional.cross_entropy(twin(x), y)
        twin_optimizer.zero_grad()
        twin_value.backward()
        twin_optimizer.step()
        torch.testing.assert_close(value, twin_value.detach(), rtol=1e-9, atol=0)
    assert bool((y == names.IGNORED).any()) == recipe.sequences  # names of unequal length were among them
    theirs = list(twin.state_dict().values())
    for (key, tensor), expected in zip(model.state_dict().items(), theirs):
        torch.testing.assert_close(tensor, expected, rtol=1e-7, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
        assert not torch.equal(tensor, before[key]), key
    model.eval()
    twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-7, atol=1e-9)
