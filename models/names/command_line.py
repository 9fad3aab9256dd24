"""From the command line to the exit code: set up, train, write the files, show the results."""

from __future__ import annotations

import argparse
import copy
import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from handgrad import CompileError, CrossEntropy, NonFiniteError, TrainStep, keep_freed_memory
from names.checkpoint import checkpoint_of, refuse_to_lose, resume
from names.data import Split, Vocabulary, fingerprint, minibatch, read_names, split_names
from names.errors import InputError, require
from names.export import export, exported_to
from names.files import Files, refuse_paths
from names.flags import parse_flags
from names.inside import Inside, draw
from names.output import plot, progress_bar, report, require_pyplot, show, to_json
from names.run import Recipe, Run
from names.team import Team
from names.training import evaluate, sample, train

SAVE_EVERY = 5.0  # seconds between checkpoints


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """Run a names model; the exit code is that of EXIT_CODES in names/flags.py."""
    args = parse_flags(recipe, argv)
    try:
        with Stop() as stop, Team(args.device) as team:
            return run_script(recipe, args, stop, team)
    except InputError as error:
        return fail(recipe, str(error), 2)
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        return fail(recipe, "out of memory; a smaller --batch-size, --block-size or --hidden-dim needs less", 2)


def fail(recipe: Recipe, problem: str, code: int) -> int:
    """Say in one line what is wrong; returns the exit code."""
    print(f"{recipe.name}: error: {problem}", file=sys.stderr)
    return code


def run_script(recipe: Recipe, args: argparse.Namespace, stop: Stop, team: Team) -> int:
    """Everything between the flags and the exit code."""
    if team.attempt > 0 and args.save is not None and args.save.exists():
        args.resume = args.save  # a process was lost, and torchrun has started all of them again
    if team.rank > 0:
        args.save = args.report = args.plot = None
        args.samples = 0
    refuse(args, team)
    device = set_up(team.device, args.threads)
    names = read_names(args.data)
    vocabulary, data = Vocabulary.of(names), fingerprint(names)
    run, resumed = begin(recipe, args, vocabulary, data, device)
    team.prepare(run)
    group = True if team.size > 1 else None
    step = TrainStep(run.model, CrossEntropy(), run.optimizer, process_group=group, joined_loss=True)
    inside = Inside(run, step.loss, tripwire=args.tripwire, watch=args.watch is not None)
    if args.compile or args.export is not None:
        try:
            compiled = step.compile(progress=None if team.rank == 0 else False)
        except CompileError as error:
            raise InputError(str(error)) from None
        step = compiled if args.compile else step
    files, saved, failure, stopping = Files(), time.monotonic(), None, False

    def save() -> None:
        """Keep the run as it is; once a loss was not finite, the checkpoint of before is worth more."""
        if args.save is not None and run.diverged_at is None:
            files.write("checkpoint", args.save, checkpoint_of(run, data), f"after step {run.step:,}")

    save()
    files.raise_failure()

    parts = split_names(names, run.config.seed)
    splits = {name: recipe.split(part, vocabulary, run.config.block_size, device) for name, part in parts.items()}
    examples = " / ".join(f"{split.targets:,}" for split in splits.values())
    print(f"{len(names):,} names, {len(vocabulary)} characters; {examples} examples to train / validate / test")
    print(f"{run.model!r}\n{run.parameters:,} parameters", flush=True)
    if team.size > 1:
        print(f"{team.size} processes, each with a part of every minibatch", flush=True)
    if resumed:
        print(resumed, flush=True)
    if args.check and not check_gradients(run, splits["train"]):
        return fail(recipe, "a gradient differs from autograd's", 1)
    if args.compile:
        print("compiling the training step: the first steps take a minute or so", flush=True)

    with progress_bar(run, shown=team.rank == 0) as show_progress:

        def go_on() -> bool:
            """Between two stretches of steps: save now and then, show progress; whether to go on."""
            nonlocal saved, stopping
            if time.monotonic() - saved > SAVE_EVERY:
                told = bool(files.failures)
                save()
                if files.failures and not told:
                    print(f"{recipe.name}: {files.failures['checkpoint']}; the run goes on", file=sys.stderr)
                saved = time.monotonic()
            show_progress()
            stopping = team.agree(stop.asked)
            team.begin_stretch(run)
            return not stopping

        try:
            train(run, step, splits["train"], splits["val"], go_on, inside.around, args.tripwire, team.part)
        except NonFiniteError as error:
            failure = error
    save()
    stopping = stopping or stop.asked
    stopped = stopping or failure is not None
    if args.export is not None:
        remark = f"after step {run.step:,}"
        files.note(
            "program", args.export, lambda: export(args.export, step, run.config.batch_size, splits["train"]), remark
        )
    losses = show_results(run, splits, args, device, inside, files, team.size, stopped=stopped)
    problems, kept = list(files.failures.values()), ", ".join(["losses", *files.kept()])
    if failure is not None:
        problems.append(f"step {run.step + 1:,}: {failure}; kept, up to this step: {kept}")
    elif (first := first_not_finite(run, losses)) is not None:
        remedy = f"try a smaller --lr than {run.config.lr:g}, or --tripwire, which says in which layer it begins"
        problems.append(f"the run diverged: {first}; {remedy}")
    for problem in problems:
        fail(recipe, problem, 1)
    return 130 if stopping else int(bool(problems))


def begin(
    recipe: Recipe, args: argparse.Namespace, vocabulary: Vocabulary, data: str, device: torch.device
) -> tuple[Run, str]:
    """A new run; or a resumed one, with what to say of it.

    InputError where the flags do not fit the checkpoint to resume, or --save would replace one that this is not.
    """
    given = {name: value for name, value in vars(args).items() if hasattr(recipe.defaults, name) and value is not None}
    if args.resume is None:
        run, resumed = Run.new(recipe, replace(recipe.defaults, **given), vocabulary, device), ""
    else:
        run = resume(recipe, args.resume, given, vocabulary, data, device)
        planned, steps = run.config.steps, given.get("steps", run.config.steps)
        run.set_steps(steps)
        resumed = f"going on after step {run.step:,} of {steps:,}"
        if steps != planned:
            resumed += f", not {planned:,}, which moves the half where the learning rate drops: it is {run.schedule()}"
    same = args.resume is not None and args.save is not None and args.save.resolve() == args.resume.resolve()
    if args.save is not None and args.save.exists() and not args.overwrite and not same:
        refuse_to_lose(run, args.save, data)
    return run, resumed


def first_not_finite(run: Run, losses: dict[str, float]) -> str | None:
    """What was first infinite or not a number, of the losses of the steps and then of the results; None for nothing."""
    if run.diverged_at is not None:
        return f"step {run.diverged_at:,} is the first whose loss, {run.losses[run.diverged_at - 1]}, is not finite"
    for name, loss in losses.items():
        if not math.isfinite(loss):
            return f"after step {run.step:,} the {name} loss, {loss}, is not finite"
    return None


def refuse(args: argparse.Namespace, team: Team) -> None:
    """Raise InputError, before any work, for what could only fail later."""
    for flag in ("check", "export", "tripwire", "watch"):
        if team.size > 1 and getattr(args, flag):
            raise InputError(f"--{flag} is for a run in one process; omit it, or torchrun")
    given = [(f"--{flag}", getattr(args, flag)) for flag in ("data", "resume", "save", "report", "plot", "watch")]
    exported = [] if args.export is None else exported_to(args.export)
    refuse_paths([(flag, path) for flag, path in given if path is not None] + [("--export", p) for p in exported])
    for path in exported:
        if path.exists() and not args.overwrite:
            raise InputError(f"--export would replace {path}; export elsewhere, or replace it with --overwrite")
    if args.overwrite and args.save is None and args.export is None:
        raise InputError("--overwrite is about the files of --save and --export; give one of them, too")
    for flag in ("tripwire", "watch"):
        if args.compile and getattr(args, flag):
            raise InputError(
                f"--{flag} looks inside the steps, and a compiled one cannot be looked into; omit --compile"
            )
    require("tqdm")
    if args.save is not None or args.resume is not None or exported:
        require("safetensors.torch")
    if args.plot is not None or args.watch is not None:
        require_pyplot()


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
    run: Run,
    splits: dict[str, Split],
    args: argparse.Namespace,
    device: torch.device,
    inside: Inside,
    files: Files,
    processes: int,
    *,
    stopped: bool,
) -> dict[str, float]:
    """Evaluate and sample; first write the files that were asked for, then print the results; returns the losses."""
    losses = {name: evaluate(run.model, split) for name, split in splits.items()}
    samples = sample(run, args.samples, device)
    seen = inside.seen()
    if args.report is not None:
        settings = {"data": str(args.data), "device": str(device), "threads": args.threads, "compile": args.compile}
        settings["processes"] = processes
        files.write("report", args.report, to_json(report(run, losses, samples, settings)))
    if args.plot is not None:
        title = f"{run.recipe.name}: {run.parameters:,} parameters, validation loss {show(losses['val'])}"
        files.write("plot", args.plot, plot(run, title))
    if seen:
        files.write("pictures", args.watch, draw(seen), " and ".join(seen))

    state = f"stopped after {run.step:,} of {run.config.steps:,} steps" if stopped else f"{run.step:,} steps"
    speed = f", {run.steps_per_second:,.0f} steps/s" if run.steps_per_second else ""
    print("  ".join(f"{name} {show(loss)}" for name, loss in losses.items()) + f"   ({state}{speed})")
    if args.samples:
        print("samples:" if samples else "samples: none, the output is not finite")
        for name in samples:
            print(f"  {name or '(empty)'}")
    if seen:
        title, last = list(seen.items())[-1]
        print(f"\n{title}: {last}\n")
    for kind, (path, remark) in files.written.items():
        print(f"{kind}: {path}" + (f" ({remark})" if remark else ""))
    if args.watch is not None and not seen:
        print("pictures: none, no step was taken")
    return losses


class Stop:
    """Ctrl-C, or the signal of `kill`, asks the run to end after the current steps; a second one ends it at once."""

    asked = False

    def __enter__(self) -> Stop:
        self.previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as for SIGINT in the background
                self.previous[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def ask(self, *_: object) -> None:
        """The signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
