"""The training step of a run in files that a program without Python trains with; models/cpp is one."""

from __future__ import annotations

from pathlib import Path

import torch

from handgrad import CompileError, TrainStep
from names.data import Split, minibatch
from names.errors import InputError, require
from names.files import write_atomically

KINDS = (".pt2", ".safetensors", ".training.safetensors", ".data.safetensors")


def exported_to(path: Path) -> list[Path]:
    """The files of an export: the step, the model's tensors, the other tensors of training, the examples."""
    if path.suffix != KINDS[0]:
        raise InputError(f"--export: the path must end in {KINDS[0]}, got {path}")
    return [path.with_suffix(kind) for kind in KINDS]


def export(path: Path, step: TrainStep, batch_size: int, split: Split) -> None:
    """Write the files, each whole or not at all: the step for minibatches of this size, and the rows to draw from."""
    *_, data = exported_to(path)
    tensors = {"x": split.x.cpu().contiguous(), "target": split.y.cpu().contiguous()}
    write_atomically(data, require("safetensors.torch").save(tensors))
    try:
        step.export(path, *minibatch(split, batch_size, torch.Generator()))
    except CompileError as error:
        raise InputError(str(error)) from None
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
