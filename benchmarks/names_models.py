"""One training step of each names model, sampling included, beside the same model in torch.nn under autograd.

Run it from the root of the project: ``python benchmarks/names_models.py --json benchmarks/results/models.json``.
Before anything is timed, the two take a few steps in float64 and must agree on every parameter. The compiled step is a
third contender; its first result is timed in new processes, with the caches as benchmarks/steps.py says.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from names_twins import TWINS, load
from steps import Contender, Row, first_result, first_results

from handgrad import CrossEntropy, Dropout, TrainStep
from handgrad.bench import environment, interleave, ratio
from handgrad.bench.timing import timed
from handgrad.tables import seconds_text, text_table
from names.data import DATA, Vocabulary, minibatch, read_names

HEAD = [
    "model",
    "parameters",
    "TrainStep",
    "compiled",
    "autograd",
    "/ TrainStep",
    "/ compiled",
    "cold",
    "warm",
]
ALIGN = "lrrrrrrrr"


def row(name: str, found: dict[str, Any]) -> list[str]:
    """A model's cells in the table: times of a step, autograd's time over them, times to the first result."""
    times = [seconds_text(found[f"{side}_us"] / 1e6) for side in ("handgrad", "compiled", "autograd")]
    ratios = ["{:.2f} ({:.2f} to {:.2f})".format(*found["handgrad"]), f"{found['compiled'][0]:.2f}"]
    first = found.get("first_result_seconds", {})
    firsts = [seconds_text(first[state]) if first else "" for state in ("cold", "warm")]
    return [name, f"{found['parameters']:,}", *times, *ratios, *firsts]


class Contenders:
    """A model and its twin, with the same weights, data and optimizer; each call takes one step."""

    def __init__(self, name: str, people: list[str]) -> None:
        self.recipe, make_twin = TWINS[name]
        config, vocabulary = self.recipe.defaults, Vocabulary.of(people)
        self.data = self.recipe.split(people, vocabulary, config.block_size, torch.device("cpu"))
        self.config, self.generator = config, torch.Generator().manual_seed(1)
        self.model = self.recipe.build(config, len(vocabulary), self.generator)
        self.twin = make_twin(config, len(vocabulary))
        load(self.twin, self.model)
        self.ready()

    def ready(self) -> None:
        """Make the optimizers."""
        self.step = TrainStep(
            self.model, CrossEntropy(), self.recipe.optimizer(self.model.parameters(), self.config.lr)
        )
        self.program = self.step.compile(progress=False)
        kind = torch.optim.AdamW if self.recipe.optimizer is torch.optim.AdamW else torch.optim.SGD
        self.optimizer = kind(self.twin.parameters(), lr=self.config.lr)

    def by_hand(self) -> None:
        """A step of handgrad."""
        self.step(*minibatch(self.data, self.config.batch_size, self.generator))

    def by_program(self) -> None:
        """A step of handgrad, compiled."""
        self.program(*minibatch(self.data, self.config.batch_size, self.generator))

    def by_autograd(self) -> None:
        """A step of torch.nn."""
        x, y = minibatch(self.data, self.config.batch_size, self.generator)
        loss = nn.functional.cross_entropy(self.twin(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def agree(self) -> float:
        """The largest difference between the two after five steps on the same data in float64."""
        other = copy.deepcopy(self)
        other.model.to(torch.float64)
        other.twin.double()
        dropouts = [layer for _, layer in other.model.named_layers() if isinstance(layer, Dropout)]
        for dropout in (*dropouts, *(module for module in other.twin.modules() if isinstance(module, nn.Dropout))):
            dropout.p = 0.0  # the two draw from different generators
        other.ready()
        start = other.generator.get_state()
        for call in (other.by_hand, other.by_autograd):
            other.generator.set_state(start)
            for _ in range(5):
                call()
        pairs = zip(other.model.state_dict().values(), other.twin.state_dict().values())
        return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Contenders:
        """Everything but the generator, which takes no deep copy, and the optimizers, which are made anew."""
        twin = object.__new__(Contenders)
        twin.recipe, twin.config, twin.data = self.recipe, self.config, self.data
        twin.model, twin.twin = copy.deepcopy(self.model), copy.deepcopy(self.twin)
        twin.generator = torch.Generator().manual_seed(2)
        return twin


def main() -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(TWINS), help="which (default: all)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each model (default 20)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--no-first", action="store_true", help="without the time to the compiled step's first result")
    parser.add_argument("--first", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    people = read_names(DATA)

    def compiled(name: str) -> Row:
        made: Any = lambda: Contender(None, Contenders(name, people).by_program)  # type: ignore[arg-type]  # noqa: E731
        return Row(name, made, compiles=True)

    if args.first:
        print(first_result(compiled(args.first)))
        return 0
    rows: dict[str, dict[str, Any]] = {}
    for name in tqdm(args.models.split(","), disable=None, unit="model"):
        contenders = Contenders(name, people)
        difference = contenders.agree()
        if not difference < 1e-6:
            print(f"{name}: handgrad and torch.nn differ by {difference:.1e} after five steps", file=sys.stderr)
            return 1
        contenders.by_program()
        sides = {"handgrad": contenders.by_hand, "compiled": contenders.by_program, "autograd": contenders.by_autograd}
        times = interleave({side: timed(call) for side, call in sides.items()}, seconds=args.seconds)
        rows[name] = {
            "parameters": sum(p.numel() for p in contenders.model.parameters()),
            "difference_float64": difference,
            **{f"{side}_us": 1e6 * t.median() for side, t in times.items()},
            **{side: ratio(times[side].rounds(), times["autograd"].rounds()) for side in ("handgrad", "compiled")},
        }
        if not args.no_first:
            command = [sys.executable, __file__, "--threads", str(args.threads)]
            with tempfile.TemporaryDirectory() as folder:
                rows[name]["first_result_seconds"] = first_results(command, compiled(name), Path(folder))
    print("/ is autograd's time over it; cold and warm are the compiled step's first result, by the compiler's caches")
    print(text_table([HEAD, *(row(name, found) for name, found in rows.items())], ALIGN))
    if args.json is not None:
        text = json.dumps({"environment": environment(), "models": rows}, indent=2)
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
