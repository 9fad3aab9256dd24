"""Random layers are compared where they draw the same numbers in the same places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from handgrad import Dropout, Layer, Linear, Sequential, Tanh, from_torch
from handgrad.testing import GradientMismatch, OutputMismatch, check_layer, compare
from handgrad.testing.operations import FirstNotFinite, InFloat64, Lowers, SameNumbers

DRAWS = {
    "rand": lambda x: torch.rand(x.shape, dtype=x.dtype),
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(x.shape, dtype=x.dtype),
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 7),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "uniform_": lambda x: torch.empty_like(x).uniform_(),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.5),
    "bernoulli": lambda x: torch.bernoulli(x.abs().clamp(max=1)),
    "normal": lambda x: torch.normal(x, x.abs()),
    "normal of numbers": lambda x: torch.normal(0.0, 1.0, x.shape, dtype=x.dtype),
    "out=": lambda x: torch.randn(x.shape, out=torch.empty_like(x)),
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_numbers_depend_on_the_seed_and_the_shape_alone(draw):
    """Not on dtype and layout; and the dtype is what it would be."""

    def drawn(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        with SameNumbers() as numbers:
            found = draw(x)
        assert numbers.drew
        assert found.dtype is x.dtype
        return found

    x = torch.randn(4, 5, dtype=torch.float64)
    with torch.random.fork_rng():
        want = drawn(x)
        assert torch.equal(drawn(x.t().contiguous().t()), want)
        torch.testing.assert_close(drawn(x.to(torch.float32)), want.to(torch.float32))


@pytest.mark.parametrize("draw", [lambda: torch.randperm(5), lambda: torch.randint(9, (4,)), lambda: torch.rand(3)])
def test_what_depends_on_no_tensor_has_its_own_dtype(draw):
    with torch.random.fork_rng():
        before = draw().dtype
        with SameNumbers():
            assert draw().dtype is before


class Noise(Layer):
    """Adds noise in the modes given."""

    def __init__(self, modes: tuple[bool, ...] = (True, False), generator: torch.Generator | None = None) -> None:
        self.modes, self.generator = modes, generator

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        out = x
        if self.training in self.modes:
            out = x + 0.3 * torch.empty_like(x).normal_(generator=self.generator)
        self.push(out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        self.pop(dout)
        return dout


class Scaled(Layer):
    """Times random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rand(x.shape, dtype=x.dtype)
        self.push(scale, out=x)
        return x * scale

    def backward(self, dout: Tensor) -> Tensor:
        (scale,) = self.pop(dout)
        return dout * scale


class Sampling(Layer):
    """out = mean + exp(logvar / 2) noise, as in a variational autoencoder."""

    def forward(self, mean: Tensor, logvar: Tensor) -> Tensor:
        noise = torch.randn_like(mean) * (logvar / 2).exp()
        self.push(noise, out=mean)
        return mean + noise

    def backward(self, dout: Tensor) -> tuple[Tensor, Tensor]:
        (noise,) = self.pop(dout)
        return dout, dout * noise / 2


RIGHT = {
    "noise in every mode": (Noise, "*N"),
    "noise in training": (lambda: Noise((True,)), "*N"),
    "noise in evaluation": (lambda: Noise((False,)), "*N"),
    "a generator of its own": (lambda: Noise(generator=torch.Generator().manual_seed(1)), "*N"),
    "Dropout with a generator": (lambda: Dropout(0.5, generator=torch.Generator().manual_seed(1)), "*N"),
    "torch's dropout": (lambda: from_torch(nn.Dropout(0.5)), "*N"),
    "times random numbers": (Scaled, "*N"),
    "sampling": (Sampling, ["*N", "*N"]),
    "inside a model": (lambda D: Sequential(Linear(D, 3), Dropout(0.3), Tanh()), "N D"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_random_layer_passes(name):
    """And where evaluation draws, too, the report says what cannot be compared."""
    make, x = RIGHT[name]
    for _ in range(3):
        report = check_layer(make, x=x)
    draws_in_evaluation = "training" not in name and "ropout" not in name and "model" not in name
    (modes,) = [p for p in report.properties if p.name == "modes"]
    assert ("draws random numbers in evaluation" in str(modes)) == draws_in_evaluation
    assert not any(p.note for p in report.properties if p.name in ("layouts", "dtypes", "special"))


def test_a_wrong_random_layer_is_noticed():
    class Forgets(Sampling):
        def backward(self, dout):
            (noise,) = self.pop(dout)
            return dout, dout * noise

    class Redraws(Scaled):
        def backward(self, dout):
            self.pop(dout)
            return dout * torch.rand(dout.shape, dtype=dout.dtype)

    with pytest.raises(GradientMismatch, match=r"dx\[1\] is wrong"):
        check_layer(Forgets, x=["*N", "*N"])
    with pytest.raises(GradientMismatch, match="dx is wrong"):
        check_layer(Redraws, x="*N")


def test_a_reference_draws_the_same_numbers():
    """In its own way, from the same seed."""
    check_layer(Sampling, x=["*N", "*N"], reference=lambda m, v: torch.randn_like(m) * v.exp().sqrt() + m)
    with pytest.raises(OutputMismatch, match="out is wrong"):
        check_layer(Noise, x="*N", reference=lambda x: x + 0.2 * torch.randn_like(x))


def test_compare_gives_both_the_same_numbers():
    class Module(nn.Module):
        def forward(self, x):
            return x + 0.3 * torch.randn_like(x) if self.training else x

    compare(Noise((True,)), Module(), torch.randn(3, 4).t())


LOWERED = {
    "float": lambda x: x.float().to(x.dtype),
    "softmax": lambda x: torch.softmax(x, -1, dtype=torch.float32).to(x.dtype),
    "sum": lambda x: x + x.sum(dtype=torch.float16),
    "bfloat16": lambda x: (x.bfloat16() @ x.bfloat16().t()).to(x.dtype),
    "a tensor made in float32": lambda x: torch.zeros(len(x), len(x)).addmm_(x.float(), x.float().t()).to(x.dtype),
    "a tensor given in float32": lambda x: (torch.tensor([[0.5], [0.25]]) @ x.float()[:1]).to(x.dtype),
}


@pytest.mark.parametrize("function", LOWERED.values(), ids=LOWERED)
def test_a_lower_precision_is_noticed_and_can_be_raised(function):
    """In float64 it computes the same, but for the rounding; and what it returns has the dtype that it would have."""
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with Lowers() as lowers:
        rounded = function(x)
    assert lowers.to in (torch.float32, torch.float16, torch.bfloat16)
    with InFloat64():
        exact = function(x)
    assert exact.dtype is rounded.dtype is torch.float64
    torch.testing.assert_close(exact, rounded, rtol=0.1, atol=0.1)
    assert not torch.equal(exact, rounded)
    with Lowers() as lowers, InFloat64():
        function(x)
    assert lowers.to is None


def test_what_stays_in_its_precision_is_not_noticed():
    """Nor what was in a lower one, nor what is no number of the input."""
    with Lowers() as lowers:
        x = torch.randn(3, dtype=torch.float64)
        (x > 0).float() + torch.arange(3).float() * torch.ones(3).half()
        torch.tanh(x) @ x
    assert lowers.to is None


def test_the_first_line_that_makes_nan():
    """And not one that hands it on; for infinity, the first that makes infinity."""

    def computes(x):
        zero = x - x
        rest = zero / zero
        return rest + 1

    for nan, word, text in ((True, "NaN", "rest = zero / zero"), (False, "infinity", "")):
        with FirstNotFinite(nan=nan) as first:
            computes(torch.ones(3))
        assert (f"{word} first appears in computes, line" in first.where and text in first.where) == bool(text)
