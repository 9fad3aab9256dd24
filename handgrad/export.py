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
        from safetensors.torch import save
    except ImportError as error:
        problem = "safetensors must be installed, for the tensors that the program starts with: pip install safetensors"
        raise ArgumentError(f"TrainStep.export: {problem}") from error
    names, own = names_of(traced, stage, model, loss), model.state_dict()
    state = [(names[id(t)], t) for t in traced.state]
    rates = [(_name(n), torch.tensor(value, dtype=torch.float64)) for n, value in numbers(stage.optimizer).items()]
    minibatch = [name for key, part in zip(("x", "target"), pair) for name in _part_names(key, part)]
    known = [*state, *rates, *zip(minibatch, traced.parts)]
    inputs = [name for name, _ in known] + ["seeds"] * traced.seeded + ["first", "last"]
    for name in inputs:
        if inputs.count(name) > 1:
            problem = f"two inputs of the program would be named {name!r}; give that tensor of the model another name"
            raise ArgumentError(f"TrainStep.export: {problem}")
    lists = {
        "inputs": inputs,
        "shapes": {name: list(t.shape) for name, t in known},
        "outputs": ["losses", "wrong", *(f"grad.{names[id(stage.params[i])]}" for i in traced.graded)],
        "same": {key: names[id(t)] for key, t in own.items() if key != names[id(t)]},
        "accumulate": stage.accumulate,
    }
    progress.tell("compiling")
    package(traced, stage, path, {key: json.dumps(value) for key, value in lists.items()})
    rest = dict([(name, t) for name, t in state if name not in own] + rates)
    for kind, tensors in ((".safetensors", own), (".training.safetensors", rest)):
        draft = path.with_suffix(kind + ".part")
        try:
            draft.write_bytes(save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}))
            draft.replace(path.with_suffix(kind))
        finally:
            draft.unlink(missing_ok=True)


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
