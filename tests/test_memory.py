"""How the process handles memory."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_kept_memory_spares_a_step_its_fresh_pages():
    """After the first steps, large tensors hardly cost page faults; and making a TrainStep changes nothing by itself.

    A free piece of memory does not always fit at once, so a later step may still take some.
    """
    code = """
import resource, sys, torch
from handgrad import MSE, SGD, BatchNorm1d, Sequential, Tanh, TrainStep, keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "True":
    assert keep_freed_memory()
model = Sequential(BatchNorm1d(512), Tanh(), BatchNorm1d(512), Tanh())
step = TrainStep(model, MSE(), SGD(model.parameters(), lr=0.1))
x = torch.randn(20_000, 512)  # 40 MB: malloc by itself gives as much back to the system at once
for _ in range(3):
    step(x, x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step(x, x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for keep in (True, False):
        command = [sys.executable, "-c", code, str(keep)]
        faults[keep] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults[False] > 50_000
    assert faults[True] < faults[False] / 5
