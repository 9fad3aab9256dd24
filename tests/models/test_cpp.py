"""models/cpp: what its program trains, saves, prints and refuses."""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from handgrad import SGD, CrossEntropy, Dropout, Embedding, Flatten, Linear, Sequential, TrainStep
from tests.models.building import lines_of, train
from tests.versions import COMPILES

pytestmark = [COMPILES, pytest.mark.slow]
BATCH, ROWS = 8, 50
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
)


def make_model() -> Sequential:
    """With a table that is tied, and random numbers."""
    g = torch.Generator().manual_seed(0)
    table, head = Embedding(9, 6, generator=g), Linear(6, 9, generator=g)
    head.weight = table.weight
    return Sequential(table, Flatten(), Linear(12, 6, generator=g), Dropout(0.1, generator=g), head)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported step of two minibatches, and of its data."""
    folder, g = tmp_path_factory.mktemp("made"), torch.Generator().manual_seed(0)
    x, target = torch.randint(9, (ROWS, 2), generator=g), torch.randint(9, (ROWS,), generator=g)
    model = make_model()
    step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=0.1, momentum=0.9), accumulate=2)
    step.export(folder / "step.pt2", x[:BATCH], target[:BATCH])
    save_file({"x": x, "target": target}, folder / "step.data.safetensors")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may spoil."""
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(path: Path, **tensors: Tensor | None) -> None:
    """Put other tensors in a file; None takes one away."""
    kept = {**load_file(path), **tensors}
    save_file({name: t for name, t in kept.items() if t is not None}, path)


def refused(cpp: Path, *arguments: object) -> str:
    """The one line that says why."""
    _, error = train(cpp, *arguments, code=1)
    (line,) = [line for line in error.splitlines() if line.startswith("train: error: ")]
    return line.removeprefix("train: error: ")


def test_memory_stays_where_it_is(folder: Path, cpp: Path) -> None:
    """From step 1,000 to 10,000; and the loss falls."""
    lines = lines_of(train(cpp, folder / "step.pt2", "--steps", 10_000)[0])
    assert 1000 <= lines[0][0] < 1100
    assert lines[-1][0] == 10_000
    assert abs(lines[-1][2] - lines[0][2]) <= 1
    assert lines[-1][2] > 20
    assert lines[-1][1] < lines[0][1]


def test_one_seed_one_result(folder: Path, cpp: Path) -> None:
    """Rows and masks. The last call has a single step."""
    flags = [folder / "step.pt2", "--steps", 65, "--save"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(cpp, *flags, folder / f"{name}.safetensors", "--seed", seed)
    a, b, c = (load_file(folder / f"{name}.safetensors") for name in "abc")
    assert all(a[key].equal(b[key]) for key in a)
    assert not a["0.weight"].equal(c["0.weight"])


def test_training_goes_on_from_what_was_saved(folder: Path, cpp: Path) -> None:
    """With the momentum and the rate that were saved; all names of the tied table have its values."""
    rows = torch.randint(ROWS, (80, BATCH), generator=torch.Generator().manual_seed(0))
    for name, part in (("all", rows), ("one", rows[:40]), ("two", rows[40:])):
        save_file({"rows": part.contiguous()}, folder / f"{name}.safetensors")
    once, twice = folder / "once.safetensors", folder / "twice.safetensors"
    step = folder / "step.pt2"
    train(cpp, step, "--rows", folder / "all.safetensors", "--save", once, "--lr", 0)
    assert load_file(once)["0.weight"].equal(load_file(folder / "step.safetensors")["0.weight"])  # the rate was 0
    assert float(load_file(folder / "once.training.safetensors")["lr"]) == 0
    train(cpp, step, "--rows", folder / "one.safetensors", "--steps-per-call", 1, "--save", twice)
    half = load_file(folder / "twice.training.safetensors")
    assert float(half["optimizer.momentum_buffer.0.weight"].abs().max()) > 0
    output, _ = train(cpp, step, "--from", twice, "--rows", folder / "two.safetensors", "--save", twice)
    assert f"saved after step 20: {twice}" in output
    trained = load_file(twice)
    assert trained["0.weight"].equal(trained["4.weight"])
    make_model().load_state_dict(trained)


def test_a_file_of_all_dtypes_comes_back_as_it_was(folder: Path, cpp: Path) -> None:
    """Tensors that the program does not know are kept, whatever their names; as the files of others are read."""
    g = torch.Generator().manual_seed(0)
    odd = {str(dtype): (torch.rand(3, 5, generator=g) * 100).to(dtype) for dtype in DTYPES}
    odd |= {'a "quoted" \\ name\n\t': torch.ones(1), "Größe 數 😀": torch.tensor(2.0), "none": torch.zeros(0, 3)}
    path, out = folder / "step.safetensors", folder / "out.safetensors"
    kept = {**load(path.read_bytes()), **odd}
    path.write_bytes(save(kept, {"format": "pt", "note": "{}"}))
    train(cpp, folder / "step.pt2", "--steps", 0, "--save", out)
    found = load_file(out)
    assert found.keys() == kept.keys()
    for name, tensor in kept.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor), name
    # the same file with a header that escapes what is not ASCII, as Python writes JSON
    content = out.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + length])).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    train(cpp, folder / "step.pt2", "--steps", 0, "--save", out)
    assert load_file(out).keys() == kept.keys()


def test_a_damaged_file_is_refused(folder: Path, cpp: Path) -> None:
    """Whatever is wrong with it, before anything is done with it."""
    path = folder / "step.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def with_header(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode() + data

    def with_entry(**changes: object) -> bytes:
        return with_header(json.dumps({**header, "0.weight": {**header["0.weight"], **changes}}))

    damaged = "tensor 0.weight: its bytes do not fit its shape, or the file: the file is damaged"
    cases = [
        (b"", "it is no whole safetensors file"),
        (content[:6], "it is no whole safetensors file"),
        (content[:20], "it is no whole safetensors file"),
        (b"\xff" * 100, "it is no whole safetensors file"),
        (content[:-1], "the file is damaged"),
        (content + b"\0", "it has more or fewer bytes than its tensors"),
        (with_header("[1, 2]"), "expected a map"),
        (with_header('{"a": '), "its header: expected a text, a whole number, a list or a map, found the end"),
        (with_header('{"a": 1} x'), "its header: expected the end, found 'x'"),
        (with_header('{"a": 1, "a": 1}'), 'its header: "a" is there twice'),
        (with_header("[" * 10_000), "its header: expected less nesting, found '[[["),
        (with_header('{"a": {}}'), 'tensor a: there is no "dtype"'),
        (with_entry(dtype="F8_E4M3"), "tensor 0.weight: its dtype is F8_E4M3, which is not read here"),
        (with_entry(shape=[9, 7]), damaged),
        (with_entry(shape=[-9, -6]), "tensor 0.weight: its shape is impossible"),
        (with_entry(shape=[10**17, 10**17]), "tensor 0.weight: its shape is impossible"),
        (with_entry(data_offsets=[10**9, 10**9 + 216]), damaged),
        (with_entry(data_offsets=[0]), damaged),
        (with_entry(data_offsets=[-216, 0]), damaged),
    ]
    for spoilt, problem in cases:
        path.write_bytes(spoilt)
        line = refused(cpp, folder / "step.pt2")
        assert line.startswith(f"cannot read {path}: ")
        assert problem in line


def test_what_does_not_fit_the_program_is_refused(folder: Path, cpp: Path) -> None:
    """In one line, and nothing is saved but what there was."""
    step, rows, data = folder / "step.pt2", folder / "rows.safetensors", folder / "step.data.safetensors"
    content = data.read_bytes()
    x = load(content)["x"]
    cases: list[tuple[Path, dict[str, Tensor | None], str]] = [
        (data, {"x": x.int()}, r"x: unmatched dtype, expected: 4\(at::kLong\), but got: 3"),
        (
            data,
            {"x": x[:-1]},
            r"the data have 49 rows of x, and 50 of target|the data have 50 rows of target, and 49 of x",
        ),
        (
            data,
            {"x": x[:, :1].contiguous()},
            r"a minibatch of x must be of shape \(8, 2\), which 8 rows of data of shape ",
        ),
        (data, {"x": None}, r"the program needs a tensor x, which is in none of the files beside it"),
        (folder / "step.safetensors", {"2.bias": torch.zeros(7)}, r"2.bias must be of shape \(6\), got \(7\)"),
        (folder / "step.safetensors", {"0.weight": None}, r".*step.safetensors has no tensor 0.weight"),
        (folder / "step.training.safetensors", {"lr": None}, r"the program needs a tensor lr, which is in none"),
    ]
    for path, tensors, problem in cases:
        before = path.read_bytes()
        change(path, **tensors)
        assert re.match(problem, refused(cpp, step))
        path.write_bytes(before)
    assert data.read_bytes() == content
    for numbers, problem in (
        (torch.zeros(40, BATCH - 1, dtype=torch.int64), "rows must be (minibatches, 8) int64, got (40, 7) Long"),
        (torch.zeros(40, BATCH), "rows must be (minibatches, 8) int64, got (40, 8) Float"),
        (torch.full((40, BATCH), ROWS), "rows must be from 0 to 49"),
        (torch.zeros(39, BATCH, dtype=torch.int64), "20 steps take 40 rows of numbers, got 39"),
    ):
        save_file({"rows": numbers}, rows)
        assert refused(cpp, step, "--rows", rows, "--steps", 20) == problem


def test_a_wrong_label_ends_the_training_with_what_was_reached(folder: Path, cpp: Path) -> None:
    """It says in which step; the steps of the calls before it are saved."""
    out, target = folder / "out.safetensors", load_file(folder / "step.data.safetensors")["target"]
    target[7] = 9
    change(folder / "step.data.safetensors", target=target)
    rows = torch.arange(8, 8 + BATCH).repeat(20, 1)
    save_file({"rows": rows[:12].contiguous()}, folder / "good.safetensors")
    rows[15, 3] = 7  # step 8, for a step has two minibatches
    save_file({"rows": rows}, folder / "rows.safetensors")
    flags = "--steps-per-call", 3, "--save"
    problem = "step 8: an index is out of range, such as a label; the state is that after step 6"
    assert refused(cpp, folder / "step.pt2", "--rows", folder / "rows.safetensors", *flags, out) == problem
    good = folder / "until.safetensors"
    train(cpp, folder / "step.pt2", "--rows", folder / "good.safetensors", *flags, good)
    assert all(t.equal(load_file(out)[key]) for key, t in load_file(good).items())


def test_bad_options_and_missing_files(folder: Path, cpp: Path) -> None:
    step = folder / "step.pt2"
    assert "usage: train STEP.pt2" in train(cpp, "--help")[0]
    cases: list[tuple[list[object], str]] = [
        ([], "give the path of a program, STEP.pt2"),
        ([step, "--stepz", 3], "there is no option --stepz"),
        ([step, "--steps", "x"], "--steps: expected a whole number from 0 on, got 'x'"),
        ([step, "--steps"], "--steps: expected a whole number from 0 on, got ''"),
        ([step, "--steps-per-call", 0], "--steps-per-call: expected a whole number from 1 on, got '0'"),
        ([step, "--lr", "nan"], "--lr: expected a number from 0 on, got 'nan'"),
        ([step, "--save", step], "--save must end in .safetensors"),
        ([step, "--save", folder / "step.data.safetensors"], "--save would replace the data, "),
        ([step, "--save", folder / "no" / "s.safetensors"], f"cannot write {folder / 'no' / 's.safetensors'}: "),
        (
            [step, "--from", folder / "no.safetensors"],
            f"cannot read {folder / 'no.safetensors'}: there is no such file",
        ),
        ([folder / "no.pt2"], f"there is no program {folder / 'no.pt2'}"),
    ]
    for arguments, problem in cases:
        assert refused(cpp, *arguments).startswith(problem)
    for name in ("step.safetensors", "step.training.safetensors", "step.data.safetensors"):
        (folder / name).rename(folder / "away")
        assert refused(cpp, step) == f"cannot read {folder / name}: there is no such file to be read"
        (folder / "away").rename(folder / name)
    step.write_bytes(b"no package")
    assert refused(cpp, step)


def test_ctrl_c_saves(folder: Path, cpp: Path) -> None:
    """And the exit code is 130."""
    out = folder / "out.safetensors"
    command = [str(cpp), str(folder / "step.pt2"), "--steps", str(10**9), "--save", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # the heading, after all files are read
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    (steps,) = re.findall(rf"saved after step (\d+): {re.escape(str(out))}", output)
    assert 0 < int(steps) < 10**9
    assert not load_file(out)["0.weight"].equal(load_file(folder / "step.safetensors")["0.weight"])
