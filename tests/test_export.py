"""TrainStep.export: a program that trains as the step does, without handgrad."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import handgrad as hg
from handgrad import (
    SGD,
    ArgumentError,
    BatchNorm1d,
    CrossEntropy,
    Embedding,
    Flatten,
    Layer,
    Linear,
    Sequential,
    StateError,
    Tanh,
    TrainStep,
    parameter,
)
from tests.exported import run_exported
from tests.versions import COMPILES

pytestmark = COMPILES
VOCABULARY, BATCH, ACCUMULATE = 5, 6, 2


def make_step() -> TrainStep:
    """Tied weights, buffers, momentum, a norm to keep to, and two minibatches a step."""
    g = torch.Generator().manual_seed(0)
    table, head = Embedding(VOCABULARY, 4, generator=g), Linear(4, VOCABULARY, generator=g)
    head.weight = table.weight
    layers = table, Flatten(), Linear(8, 4, generator=g), BatchNorm1d(4), Tanh(), head
    model = Sequential(*layers).to(torch.float64)
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    return TrainStep(model, CrossEntropy(), optimizer, max_norm=0.5, accumulate=ACCUMULATE)


def draw(steps: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    size = steps * ACCUMULATE, BATCH
    return {
        "x": torch.randint(VOCABULARY, (*size, 2), generator=g),
        "target": torch.randint(VOCABULARY, size, generator=g),
    }


def many(step: TrainStep, minibatches: dict[str, Tensor]) -> Tensor:
    return step.many(*[minibatches[key].unflatten(0, (-1, ACCUMULATE)) for key in ("x", "target")])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], TrainStep, list[Tensor], Path]:
    """A step that is exported after a step and run elsewhere; and the same steps, taken here."""
    step, path = make_step(), tmp_path_factory.mktemp("export") / "small.pt2"
    many(step, draw(1, seed=1))
    one = draw(1)
    step.export(path, one["x"][0], one["target"][0])
    good, single = draw(5, seed=2), draw(1, seed=3)
    bad = draw(3, seed=4)
    bad["target"][4, 1] = VOCABULARY
    fewer_rows = {"x": good["x"][:, 1:], "target": good["target"]}
    other_dtype = {"x": good["x"].int(), "target": good["target"]}
    found = run_exported(path, [good, fewer_rows, other_dtype, bad, single])
    return found, step, [many(step, good), many(step, single)], path


def test_the_program_trains_as_the_step_does(exported: Any) -> None:
    found, step, losses, _ = exported
    first, *_, last = found["calls"]
    assert first["wrong"] == last["wrong"] == -1
    torch.testing.assert_close(first["losses"], losses[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last["losses"], losses[1], rtol=1e-12, atol=1e-12)
    same = found["metadata"]["same"]
    assert same == {"5.weight": "0.weight"}
    state = {key: found["state"][same.get(key, key)] for key in step.model.state_dict()}
    torch.testing.assert_close(state, dict(step.model.state_dict()), rtol=1e-12, atol=1e-12)
    for name, p in step.model.named_parameters():
        momentum = found["state"][f"optimizer.momentum_buffer.{name}"]
        torch.testing.assert_close(momentum, step.optimizer.state[p]["momentum_buffer"], rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_is_refused_and_changes_nothing(exported: Any) -> None:
    first, fewer_rows, other_dtype, bad, last = exported[0]["calls"]
    assert [call["changed"] for call in (fewer_rows, other_dtype, bad)] == [False] * 3
    assert [call["changed"] for call in (first, last)] == [True] * 2
    place = exported[0]["metadata"]["inputs"].index("x")
    assert f"input_handles[{place}]: unmatched dim value at 1, expected: 6, but got: 5" in fewer_rows["error"]
    assert f"input_handles[{place}]: unmatched dtype, expected: 4(at::kLong)" in other_dtype["error"]
    assert bad["wrong"] == 4


def test_the_files_and_the_metadata_name_everything(exported: Any) -> None:
    found, step, _, path = exported
    metadata, own = found["metadata"], load_file(path.with_suffix(".safetensors"))
    training = load_file(path.with_suffix(".training.safetensors"))
    assert own.keys() == step.model.state_dict().keys()
    params = [name for name, _ in step.model.named_parameters()]
    assert set(training) == {"lr", "momentum", *(f"optimizer.momentum_buffer.{name}" for name in params)}
    assert float(training["lr"]) == 0.2
    inputs = metadata["inputs"]
    assert sorted(inputs[:-4]) == sorted((own.keys() | training.keys()) - metadata["same"].keys())
    assert inputs[-4:] == ["x", "target", "first", "last"]
    assert metadata["outputs"] == ["losses", "wrong", *(f"grad.{name}" for name in params)]
    assert metadata["accumulate"] == ACCUMULATE
    shapes = {name: list((own | training)[name].shape) for name in inputs[:-4]}
    assert metadata["shapes"] == {**shapes, "x": [BATCH, 2], "target": [BATCH]}
    written = {"small.pt2", "small.safetensors", "small.training.safetensors"}
    assert {file.name for file in path.parent.iterdir()} == written | {"small.calls", "small.results"}  # of the test


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled: the package is a few bytes."""
    monkeypatch.setattr("handgrad.export.package", lambda traced, stage, path, metadata: path.write_bytes(b"package"))


def export(step: TrainStep, path: Path) -> None:
    x, target = draw(1).values()
    step.export(path, x[0], target[0])


@pytest.mark.usefixtures("packed")
def test_a_disk_that_is_full_leaves_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a new file, nor in the place of one that was there."""
    path, write = tmp_path / "step.pt2", Path.write_bytes
    export(make_step(), path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(before) == {"step.pt2", "step.safetensors", "step.training.safetensors"}

    def full(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    step = make_step()
    many(step, draw(1))
    with monkeypatch.context() as patch:
        patch.setattr("handgrad.export.package", lambda *_: None)
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left on device"):
            export(step, path)
        with pytest.raises(OSError, match="No space left on device"):
            export(step, tmp_path / "new.pt2")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_package_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **options: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fails)
    step = make_step()
    with pytest.raises(RuntimeError, match="no compiler"):
        export(step, tmp_path / "step.pt2")
    assert list(tmp_path.iterdir()) == []
    assert not step.optimizer.state  # what was made for the program is gone


@pytest.mark.usefixtures("packed")
def test_what_cannot_be_exported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step()
    with pytest.raises(ArgumentError, match=r"^TrainStep\.export: the path must end in \.pt2, got '.*step'$"):
        export(step, tmp_path / "step")
    params = list(step.model.parameters())
    problem = (
        r"^TrainStep\.export: the optimizer must be handgrad's SGD, torch\.optim\.Adam or AdamW, without step hooks, "
        r"for the program does the update; got RMSprop$"
    )
    with pytest.raises(ArgumentError, match=problem):
        export(TrainStep(step.model, step.loss, torch.optim.RMSprop(params)), tmp_path / "step.pt2")
    dampened = SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    problem = r"^TrainStep\.export: the first step with dampening is unlike the others; take it before the export$"
    with pytest.raises(StateError, match=problem):
        export(TrainStep(step.model, step.loss, dampened), tmp_path / "step.pt2")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    problem = r"^TrainStep\.export: safetensors must be installed, .*: pip install safetensors$"
    with pytest.raises(ArgumentError, match=problem):
        export(step, tmp_path / "step.pt2")
    assert list(tmp_path.iterdir()) == []


class Shift(Layer):
    """A parameter with the name of an input."""

    x: Tensor = parameter("D")

    def __init__(self) -> None:
        self.x = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.x
        self.push(out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        self.pop(dout)
        self.add_grad(self.x, dout.sum(0))
        return dout


@pytest.mark.usefixtures("packed")
def test_a_parameter_must_not_have_the_name_of_another_input(tmp_path: Path) -> None:
    model = Shift()
    step = TrainStep(model, hg.MSE(), SGD(model.parameters(), lr=0.1))
    problem = r"^TrainStep\.export: two inputs of the program would be named 'x'; give that tensor of the model another"
    with pytest.raises(ArgumentError, match=problem):
        step.export(tmp_path / "step.pt2", torch.zeros(2, 3), torch.zeros(2, 3))
    assert list(tmp_path.iterdir()) == []
