"""Looking inside a run while it trains: what --tripwire and --watch do around the steps."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, ExitStack

from handgrad import Loss, Statistics, tripwire
from names.run import Run

WATCHED = 20  # steps at the start of a run, and at its end; some more where a stretch of steps is longer


class Inside:
    """The context of each stretch of steps, and the statistics of the first and the last of them."""

    def __init__(self, run: Run, loss: Loss, *, tripwire: bool, watch: bool) -> None:
        self.run, self.loss, self.tripwire, self.watch, self.begun = run, loss, tripwire, watch, run.step
        self.first, self.last = (Statistics(run.model, run.optimizer) for _ in range(2))

    def around(self, end: int) -> AbstractContextManager[object]:
        """The context for the steps from `run.step` to `end`."""
        stack = ExitStack()
        if self.tripwire:
            stack.enter_context(tripwire(self.run.model, self.loss))
        if self.watch and self.run.step < self.begun + WATCHED:
            stack.enter_context(self.first)
        elif self.watch and end > self.run.config.steps - WATCHED:
            stack.enter_context(self.last)
        return stack

    def seen(self) -> dict[str, Statistics]:
        """The statistics that there are, by what they are of."""
        parts = ((self.begun, self.first), (self.run.step - self.last.steps, self.last))
        seen = ((done + 1, done + stats.steps, stats) for done, stats in parts if stats.steps)
        return {f"steps {a:,} to {b:,}" if a < b else f"step {a:,}": stats for a, b, stats in seen}


def draw(seen: dict[str, Statistics]) -> bytes:
    """A PNG picture: four pictures for each of the statistics, side by side."""
    (first, *others), image = seen.values(), io.BytesIO()
    first.figure(*others, titles=list(seen)).savefig(image, dpi=110, format="png")
    return image.getvalue()
