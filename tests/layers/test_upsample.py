"""What Upsample refuses."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, ShapeError, Upsample


def test_errors_and_repr():
    with pytest.raises(
        ArgumentError, match=r"Upsample: mode must be 'nearest', got 'bilinear'; instead take from_torch"
    ):
        Upsample(2, mode="bilinear")
    for options, came in (({}, "None and None"), ({"size": 2, "scale_factor": 3}, "2 and 3")):
        with pytest.raises(ArgumentError, match=f"Upsample: one of size and scale_factor must be given, got {came}"):
            Upsample(**options)
    wrong = (
        ({"size": 0}, "size must be an int of at least 1, got 0"),
        ({"scale_factor": -1.0}, "scale_factor must be above 0, got -1.0"),
    )
    for options, problem in wrong:
        with pytest.raises(ArgumentError, match=f"Upsample: {problem}"):
            Upsample(**options)
    with pytest.raises(TypeError, match="align_corners"):
        Upsample(2, align_corners=True)
    wanted = r"x must be \(N, C, L\), \(N, C, H, W\) or \(N, C, D, H, W\), with no size of 0 but N, got shape "
    for shape, came in (((3, 4), r"\(3, 4\)"), ((1, 3, 0), r"\(1, 3, 0\)"), ((1, 0, 3), r"\(1, 0, 3\)")):
        with pytest.raises(ShapeError, match=r"Upsample\(size=2\)\.forward: " + wanted + came):
            Upsample(2)(torch.zeros(shape))
    wanted = r"x must have 2 dimension\(s\) after C, as many as size or scale_factor has numbers, got shape \(1, 1, 4\)"
    with pytest.raises(ShapeError, match=wanted):
        Upsample((2, 3))(torch.zeros(1, 1, 4))
    with pytest.raises(
        ShapeError, match=r"x must be large enough to leave something, scaled by 0\.4, got shape \(1, 1, 2\)"
    ):
        Upsample(scale_factor=0.4)(torch.zeros(1, 1, 2))
    assert repr(Upsample(scale_factor=2)) == "Upsample(scale_factor=2)"
