"""The step as a program: its cache on the disk, and what happens in a kernel of several threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from handgrad import (
    SGD,
    CompileError,
    CrossEntropy,
    Embedding,
    Flatten,
    Layer,
    Linear,
    Sequential,
    Tanh,
    TrainStep,
    buffer,
)
from handgrad.program import Stage, Traced, _Packed, trace
from tests.versions import COMPILES

pytestmark = COMPILES

SCRIPT = """
import sys, time, torch
from handgrad import SGD, CrossEntropy, Embedding, Flatten, Linear, Sequential, TrainStep

torch.manual_seed(0)
rows = int(sys.argv[1])
model = Sequential(Embedding(27, 4), Flatten(), Linear(8, 27))
step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=0.1)).compile(progress=True)
x, y = torch.randint(27, (rows, 2)), torch.randint(27, (rows,))
print(step(x, y).item())
before = {name: t.clone() for name, t in model.state_dict().items()}
y[rows - 1] = 27
try:
    step(x, y)
except IndexError as error:
    print(error)
print(all(torch.equal(t, model.state_dict()[name]) for name, t in before.items()))
"""


def run(tmp_path: Path, rows: int, threads: int = 1) -> tuple[list[str], str]:
    """The lines that the script prints, and what it says of compiling."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": str(threads), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(rows)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.slow
def test_another_process_finds_the_program_and_a_damaged_one_is_made_anew(tmp_path: Path) -> None:
    first, told = run(tmp_path, 8)
    assert "compiling" in told
    again, told = run(tmp_path, 8)
    assert again == first
    assert "compiling" not in told
    (package,) = (tmp_path / "handgrad").glob("*.pt2")
    package.write_bytes(package.read_bytes()[:1000])
    again, told = run(tmp_path, 8)
    assert again == first
    assert "compiling" in told


@pytest.mark.slow
def test_a_bad_label_in_a_kernel_of_several_threads_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    lines, _ = run(tmp_path, 1 << 16, threads=2)
    assert lines[1:] == ["CrossEntropy().forward: targets must be in 0..26 or ignore_index=-100, got 27", "True"]


def traced(dim: int = 4, layer: type = Tanh, lr: float = 0.1, rows: int = 3) -> Traced:
    model = Sequential(Linear(dim, 5), layer(), Linear(5, 2))
    loss, optimizer = CrossEntropy(), SGD(model.parameters(), lr=lr)
    step = TrainStep(model, loss, optimizer)
    layers = [la for part in (model, loss) for _, la in part.named_layers()]
    stage = Stage(layers, step.params, optimizer, 1, True, step._forward_backward, step._finish)
    return trace(stage, torch.ones(rows, dim), torch.zeros(rows, dtype=torch.int64))


def test_one_digest_means_one_program() -> None:
    """Other weights and another lr give the same program; another layer, size or minibatch does not."""

    class Doubled(Tanh):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    one = traced().digest
    assert traced().digest == one
    assert traced(lr=0.5).digest == one
    others = [traced(dim=6).digest, traced(layer=Doubled).digest, traced(rows=4).digest]
    assert len({one, *others}) == 4


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = Sequential(Embedding(5, 3), Flatten(), Linear(6, 2))
    loss, optimizer = CrossEntropy(), SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = TrainStep(model, loss, optimizer)
    held = {name: (id(t), t.clone()) for name, t in model.state_dict().items()}
    layers = [la for part in (model, loss) for _, la in part.named_layers()]
    stage = Stage(layers, step.params, optimizer, 1, True, step._forward_backward, step._finish)
    trace(stage, torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    assert model.pending == loss.pending == 0
    for name, t in model.state_dict().items():
        assert id(t) == held[name][0]
        assert torch.equal(t, held[name][1])
        assert type(t) is Tensor
        assert t.grad is None


def test_tensors_lie_end_to_end_all_of_a_dtype_in_one_and_come_apart_again() -> None:
    tensors = [
        torch.randn(2, 3),
        torch.tensor(7),
        torch.randn(4).double(),
        torch.randn(3, 2).t(),
        torch.tensor([1, 2]),
        torch.randn(0, 5),
        torch.tensor(0.5),
    ]
    packing = _Packed(tensors)
    held = packing.together(tensors)
    assert [(t.shape, t.dtype) for t in held] == [((13,), torch.float32), ((3,), torch.int64), ((4,), torch.float64)]
    assert len(packing) == 3
    for found, t in zip(packing.apart(held), tensors, strict=True):
        assert torch.equal(found, t)
        assert found.dtype is t.dtype
    assert _Packed([]).together([]) == _Packed([]).apart([]) == []


def test_an_index_computed_of_what_the_step_changes_is_refused() -> None:
    class Walking(Layer):
        """A row of a table, the next one in each step."""

        place: Tensor = buffer(1)

        def __init__(self) -> None:
            self.place, self.table = torch.zeros(1, dtype=torch.int64), torch.arange(10.0)

        def forward(self, x: Tensor) -> Tensor:
            self.check_input(x)
            out = x + self.table.index_select(0, self.place)
            self.place.add_(1)
            self.push(out=out)
            return out

        def backward(self, dout: Tensor) -> Tensor:
            self.pop(dout)
            return dout

    with pytest.raises(CompileError, match="an index is computed of a tensor that the step changes"):
        traced(layer=Walking)
