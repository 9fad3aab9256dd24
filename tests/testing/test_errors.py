"""What a check can say."""

from __future__ import annotations

import traceback

import pytest
import torch

from handgrad import Sequential, Tanh
from handgrad.testing import (
    CheckError,
    CheckFailure,
    GradientMismatch,
    LayerCrash,
    VacuousCheck,
    check_layer,
    compare,
)


def test_errors_are_of_two_kinds():
    """One speaks of the layer, the other of the check."""
    assert issubclass(GradientMismatch, CheckFailure)
    assert issubclass(CheckFailure, AssertionError)
    assert issubclass(VacuousCheck, CheckError)
    assert not issubclass(CheckError, AssertionError)


class Wrong(Tanh):
    def backward(self, dout):
        return super().backward(dout) * 1.01


class Crash(Tanh):
    def backward(self, dout):
        raise KeyError("no such thing")


def in_a_notebook(call):
    """The lines that IPython prints for what the call raises."""
    with pytest.raises((CheckFailure, CheckError)) as caught:
        call()
    return caught.value, caught.value._render_traceback_()


def test_a_notebook_shows_the_readers_own_line_and_the_text():
    """IPython prints what `_render_traceback_` returns; none of the machinery's own lines is in it."""
    for call in (
        lambda: check_layer(Wrong, x="*N", examples=10),
        lambda: compare(Wrong(), torch.nn.Tanh(), torch.ones(3)),
    ):
        error, lines = in_a_notebook(call)
        assert not any("handgrad/testing" in line or "hypothesis" in line for line in lines)
        assert lines[-1 - str(error).count("\n") :] == f"handgrad.testing.errors.GradientMismatch: {error}".split("\n")
        assert "    call()" in lines
        assert len(lines) < 10 + str(error).count("\n")


def test_a_notebook_shows_where_a_layer_crashed():
    _, lines = in_a_notebook(lambda: check_layer(lambda: Sequential(Crash()), x="*N", examples=10))
    middle = lines.index("That was the cause of:")
    assert '    raise KeyError("no such thing")' in lines[:middle]
    assert "KeyError: 'no such thing'" in lines[:middle]
    assert not any("handgrad/testing" in line for line in lines)
    assert lines[middle + 2].endswith(", in in_a_notebook")
    assert any(line.startswith("handgrad.testing.errors.LayerCrash: ") for line in lines[middle:])


def test_an_error_of_the_check_reads_the_same_way():
    error, lines = in_a_notebook(lambda: check_layer(Tanh, x="3 < 2", examples=10, skip={"rng": "none"}))
    assert lines[-1 - str(error).count("\n")].startswith(f"handgrad.testing.errors.{type(error).__name__}: ")


def test_elsewhere_the_traceback_is_pythons_own():
    with pytest.raises(LayerCrash) as caught:
        check_layer(Crash, x="*N", examples=10)
    text = "".join(traceback.format_exception(caught.value))
    assert "handgrad/testing/check.py" in text
    assert "The above exception was the direct cause" in text
