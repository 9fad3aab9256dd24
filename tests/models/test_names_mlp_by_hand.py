"""The MLP's backward pass in atomic steps."""

from __future__ import annotations

import sys

import names_mlp_by_hand
import pytest

from tests.models.running import script


def test_every_gradient_agrees_with_autograd() -> None:
    """Of every intermediate value, and of the formulas and the layers in place of the steps."""
    result = script("names_mlp_by_hand.py")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" True ") >= 39
    assert result.stdout.endswith("Every gradient agrees.\n")


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A slip in one step: exit code 1."""
    right = names_mlp_by_hand.batch_norm_at_once
    monkeypatch.setattr(names_mlp_by_hand, "batch_norm_at_once", lambda v, dnormed: right(v, dnormed) * (1 + 1e-7))
    monkeypatch.setattr(sys, "argv", ["names_mlp_by_hand"])
    assert names_mlp_by_hand.main() == 1
    assert "A gradient is wrong" in capsys.readouterr().out
