"""What the names models share: data, split, training loop, evaluation, sampling, checkpoints, pictures and flags.

A model script defines its `Recipe` and calls `main`; everything a person sees is here.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import io
import json
import math
import os
import platform
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import handgrad
from handgrad import SGD, CrossEntropy, Layer, TrainStep

DATA = Path(__file__).parent / "data" / "names.txt"
IGNORED = -100  # the target of a place that holds no character: CrossEntropy passes over it
BOUNDARY = "."  # token 0: it fills the context before a name and ends the name
LONGEST_SAMPLE = 64  # characters after which a sampled name is cut off
VALIDATIONS = 20  # validation losses along a run
SAVE_EVERY = 5.0  # seconds between checkpoints
BLOCK = 40  # steps between two looks at the clock, the keyboard and the progress bar
CHUNK = 8192  # examples evaluated at once


class InputError(Exception):
    """Something the user gave cannot be used: reported in one line, exit code 2."""


# ---------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Vocabulary:
    """The characters of the data in sorted order, after the boundary: a character's token is its place."""

    characters: str

    @classmethod
    def of(cls, names: Sequence[str]) -> Vocabulary:
        """Collect the vocabulary of some names."""
        return cls(BOUNDARY + "".join(sorted(set("".join(names)))))

    def __len__(self) -> int:
        return len(self.characters)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        return "".join(self.characters[token] for token in tokens)


@dataclass(frozen=True)
class Split:
    """Tokens x (N, T), and what follows: y (N,) after all T of them, or y (N, T) after each, IGNORED where nothing."""

    x: Tensor
    y: Tensor


def read_names(path: Path) -> list[str]:
    """The names in a UTF-8 text file, one a line; blank lines and the style of the line ends do not matter."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the data file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a UTF-8 text file; expected one name a line") from None
    if "\0" in text:
        raise InputError(f"{path} is a binary file; expected text, one name a line")
    names = [line.strip() for line in text.splitlines()]
    for number, name in enumerate(names, 1):
        if BOUNDARY in name:
            raise InputError(
                f"{path}, line {number}: {BOUNDARY!r} marks the end of a name and cannot be in one: {name!r}"
            )
    names = [name for name in names if name]
    if len(names) < 3:
        raise InputError(
            f"{path} has {len(names)} name(s); at least 3 are needed, one each to train, validate and test"
        )
    return names


def split_names(names: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Shuffle, then cut 80 / 10 / 10; each part gets at least one name."""
    shuffled = list(names)
    random.Random(seed).shuffle(shuffled)
    count = len(shuffled)
    test = max(1, count - int(0.9 * count))
    val = max(1, int(0.9 * count) - int(0.8 * count))
    train = count - val - test
    return {"train": shuffled[:train], "val": shuffled[train : train + val], "test": shuffled[train + val :]}


def windows(names: Sequence[str], vocabulary: Vocabulary, block_size: int) -> Split:
    """Each character of each name, and the boundary after it, with the `block_size` tokens before it."""
    token = {character: i for i, character in enumerate(vocabulary.characters)}
    x, y = [], []
    for name in names:
        context = [0] * block_size
        for character in name + BOUNDARY:
            x.append(context)
            y.append(token[character])
            context = [*context[1:], token[character]]
    return Split(torch.tensor(x), torch.tensor(y))


def sequences(names: Sequence[str], vocabulary: Vocabulary, block_size: int) -> Split:
    """Each name as one row: the boundary and the name, at each place the token after it; cut off at `block_size`."""
    token = {character: i for i, character in enumerate(vocabulary.characters)}
    width = min(block_size, max(map(len, names)) + 1)
    x = torch.zeros(len(names), width, dtype=torch.int64)
    y = torch.full((len(names), width), IGNORED)
    for row, name in enumerate(names):
        tokens = [token[character] for character in BOUNDARY + name + BOUNDARY][: width + 1]
        x[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        y[row, : len(tokens) - 1] = torch.tensor(tokens[1:])
    return Split(x, y)


# ---------------------------------------------------------------------------------------------------- a model, a run


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

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: a tenth in the second half."""
        return self.lr if step < self.steps // 2 else self.lr / 10


OPTIONS = {
    "unbiased": "normalise batches with n - 1, as the lecture does",
    "tied": "share the table of the embedding with the output layer",
}


@dataclass(frozen=True)
class Recipe:
    """What a model script defines; everything else is shared."""

    name: str
    description: str
    build: Callable[[Config, int, torch.Generator], Layer]  # of the configuration, the vocabulary size and a generator
    defaults: Config = field(default_factory=Config)
    options: tuple[str, ...] = ()  # which of OPTIONS the model has
    sequences: bool = False  # a model of whole names, with a target at each place, instead of one of windows
    optimizer: Callable[[Iterable[Tensor], float], torch.optim.Optimizer] = SGD

    def split(self, names: Sequence[str], vocabulary: Vocabulary, block_size: int, device: torch.device) -> Split:
        """The names as the model reads them."""
        split = (sequences if self.sequences else windows)(names, vocabulary, block_size)
        return Split(split.x.to(device), split.y.to(device))


@dataclass
class Run:
    """A training run: everything that changes from step to step, and what a checkpoint has to hold."""

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
        """The speed of training, without evaluations and checkpoints; None where no step was timed."""
        return self.timed_steps / self.seconds if self.seconds else None

    @property
    def parameters(self) -> int:
        """The number of trained numbers."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def minibatch(split: Split, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `size` rows with replacement: x, and y as the loss wants it, one a prediction."""
    xs, ys = minibatches(split, 1, size, generator)
    return xs[0], ys[0]


def minibatches(split: Split, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `count` minibatches: xs (K, B, T), and ys (K, B) or (K, B T)."""
    rows = torch.randint(0, split.y.shape[0], (count, size), generator=generator).to(split.y.device)
    return split.x[rows], split.y[rows].flatten(1)


def train(run: Run, split: Split, val: Split, step: TrainStep, save: Callable[[], None], stop: Stop) -> None:
    """Take the steps that are left, with a progress bar on a terminal; end early, between two blocks, when asked to.

    Where a block of steps ends depends on the step alone, never on the clock or on where the run began: so a resumed
    run takes its steps in the same blocks, and rounds alike where a block is one compiled graph.
    """
    config, saved, started = run.config, time.monotonic(), run.step
    validate_every = max(1, config.steps // VALIDATIONS)
    with progress(run) as bar:
        while run.step < config.steps and not stop.asked:
            boundaries = (run.step // period * period + period for period in (BLOCK, validate_every))
            end = min(*boundaries, *(b for b in (config.steps // 2, config.steps) if b > run.step))
            for group in run.optimizer.param_groups:
                group["lr"] = config.lr_at(run.step)
            begun = time.perf_counter()
            xs, ys = minibatches(split, end - run.step, config.batch_size, run.generator)
            run.losses[run.step : end] = step.many(xs, ys)
            if run.step > started:  # the first block warms up, or compiles
                run.seconds += time.perf_counter() - begun
                run.timed_steps += end - run.step
            run.step = end
            if run.step % validate_every == 0:
                run.validations.append((run.step, evaluate(run.model, val)))
            if time.monotonic() - saved > SAVE_EVERY:
                save()
                saved = time.monotonic()
            if not bar.disable:
                recent = f"{float(run.losses[max(0, end - 1000) : end].mean()):.4f}"
                bar.set_postfix(loss=recent, val=f"{run.validations[-1][1]:.4f}" if run.validations else "...")
            bar.update(run.step - bar.n)


@torch.no_grad()
def evaluate(model: Layer, split: Split) -> float:
    """The mean loss over a split, with running statistics."""
    loss, total = CrossEntropy(reduction="sum"), 0.0
    model.eval()
    for x, y in zip(split.x.split(CHUNK), split.y.split(CHUNK)):
        total += float(loss(model(x), y.flatten()))
    model.train()
    return total / int((split.y != IGNORED).sum())


@torch.no_grad()
def sample(run: Run, count: int, device: torch.device) -> list[str]:
    """Draw `count` names from the model, character by character."""
    block_size, generator = run.config.block_size, torch.Generator().manual_seed(run.config.seed)
    begin = 1 if run.recipe.sequences else block_size  # boundaries before the first character
    tokens = torch.zeros(count, begin, dtype=torch.int64)
    run.model.eval()
    for _ in range(LONGEST_SAMPLE if count else 0):
        logits = run.model(tokens[:, -block_size:].to(device)).cpu()
        probabilities = logits.view(count, -1, len(run.vocabulary))[:, -1].softmax(1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
        if bool((tokens[:, begin:] == 0).any(1).all()):
            break
    run.model.train()
    texts = (run.vocabulary.decode(row) for row in tokens[:, begin:].tolist())
    return [text.split(BOUNDARY)[0] for text in texts]


# ---------------------------------------------------------------------------------------------------- checkpoints

FORMAT = "handgrad names model 1"


def save_checkpoint(run: Run, path: Path, data: str) -> None:
    """Write the whole run to a safetensors file, atomically: at any moment it is the old or the new one, whole."""
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
    # each tensor contiguous and with memory of its own, as the format wants it
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_atomically(path, require("safetensors.torch").save(tensors, metadata))


def load_checkpoint(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a checkpoint of this kind of model; InputError for anything else."""
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
    """Put a new run of the same configuration where the checkpoint left it."""
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
    """Write beside the target, flush to the disk, and only then take the target's name."""
    draft = path.with_name(f".{path.name}.part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------- what people see


def plot(run: Run, path: Path, title: str) -> None:
    """The loss of each step, faint, its mean over 1,000 steps, the validation losses, and where the lr changes."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    losses, window = run.losses[: run.step], min(1000, max(1, run.step // 20))
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    raw = {"color": "tab:blue", "alpha": max(0.03, min(0.3, 600 / (run.step + 1))), "markersize": 1.5}
    axes.plot(range(1, run.step + 1), losses.numpy(), "o", markeredgewidth=0, label="minibatch", **raw)
    if run.step:
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), losses.double().cumsum(0)])
        means = (sums[window:] - sums[:-window]) / window
        label = f"mean over {window:,} steps"
        axes.plot(range(window, run.step + 1), means.numpy(), color="tab:blue", linewidth=1.8, label=label)
        if run.step > 20:
            axes.set_ylim(*(float(losses.nan_to_num().quantile(share)) for share in (0.002, 0.998)))
    if run.validations:
        axes.plot(*zip(*run.validations), "o-", color="tab:orange", markersize=4, label="validation")
    change = run.config.steps // 2
    if 0 < change < run.step:
        axes.axvline(change, color="gray", linestyle="--", linewidth=1)
        text = f" lr {run.config.lr_at(change - 1):g} to {run.config.lr_at(change):g}"
        axes.text(change, 0.98, text, transform=axes.get_xaxis_transform(), va="top", color="gray")
    axes.set(title=title, xlabel="step", ylabel="cross-entropy (nats a character)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.2)
    for line in axes.legend(loc="upper right").get_lines():
        line.set(alpha=1, markersize=4)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    pyplot.close(figure)
    write_atomically(path, image.getvalue())


@contextmanager
def progress(run: Run) -> Iterator[Any]:
    """A bar with losses and steps/s on a terminal; nothing where the output goes to a file."""
    tqdm = require("tqdm").tqdm
    with tqdm(total=run.config.steps, initial=run.step, unit="step", disable=None, dynamic_ncols=True) as bar:
        yield bar


def report(run: Run, losses: dict[str, float], samples: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The result of a run as JSON-ready values; a loss that is no number any more is null."""
    return {
        "parameters": run.parameters,
        "steps": run.step,
        **{f"{name}_loss": loss if math.isfinite(loss) else None for name, loss in losses.items()},
        "steps_per_second": run.steps_per_second,
        "samples": samples,
        "config": asdict(run.config) | settings,
        "versions": {
            "handgrad": handgrad.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
    }


def check_gradients(run: Run, split: Split) -> bool:
    """Print every gradient of the first batch beside autograd's, in float64; whether they agree."""
    table = require("handgrad.testing").gradient_table
    generator = torch.Generator()
    generator.set_state(run.generator.get_state())
    model = copy.deepcopy(run.model).to(torch.float64)
    result = table(model, CrossEntropy(), *minibatch(split, run.config.batch_size, generator))
    print(result, flush=True)
    return bool(result.ok)


class Stop:
    """Ctrl-C (or a polite kill) asks the run to end after the current steps; a second one ends it at once."""

    asked = False

    def __enter__(self) -> Stop:
        self.previous = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def ask(self, *_: object) -> None:
        """The signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def require(module: str) -> ModuleType:
    """Import what the extra `models` brings, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"this needs {error.name}: pip install 'handgrad[models]'") from None


# ---------------------------------------------------------------------------------------------------- flags


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number within bounds."""

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
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def parse_flags(recipe: Recipe, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags that all names models share. What a run's result depends on is None where it was not given."""
    defaults = recipe.defaults
    parser = argparse.ArgumentParser(
        prog=recipe.name, description=recipe.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data and model")
    data.add_argument(
        "--data",
        type=Path,
        default=DATA,
        metavar="PATH",
        help="text file, one name a line (default: the shipped names)",
    )

    def size(name: str, low: int, high: int, text: str, group: Any) -> None:
        default = getattr(defaults, name[2:].replace("-", "_"))
        group.add_argument(name, type=whole(low, high), metavar="N", help=f"{text} (default {default:,})")

    size("--block-size", 1, 1024, "characters of context", data)
    size("--embedding-dim", 1, 65536, "numbers a character is embedded in", data)
    size("--hidden-dim", 1, 65536, "hidden units", data)
    for option in recipe.options:
        data.add_argument(f"--{option}", action="store_const", const=True, help=OPTIONS[option])
    training = parser.add_argument_group("training")
    size("--steps", 0, 10**9, "training steps; the learning rate drops to a tenth halfway", training)
    size("--batch-size", 2, 2**20, "examples a step", training)
    training.add_argument(
        "--lr", type=rate, metavar="X", help=f"learning rate of the first half (default {defaults.lr:g})"
    )
    size("--seed", 0, 2**63 - 1, "seed of the split, the initial weights, the minibatches and the samples", training)
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
        help="go on from this checkpoint, with its configuration; only --steps may differ",
    )
    result.add_argument("--plot", type=Path, metavar="PATH", help="draw the loss curve here (PNG)")
    result.add_argument(
        "--report", type=Path, metavar="PATH", help="write losses, samples, speed and configuration here (JSON)"
    )
    return parser.parse_args(argv)


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """Run a names model; the exit code is 0, or 1 for a wrong gradient, 2 for bad input, 130 after Ctrl-C."""
    args = parse_flags(recipe, argv)
    try:
        with Stop() as stop:
            return run_model(recipe, args, stop)
    except InputError as error:
        print(f"{recipe.name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run_model(recipe: Recipe, args: argparse.Namespace, stop: Stop) -> int:
    """Everything between the flags and the exit code."""
    for path in (args.save, args.plot, args.report):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no directory {path.parent}")
    device = find_device(args.device)
    torch.set_num_threads(args.threads)
    names = read_names(args.data)
    vocabulary = Vocabulary.of(names)
    data = hashlib.sha256("\n".join(names).encode()).hexdigest()
    given = {name: value for name, value in vars(args).items() if hasattr(recipe.defaults, name) and value is not None}
    if args.resume is None:
        run = Run.new(recipe, Config(**(asdict(recipe.defaults) | given)), vocabulary, device)
    else:
        run = resume(recipe, args.resume, given, vocabulary, data, device)
    if args.save is not None:
        if args.save.exists() and args.save != args.resume:
            load_checkpoint(args.save, recipe.name)  # refuse to replace anything but an earlier checkpoint
        save_checkpoint(run, args.save, data)

    config = run.config
    parts = split_names(names, config.seed)
    splits = {name: recipe.split(part, vocabulary, config.block_size, device) for name, part in parts.items()}
    examples = " / ".join(f"{int((split.y != IGNORED).sum()):,}" for split in splits.values())
    print(f"{len(names):,} names, {len(vocabulary)} characters; {examples} examples to train / validate / test")
    print(f"{run.model!r}\n{run.parameters:,} parameters", flush=True)
    if args.check and not check_gradients(run, splits["train"]):
        print(f"{recipe.name}: error: a gradient differs from autograd's", file=sys.stderr)
        return 1

    def save() -> None:
        if args.save is not None:
            save_checkpoint(run, args.save, data)

    step = TrainStep(run.model, CrossEntropy(), run.optimizer)
    if args.compile:
        print("compiling the training step: the first steps take a minute or so", flush=True)
        step = step.compile()
    train(run, splits["train"], splits["val"], step, save, stop)
    save()
    losses = {name: evaluate(run.model, split) for name, split in splits.items()}
    samples = sample(run, args.samples, device)
    state = f"stopped after {run.step:,} of {config.steps:,} steps" if stop.asked else f"{run.step:,} steps"
    speed = f", {run.steps_per_second:,.0f} steps/s" if run.steps_per_second else ""
    print("  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()) + f"   ({state}{speed})")
    if args.samples:
        print("samples: " + " ".join(name or "(empty)" for name in samples))
    if args.save is not None:
        print(f"checkpoint: {args.save}")
    if args.report is not None:
        settings = {"data": str(args.data), "device": str(device), "threads": args.threads, "compile": args.compile}
        text = json.dumps(report(run, losses, samples, settings), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(args.report, text.encode() + b"\n")
    if args.plot is not None:
        plot(run, args.plot, f"{recipe.name}: {run.parameters:,} parameters, validation loss {losses['val']:.4f}")
    return 130 if stop.asked else 0


def find_device(name: str) -> torch.device:
    """The device of this name, once it has been seen to work."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def resume(
    recipe: Recipe, path: Path, given: dict[str, Any], vocabulary: Vocabulary, data: str, device: torch.device
) -> Run:
    """The run that a checkpoint holds, or InputError where it does not belong to this data and these flags."""
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
