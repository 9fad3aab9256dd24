"""From the command line to the exit code: set up, train, show the results."""

from __future__ import annotations

import argparse
import copy
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from handgrad import CrossEntropy, NonFiniteError, TrainStep, keep_freed_memory
from names.checkpoint import load_checkpoint, resume, save_checkpoint, write_atomically
from names.data import Split, Vocabulary, fingerprint, minibatch, read_names, split_names
from names.errors import InputError, require
from names.flags import parse_flags
from names.inside import Inside, draw
from names.output import plot, progress_bar, report
from names.run import Config, Recipe, Run
from names.training import evaluate, sample, train

SAVE_EVERY = 5.0  # seconds between checkpoints


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """Run a names model; the exit code is 0, or 1 for a wrong gradient or a NaN, 2 for bad input, 130 after Ctrl-C."""
    args = parse_flags(recipe, argv)
    try:
        with Stop() as stop:
            return run_script(recipe, args, stop)
    except InputError as error:
        print(f"{recipe.name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run_script(recipe: Recipe, args: argparse.Namespace, stop: Stop) -> int:
    """Everything between the flags and the exit code."""
    refuse(args)
    device = set_up(args.device, args.threads)
    names = read_names(args.data)
    vocabulary, data = Vocabulary.of(names), fingerprint(names)
    given = {name: value for name, value in vars(args).items() if hasattr(recipe.defaults, name) and value is not None}
    if args.resume is None:
        run = Run.new(recipe, Config(**(asdict(recipe.defaults) | given)), vocabulary, device)
    else:
        run = resume(recipe, args.resume, given, vocabulary, data, device)

    def save() -> None:
        if args.save is not None:
            save_checkpoint(run, args.save, data)

    if args.save is not None and args.save.exists() and args.save != args.resume:
        load_checkpoint(args.save, recipe.name)  # refuse to replace anything but an earlier checkpoint
    save()

    parts = split_names(names, run.config.seed)
    splits = {name: recipe.split(part, vocabulary, run.config.block_size, device) for name, part in parts.items()}
    examples = " / ".join(f"{split.targets:,}" for split in splits.values())
    print(f"{len(names):,} names, {len(vocabulary)} characters; {examples} examples to train / validate / test")
    print(f"{run.model!r}\n{run.parameters:,} parameters", flush=True)
    if args.check and not check_gradients(run, splits["train"]):
        print(f"{recipe.name}: error: a gradient differs from autograd's", file=sys.stderr)
        return 1

    step = TrainStep(run.model, CrossEntropy(), run.optimizer)
    inside = Inside(run, step.loss, tripwire=args.tripwire, watch=args.watch is not None)
    if args.compile:
        print("compiling the training step: the first steps take a minute or so", flush=True)
        step = step.compile()
    saved, failure = time.monotonic(), None
    with progress_bar(run) as show_progress:

        def go_on() -> bool:
            """Between two stretches of steps: save now and then, show progress; whether to go on."""
            nonlocal saved
            if time.monotonic() - saved > SAVE_EVERY:
                save()
                saved = time.monotonic()
            show_progress()
            return not stop.asked

        try:
            train(run, step, splits["train"], splits["val"], go_on, inside.around, one_by_one=args.tripwire)
        except NonFiniteError as error:
            failure = error
    save()
    show_results(run, splits, args, device, inside, stopped=stop.asked or failure is not None)
    if failure is not None:
        paths = {"checkpoint": args.save, "report": args.report, "plot": args.plot}
        if inside.seen():
            paths["pictures"] = args.watch
        kept = ", ".join(["losses", *(f"{name} {path}" for name, path in paths.items() if path is not None)])
        print(f"{recipe.name}: error: step {run.step + 1:,}: {failure}; kept, up to this step: {kept}", file=sys.stderr)
        return 1
    return 130 if stop.asked else 0


def refuse(args: argparse.Namespace) -> None:
    """Raise InputError, before any work, for what could only fail later."""
    for path in (args.save, args.plot, args.report, args.watch):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no directory {path.parent}")
    for flag in ("tripwire", "watch"):
        if args.compile and getattr(args, flag):
            raise InputError(
                f"--{flag} looks inside the steps, and a compiled one cannot be looked into; omit --compile"
            )
    if args.plot is not None or args.watch is not None:
        require("matplotlib")


def set_up(device_name: str, threads: int) -> torch.device:
    """Prepare the process for the run; returns the device, once it has been seen to work."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        device = torch.device(device_name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {device_name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def check_gradients(run: Run, split: Split) -> bool:
    """Print every gradient of the first minibatch beside autograd's, in float64; whether they agree."""
    table = require("handgrad.testing").gradient_table
    generator = torch.Generator()
    generator.set_state(run.generator.get_state())
    model = copy.deepcopy(run.model).to(torch.float64)
    result = table(model, CrossEntropy(), *minibatch(split, run.config.batch_size, generator))
    print(result, flush=True)
    return bool(result.ok)


def show_results(
    run: Run, splits: dict[str, Split], args: argparse.Namespace, device: torch.device, inside: Inside, *, stopped: bool
) -> None:
    """Evaluate and sample; print the results, and write the report and the pictures that were asked for."""
    losses = {name: evaluate(run.model, split) for name, split in splits.items()}
    samples = sample(run, args.samples, device)
    state = f"stopped after {run.step:,} of {run.config.steps:,} steps" if stopped else f"{run.step:,} steps"
    speed = f", {run.steps_per_second:,.0f} steps/s" if run.steps_per_second else ""
    print("  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()) + f"   ({state}{speed})")
    if args.samples:
        print("samples: " + (" ".join(name or "(empty)" for name in samples) or "none, the output is not finite"))
    if args.save is not None:
        print(f"checkpoint: {args.save}")
    if args.report is not None:
        settings = {"data": str(args.data), "device": str(device), "threads": args.threads, "compile": args.compile}
        text = json.dumps(report(run, losses, samples, settings), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(args.report, text.encode() + b"\n")
    if args.plot is not None:
        title = f"{run.recipe.name}: {run.parameters:,} parameters, validation loss {losses['val']:.4f}"
        write_atomically(args.plot, plot(run, title))
    if args.watch is not None:
        show_statistics(inside, args.watch)


def show_statistics(inside: Inside, path: Path) -> None:
    """Print the table of the last steps that were watched, and write the pictures."""
    seen = inside.seen()
    if not seen:
        print("pictures: none, no step was taken")
        return
    title, last = list(seen.items())[-1]
    print(f"\n{title}: {last}\n")
    write_atomically(path, draw(seen))
    print(f"pictures: {path} ({' and '.join(seen)})")


class Stop:
    """Ctrl-C, or the signal of `kill`, asks the run to end after the current steps; a second one ends it at once."""

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
