"""The checker, checked: what it says of broken contracts, of oracles that lie, of checks that are empty."""

from __future__ import annotations

import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import handgrad
from handgrad import ArgumentError, BatchNorm1d, CrossEntropy, Embedding, Layer, Linear, Sequential, Tanh, parameter
from handgrad.testing import (
    CheckError,
    CheckFailure,
    ContractError,
    GradientMismatch,
    LayerCrash,
    OracleError,
    OutputMismatch,
    VacuousCheck,
    assert_gradients,
    assert_reuse,
    check_layer,
    check_optimizer,
    compare,
    gradient_table,
    strategies,
)
from handgrad.testing.oracle import Oracle
from handgrad.testing.sample import Sample


class Double(Layer):
    """The smallest right layer."""

    def forward(self, x):
        """Twice x."""
        out = 2 * x
        self.push(out=out)
        return out

    def backward(self, dout):
        """Twice dout."""
        self.pop(dout)
        return 2 * dout


# ---------------------------------------------------------------- the contract


def test_an_object_that_is_no_layer_passes_by_keeping_the_contract():
    """No base class of handgrad's is needed: forward, backward and tensors in attributes."""

    class Scale:
        def __init__(self, size):
            self.weight = torch.ones(size)
            self.stack = []

        def forward(self, x):
            if torch.is_grad_enabled():
                self.stack.append(x.clone())
            return x * self.weight

        def backward(self, dout):
            if not self.stack:
                raise RuntimeError("Scale: no forward waits for this backward")
            grad = (dout * self.stack.pop()).reshape(-1, self.weight.numel()).sum(0)
            self.weight.grad = grad if self.weight.grad is None else self.weight.grad + grad
            return dout * self.weight

        def __deepcopy__(self, memo):
            twin = Scale(1)
            twin.weight = self.weight.clone()
            return twin

    report = check_layer(lambda D: Scale(D), x="*N D")
    assert report.subject == "Scale"


def test_a_layer_without_backward_is_told_the_contract():
    """By name."""

    class OneWay(Layer):
        def forward(self, x):
            return x

    with pytest.raises(ContractError, match=r"OneWay\(\) has no backward\.\nThe contract of a layer"):
        check_layer(OneWay, x="*N")


def test_a_gradient_on_an_unlisted_tensor_is_a_contract_error():
    """No optimizer would ever see it."""

    class Hidden(Double):
        def __init__(self):
            self.gain = torch.ones(())

        def backward(self, dout):
            self.gain.grad = torch.ones_like(self.gain)
            return super().backward(dout)

    with pytest.raises(ContractError, match=r"wrote a gradient to gain, which parameters\(\) does not list"):
        check_layer(Hidden, x="*N")


def test_a_gradient_for_integers_is_a_contract_error():
    """An index has none."""

    class Looks(Embedding):
        def backward(self, dout):
            super().backward(dout)
            return dout

    with pytest.raises(ContractError, match="dx must be None, for the input is not floating point"):
        check_layer(lambda V, D: Looks(V, D), x="N < V")


@pytest.mark.parametrize("stack", [True, False], ids=["beside an empty record", "alone"])
def test_a_record_in_an_attribute_is_told_the_contract(stack):
    """In whatever the attribute holds; the cause is established by putting it back."""

    class Square(Layer):
        def forward(self, x):
            self.cache = (x, "anything")
            out = x * x
            if stack:
                self.push(out=out)
            return out

        def backward(self, dout):
            if stack:
                self.pop(dout)
            return 2 * self.cache[0] * dout

    with pytest.raises(ContractError) as caught:
        check_layer(Square, x="*N")
    text = str(caught.value)
    assert "forward keeps cache in attributes, where the next forward overwrites" in text
    assert "It is right once each backward finds cache as its own forward left it" in text
    assert "self.push(cache, out=out)\nin forward, (cache,) = self.pop(dout) in backward" in text
    assert "The contract of a layer" in text
    assert isinstance(caught.value.__cause__, CheckFailure)


def test_another_mistake_of_reuse_is_not_blamed_on_attributes():
    """A counter in an attribute is no record."""

    class Queue(Layer):
        uses = 0

        def forward(self, x):
            self.uses += 1
            self.queue = [*getattr(self, "queue", []), x] if torch.is_grad_enabled() else self.queue
            out = x * x
            self.push(out=out)
            return out

        def backward(self, dout):
            self.pop(dout)
            x, *self.queue = self.queue  # the oldest, not the latest
            return 2 * x * dout

        def __getstate__(self):
            return {**super().__getstate__(), "queue": []}

    with pytest.raises(CheckFailure) as caught:
        check_layer(Queue, x="N", sizes={"N": (2, 2)})
    assert caught.value.details["property"] == "reuse"
    assert not isinstance(caught.value, ContractError)


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda dx: None, "backward must return dx as a tensor like x, got None"),
        (lambda dx: (dx,), "backward must return dx as a tensor like x, got a tuple"),
        (lambda dx: [dx], "backward must return dx as a tensor like x, got a list"),
    ],
    ids=["None", "tuple", "list"],
)
def test_what_backward_returns_is_told_the_contract(returned, text):
    """One input: one tensor."""

    class Returns(Double):
        def backward(self, dout):
            return returned(super().backward(dout))

    with pytest.raises(ContractError) as caught:
        check_layer(Returns, x="*N")
    assert text in str(caught.value)
    assert "The contract of a layer" in str(caught.value)


def test_what_forward_returns_is_told():
    """A tensor, or a tuple of them."""

    class Returns(Double):
        def forward(self, x):
            return [super().forward(x)]

    with pytest.raises(ContractError, match="forward must return a tensor or a tuple of them; output is a list"):
        check_layer(Returns, x="*N")


def test_a_crash_is_reported_with_the_input():
    """A size of two or more must not be refused."""

    class Picky(Double):
        def forward(self, x):
            if x.numel() > 3:
                raise ValueError("too much")
            return super().forward(x)

    with pytest.raises(LayerCrash, match="forward raised ValueError: too much"):
        check_layer(Picky, x="*N")


def test_a_refusal_comes_from_forward():
    """What forward has taken, backward must manage: without rows, too."""

    class Refuses(Linear):
        def backward(self, dout, need_dx=True):
            if dout.numel() == 0:
                raise handgrad.ShapeError(f"{self!r}.backward: no rows, got {tuple(dout.shape)}")
            return super().backward(dout, need_dx)

    with pytest.raises(LayerCrash, match="backward raised ShapeError") as caught:
        check_layer(lambda D, K: Refuses(D, K), x="N D")
    assert caught.value.details["property"] == "edges"


def test_a_record_must_be_taken():
    """Each backward takes its own off the stack."""

    class Peeks(Double):
        def backward(self, dout):
            return 2 * dout

    with pytest.raises(ContractError, match="after two forwards and two backwards 2 record\\(s\\) still wait"):
        check_layer(Peeks, x="*N")


# ---------------------------------------------------------------- oracles


class Numpy(Layer):
    """A right layer that autograd cannot follow."""

    weight = parameter("D")
    slope = 3.0

    def __init__(self, size):
        self.weight = torch.ones(size)

    def forward(self, x):
        """The cube of x times w, by numpy."""
        out = torch.from_numpy(self.weight.detach().numpy() * x.detach().numpy() ** 3)
        self.push(x, self.weight, out=out)
        return out

    def backward(self, dout):
        """Thrice the square."""
        x, weight = self.pop(dout)
        self.add_grad(weight, (dout * x**3).reshape(-1, weight.numel()).sum(0))
        return self.slope * dout * weight * x**2


def test_finite_differences_judge_where_autograd_cannot_follow():
    """And the report says so."""
    assert check_layer(lambda D: Numpy(D), x="*N D").oracle == "finite differences"


def test_finite_differences_find_a_wrong_gradient():
    """Within their own, wider tolerance."""

    class Wrong(Numpy):
        slope = 3.001

    with pytest.raises(GradientMismatch, match="dx is wrong"):
        check_layer(lambda D: Wrong(D), x="*N D")


class Detached(Double):
    """Right, but autograd sees half of its forward."""

    def forward(self, x):
        out = x + x.detach()
        self.push(out=out)
        return out


def test_a_partly_detached_forward_is_the_oracles_fault():
    """Autograd would call a wrong backward right; differences tell that autograd is wrong."""

    class AsAutogradSays(Detached):
        def backward(self, dout):
            self.pop(dout)
            return dout

    with pytest.raises(OracleError, match="contradicts finite differences"):
        check_layer(AsAutogradSays, x="*N")


def test_a_kink_is_no_fault_of_the_oracle():
    """Differences contradict a slope that is another one at a single point; beside it, they agree."""
    kinked = Oracle(reference=lambda x: torch.where(x == 1, 5 * x - 3, 2 * x))
    x, dout = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64)
    truth = kinked.truth(Double(), (x,), (dout,))
    assert "contradicts finite differences" in kinked._contradiction(Double(), (x,), (dout,), truth, 0)
    kinked.police(Double(), (x,), (dout,), truth, 0)


def test_a_right_backward_of_a_partly_detached_forward_is_not_called_wrong():
    with pytest.raises(OracleError, match="hidden from autograd"):
        check_layer(Detached, x="*N")
    check_layer(Detached, x="*N", oracle="differences")


def test_an_oracles_fault_comes_with_its_example():
    with pytest.raises(OracleError, match=r"the smallest example found:\n  x +=") as caught:
        check_layer(Detached, x="*N")
    assert 'add reproduce="gradients ' in str(caught.value)


def test_kinks_of_one_of_several_inputs_are_not_compared():
    class Added(Double):
        def forward(self, x, y):
            out = x.relu() + y
            self.push(x, out=out)
            return out

        def backward(self, dout):
            (x,) = self.pop(dout)
            return dout * (x > 0), dout.clone()

    report = check_layer(Added, x=["*N", "*N"], kinks={0.0: 0.0})
    notes = {p.name: p.note for p in report.properties}
    assert notes["special"] == "does not apply: kinks= describes an elementwise layer of one input"


def test_a_wrong_forward_needs_a_reference():
    """Its own autograd agrees with it; the reference does not."""

    class Twice(Double):
        pass

    check_layer(Twice, x="*N")
    with pytest.raises(CheckFailure, match="wrong"):
        check_layer(Twice, x="*N", reference=lambda x: 2 * x + 1e-3)


def test_buffers_are_compared_with_the_module():
    """A momentum that differs shows in the running statistics."""
    with pytest.raises(OutputMismatch, match=r"running_(mean|var) is wrong after forward number 1"):
        check_layer(lambda C: BatchNorm1d(C, momentum=0.2), x="N C", module=lambda C: nn.BatchNorm1d(C))


def test_the_slope_at_a_kink_is_declared():
    """Autograd's own slope there is one of several."""

    class Clamp(Layer):
        def forward(self, x):
            out = x.clamp_min(0)
            self.push(x, out=out)
            return out

        def backward(self, dout):
            (x,) = self.pop(dout)
            return dout * (x > 0)

    check_layer(Clamp, x="*N", kinks={0.0: 0.0})
    with pytest.raises(GradientMismatch, match="at special values"):
        check_layer(Clamp, x="*N", kinks={0.0: 1.0})


# ---------------------------------------------------------------- vacuity


def test_inputs_that_cannot_notice_a_fault_are_refused():
    """Zero gradients prove nothing."""

    class Zero(Double):
        def forward(self, x):
            out = 0 * x
            self.push(out=out)
            return out

        def backward(self, dout):
            self.pop(dout)
            return 0 * dout

    with pytest.raises(VacuousCheck, match=r"cannot notice dx slightly scaled"):
        check_layer(Zero, x="*N")


def test_a_layer_that_refuses_everything_is_not_passed():
    """Nothing was checked then."""

    class Never(Double):
        def forward(self, x):
            raise handgrad.ShapeError(f"Never: no shape is right, got {tuple(x.shape)}")

    with pytest.raises((VacuousCheck, LayerCrash)):
        check_layer(Never, x="N", sizes={"N": (1, 1)})


def test_examples_that_are_all_alike_are_refused(monkeypatch):
    """As when something reseeds."""
    monkeypatch.setattr(Sample, "key", lambda self: 0)
    with pytest.raises(VacuousCheck, match="examples were different ones"):
        check_layer(Double, x="*N")


def test_errors_are_of_two_kinds():
    """One speaks of the layer, the other of the check."""
    assert issubclass(GradientMismatch, CheckFailure)
    assert issubclass(CheckFailure, AssertionError)
    assert issubclass(VacuousCheck, CheckError)
    assert not issubclass(CheckError, AssertionError)


# ---------------------------------------------------------------- the call


def test_the_global_generator_is_left_alone():
    """By everything."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_layer(lambda: handgrad.Dropout(0.5), x="*N", skip={"layouts": "the mask follows memory"})
    compare(Tanh(), nn.Tanh(), torch.ones(3))
    assert torch.equal(before, torch.get_rng_state())


def test_a_failure_is_reproduced_from_its_line():
    """The very example, and only it."""

    class Wrong(Double):
        def backward(self, dout):
            return super().backward(dout) * (1 + 1e-6)

    with pytest.raises(GradientMismatch) as caught:
        check_layer(Wrong, x="*N")
    text = str(caught.value)
    line = text[text.index("reproduce=") :].split('"')[1]
    with pytest.raises(GradientMismatch) as again:
        check_layer(Wrong, x="*N", reproduce=line)
    example = lambda t: t.partition("the smallest example")[2].partition("property")[0]  # noqa: E731
    assert example(str(again.value)) == example(text)


def test_a_skipped_property_needs_a_reason_and_shows_it():
    """In the report."""
    with pytest.raises(ArgumentError, match="needs a reason"):
        check_layer(Double, x="*N", skip={"reuse": " "})
    with pytest.raises(ArgumentError, match="no property 'speed'"):
        check_layer(Double, x="*N", skip={"speed": "slow"})
    assert "skipped: shown elsewhere" in str(check_layer(Double, x="*N", skip={"plumbing": "shown elsewhere"}))


@pytest.mark.parametrize("text", ["*N *M", "N < ", "N D >= 0", "N D in 0"])
def test_a_bad_input_is_explained(text):
    """With the syntax, or the rule."""
    with pytest.raises(ArgumentError, match=r"cannot read the input|one \*dimension"):
        check_layer(Double, x=text)


def test_an_unknown_argument_of_the_constructor_is_explained():
    """And how to give it."""
    with pytest.raises(ArgumentError, match="do not know what to give the constructor's argument 'in_features'"):
        check_layer(Linear, x="N D")


@settings(max_examples=10, database=None, deadline=None)
@given(strategies.samples_of(lambda D, H: Linear(D, H), x="*N D"))
def test_a_sample_serves_an_own_test(sample):
    """The strategies are public."""
    assert_gradients(sample)
    assert_reuse(sample)


def test_a_property_serves_alone():
    """With a layer and an x."""
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_gradients(Tanh(), x)
    with pytest.raises(GradientMismatch):
        assert_gradients(Tanh(), x, reference=torch.sin)


# ---------------------------------------------------------------- compare, table, optimizer


def test_compare_finds_a_wrong_backward():
    """In the first step."""

    class Wrong(Tanh):
        def backward(self, dout):
            return super().backward(dout) * 1.001

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    compare(Tanh(), nn.Tanh(), x)
    with pytest.raises(GradientMismatch, match="dx is wrong in training step 1"):
        compare(Wrong(), nn.Tanh(), x)


def test_the_table_shows_a_wrong_row_and_touches_nothing():
    """The wrong layer's rows, and those before it on the way back, are right or wrong as they are."""

    class Wrong(Tanh):
        def backward(self, dout):
            return super().backward(dout) * 1.01

    generator = torch.Generator().manual_seed(1)
    layers = [Linear(3, 4, generator=generator), BatchNorm1d(4), Wrong(), Linear(4, 3, generator=generator)]
    model = Sequential(*layers).to(torch.float64)
    x, target = torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    table = gradient_table(model, CrossEntropy(), x, target)
    approximate = {row.name: row.approximate for row in table.rows}
    assert not table.ok
    assert approximate["loss"]
    assert approximate["3.weight"]
    assert not approximate["2.dx (Wrong)"]
    assert not approximate["0.weight"]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.pending == 0


def test_an_optimizer_that_never_moves_is_no_proof():
    """Nothing was compared."""
    with pytest.raises(VacuousCheck):
        check_optimizer(handgrad.SGD, torch.optim.SGD, options={"lr": [0.0]}, examples=5)


# ---------------------------------------------------------------- the command line


def command(*arguments):
    """Run `python -m handgrad.testing`."""
    return subprocess.run(
        [sys.executable, "-m", "handgrad.testing", *arguments], capture_output=True, text=True, timeout=120
    )


def test_the_command_prints_the_report():
    """And exits with 0."""
    done = command("handgrad:Tanh", "--x", "*N", "--module", "torch.nn:Tanh")
    assert done.returncode == 0, done.stderr
    assert "P14 plumbing" in done.stdout
    assert "Tanh: right, by reference" in done.stdout


def test_the_command_exits_with_2_for_what_it_cannot_check():
    """In one line."""
    done = command("handgrad:Linear", "--x", "N D")
    assert done.returncode == 2
    assert "do not know what to give" in done.stderr


def test_the_table_needs_no_hypothesis():
    """A model script may use it where only torch is installed."""
    code = "import sys; sys.modules['hypothesis'] = None; from handgrad.testing import gradient_table, compare"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    code = "import sys; sys.modules['hypothesis'] = None; from handgrad.testing import check_layer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert 'pip install "handgrad[testing]"' in done.stderr


def test_hypothesis_profiles_are_registered():
    """Ci, dev and thorough."""
    assert settings.get_profile("ci").derandomize
    assert settings.get_profile("thorough").max_examples > settings.get_profile("dev").max_examples
    assert hypothesis.settings().deadline is None
