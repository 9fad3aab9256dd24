"""What is wrong with a description of the inputs is explained."""

from __future__ import annotations

import pytest

from handgrad import ArgumentError, Linear
from handgrad.testing import check_layer
from tests.testing.strangers import Double


@pytest.mark.parametrize("text", ["*N *M", "N < ", "N D >= 0", "N D in 0"])
def test_a_bad_input_is_explained(text):
    """With the syntax, or the rule."""
    with pytest.raises(ArgumentError, match=r"cannot read the input|one \*dimension"):
        check_layer(Double, x=text)


def test_an_unknown_argument_of_the_constructor_is_explained():
    """And how to give it."""
    with pytest.raises(ArgumentError, match="do not know what to give the constructor's argument 'in_features'"):
        check_layer(Linear, x="N D")
