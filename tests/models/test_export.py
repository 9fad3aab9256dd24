"""`--export`: the step of a names model in files, and what trains with them, in Python and in C++."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import names_gpt
import names_gru
import names_mlp
import names_wavenet
import pytest
import torch
from safetensors.torch import load_file, save_file

from handgrad import CompileError, CrossEntropy, TrainStep
from names.data import Vocabulary, read_names, split_names
from names.run import Recipe, Run
from tests.exported import run_exported
from tests.models.building import lines_of, train
from tests.models.running import run
from tests.versions import COMPILES

pytestmark = COMPILES
STEPS, BATCH = 200, 16
SMALL = {"embedding_dim": 16, "hidden_dim": 24, "block_size": 8, "batch_size": BATCH}


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled: the package is a few bytes."""
    monkeypatch.setattr("handgrad.export.package", lambda traced, stage, path, metadata: path.write_bytes(b"package"))


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("recipe", [names_mlp.RECIPE, names_gpt.RECIPE], ids=lambda recipe: recipe.name)
def test_the_files_hold_the_trained_model_and_the_training_split(
    recipe: Recipe, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.pt2"
    flags = ["--data", data, "--steps", 4, "--batch-size", BATCH, "--samples", 0, "--save", tmp_path / "c"]
    assert run(*flags, "--export", path, recipe=recipe) == 0
    assert capsys.readouterr().out.endswith(f"program: {path} (after step 4)\n")
    files = {"m.pt2", "m.safetensors", "m.training.safetensors", "m.data.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == files | {"c"}
    saved = load_file(tmp_path / "c")
    own = {f"model.{key}": t for key, t in load_file(tmp_path / "m.safetensors").items()}
    assert own.keys() == {key for key in saved if key.startswith("model.")}
    assert all(t.equal(saved[key]) for key, t in own.items())
    rows, names = load_file(tmp_path / "m.data.safetensors"), read_names(data)
    part = split_names(names, recipe.defaults.seed)["train"]
    split = recipe.split(part, Vocabulary.of(names), recipe.defaults.block_size, torch.device("cpu"))
    assert rows.keys() == {"x", "target"}
    assert rows["x"].equal(split.x)
    assert rows["target"].equal(split.y)
    assert rows["target"].dim() == (2 if recipe.sequences else 1)


@pytest.mark.usefixtures("packed")
def test_overwrite_replaces_an_export(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it, not even one of the files beside the program is touched: it may be a checkpoint."""
    (tmp_path / "m.safetensors").write_text("mine")
    flags = ["--data", data, "--steps", 0, "--samples", 0, "--export", tmp_path / "m.pt2"]
    assert run(*flags) == 2
    problem = f"--export would replace {tmp_path / 'm.safetensors'}; export elsewhere, or replace it with --overwrite"
    assert capsys.readouterr().err == f"names_mlp: error: {problem}\n"
    assert run(*flags, "--overwrite") == 0
    assert "0.weight" in load_file(tmp_path / "m.safetensors")


@pytest.mark.parametrize("error", [CompileError("no graph"), OSError(28, "No space left on device")])
def test_an_export_that_fails_costs_neither_the_run_nor_the_other_files(
    error: Exception, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(TrainStep, "export", fails)
    flags = ["--data", data, "--steps", 2, "--samples", 0, "--report", tmp_path / "r.json"]
    assert run(*flags, "--export", tmp_path / "m.pt2") == 1
    output, errors = capsys.readouterr()
    space = f"cannot write {tmp_path / 'm.pt2'}: No space left on device"
    assert errors == f"names_mlp: error: {'no graph' if isinstance(error, CompileError) else space}\n"
    assert output.endswith(f"report: {tmp_path / 'r.json'}\n")


def test_what_an_export_needs_is_looked_for_before_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise CompileError("a C++ compiler must be installed")

    monkeypatch.setattr(TrainStep, "compile", fails)
    assert run("--data", data, "--steps", 2, "--export", tmp_path / "m.pt2") == 2
    assert capsys.readouterr() == ("", "names_mlp: error: a C++ compiler must be installed\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "dropout"),
    [
        (names_mlp.RECIPE, None),
        (names_wavenet.RECIPE, None),
        (names_gru.RECIPE, None),
        (names_gpt.RECIPE, 0.0),
        (names_gpt.RECIPE, 0.1),
    ],
    ids=["mlp", "wavenet", "gru", "gpt", "gpt-dropout"],
)
def test_the_program_trains_in_python_and_in_cpp_as_the_step_does(
    recipe: Recipe, dropout: float | None, data: Path, tmp_path: Path, cpp: Path
) -> None:
    """On the same rows; with dropout, whose masks are others, the loss falls as far."""
    path, options = tmp_path / "m.pt2", {**SMALL, **({} if dropout is None else {"dropout": dropout})}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert run("--data", data, "--steps", 0, "--samples", 0, *flags, "--export", path, recipe=recipe) == 0

    split = load_file(path.with_suffix(".data.safetensors"))
    rows = torch.randint(len(split["x"]), (STEPS, BATCH), generator=torch.Generator().manual_seed(0))
    xs, ys = split["x"][rows], split["target"][rows].flatten(1)
    config = replace(recipe.defaults, **options)
    eager = Run.new(recipe, config, Vocabulary.of(read_names(data)), torch.device("cpu"))
    eager.model.load_state_dict(load_file(path.with_suffix(".safetensors")))
    losses = TrainStep(eager.model, CrossEntropy(), eager.optimizer).many(xs, ys)

    found = run_exported(path, [{"x": xs, "target": ys}])
    (call,) = found["calls"]
    assert call["wrong"] == -1

    save_file({"rows": rows}, tmp_path / "rows.safetensors")
    trained = tmp_path / "trained.safetensors"
    output, _ = train(cpp, path, "--rows", tmp_path / "rows.safetensors", "--steps-per-call", 10, "--save", trained)
    lines = lines_of(output)
    assert [line[0] for line in lines] == list(range(20, STEPS + 1, 20))
    printed = torch.tensor([line[1] for line in lines])
    after = copy.deepcopy(eager.model)
    after.load_state_dict(load_file(trained))

    if dropout:
        for result in (losses, call["losses"], printed):
            assert bool(result.isfinite().all())
            assert float(result[-len(result) // 4 :].mean()) < float(result[: len(result) // 10].mean()) - 0.2
        assert float(call["losses"][-50:].mean()) == pytest.approx(float(losses[-50:].mean()), abs=0.1)
        assert float(printed[-2:].mean()) == pytest.approx(float(losses[-40:].mean()), abs=0.1)
    else:
        torch.testing.assert_close(call["losses"], losses, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(printed, call["losses"].unflatten(0, (-1, 20)).mean(1), rtol=1e-5, atol=2e-6)
        state = {key: found["state"][key] for key in after.state_dict()}
        torch.testing.assert_close(dict(after.state_dict()), state, rtol=1e-5, atol=1e-6)
        with torch.no_grad():  # the weights differ where it makes no difference: Adam magnifies the noise of a zero
            logits, eager_logits = (model.eval()(xs[-1]) for model in (after, eager.model))
        torch.testing.assert_close(logits, eager_logits, rtol=1e-3, atol=1e-3)
