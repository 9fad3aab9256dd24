"""Which operations a pass takes, and how long."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from handgrad.bench.operations import operations, operations_table
from handgrad.twins import TWINS


def test_the_operations_of_a_call_and_how_often_each_is_called() -> None:
    x = torch.ones(64, 64)
    found = {op.name: op for op in operations(lambda: (x.exp(), x.exp(), x.tanh()), passes=4)}
    assert found["aten::exp"].calls == 2
    assert found["aten::tanh"].calls == 1
    assert all(op.seconds >= 0 for op in found.values())
    assert found["aten::exp"].seconds > 0


def test_the_longest_comes_first() -> None:
    small, large = torch.ones(2), torch.ones(1000, 1000)
    names = [op.name for op in operations(lambda: (small.exp(), large.tanh()))]
    assert names.index("aten::tanh") < names.index("aten::exp")


def test_a_table_of_both_sides() -> None:
    text = operations_table(TWINS["SiLU"], (64, 512), torch.float32)
    head, *body = text.splitlines()
    assert head.split() == ["operation", "calls", "time", "share"]
    sides = {name: at for at, line in enumerate(body) for name in ("handgrad", "autograd") if line.startswith(name)}
    ours, theirs = "\n".join(body[: sides["autograd"]]), "\n".join(body[sides["autograd"] :])
    assert "aten::sigmoid" in ours
    assert "aten::silu_backward" not in ours
    assert "aten::silu_backward" in theirs
    shares = [int(line.split()[-1].removesuffix("%")) for line in body[: sides["autograd"]]]
    assert 97 <= sum(shares) <= 103


@pytest.mark.slow
def test_the_command_shows_them_below_the_result_and_nothing_of_the_profiler() -> None:
    command = [sys.executable, "-m", "handgrad.bench", "--layer", "Tanh", "--sizes", "8x8", "--seconds", "0.01"]
    result = subprocess.run([*command, "--operations"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0
    assert result.stderr == ""
    assert "aten::addcmul" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
