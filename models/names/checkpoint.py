"""A training run as a file, and back: checkpoints in the format safetensors."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from names.data import Vocabulary
from names.errors import InputError, require
from names.run import Config, Recipe, Run

FORMAT = "handgrad names model 1"


def save_checkpoint(run: Run, path: Path, data: str) -> None:
    """Write the whole run to a safetensors file; if it is killed, the file is the old or the new checkpoint, whole."""
    tensors = {f"model.{key}": tensor for key, tensor in run.model.state_dict().items()}
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors["generator"] = run.generator.get_state()
    tensors["losses"] = run.losses[: run.step]
    progress = {
        "step": run.step,
        "timed_steps": run.timed_steps,
        "seconds": run.seconds,
        "validations": run.validations,
    }
    metadata = {
        "format": FORMAT,
        "kind": run.recipe.name,
        "data": data,
        "vocabulary": run.vocabulary.characters,
        "config": json.dumps(asdict(run.config)),
        "progress": json.dumps(progress),
    }
    # the format wants each tensor contiguous, with memory of its own
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_atomically(path, require("safetensors.torch").save(tensors, metadata))


def resume(
    recipe: Recipe, path: Path, given: dict[str, Any], vocabulary: Vocabulary, data: str, device: torch.device
) -> Run:
    """The run that a checkpoint holds; InputError where it does not fit the data or the flags that were given."""
    tensors, metadata = load_checkpoint(path, recipe.name)
    try:
        config = Config(**json.loads(metadata["config"]))
        if metadata["vocabulary"] != vocabulary.characters:
            problem = f"has the vocabulary {metadata['vocabulary']!r}, the data has {vocabulary.characters!r}"
            raise InputError(f"the checkpoint {path} {problem}")
        if metadata["data"] != data:
            raise InputError(f"the checkpoint {path} was trained on other data; give that file to --data")
        for name, value in given.items():
            if name != "steps" and getattr(config, name) != value:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"the checkpoint {path} was made with {flag} {getattr(config, name)}, got {value}")
        config.steps = given.get("steps", config.steps)
        done = json.loads(metadata["progress"])["step"]
        if config.steps < done:
            raise InputError(
                f"the checkpoint {path} has already taken {done:,} steps, more than --steps {config.steps:,}"
            )
        run = Run.new(recipe, config, vocabulary, device)
        restore(run, tensors, metadata)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the checkpoint {path} is damaged: {str(error).splitlines()[-1].strip()}") from None
    return run


def load_checkpoint(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a checkpoint of the script of this name; InputError for anything else."""
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a whole checkpoint (truncated, or another kind of file): {error}") from None
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is a safetensors file, but not a checkpoint of a names model")
    if metadata["kind"] != kind:
        raise InputError(f"{path} is a checkpoint of {metadata['kind']}, not of {kind}")
    return tensors, metadata


def restore(run: Run, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Give a new run of the same configuration everything that the checkpoint holds."""
    progress = json.loads(metadata["progress"])
    run.step, run.timed_steps, run.seconds = progress["step"], progress["timed_steps"], progress["seconds"]
    run.validations = [(step, loss) for step, loss in progress["validations"]]
    run.model.load_state_dict({k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key in (key for key in tensors if key.startswith("optimizer.")):
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = tensors[key]
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
    run.generator.set_state(tensors["generator"])
    run.losses[: run.step] = tensors["losses"]


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a new file, and give it the name `path` once it is on the disk: so `path` never holds half of it."""
    draft = path.with_name(f".{path.name}.part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
