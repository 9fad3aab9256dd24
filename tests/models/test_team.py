"""A run in several processes under torchrun: that of one, as far as numbers can be; and it survives lost processes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import names_gpt
import pytest
import torch

from names.data import Vocabulary
from names.run import Config, Run
from names.team import Team
from tests.models.running import ENVIRONMENT, MODELS, checkpoint_step, equal_checkpoints, script
from tests.versions import COMPILES


def torchrun(name: str, *arguments: object, restarts: int = 0) -> subprocess.Popen[str]:
    """Start a script of models/ in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", str(MODELS / name), *map(str, arguments)]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


Reported = tuple[dict[str, Any], str]  # and what was printed


def in_one_and_in_two(folder: Path, name: str, common: list[object], *more: object) -> tuple[Reported, Reported]:
    """The report of a run in one process, and of one in two with more arguments, which has the same losses."""
    one = script(name, *common, "--report", folder / "one.json")
    process = torchrun(name, *common, *more, "--report", folder / "two.json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    a, b = (json.loads((folder / f"{which}.json").read_text()) for which in ("one", "two"))
    for key in ("train_loss", "val_loss", "test_loss"):
        assert abs(a[key] - b[key]) < 2e-4, key
    assert b["config"]["processes"] == 2
    return (a, one.stdout), (b, out)


def workers(agent: int) -> list[int]:
    """The processes that torchrun has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def a_team(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, device: str = "cpu") -> Team:
    names = {"TORCHELASTIC_RUN_ID": "x", "RANK": rank, "WORLD_SIZE": size, "TORCHELASTIC_RESTART_COUNT": 3}
    for name, value in (names | {"LOCAL_RANK": rank}).items():
        monkeypatch.setenv(name, str(value))
    return Team(device)


def test_on_gpus_each_process_has_one_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or all would send what is no tensor from the first GPU."""
    said: list[tuple[str, str]] = []
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: said.append(("device", device)))
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend: said.append(("group", backend)))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: said.append(("group", "destroyed")))
    with a_team(monkeypatch, 1, 2, "cuda") as team:
        assert team.device == "cuda:1"
    assert said == [("device", "cuda:1"), ("group", "nccl"), ("group", "destroyed")]


def test_the_parts_are_the_minibatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is in one of them; targets of places stay with their rows."""
    xs, ys = torch.arange(2 * 7 * 3).view(2, 7, 3), torch.arange(2 * 7 * 3).view(2, 21)
    parts = [a_team(monkeypatch, rank, 4).part(xs, ys) for rank in range(4)]
    assert [x.shape[1] for x, _ in parts] == [1, 2, 2, 2]
    assert torch.cat([x for x, _ in parts], 1).equal(xs)
    assert torch.cat([y for _, y in parts], 1).equal(ys)
    assert all(x.flatten(1).equal(y) for x, y in parts)
    assert torch.cat([a_team(monkeypatch, r, 2).part(xs, ys[:, :7])[1] for r in (0, 1)], 1).equal(ys[:, :7])


def test_alone_nothing_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    team, xs, ys = Team("cpu"), torch.zeros(2, 3, 4), torch.zeros(2, 3)
    assert (team.rank, team.size, team.attempt, team.device) == (0, 1, 0, "cpu")
    assert team.part(xs, ys) == (xs, ys)
    assert team.agree(True)
    assert not team.agree(False)


def test_masks_are_each_processes_own_and_depend_on_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.new(
        names_gpt.RECIPE, Config(embedding_dim=8, steps=9, dropout=0.5), Vocabulary("ab"), torch.device("cpu")
    )
    states, drawn = [], []
    for rank, step in ((0, 0), (1, 0), (0, 5), (0, 0)):
        team, run.step = a_team(monkeypatch, rank, 2), step
        team.prepare(run)
        held = [layer.generator for _, layer in run.model.named_layers() if hasattr(layer, "generator")]
        assert team.attempt == 3
        assert all(generator is not run.generator for generator in held)
        team.begin_stretch(run)
        states.append(team.masks.initial_seed())
        drawn.append(torch.rand(3, generator=team.masks))
    assert len(set(states)) == 3
    assert drawn[0].equal(drawn[3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["names_mlp.py", "names_wavenet.py", "names_gru.py", "names_gpt.py"])
def test_two_processes_end_with_the_losses_of_one(name: str, tmp_path: Path, data: Path) -> None:
    """Batch norms and ignored targets included; one of them prints and writes."""
    common = ["--data", data, "--steps", 60, "--batch-size", 7, *(["--dropout", 0] if "gpt" in name else [])]
    (a, told), (b, out) = in_one_and_in_two(tmp_path, name, common, "--save", tmp_path / "two")
    assert b["steps_per_second"] > 0
    assert b["samples"] == a["samples"]
    assert out.count("samples:") == told.count("samples:") == 1
    assert out.count("2 processes, each with a part of every minibatch") == 1
    assert checkpoint_step(tmp_path / "two") == 60


@pytest.mark.slow
@COMPILES
def test_two_processes_compile_and_end_with_the_losses_of_one(tmp_path: Path, data: Path) -> None:
    common = ["--data", data, "--steps", 60, "--batch-size", 7, "--samples", 0]
    _, (b, out) = in_one_and_in_two(tmp_path, "names_gru.py", common, "--compile")
    assert b["config"]["compile"]
    assert "compiling the training step" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ("--check", "--check is for a run in one process; omit it, or torchrun"),
        pytest.param("--compile", "use the step as it is, or without a SyncBatchNorm", marks=COMPILES),
    ],
)
def test_what_several_processes_cannot_do_is_refused(flag: str, problem: str, data: Path) -> None:
    process = torchrun("names_mlp.py", "--data", data, flag)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    assert "names_mlp: error: " in err
    assert problem in err


@pytest.mark.slow
def test_the_signal_of_kill_stops_all_and_saves(tmp_path: Path, data: Path) -> None:
    process = torchrun("names_mlp.py", "--data", data, "--steps", 10**8, "--save", tmp_path / "c")
    assert process.stdout is not None
    while "parameters" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    (done,) = re.findall(r"stopped after ([\d,]+) of 100,000,000 steps", out)
    assert checkpoint_step(tmp_path / "c") == int(done.replace(",", "")) > 0


@pytest.mark.slow
def test_a_run_survives_twenty_kills_and_ends_bit_equal(tmp_path: Path, data: Path) -> None:
    """Of either process, at any moment: while it starts, trains, saves."""
    common = ["--data", data, "--steps", 4000, "--batch-size", 8, "--samples", 0]
    process = torchrun("names_mlp.py", *common, "--save", tmp_path / "whole")
    process.communicate(timeout=300)
    process = torchrun("names_mlp.py", *common, "--save", tmp_path / "killed", restarts=40)
    kills, random_ = 0, random.Random(0)
    with ThreadPoolExecutor() as reader:
        ended = reader.submit(process.communicate, timeout=600)  # from the start, or torchrun stops at a full pipe
        while process.poll() is None and kills < 20:
            time.sleep(random_.uniform(0.1, 7))
            if alive := workers(process.pid):
                try:
                    os.kill(random_.choice(alive), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                kills += 1
        out, err = ended.result()
    assert process.returncode == 0, err[-3000:]
    assert kills == 20
    assert "going on after step" in out
    assert equal_checkpoints(tmp_path / "whole", tmp_path / "killed")
