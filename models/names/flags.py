"""The flags of the scripts, and the kinds of numbers that they take."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from names.data import DATA
from names.run import LARGEST_RATE, RANGES, Recipe


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", "").replace(",", ""))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low:,} to {high:,}, got {text}")
        return value

    return parse


def rate(text: str) -> float:
    """An argparse type: a learning rate."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 < value <= LARGEST_RATE:
        raise argparse.ArgumentTypeError(f"expected a number above 0, up to {LARGEST_RATE:g}, got {text}")
    return value


def share(text: str) -> float:
    """An argparse type: a number that is at least 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 up to 1, got {text}")
    return value


MODEL_FLAGS: dict[str, dict[str, Any]] = {
    "unbiased": {"action": "store_const", "const": True, "help": "normalise batches with n - 1, as the lecture does"},
    "tied": {"action": "store_const", "const": True, "help": "share the embedding's table with the output layer"},
    "dropout": {"type": share, "metavar": "P", "help": "share of the activations to drop in training (default 0.1)"},
}
"""The flags that only some models have: see Recipe.options."""


EXIT_CODES = """
exit code: 0; 1 where a gradient is wrong, a value was not finite (the run diverged) or a file could not be written;
2 for input that cannot be used, or too little memory; 130 after Ctrl-C
"""
SEVERAL = """
In several processes: torchrun --nproc-per-node 2 models/{name}.py ...; each steps on a part of every minibatch. With
--save, torchrun's --max-restarts N goes on from the checkpoint where a process is lost.
"""


def new_parser(name: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose help keeps the paragraphs of its description, in at most 100 columns."""
    width = min(100, shutil.get_terminal_size().columns - 2)
    return argparse.ArgumentParser(
        prog=name,
        description="\n\n".join(textwrap.fill(text, width) for text in description.split("\n\n")),
        epilog="\n\n".join(textwrap.fill(text, width) for text in epilog.strip().split("\n\n")),
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=width),
    )


def parse_flags(recipe: Recipe, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. A flag that is a field of Config is None where it was not given."""
    defaults, parser = (
        recipe.defaults,
        new_parser(recipe.name, recipe.description, SEVERAL.format(name=recipe.name) + EXIT_CODES),
    )

    def size(name: str, text: str, group: Any) -> None:
        default, numbers = getattr(defaults, name), whole(*RANGES[name])
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=numbers, metavar="N", help=f"{text} (default {default:,})")

    data = parser.add_argument_group("data and model")
    data.add_argument(
        "--data",
        type=Path,
        default=DATA,
        metavar="PATH",
        help="text file, one name per line (default: the shipped names)",
    )
    size("block_size", "characters of context", data)
    size("embedding_dim", "numbers a character is embedded in", data)
    size("hidden_dim", "hidden units", data)
    for option in recipe.options:
        data.add_argument(f"--{option}", **MODEL_FLAGS[option])
    training = parser.add_argument_group("training")
    size("steps", "training steps; the learning rate drops to a tenth halfway", training)
    size("batch_size", "examples a step", training)
    training.add_argument(
        "--lr", type=rate, metavar="X", help=f"learning rate of the first half (default {defaults.lr:g})"
    )
    size("seed", "seed of the split, the initial weights, the minibatches and the samples", training)
    training.add_argument("--compile", action="store_true", help="compile the training step: faster, after a minute")
    training.add_argument(
        "--device", default="cpu", metavar="NAME", help="where to train: cpu, cuda, cuda:1, ... (default cpu)"
    )
    training.add_argument(
        "--threads",
        type=whole(1, 1024),
        default=1,
        metavar="N",
        help="CPU threads (default 1: the fastest for a model this small)",
    )
    result = parser.add_argument_group("checks and results")
    result.add_argument(
        "--check",
        action="store_true",
        help="before training, hold the first gradients against autograd, in float64; exit 1 if any is off",
    )
    result.add_argument(
        "--tripwire",
        action="store_true",
        help="end the run at the first NaN or infinity, and say in which layer; exit 1. Slower",
    )
    result.add_argument(
        "--watch",
        type=Path,
        metavar="PATH",
        help="draw activations, gradients and updates of the first and the last steps here (PNG), "
        "and print a table of the last",
    )
    result.add_argument(
        "--samples", type=whole(0, 10**6), default=20, metavar="N", help="names to sample at the end (default 20)"
    )
    result.add_argument(
        "--save",
        type=Path,
        metavar="PATH",
        help="keep a checkpoint here (safetensors), every few seconds, on Ctrl-C and at the end",
    )
    result.add_argument(
        "--resume",
        type=Path,
        metavar="PATH",
        help="go on from this checkpoint, with its configuration; only --steps may differ, and with it the step where "
        "the learning rate drops",
    )
    result.add_argument(
        "--overwrite",
        action="store_true",
        help="let --save and --export replace what is there, whatever it holds: another run, or more steps of this one",
    )
    result.add_argument(
        "--export",
        type=Path,
        metavar="PATH.pt2",
        help="after training, write the training step as a program that needs neither handgrad nor Python, and beside "
        "it, in .safetensors files, the state that it goes on from and the training examples: see models/cpp",
    )
    result.add_argument("--plot", type=Path, metavar="PATH", help="draw the loss curve here (PNG)")
    result.add_argument(
        "--report", type=Path, metavar="PATH", help="write losses, samples, speed and configuration here (JSON)"
    )
    return parser.parse_args(argv)
