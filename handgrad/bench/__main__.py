"""``python -m handgrad.bench``: layers against autograd, from the shell."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from handgrad.bench.environment import environment
from handgrad.bench.measure import Measurement, measure
from handgrad.bench.operations import operations_table
from handgrad.bench.report import as_dict, head, lines, plot, write_json
from handgrad.errors import HandgradError
from handgrad.losses.loss import Loss
from handgrad.memory import keep_freed_memory
from handgrad.pictures import new_figure
from handgrad.twins import TWINS, Twin, rows, rows_and_labels

SIZES = "32x64,256x512,4096x1024"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser(
        prog="python -m handgrad.bench",
        description="Time layers, forward and backward, against the equal torch module under autograd. The contenders "
        "take turns, so a busy machine slows both. Results are compared first. Inside a model is what a model takes "
        "longer for having the layer: a chain of many copies less a chain of few, or a layer before it with and "
        "without it. Alone is one call of forward and one of backward: there autograd pays for the call itself, too, "
        "which a model pays once a step.",
    )
    p.add_argument(
        "--layer",
        action="append",
        help="a layer of handgrad, may be given again (default: every one that does arithmetic); or module:Class, a "
        "layer of one input of rows x columns, made without arguments, of the columns, or of the columns twice",
    )
    p.add_argument("--against", help="module:Class to compare with, for a --layer that is not one of handgrad's")
    p.add_argument("--sizes", type=_sizes, default=_sizes(SIZES), help=f"rows x columns, ... (default: {SIZES})")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    p.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    p.add_argument(
        "--keep-memory",
        action="store_true",
        help="keep freed memory in the process: without fresh pages, which cost both the same",
    )
    p.add_argument("--compiled", action="store_true", help="the torch module under torch.compile, too")
    p.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="for each layer and size, alone and inside a model each, more if needed (default: 1)",
    )
    p.add_argument(
        "--operations", action="store_true", help="after each result, which operations of torch took how long"
    )
    p.add_argument("--json", type=Path, help="write the results to this file")
    p.add_argument("--plot", type=Path, help="draw the results to this PNG file; needs matplotlib")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements; 2 for bad arguments, 1 where a result is wrong."""
    p = parser()
    args = p.parse_args(argv)
    try:
        twins = chosen(args.layer, args.against)
        if args.plot:
            new_figure(1, 1)  # what is missing for it is said before the measuring
    except (ValueError, ImportError, AttributeError) as error:
        p.error(str(error))
    if args.threads < 1:
        p.error(f"--threads must be at least 1, got {args.threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    if args.keep_memory:
        keep_freed_memory()
    try:
        results = run(twins, args.sizes, DTYPES[args.dtype], args.compiled, args.seconds, args.operations)
    except HandgradError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (TypeError, RuntimeError, IndexError) as error:
        if args.against is None:
            raise
        print(f"error: {args.layer[0]} or {args.against} does not run: {error}", file=sys.stderr)
        print("other inputs than one of rows x columns: handgrad.bench.measure(Twin(...), size)", file=sys.stderr)
        return 1
    else:
        if args.json:
            write_json(args.json, [as_dict(r) for r in results], dtype=args.dtype, keep_memory=args.keep_memory)
        if args.plot:
            plot(args.plot, results, f"{args.dtype}, {args.threads} thread(s), {environment()['machine']}")
    finally:
        torch.set_num_threads(before)
    return 0


def run(
    twins: Sequence[Twin],
    sizes: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    seconds: float = 1.0,
    by_operation: bool = False,
) -> list[Measurement]:
    """Measure the twins at all sizes, printing each result when it is there."""
    env = environment()
    print(f"{env['machine']}, torch {env['torch']}, {env['threads']} thread(s), {str(dtype).removeprefix('torch.')}")
    print(head())
    results: list[Measurement] = []
    todo = [(twin, size) for twin in twins for size in sizes if twin.fits(*size)]
    for i, (twin, size) in enumerate(todo):
        _progress(f"{i + 1} of {len(todo)}: {twin.name} {size[0]}x{size[1]}")
        torch.manual_seed(0)
        results.append(measure(twin, size, dtype, compiled=compiled, seconds=seconds))
        _progress("")
        print(lines(results[-1]), flush=True)
        if by_operation:
            print(operations_table(twin, size, dtype), flush=True)
    left_out = list(dict.fromkeys(r.name for r in results if r.entries["autograd"].inside_ratio is None))
    if left_out:
        print(f"not inside a model, for they have several inputs or outputs: {', '.join(left_out)}")
    theirs = [r.entries["autograd"] for r in results]
    inside, alone = [e.inside_ratio for e in theirs if e.inside_ratio], [e.ratio for e in theirs if e.ratio]
    means = [f"{geometric_mean(r.value for r in ratios):.2f}" if ratios else "-" for ratios in (inside, alone)]
    if results:
        print(f"geometric mean of autograd / handgrad: {means[0]} inside a model, {means[1]} alone")
    return results


def chosen(layers: Sequence[str] | None, against: str | None) -> list[Twin]:
    """The twins that `--layer` and `--against` ask for: without them, all that do arithmetic."""
    if against is not None:
        if not layers or len(layers) != 1:
            raise ValueError("--against needs exactly one --layer")
        ours = TWINS[layers[0]].layer if layers[0] in TWINS else None
        return [twin_of(ours or _load(layers[0]), _load(against))]
    for name in layers or ():
        if name not in TWINS:
            raise ValueError(f"--layer {name}: give --against module:Class with it, or one of {', '.join(TWINS)}")
    return [TWINS[name] for name in layers] if layers else [twin for twin in TWINS.values() if twin.arithmetic]


def twin_of(ours: Any, theirs: Any) -> Twin:
    """A twin of two classes of anybody: each is called without arguments, or with D, or with D and D.

    >>> from handgrad import Linear, Tanh
    >>> twin_of(Tanh, torch.nn.Tanh).layer(8), twin_of(Linear, torch.nn.Linear).layer(8)
    (Tanh(), Linear(8 -> 8))
    """
    is_loss = isinstance(ours, type) and issubclass(ours, Loss)
    name = getattr(ours, "__name__", str(ours))
    return Twin(name, partial(_made, ours), partial(_made, theirs), rows_and_labels if is_loss else rows)


def _made(maker: Any, D: int) -> Any:
    for arguments in ((), (D,)):
        try:
            return maker(*arguments)
        except TypeError:
            continue
    return maker(D, D)


def _load(text: str) -> Any:
    module, found, name = text.partition(":")
    if not found:
        raise ValueError(f"expected module:Class, such as torch.nn:SiLU, got {text!r}")
    return getattr(importlib.import_module(module), name)


def _sizes(text: str) -> list[tuple[int, int]]:
    sizes = []
    for part in text.split(","):
        rows, found, columns = part.partition("x")
        if not (found and rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
            raise argparse.ArgumentTypeError(f"expected sizes such as 32x64,256x512, got {text!r}")
        sizes.append((int(rows), int(columns)))
    return sizes


def _progress(text: str) -> None:
    """A line that the next one replaces, where somebody looks on."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, "")  # a layer of one's own, in the directory where one stands
    sys.exit(main())
