"""`check_layer` and `check_loss`: every property of one layer, in one line."""

from __future__ import annotations

import contextlib
import heapq
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis.errors import Flaky, Unsatisfiable

from handgrad import pieces
from handgrad.errors import ArgumentError
from handgrad.testing import judge, subject
from handgrad.testing.errors import CheckError, CheckFailure, ContractError, LayerCrash, OracleError, VacuousCheck
from handgrad.testing.plan import LONG, Plan, plan_of
from handgrad.testing.properties.values import is_refusal
from handgrad.testing.registry import PROPERTIES, NotApplicable, Property, in_order
from handgrad.testing.report import PropertyReport, Report, example, failure_text
from handgrad.testing.sample import Sample
from handgrad.testing.sensitivity import plant
from handgrad.testing.strategies import samples

PHASES = (Phase.explicit, Phase.generate, Phase.shrink)  # of those that the profile has
KEPT = 12  # samples of a property that the planted faults are tried on
RICH = 6  # failing samples that hints are sought in, beside the smallest
ELSEWHERE = ("generator", "device", "dtype")  # arguments that choose where, not what, to compute
OPTION = (bool, int, float, str, type(None))  # what an argument is that chooses between ways to compute


def check_layer(
    make: Callable[..., Any],
    x: str | Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    reference: Callable[..., Any] | None = None,
    module: Callable[..., torch.nn.Module] | None = None,
    kinks: Mapping[float, float | None] | None = None,
    distinct: bool = False,
    oracle: str = "autograd",
    skip: Mapping[str, str] | None = None,
    examples: int | None = None,
    reproduce: str | None = None,
) -> Report:
    """Prove a layer's backward: draw sizes, parameters, inputs and douts, and check every registered property.

    make        the class or a function that makes the layer. Its arguments are sizes (names that x mentions, or any
                capitalised name) and options.
    x           the input, or a list with one entry per input of forward (a tuple of entries where that input is
                a tuple), by its dimensions: ``"*N D"`` any number
                of leading dimensions and one of size D, ``"N T < V"`` integers below V; `handgrad.testing.SYNTAX`.
    options     values, or hypothesis strategies, for other arguments of make: ``{"bias": [True, False]}``. `reduction`
                need not be named: it is drawn from mean, sum and none where make takes it, and so does whoever judges.
                The report names what the layer's constructor takes and what was never given a second value.
    sizes       from and to, where a size cannot be 1 to 4, or a star 0 to 3 dimensions: ``{"L": (3, 6)}``. The other
                sizes are also tried at 131, one at a time, with handgrad's own blocks made smaller than that.
    ranges      from and to, where a parameter cannot take any value: ``{"temperature": (0.5, 2)}``.
    reference   the same function by other means: of the inputs, or of the layer and the inputs if its first argument
                is called `layer`. It also catches a wrong forward.
    module      like make, but makes the equal torch.nn.Module; its buffers are compared, too.
    kinks       where an elementwise function has none or two slopes, and which one backward gives: ``{0.0: 0.0}``;
                None for the one that the oracle gives. Elsewhere, values keep away from kinks.
    distinct    draw no two equal numbers in one input (maxima, sorting).
    oracle      "differences" to judge by finite differences, for a forward that hides from autograd.
    skip        properties not to check, each with the reason; also "sensitivity", and "differences" where the gradient
                is by definition not the slope (a padding row), so that finite differences must not police the oracle.
    examples    of the gradients property (60 by default); the others follow in proportion, as they do with
                the max_examples of the hypothesis profile.
    reproduce   what a failure printed: runs just that example.

    A layer that draws random numbers, from torch's generator or its own, is given the same ones in the same places in
    all runs that are compared, whatever their dtype and layout; a reference or module that draws in the same order gets
    them, too. A forward that computes in float32 whatever comes in computes in float64 while values are judged, and the
    report says so. Frozen parameters must get no gradient. An output that is not floating, such as indices, has no
    dout: backward gets None for it.

    Returns a Report. Raises GradientMismatch, OutputMismatch, ContractError or LayerCrash (all of them
    CheckFailure and AssertionError) where the layer is wrong, with the smallest example found; VacuousCheck or
    OracleError (CheckError) where the check is; ArgumentError where it is asked for something impossible.

    >>> from handgrad import Tanh
    >>> report = check_layer(Tanh, x="*N", reference=torch.tanh)
    >>> report.oracle
    'reference'
    """
    __tracebackhide__ = True
    if oracle not in ("autograd", "differences"):
        raise ArgumentError(f"oracle must be 'autograd' or 'differences', got {oracle!r}")
    plan = plan_of(
        make,
        x,
        options=options or {},
        sizes=sizes or {},
        ranges=ranges or {},
        reference=reference,
        module=module,
        kinks=kinks or {},
        differences=oracle == "differences",
        distinct=distinct,
    )
    return check_plan(plan, skip or {}, examples, reproduce)


def check_loss(make: Callable[..., Any], x: str | Sequence[Any], target: str | Sequence[Any], **what: Any) -> Report:
    """Prove a loss's backward: as `check_layer`, for a Loss with a second input that has no gradient.

    x, and target, may be a tuple of entries: that of a loss of several outputs, ``x=("N D", "N")``.
    Beside the properties of a layer, `backward()` without an argument must equal backward of 1 for a scalar loss.

    >>> from handgrad import CrossEntropy
    >>> report = check_loss(CrossEntropy, x="N C", target="N < C", reference=torch.nn.functional.cross_entropy)
    """
    __tracebackhide__ = True
    return check_layer(make, [x, target], **what)


def check_plan(plan: Plan, skip: Mapping[str, str], examples: int | None, reproduce: str | None) -> Report:
    """`check_layer` of a Plan."""
    __tracebackhide__ = True
    known = [*(p.name for p in in_order()), "sensitivity", "differences"]
    for name, reason in skip.items():
        if name not in known:
            raise ArgumentError(f"skip: no property {name!r}; there are {', '.join(known)}")
        if not reason.strip():
            raise ArgumentError(f"skip: {name} needs a reason, which the report prints")
    chosen = re.fullmatch(r"(\w+)(?::(\S+))? (\S+)", reproduce) if reproduce else None
    if reproduce and (chosen is None or chosen[1] not in PROPERTIES or chosen[2] not in (None, *plan.growing)):
        raise ArgumentError(f"reproduce must be what a failure printed, got {reproduce!r}")
    report = Report(getattr(plan.make, "__name__", "layer"))
    kept: dict[str, list[Sample]] = {}
    for prop in in_order() if chosen is None else [PROPERTIES[chosen[1]]]:
        if prop.name in skip:
            report.properties.append(PropertyReport(prop.name, note=f"skipped: {skip[prop.name]}"))
            continue
        one = plan.grown(chosen[2]) if chosen and chosen[2] else plan
        runner = _Runner(one, prop, examples, chosen[3] if chosen else None, "differences" not in skip)
        report.properties.append(runner.run())
        kept[prop.name] = runner.kept
        if prop.name == "gradients" and chosen is None:
            _run_long(plan, runner)
            report.never_varied = runner.never_varied()
        if runner.first is not None and prop.name == "gradients":
            report.subject = type(subject.unwrap(runner.first.layer)).__name__
            report.oracle = runner.first.truth.source
    if chosen is None and "sensitivity" not in skip:
        report.faults = plant(kept, skip)
    elif "sensitivity" in skip:
        report.faults = {"all": f"skipped: {skip['sensitivity']}"}
    return report


def _run_long(plan: Plan, ordinary: _Runner) -> None:
    """One example for each size, with that one LONG: a mistake may begin where a block ends. The report says which."""
    __tracebackhide__ = True
    report, ran, unable = ordinary.report, [], []
    if ordinary.first is None or ordinary.first.truth.source == "finite differences":  # which would take too long
        return
    for name in plan.growing:
        runner = _Runner(plan.grown(name), ordinary.prop, None, None, ordinary.policed)
        try:
            long = runner.run()
        except (CheckError, CheckFailure):
            raise
        except Exception as error:  # the constructor's, which takes no such size
            unable.append(f"{name} ({type(error).__name__})")
            continue
        report.examples, report.elements = report.examples + long.examples, report.elements + long.elements
        report.distinct, report.seconds = report.distinct + long.distinct, report.seconds + long.seconds
        report.worst = max(report.worst, long.worst)
        ran += [name] * bool(long.examples)
        unable += [f"{name} ({long.note})"] * bool(long.note)
    texts = [f"also with {LONG} in {', '.join(ran)}"] * bool(ran) + [f"never in {', '.join(unable)}"] * bool(unable)
    report.remark = "; ".join([report.remark] * bool(report.remark) + texts)


@contextlib.contextmanager
def _small_blocks() -> Iterator[None]:
    """Inside, handgrad cuts tensors in pieces that are smaller than LONG."""
    before = pieces.WHOLE, pieces.PIECE, pieces.FEW
    pieces.WHOLE = pieces.PIECE = pieces.FEW = LONG // 2
    try:
        yield
    finally:
        pieces.WHOLE, pieces.PIECE, pieces.FEW = before


def examples_of(plan: Plan, name: str) -> list[Sample]:
    """Some examples in which the property holds."""
    runner = _Runner(plan, PROPERTIES[name], None, None, False)
    runner.run()
    return runner.kept


class _Runner:
    """One property, run by hypothesis."""

    def __init__(self, plan: Plan, prop: Property, examples: int | None, blob: str | None, policed: bool) -> None:
        self.plan, self.prop, self.name, self.blob, self.policed = plan, prop, prop.name, blob, policed
        self.report = PropertyReport(prop.name)
        self.kept: list[Sample] = []
        self.first: Sample | None = None
        self.keys: set[int] = set()
        self.failing: Sample | None = None  # the latest, in the end the smallest
        self.collecting = False
        self.rich: list[Sample] = []  # those that fail and tell most
        whole = PROPERTIES["gradients"].examples  # what the argument `examples` is about
        share, profile = prop.examples / whole, hypothesis.settings().max_examples
        self.examples = 1 if plan.long else max(2, round(share * (examples or whole * profile / 100)))
        self.arguments: dict[str, list[Any]] = {}  # what the constructor was called with, by name

    def run(self) -> PropertyReport:
        """Run it; raises what the failing example raises, with everything known about it."""
        __tracebackhide__ = True
        start = time.perf_counter()
        failure: CheckError | CheckFailure | None = None
        with judge.tallying() as tally, _small_blocks() if self.plan.long else contextlib.nullcontext():
            try:
                self._hypothesis()
            except Unsatisfiable:
                failure = VacuousCheck(
                    f"{self.name}: the layer refused every input drawn, so nothing was checked; give sizes= it takes"
                )
            except Flaky as error:
                failure = ContractError(
                    f"{self.name}: the layer gave different results for the same inputs and the same seed, so it draws "
                    f"from somewhere else than torch's generator or its own ({error})"
                )
            except CheckFailure as error:
                self._look_for_more()
                failure = type(error)(
                    failure_text(error, self.name, self.failing, self.rich, self._again(error)),
                    **{**error.details, "property": self.name},
                )
                failure.__cause__ = error.__cause__
            except OracleError as error:
                there = [] if self.failing is None else ["", *example(self.failing), "", self._again(error)]
                failure = OracleError("\n".join([str(error), *there]).rstrip())
            except CheckError as error:
                failure = error
                failure.__notes__ = []  # type: ignore[attr-defined]
        if failure is not None:
            raise failure from failure.__cause__
        if self.report.examples:
            self.report.note = ""
        self.report.elements, self.report.worst, self.report.remark = tally.elements, tally.worst, tally.remark
        self.report.distinct = len(self.keys)
        self.report.seconds = time.perf_counter() - start
        self._refuse_vacuous()
        return self.report

    def _hypothesis(self) -> None:
        @hypothesis.settings(
            max_examples=self.examples,
            deadline=None,
            database=None,
            print_blob=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[phase for phase in hypothesis.settings().phases if phase in PHASES],
        )
        @hypothesis.given(samples(self.plan, self.prop.draws == "edges", self.prop.draws == "special"))
        def run(sample: Sample) -> None:
            self._one(sample)

        if self.blob is not None:
            run = hypothesis.reproduce_failure(hypothesis.__version__, self.blob.encode())(run)
        run()

    def _one(self, sample: Sample) -> None:
        sample = sample if self.policed else replace(sample, policed=False, suspects_oracle=False)
        try:
            self.prop.check(sample)
        except NotApplicable as reason:  # to this example; perhaps to another one
            self.report.note = f"does not apply: {reason}"
            return
        except OracleError:
            self.failing = sample
            raise
        except CheckFailure as failure:
            if isinstance(failure, LayerCrash) and is_refusal(sample.layer, failure.details["inputs"], failure):
                hypothesis.reject()  # a row too few for the mode that this property needs
            if self.plan.long and isinstance(failure, LayerCrash) and failure.details["method"] == "forward":
                self.report.note = f"{failure.message:.60}"  # nobody said that it takes this size
                return
            if not self.collecting:
                self.failing = sample
            self.rich = heapq.nlargest(RICH, [*self.rich, sample], key=Sample.richness)
            if self.collecting:
                return
            raise
        self.report.examples += 1
        for name, value in sample.arguments.items():
            self.arguments.setdefault(name, []).append(value)
        self.keys.add(sample.key())
        self.first = self.first or sample
        if len(self.kept) < KEPT:
            self.kept.append(sample)

    def never_varied(self) -> dict[str, Any]:
        """The constructor's options that had one value in all examples, with that value."""
        seen = {name: values for name, values in self.arguments.items() if name not in ELSEWHERE}
        simple = {name: values for name, values in seen.items() if isinstance(values[0], OPTION)}
        return {name: values[0] for name, values in simple.items() if len(set(map(repr, values))) == 1}

    def _look_for_more(self) -> None:
        """Run some more examples, for hints: those that failed so far may be too small to show a pattern."""
        if self.blob is None and Phase.shrink in hypothesis.settings().phases:
            self.collecting, self.examples = True, 15
            self.plan = replace(self.plan, rich=self.prop.draws == "ordinary")
            with contextlib.suppress(CheckError, CheckFailure, Flaky, Unsatisfiable):
                self._hypothesis()

    def _again(self, error: CheckError | CheckFailure) -> str:
        """How to run the failing example again: hypothesis notes it on the error."""
        notes = "\n".join(getattr(error, "__notes__", []))
        blob = re.search(r"reproduce_failure\([^,]+, b'([^']+)'\)", notes)
        name = f"{self.name}:{self.plan.long}" if self.plan.long else self.name
        return f'to run just this example: add reproduce="{name} {blob[1]}" to the call' if blob else ""

    def _refuse_vacuous(self) -> None:
        if self.report.note or self.blob is not None or self.plan.long:
            return
        if self.report.elements == 0:
            raise VacuousCheck(f"{self.name}: {self.report.examples} examples ran and nothing was compared in them")
        wanted = 1 + min(self.report.examples // 5, 4)  # a layer with few sizes and no values has few examples
        if self.report.distinct < wanted:
            raise VacuousCheck(
                f"{self.name}: only {self.report.distinct} of {self.report.examples} examples were different ones; "
                "does something reseed or fix what is drawn?"
            )
