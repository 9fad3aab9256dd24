"""The training step in files that need neither handgrad nor Python: the program, and the tensors it starts with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handgrad.errors import ArgumentError
from handgrad.layer import Layer
from handgrad.minibatches import taken_apart
from handgrad.program import Number, Progress, Stage, Traced, numbers, package


def write(path: Path, traced: Traced, stage: Stage, model: Layer, loss: Layer, pair: Any, progress: Progress) -> None:
    """Write the three files of `TrainStep.export`, each whole or not at all."""
    if path.suffix != ".pt2":
        raise ArgumentError(f"TrainStep.export: the path must end in .pt2, got {str(path)!r}")
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        problem = "safetensors must be installed, for the tensors that the program starts with: pip install safetensors"
        raise ArgumentError(f"TrainStep.export: {problem}") from error
    names = names_of(traced, stage, model, loss)
    scheduled = {_name(number): value for number, value in numbers(stage.optimizer).items()}
    inputs = [names[id(t)] for t in traced.state] + list(scheduled)
    inputs += [name for key, part in zip(("x", "target"), pair) for name in _part_names(key, part)]
    inputs += [*(["seeds"] if traced.seeded else []), "first", "last"]
    own = model.state_dict()
    same = {key: names[id(t)] for key, t in own.items() if key != names[id(t)]}
    outputs = ["losses", "wrong", *(f"grad.{names[id(stage.params[i])]}" for i in traced.graded)]
    lists = {"inputs": inputs, "outputs": outputs, "same": same, "accumulate": stage.accumulate}
    progress.tell("compiling")
    package(traced, stage, path, {key: json.dumps(value) for key, value in lists.items()})
    rest = {names[id(t)]: t for t in traced.state if names[id(t)] not in own}
    rest |= {name: torch.tensor(value, dtype=torch.float64) for name, value in scheduled.items()}
    for kind, tensors in ((".safetensors", own), (".training.safetensors", rest)):
        half = path.with_suffix(kind + ".part")
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, half)
        half.replace(path.with_suffix(kind))


def names_of(traced: Traced, stage: Stage, model: Layer, loss: Layer) -> dict[int, str]:
    """By the id of each tensor of the state, its name: that in the model's state_dict, where it is there."""
    found: dict[int, str] = {}
    for prefix, part in (("", model), ("loss.", loss)):
        for name, tensor in (*part.state_dict().items(), *part.named_parameters(), *part.named_buffers()):
            found.setdefault(id(tensor), prefix + name)
    state: dict[Any, Any] = {} if stage.optimizer is None else dict(stage.optimizer.state)
    for p, values in state.items():
        for name, tensor in values.items():
            if isinstance(tensor, Tensor) and id(p) in found:
                found.setdefault(id(tensor), f"optimizer.{name}.{found[id(p)]}")
    for i, tensor in enumerate(traced.state):
        found.setdefault(id(tensor), f"undeclared.{i}")
    return found


def _name(number: Number) -> str:
    """``lr``, ``betas.0``; of a further parameter group ``lr.group1``."""
    place = "" if number.place is None else f".{number.place}"
    return f"{number.name}{place}" + (f".group{number.group}" if number.group else "")


def _part_names(key: str, value: Any) -> list[str]:
    """The names of the tensors of x or target: ``x``, or ``x.0``, ``x.1``."""
    parts, _ = taken_apart(value)
    return [key] if isinstance(value, Tensor) else [f"{key}.{i}" for i in range(len(parts))]
