"""The call: checks that are empty are refused, a failure can be repeated, a skip needs a reason."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import settings
from torch import nn
from torch.nn import functional

import handgrad
from handgrad import ArgumentError, Loss, ShapeError, Tanh, pieces
from handgrad.testing import GradientMismatch, LayerCrash, Sample, VacuousCheck, check_layer, check_loss, compare
from tests.testing.strangers import Double


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


def test_the_global_generator_is_left_alone():
    """By everything."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_layer(lambda: handgrad.Dropout(0.5), x="*N")
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


def test_hypothesis_profiles_are_registered():
    """Ci, dev and thorough."""
    assert settings.get_profile("ci").derandomize
    assert settings.get_profile("thorough").max_examples > settings.get_profile("dev").max_examples
    assert hypothesis.settings().deadline is None


class OwnAbsolute(Loss):
    """The mean, the sum, or each of |x - target|: right."""

    def __init__(self, reduction="mean", scale=1.0):
        super().__init__(reduction=reduction)
        self.scale = scale

    def forward(self, x, target):
        diff = x - target
        out = self.reduce(self.scale * diff.abs())
        self.push(diff, out=out)
        return out

    def backward(self, dout=None):
        (diff,) = self.pop(dout)
        return self.scale * self.dlosses(dout, diff, max(diff.numel(), 1)) * diff.sign()


class WrongUnreduced(OwnAbsolute):
    """Ignores dout where it does not reduce."""

    def backward(self, dout=None):
        return super().backward(torch.ones_like(dout) if self.reduction == "none" else dout)


class MeanOnly(OwnAbsolute):
    """Its constructor refuses what it cannot do."""

    def __init__(self, reduction="mean"):
        if reduction == "none":
            raise ArgumentError("MeanOnly: reduction must not be none")
        super().__init__(reduction=reduction)


def own_l1(x, target, reduction="mean"):
    """A reference that takes the option."""
    return functional.l1_loss(x, target, reduction=reduction)


def test_a_reduction_that_nobody_named_is_drawn():
    """All of them, for the reference, too; the report names the rest."""
    report = check_loss(OwnAbsolute, "N D", "N D", reference=own_l1)
    assert report.never_varied == {"scale": 1.0}
    assert "never varied, so nothing is said about other values: scale=1.0" in str(report)
    with pytest.raises(GradientMismatch, match="made with reduction='none'"):
        check_loss(WrongUnreduced, "N D", "N D")
    with pytest.raises(GradientMismatch, match="made with reduction='none'"):
        check_loss(WrongUnreduced, "N D", "N D", module=lambda reduction="mean": Module(nn.L1Loss(reduction=reduction)))


class Module(nn.Module):
    """A module around another, without parameters."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, target):
        return self.inner(x, target)


def test_a_reduction_that_cannot_be_drawn_is_named_in_the_report():
    """Because a lambda hides it, or whoever judges does not know it."""
    report = check_loss(lambda: OwnAbsolute(), "N D", "N D")
    assert report.never_varied == {"reduction": "mean", "scale": 1.0}
    report = check_loss(OwnAbsolute, "N D", "N D", reference=lambda x, target: (x - target).abs().mean())
    assert report.never_varied == {"reduction": "mean", "scale": 1.0}


def test_a_reduction_that_the_constructor_refuses_is_no_failure():
    report = check_loss(MeanOnly, "N D", "N D", reference=own_l1)
    assert report.never_varied == {}
    with pytest.raises(ArgumentError, match="must not be none"):
        check_loss(lambda reduction: MeanOnly(reduction), "N D", "N D", options={"reduction": ["none"]})


def test_options_that_never_varied_are_named():
    """Those of the layer's own constructor, whoever calls it; not sizes that did, nor where to compute."""
    report = check_layer(lambda D, eps: handgrad.LayerNorm(D, eps=eps), x="N D", options={"eps": [1e-5, 0.1]})
    assert report.never_varied == {"elementwise_affine": True, "bias": True}
    assert check_layer(Tanh, x="*N").never_varied == {}
    assert "never varied" not in str(check_layer(Tanh, x="*N"))


class FirstRows(Double):
    """Right for 64 rows."""

    def backward(self, dout):
        dx = super().backward(dout)
        dx[64:] = 0
        return dx


class FirstColumns(Double):
    """Right for 64 columns."""

    def backward(self, dout):
        dx = super().backward(dout)
        dx[..., 64:] = 0
        return dx


@pytest.mark.parametrize(("layer", "size", "shape"), [(FirstRows, "N", "(131, "), (FirstColumns, "D", ", 131)")])
def test_a_mistake_beyond_64_is_noticed(layer, size, shape):
    """In rows and in columns; and its line runs it again."""
    with pytest.raises(
        GradientMismatch, match=r"it is right up to index 63 of dimension \d, and wrong from there"
    ) as caught:
        check_layer(layer, x="N D")
    text = str(caught.value)
    assert shape in text
    line = text[text.index("reproduce=") :].split('"')[1]
    assert line.startswith(f"gradients:{size} ")
    with pytest.raises(GradientMismatch, match="elements differ"):
        check_layer(layer, x="N D", reproduce=line)


def test_the_report_says_which_sizes_were_long():
    """A layer that takes no such size is no failure; a size with a range keeps to it."""

    class Short(Double):
        def forward(self, x):
            if x.shape[1] > 10:
                raise ValueError("at most 10 columns")
            return super().forward(x)

    remark = check_layer(Short, x="N D", sizes={"N": (1, 3)}).properties[0].remark
    assert remark == "never in D (forward raised ValueError: at most 10 columns)"
    assert check_layer(Short, x="N 3").properties[0].remark == "also with 131 in N"
    report = check_layer(lambda D: handgrad.Linear(D, 2), x="*N D")
    assert report.properties[0].remark == "also with 131 in *N, D"


def test_long_sizes_are_beyond_handgrads_own_blocks():
    """Which are made smaller for it, and then as they were."""
    before, seen = (pieces.WHOLE, pieces.PIECE, pieces.FEW), set()

    class Looks(Double):
        def forward(self, x):
            seen.add((len(x) > 64, pieces.WHOLE < 131))
            return super().forward(x)

    check_layer(Looks, x="N D")
    assert {(True, True), (False, False)} <= seen
    assert before == (pieces.WHOLE, pieces.PIECE, pieces.FEW)


def test_a_crash_on_few_rows_says_how_to_refuse_them():
    """And how to skip; the refusal that it writes down is one."""

    class NoRows(Double):
        def forward(self, x):
            x.max()  # of nothing, there is none
            return super().forward(x)

    class Refuses(NoRows):
        def forward(self, x):
            if x.numel() == 0:
                raise self.error(ShapeError, "forward", f"x must have at least 1 row, got {tuple(x.shape)}")
            return super().forward(x)

    class TwoRows(Double):
        def forward(self, x):
            if len(x) == 1:
                raise RuntimeError("one row")
            return super().forward(x)

    with pytest.raises(LayerCrash) as caught:
        check_layer(NoRows, x="N D")
    text = " ".join(str(caught.value).split())
    assert (
        "its forward must refuse it by name and shape, before anything is recorded: raise self.error(ShapeError" in text
    )
    assert 'f"x must have at least 1 row, got {tuple(x.shape)}")' in text
    assert 'sizes={"N": (1, 4)}, or skip={"edges": "why they never come"}' in text
    check_layer(Refuses, x="N D")
    check_layer(NoRows, x="N D", skip={"edges": "never empty"})
    with pytest.raises(LayerCrash, match="x must have at least 2 rows"):
        check_layer(TwoRows, x="N D")


def test_a_crash_at_any_size_is_not_laid_at_the_size():
    class Broken(Double):
        def forward(self, x):
            raise RuntimeError("broken")

    with pytest.raises(LayerCrash, match="forward raised RuntimeError: broken") as caught:
        check_layer(Broken, x="N D")
    assert "refuse" not in str(caught.value)
