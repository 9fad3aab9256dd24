"""A quick look without a test: ``python -m handgrad.testing mypkg.layers:Swish --x "*N D"``."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from handgrad.errors import HandgradError
from handgrad.testing.plan import SYNTAX


def main(arguments: list[str] | None = None) -> int:
    """Check one layer and print the report. The exit code: 0 right, 1 wrong, 2 the check could not be made."""
    parser = argparse.ArgumentParser(
        prog="python -m handgrad.testing",
        description="Check the hand-written gradients of a layer, and print the report.",
        epilog=SYNTAX,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("layer", help="module:Name of the class or of a function that makes the layer")
    parser.add_argument(
        "--x",
        action="append",
        required=True,
        help='the input, such as "*N D"; once for each input of forward, or for each output that a loss takes',
    )
    parser.add_argument("--target", help="the target, for a loss")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=V1,V2", help="values of an argument")
    parser.add_argument("--sizes", action="append", default=[], metavar="NAME=FROM,TO", help="of a size, from and to")
    parser.add_argument("--ranges", action="append", default=[], metavar="NAME=FROM,TO", help="of a parameter's values")
    parser.add_argument(
        "--kinks",
        action="append",
        default=[],
        metavar="X=SLOPE",
        help="where the slope jumps, and which is given",
    )
    parser.add_argument("--distinct", action="store_true", help="no two equal numbers in an input")
    parser.add_argument("--module", help="module:Name of the equal torch.nn.Module")
    parser.add_argument("--reference", help="module:Name of the same function by other means")
    parser.add_argument("--differences", action="store_true", help="judge by finite differences")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="PROPERTY=REASON", help="a property to leave out"
    )
    parser.add_argument("--examples", type=int, help="examples of the gradients property (60)")
    parser.add_argument("--reproduce", help="what a failure printed")
    given = parser.parse_args(arguments)
    sys.path.insert(0, "")
    try:
        from handgrad.testing import check_layer, check_loss  # says what to install where hypothesis is missing

        what: dict[str, Any] = {
            "options": {name: [_parsed(v) for v in values.split(",")] for name, values in map(_pair, given.set)},
            "sizes": {name: tuple(map(int, ends.split(","))) for name, ends in map(_pair, given.sizes)},
            "ranges": {name: tuple(map(float, ends.split(","))) for name, ends in map(_pair, given.ranges)},
            "kinks": {float(x): _parsed(slope) for x, slope in map(_pair, given.kinks)},
            "distinct": given.distinct,
            "skip": dict(map(_pair, given.skip)),
            "module": given.module and _load(given.module),
            "reference": given.reference and _load(given.reference),
            "oracle": "differences" if given.differences else "autograd",
            "examples": given.examples,
            "reproduce": given.reproduce,
        }
        make = _load(given.layer)
        if given.target:
            report = check_loss(make, given.x if len(given.x) > 1 else given.x[0], given.target, **what)
        else:
            report = check_layer(make, given.x, **what)
    except AssertionError as failure:
        print(f"{type(failure).__name__}: {failure}")
        if "required positional argument" in str(failure):
            print("does forward take more inputs? give --x once for each of them, in order; a loss takes --target, too")
        return 1
    except (HandgradError, ImportError, AttributeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


def _load(path: str) -> Any:
    module, colon, name = path.partition(":")
    if not colon:
        raise ValueError(f"expected module:Name, got {path!r}")
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _parsed(text: str) -> Any:
    """A number or True, False, None; else the text itself."""
    words: dict[str, Any] = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    sys.exit(main())
