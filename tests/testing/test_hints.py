"""The hint of a failure leads to the mistake, and speaks of the example that is printed or says of which other one."""

from __future__ import annotations

import re

import pytest
import torch

from handgrad import Embedding, Layer, Linear, Parallel, Sequential, Tanh, parameter
from handgrad.testing import CheckFailure, check_layer, judge
from handgrad.testing.hints import Finding, Hint, agreed, hints
from handgrad.testing.sample import sample_of
from tests.testing.mistakes import Tower

pytestmark = pytest.mark.usefixtures("_the_same_examples")


def hints_of(make, x, **what) -> list[str]:
    """The hints of the failure."""
    with pytest.raises(CheckFailure) as caught:
        check_layer(make, x, **what)
    return re.findall(r"  hint: (.*)", str(caught.value))


class Affine(Layer):
    """out = x weight + bias, gain times: right, and the ground for mistakes."""

    weight = parameter("D", "H")
    bias = parameter("H")
    gain = parameter()

    def __init__(self, D, H):
        self.weight, self.bias, self.gain = torch.ones(D, H), torch.zeros(H), torch.ones(())

    def forward(self, x):
        raw = x @ self.weight + self.bias
        out = raw * self.gain
        self.push(x, raw, self.weight, self.gain, out=out)
        return out

    def backward(self, dout):
        x, raw, weight, gain = self.pop(dout)
        self.gain_grad(gain, dout, raw)
        draw = self.through_gain(dout, gain)
        self.weight_grad(weight, x, draw)
        self.bias_grad(self.bias, draw)
        return self.dx(draw, weight)

    def gain_grad(self, gain, dout, raw):
        self.add_grad(gain, (dout * raw).sum())

    def through_gain(self, dout, gain):
        return dout * gain

    def weight_grad(self, weight, x, draw):
        self.add_grad(weight, x.t() @ draw)

    def bias_grad(self, bias, draw):
        self.add_grad(bias, draw.sum(0))

    def dx(self, draw, weight):
        return draw @ weight.t()


def wrong(**method):
    """Affine with one method replaced."""
    return type("Wrong", (Affine,), method)


def affine(**method) -> list[str]:
    """The hints about Affine with one method replaced."""
    return hints_of(lambda D, H: wrong(**method)(D, H), "N D")


def test_values_that_are_not_finite():
    (hint,) = affine(dx=lambda self, draw, weight: (draw @ weight.t()) / 0)
    assert re.match(r"infinity first appears in <lambda>, line \d+: `.*/ 0\)` \(div\)", hint)


def test_nothing_is_guessed_of_nan_but_where_it_appears():
    """NaN equals nothing, whatever it is compared with; and first in forward, or in backward."""

    class Logs(Layer):
        def forward(self, x):
            self.push(x, out=x)
            return 2 * x

        def backward(self, dout):
            (x,) = self.pop(dout)
            share = torch.log(-1 - x.square())
            return 2 * dout * share

    (hint,) = hints_of(Logs, "*N")
    assert re.fullmatch(
        r"NaN first appears in backward, line \d+: `share = torch.log\(-1 - x.square\(\)\)` \(log\)", hint
    )


def test_another_precision_is_no_factor():
    found = affine(dx=lambda self, draw, weight: (draw.float() @ weight.float().t()).double())
    assert found == [
        "it is right but for rounding, which is not that of float64: backward computes in float32 somewhere"
    ]


def test_another_dtype():
    found = affine(dx=lambda self, draw, weight: (draw @ weight.t()).float())
    assert found == ["backward computes in float32: convert what it returns and adds to float64, with .to(dout.dtype)"]


def test_a_ratio_is_said_only_if_it_means_something():
    """It is a number of every example, or the same in all."""

    def by_the_sum(self, draw, weight):
        return draw @ weight.t() * float(draw.sum())

    assert not any("times the right one" in hint for hint in affine(dx=by_the_sum))
    found = affine(dx=lambda self, draw, weight: draw @ weight.t() * 0.7)
    assert found == ["it is 0.7 times the right one, which is 0.7 in every example"]


def test_an_example_of_zeros_and_ones_supports_nothing():
    """Of a layer that is wrong for x = 1 alone, every failing example is one of ones."""

    class AtOne(Layer):
        def forward(self, x):
            self.push(x, out=x)
            return x * x

        def backward(self, dout):
            (x,) = self.pop(dout)
            return dout * x if x.numel() and bool((x == 1).all()) else 2 * dout * x

    assert hints_of(AtOne, "N", sizes={"N": (1, 1)}, kinks={1.0: None}) == []


def test_zeros():
    assert "backward gives zeros everywhere" in affine(dx=lambda self, draw, weight: 0 * draw @ weight.t())


def test_the_identity():
    class Passes(Layer):
        def forward(self, x):
            out = x.square()
            self.push(out=out)
            return out

        def backward(self, dout):
            self.pop(dout)
            return dout

    assert "it equals dout: as if the layer were the identity" in hints_of(Passes, "*N")


def test_a_transpose():
    def transposed(self, weight, x, draw):
        self.add_grad(weight, draw.t() @ x)

    found = hints_of(lambda D: wrong(weight_grad=transposed)(D, D), "N D")
    assert any("it is the transpose of the right one" in hint for hint in found), found


def test_a_sign():
    found = affine(dx=lambda self, draw, weight: -draw @ weight.t())
    assert any("the sign is wrong" in hint for hint in found), found


def test_a_mean_for_a_sum():
    """The number of rows is named, in the example printed or in one whose shape is given."""
    found = affine(bias_grad=lambda self, bias, draw: self.add_grad(bias, draw.sum(0) / max(len(draw), 1)))
    number = r"it is (0\.5|0\.333333|0\.25) times the right one, which is 1/\(x\.shape\[0\]\)"
    assert any(re.search(number, hint) for hint in found), found


def test_one_less_than_the_rows():
    class Mean(Layer):
        def forward(self, x):
            out = x.mean(0)
            self.push(x.shape, out=out)
            return out

        def backward(self, dout):
            (shape,) = self.pop(dout)
            return (dout / (shape[0] - 1)).expand(shape).clone()

    found = hints_of(Mean, "N D", sizes={"N": (2, 6)})
    assert any("times the right one, which is n/(n - 1) for n = x.shape[0]" in hint for hint in found), found


def test_a_constant_factor():
    """Two examples agree on what it is: no size that happens to be 2 in one of them."""
    (hint, *_) = affine(dx=lambda self, draw, weight: 2 * draw @ weight.t())
    assert hint == "it is 2 times the right one, which is 2 in every example"


def test_a_forgotten_scalar():
    found = affine(through_gain=lambda self, dout, gain: dout)
    assert any("times the right one, which is 1/gain" in hint for hint in found), found
    assert any("it is right when gain = 1: look for the mistake where gain is used" in hint for hint in found), found


def test_a_forgotten_mean():
    class Centred(Layer):
        def forward(self, x):
            out = x - x.mean(0)
            self.push(out=out)
            return out

        def backward(self, dout):
            self.pop(dout)
            return dout.clone()

    found = hints_of(Centred, "N D")
    text = "it is off by the same amount all along dimension 0: a sum or mean over it is missing, or not right"
    assert any(text in hint for hint in found), found


def test_a_forgotten_path():
    """Each row divided by its length, the length taken for a constant."""

    class Unit(Layer):
        def forward(self, x):
            length = (x.square().sum(-1, keepdim=True) + 0.1).sqrt()
            self.push(length, out=x)
            return x / length

        def backward(self, dout):
            (length,) = self.pop(dout)
            return dout / length

    found = hints_of(Unit, "N D")
    text = "it is off by a multiple of x all along dimension 1: a sum or mean over it is missing, or not right"
    assert any(text in hint for hint in found), found


def test_one_wrong_index():
    def forgets_last(self, draw, weight):
        dx = draw @ weight.t()
        dx[:, -1] = 0
        return dx

    found = affine(dx=forgets_last)
    assert any("it is wrong only at the last index of dimension 1" in hint for hint in found), found


def test_an_overwritten_gradient():
    def assigned(self, bias, draw):
        bias.grad = draw.sum(0)

    (hint,) = affine(bias_grad=assigned)
    assert hint == "it holds the latest gradient alone: backward assigns .grad where it must add (add_grad does)"


def test_equal_indices():
    class Assigns(Embedding):
        def backward(self, dout):
            x, *_ = self.pop(dout)
            grad = torch.zeros_like(self.weight)
            grad[x] = dout
            self.add_grad(self.weight, grad)

    found = hints_of(lambda V, D: Assigns(V, D), "N < V")
    text = "of equal indices only the last one arrived: add them up (index_add_), do not assign"
    assert any(text in hint for hint in found), found


def test_a_gradient_never_added():
    (hint,) = affine(bias_grad=lambda self, bias, draw: None)
    assert hint == "backward never adds to it: add_grad(parameter, gradient)"


def test_a_dimension_lost():
    class Flat(Layer):
        def forward(self, x):
            out = 2 * x.reshape(-1)
            self.push(out=out)
            return out

        def backward(self, dout):
            self.pop(dout)
            return 2 * dout

    (hint,) = hints_of(Flat, "N D")
    assert re.fullmatch(r"its numbers are right: a reshape to \(\d, \d\) is missing", hint)


def test_a_broadcast_forgotten():
    class Sum(Layer):
        def forward(self, x, y):
            out = x + y
            self.push(out=out)
            return out

        def backward(self, dout):
            self.pop(dout)
            return dout.clone(), dout.clone()

    found = hints_of(Sum, ["N D", "D"])
    text = r"x\[1\] was broadcast on the way to out, so its gradient must be summed back to \(\d,\)"
    assert any(re.search(text, hint) for hint in found), found


def test_two_gradients_exchanged():
    class Product(Layer):
        def forward(self, x, y):
            out = x * y
            self.push(x, y, out=out)
            return out

        def backward(self, dout):
            x, y = self.pop(dout)
            return dout * x, dout * y

    found = hints_of(Product, ["*N", "*N"])
    assert any("it is the right one of dx[1]: are the two exchanged?" in hint for hint in found), found


def test_dout_forgotten():
    class Square(Layer):
        def forward(self, x):
            out = (x * x).sum(-1)
            self.push(x, out=out)
            return out

        def backward(self, dout):
            (x,) = self.pop(dout)
            return 2 * x

    found = hints_of(Square, "*N D")
    assert found == ["it is the same for another dout: dout is forgotten"]


def test_what_a_small_example_shows_by_accident_is_not_said():
    """Shrunk, a backward that forgets the last place of several looks like one of zeros."""
    zeros, other = Hint("backward gives zeros everywhere"), Hint("the sign is wrong")
    assert agreed([zeros], [("x (3, 3)", [other])]) == ["the sign is wrong"]
    assert agreed([zeros], [("x (3, 3)", [zeros]), ("x (4, 3)", []), ("x (4, 4)", [])]) == []
    assert agreed([zeros], [("x (3, 3)", [zeros])]) == ["backward gives zeros everywhere"]
    assert agreed([zeros], []) == ["backward gives zeros everywhere"]


def test_a_transposed_shape():
    found = affine(dx=lambda self, draw, weight: weight @ draw.t())
    assert any(hint.endswith("it is transposed") for hint in found), found


def test_numbers_are_those_of_the_example_printed():
    """Or the hint names the shape of the example that it is about."""
    with pytest.raises(CheckFailure) as caught:
        check_layer(
            lambda D, H: wrong(bias_grad=lambda self, bias, draw: self.add_grad(bias, draw.mean(0)))(D, H), "N D"
        )
    text = str(caught.value)
    rows = re.search(r"\n  x +=.*# shape \((\d+), \d+\)", text)[1]
    for hint in re.findall(r"  hint: (.*)", text):
        ratio = re.search(r"it is ([\d.]+) times", hint)
        if ratio:
            about = re.match(r"on another example, x \((\d+), \d+\): ", hint)
            assert float(ratio[1]) == pytest.approx(1 / int(about[1] if about else rows), rel=1e-5)


def test_several_examples_are_heard():
    """What the others show, too, is said of the first, with the meanings they share; the rest says whose it is."""
    ratio = lambda n, *meanings: Hint(f"it is {n} times the right one", "ratio", meanings)  # noqa: E731
    small, large = ratio(2, "x.shape[0]", "2 in every example"), ratio(3, "x.shape[0]", "x.shape[1]")
    assert agreed([small], [("x (3, 3)", [large])]) == ["it is 2 times the right one, which is x.shape[0]"]
    by_chance, sign = Hint("it equals dout"), Hint("the sign is wrong")
    assert agreed([by_chance], [("x (3, 3)", [sign])]) == ["the sign is wrong"]
    assert agreed([by_chance], [("x (3, 3)", [])]) == []
    third = [("x (3, 3)", [large]), ("x (3, 2)", [ratio(3, "x.shape[0]")])]
    assert agreed([], third) == ["on another example, x (3, 3): it is 3 times the right one, which is x.shape[0]"]
    alone = ratio(-389.625, "-389.625 in every example")
    assert agreed([alone], []) == []
    assert agreed([alone], [("x (3, 3)", [ratio(5, "5 in every example")])]) == []


ORDER = "2 times, and it is right when the first backward takes the first of its records: run the backwards in reverse"


def test_backwards_of_a_shared_layer_first_to_last():
    """Each takes the latest record, which is that of the other use."""

    class InOrder(Parallel):
        def _backward_each(self, douts, need_dx):
            return [body.backward_at(i, d, need_dx) for i, (body, d) in enumerate(zip(self.layers, douts))]

    def shared(D):
        linear = Linear(D, D)
        return InOrder(linear, linear)

    assert f"forward uses tower (Linear) {ORDER}" in hints_of(lambda D: Tower(Linear(D, 3)), ["N D", "N D"])[0]
    found = hints_of(lambda D: Tower(Sequential(Linear(D, 3), Tanh())), ["N D", "M D"], sizes={"N": (2, 4)})
    assert f"forward uses tower (Sequential) {ORDER}" in found[0]
    assert f"forward uses 0 (Linear) {ORDER}" in hints_of(shared, [("N D", "N D")])[0]


def test_another_mistake_in_a_layer_used_twice_is_not_laid_at_the_order():
    class Wrong(Linear):
        def backward(self, dout, need_dx=True):
            return 2 * super().backward(dout)

    def twice(D):
        wrong = Wrong(D, D)
        return Sequential(wrong, Tanh(), wrong)

    assert not any("in reverse" in hint for hint in hints_of(twice, "N D"))


def test_what_is_wrong_by_less_than_a_guess_can_see_gets_no_hint():
    """In one tiny element among large ones, by rounding: every guess would find that it fits."""
    s = sample_of(Linear(2, 2).to(torch.float64), torch.ones(3, 2, dtype=torch.float64))
    want = s.truth.grads["weight"]
    finding = Finding(s, "weight", want + 1e-11 * judge.largest(want), want, "special")
    assert hints(finding) == []
    assert Finding(s, "weight", want + 1e-3 * judge.largest(want), want, "special").kind == "value"
