"""A training run as a file, and back: checkpoints in the format safetensors, with a checksum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from names.data import Vocabulary
from names.errors import InputError, require, shorten
from names.run import Config, Recipe, Run

FORMAT, EARLIER = "handgrad names model 2", "handgrad names model 1"
NO_CHECKSUM = "0" * 64  # in the place of the checksum, while that is computed


def checkpoint_of(run: Run, data: str) -> bytes:
    """The whole run as the content of a safetensors file; `data` is the fingerprint of the names."""
    tensors = {f"model.{key}": tensor for key, tensor in run.model.state_dict().items()}
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors["generator"] = run.generator.get_state()
    tensors["losses"] = run.losses[: run.step]
    # the format wants each tensor contiguous, with memory of its own
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    content: bytes = require("safetensors.torch").save(tensors, describe(run, data))
    return content.replace(NO_CHECKSUM.encode(), checksum(content).encode(), 1)


def describe(run: Run, data: str) -> dict[str, str]:
    """The metadata of a checkpoint, before the checksum is known."""
    progress = {
        "step": run.step,
        "timed_steps": run.timed_steps,
        "seconds": run.seconds,
        "validations": run.validations,
        "rates": run.rates,
    }
    return {
        "format": FORMAT,
        "checksum": NO_CHECKSUM,
        "kind": run.recipe.name,
        "data": data,
        "vocabulary": run.vocabulary.characters,
        "config": json.dumps(run.recipe.settings(run.config)),
        "progress": json.dumps(progress),
    }


def checksum(content: bytes) -> str:
    """What any change of the content, that of a single bit, would change."""
    return hashlib.sha256(content).hexdigest()


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a checkpoint, as they were written; InputError for anything else."""
    safetensors = require("safetensors")
    try:
        content = path.read_bytes()
        tensors = require("safetensors.torch").load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a whole checkpoint (truncated, or another kind of file): {error}") from None
    metadata: dict[str, str] = header.get("__metadata__", {})
    if metadata.get("format") == EARLIER:
        problem = "is of an earlier version, which wrote no checksum"
        raise InputError(f"the checkpoint {path} {problem}; start again without --resume: one seed, one result")
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is a safetensors file, but not a checkpoint of a names model")
    written = metadata.get("checksum", "")
    unsigned = content.replace(written.encode(), NO_CHECKSUM.encode(), 1)
    if len(written) != len(NO_CHECKSUM) or written != checksum(unsigned):
        raise InputError(
            f"the checkpoint {path} is damaged: it does not match its checksum; use a copy, or start again"
        )
    return tensors, metadata


def resume(
    recipe: Recipe, path: Path, given: dict[str, Any], vocabulary: Vocabulary, data: str, device: torch.device
) -> Run:
    """The run that a checkpoint holds; InputError where it does not fit the data or the flags that were given."""
    tensors, metadata = load_checkpoint(path)
    try:
        if metadata["kind"] != recipe.name:
            raise InputError(f"{path} is a checkpoint of {metadata['kind']}, not of {recipe.name}")
        settings = json.loads(metadata["config"])
        config = Config(**settings)
        if settings.keys() != recipe.settings(config).keys():
            raise ValueError(f"its configuration has the fields {', '.join(settings)}")
        if metadata["vocabulary"] != vocabulary.characters:
            theirs, ours = shorten(metadata["vocabulary"]), shorten(vocabulary.characters)
            raise InputError(f"the checkpoint {path} has the vocabulary {theirs}, the data has {ours}")
        if metadata["data"] != data:
            raise InputError(f"the checkpoint {path} was trained on other data; give that file to --data")
        for name, value in given.items():
            if name != "steps" and getattr(config, name) != value:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"the checkpoint {path} was made with {flag} {getattr(config, name)}, got {value}")
        run = Run.new(recipe, config, vocabulary, device)
        restore(run, tensors, json.loads(metadata["progress"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the checkpoint {path} is damaged: {str(error).splitlines()[-1].strip()}") from None
    return run


def restore(run: Run, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
    """Give a new run of the same configuration everything that the checkpoint holds."""
    run.step, run.timed_steps, run.seconds = progress["step"], progress["timed_steps"], progress["seconds"]
    run.validations = [(step, loss) for step, loss in progress["validations"]]
    run.rates = [(step, rate) for step, rate in progress["rates"]]
    check_progress(run)
    run.model.load_state_dict({k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key in (key for key in tensors if key.startswith("optimizer.")):
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = tensors[key]
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
    run.generator.set_state(tensors["generator"])
    if tensors["losses"].shape != (run.step,):
        raise ValueError(f"there are {tensors['losses'].numel():,} losses of {run.step:,} steps")
    run.losses[: run.step] = tensors["losses"]


def check_progress(run: Run) -> None:
    """Raise ValueError where a run cannot have come so far in this way."""
    changes = [*run.validations, *run.rates]
    for steps, most in (
        (run.step, run.config.steps),
        (run.timed_steps, run.step),
        *((s, run.step) for s, _ in changes),
    ):
        if type(steps) is not int or not 0 <= steps <= most:
            raise ValueError(f"its progress has {steps!r} for a number of steps up to {most:,}")
    for number in (run.seconds, *(number for _, number in changes)):
        if type(number) is not float or number < 0:
            raise ValueError(f"its progress has {number!r} for a number from 0 on")
    if run.step > 0 and not run.rates:
        raise ValueError("its progress has no learning rate")


def refuse_to_lose(run: Run, path: Path, data: str) -> None:
    """Raise InputError where `path` holds anything that this run will not come to: another run, or more of this one."""
    try:
        metadata = load_checkpoint(path)[1]
        done = json.loads(metadata["progress"])["step"]
    except (InputError, KeyError, ValueError):
        problem = f"{path} exists, and is no checkpoint that could be resumed"
        raise InputError(f"{problem}; save elsewhere, or replace it with --overwrite") from None
    own, words = describe(run, data), {"kind": "model", "data": "data", "config": "flags"}
    other = [word for key, word in words.items() if own[key] != metadata.get(key)]
    if other or done > run.step:
        what = f"another run (other {', other '.join(other)})" if other else "this run"
        raise InputError(
            f"{path} holds {what} after {done:,} steps; go on from it with --resume {path}, save elsewhere, "
            "or replace it with --overwrite"
        )
