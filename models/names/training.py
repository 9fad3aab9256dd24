"""The training loop of the names models, their loss on a split of the data, and the names they make up."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from handgrad import CrossEntropy, Layer, NonFiniteError, TrainStep
from names.data import BOUNDARY, Split, minibatches
from names.run import Run

STEPS_PER_LOOK = 40  # training steps between two looks at the clock, the keyboard and the progress bar
VALIDATIONS = 20  # how often a run is evaluated on the validation split
ROWS_AT_ONCE = 8192  # rows of a split evaluated at once
LONGEST_SAMPLE = 64  # characters after which a sampled name is cut off


def train(
    run: Run,
    step: TrainStep,
    split: Split,
    val: Split,
    go_on: Callable[[], bool],
    around: Callable[[int], AbstractContextManager[object]] = nullcontext,
    one_by_one: bool = False,
    part: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda xs, ys: (xs, ys),
) -> None:
    """Take the steps that are left, in short stretches; before each, `go_on()` says whether to take it.

    `around(end)` gives the context for the steps of a stretch, `part(xs, ys)` what of its minibatches the steps are
    taken on. With `one_by_one`, after a NonFiniteError the run is as
    it was before that step, but for running statistics: resumed, it takes the step on the same minibatch.
    """
    config, started = run.config, run.step
    validate_every = max(1, config.steps // VALIDATIONS)
    while run.step < config.steps and go_on():
        end = end_of_stretch(run.step, config.steps, validate_every)
        for group in run.optimizer.param_groups:
            group["lr"] = config.lr_at(run.step)
        run.note_rate(config.lr_at(run.step))
        begun, first, generator = time.perf_counter(), run.step, run.generator.get_state()
        xs, ys = part(*minibatches(split, end - first, config.batch_size, run.generator))
        try:
            with around(end):
                if one_by_one:
                    for x, y in zip(xs, ys):
                        run.losses[run.step] = step(x, y)
                        run.step += 1
                else:
                    run.losses[first:end] = step.many(xs, ys)  # of each minibatch: forward, loss, backward, update
        except NonFiniteError:
            run.generator.set_state(generator)
            minibatches(split, run.step - first, config.batch_size, run.generator)  # of the steps that were taken
            raise
        if first > started:  # the first stretch warms up, or compiles
            run.seconds += time.perf_counter() - begun
            run.timed_steps += end - first
        run.step = end
        if run.step % validate_every == 0:
            run.validations.append((run.step, evaluate(run.model, val)))


def end_of_stretch(step: int, steps: int, validate_every: int) -> int:
    """The step where a stretch through `step` ends: for a look, a validation, at half of the steps, or after the last.

    That never depends on the clock or on where the run began: so a resumed run takes its steps in the same
    stretches, and rounds alike where several steps are one compiled graph.
    """
    multiples = ((step // period + 1) * period for period in (STEPS_PER_LOOK, validate_every))
    return min(end for end in (*multiples, steps // 2, steps) if end > step)


@torch.no_grad()
def evaluate(model: Layer, split: Split) -> float:
    """The mean loss over a split, in evaluation mode: batch norm uses its running statistics, dropout drops nothing."""
    loss, total = CrossEntropy(reduction="sum"), 0.0
    model.eval()
    for x, y in zip(split.x.split(ROWS_AT_ONCE), split.y.split(ROWS_AT_ONCE)):
        total += float(loss(model(x), y.flatten()))
    model.train()
    return total / split.targets


@torch.no_grad()
def sample(run: Run, count: int, device: torch.device) -> list[str]:
    """Draw `count` names from the model, character by character; none where its output is not finite."""
    generator, names = torch.Generator().manual_seed(run.config.seed), []
    run.model.eval()
    while len(names) < count:
        drawn = sample_at_once(run, min(ROWS_AT_ONCE, count - len(names)), device, generator)
        if not drawn:
            names = []
            break
        names += drawn
    run.model.train()
    return names


def sample_at_once(run: Run, count: int, device: torch.device, generator: torch.Generator) -> list[str]:
    """Draw some names, a character of each at a time; none where the model's output is not finite."""
    block_size = run.config.block_size
    begin = 1 if run.recipe.sequences else block_size  # boundaries before the first character
    tokens = torch.zeros(count, begin, dtype=torch.int64)
    for _ in range(LONGEST_SAMPLE):
        logits = run.model(tokens[:, -block_size:].to(device)).cpu()
        probabilities = logits.view(count, -1, len(run.vocabulary))[:, -1].softmax(1)
        if not bool(probabilities.isfinite().all()):
            return []
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
        if bool((tokens[:, begin:] == 0).any(1).all()):
            break
    texts = (run.vocabulary.decode(row) for row in tokens[:, begin:].tolist())
    return [text.split(BOUNDARY)[0] for text in texts]
