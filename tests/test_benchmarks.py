"""benchmarks/: that everybody takes the same steps, and that what is reported is what was measured; never a time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Load a script of benchmarks/ by its name, which one of models/ may have, too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("name", ["names_mlp", "deep"])
def test_everybody_takes_the_same_steps(name, script, capsys):
    steps, module = script("steps"), script(name)
    task = module.task_of(False)
    rows = [row for row in module.rows_of(task, False) if not row.compiles]
    found = steps.compare(task, rows)  # refuses other weights
    assert next(iter(found)) == "handgrad, TrainStep"
    for contender in found.values():
        contender.run()


def test_jax_takes_the_same_steps(script):
    pytest.importorskip("jax")
    steps, module = script("steps"), script("deep")
    task = module.task_of(False)
    rows = module.rows_of(task, False)
    steps.compare(task, [rows[0], *(row for row in rows if row.needs == "jax")])


def test_other_weights_are_refused(script):
    steps, module = script("steps"), script("deep")
    task = module.task_of(False)

    def wrong():
        contender = steps.train_step(task)
        by_hand = contender.follow
        contender.follow = lambda rows: {name: w + 0.01 for name, w in by_hand(rows).items()}
        return contender

    rows = [steps.Row("handgrad, TrainStep", lambda: steps.train_step(task)), steps.Row("wrong", wrong)]
    with pytest.raises(SystemExit, match=r"wrong: wrong result, weights differ by 0.01"):
        steps.compare(task, rows)


def test_a_time_is_that_of_one_step_and_a_speed_is_told_by_the_best_autograd(script):
    steps = script("steps")
    clocks = {
        "handgrad, .many": steps.Contender(dict, list, 10, lambda n: (n * 1.0,)),
        "autograd": steps.Contender(dict, list, 1, lambda n: (n * 0.4,)),
        "autograd, another": steps.Contender(dict, list, 1, lambda n: (n * 0.2,)),
    }
    results = {r["contender"]: r for r in steps.take_turns(clocks, 0.0)}
    assert results["handgrad, .many"]["seconds"] == pytest.approx(0.1)
    assert results["handgrad, .many"]["autograd_over_this"] == pytest.approx([2, 2, 2])
    assert [name for name, r in results.items() if r["best_autograd"]] == ["autograd, another"]


CHILD = """
import os, json
from pathlib import Path
cache, temporary = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]), Path(os.environ["TMPDIR"])
cache.mkdir(exist_ok=True)
print("compiling")
print(100 * len(list(temporary.iterdir())) + 10 * (cache / "probe").exists() + (cache / "graph").exists())
(cache / "graph").touch()
(cache / "probe").touch()
(temporary / "header").touch()
"""


def test_the_first_result_is_taken_with_empty_cold_and_warm_caches(script, tmp_path):
    steps = script("steps")
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "probe").touch()
    command = [sys.executable, "-c", CHILD]
    for name in ("one", "another"):
        found = steps.first_results(command, steps.Row(name, list, compiles=True), tmp_path)
        assert found == {"empty": 0, "cold": 110, "warm": 111}


def test_what_compiles_nothing_has_one_first_result(script, tmp_path):
    steps = script("steps")
    row = steps.Row("eager", list)
    found = steps.first_results([sys.executable, "-c", "import sys; print(len(sys.argv[2]))"], row, tmp_path)
    assert found == {"empty": 5, "cold": 5, "warm": 5}


def test_the_first_result_is_timed_until_the_first_call_is_done(script, monkeypatch):
    steps, now = script("steps"), [0.0]

    def make():
        now[0] += 3
        return steps.Contender(dict, lambda: now.__setitem__(0, now[0] + 4))

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert steps.first_result(steps.Row("a", make)) == 7


def test_the_chart_and_the_table_show_the_fastest_first(script, tmp_path):
    pytest.importorskip("matplotlib")
    steps = script("steps")
    slow = {"contender": "autograd", "seconds": 2e-3, "spread": 0.1, "best_autograd": True}
    fast = {"contender": "handgrad", "seconds": 1e-3, "spread": 0.2, "best_autograd": False}
    slow |= {"autograd_over_this": [1.0, 1.0, 1.0], "first_result_seconds": dict.fromkeys(steps.FIRST, 0.009)}
    fast |= {"autograd_over_this": [2.0, 1.9, 2.1], "first_result_seconds": {"empty": 20, "cold": 10, "warm": 3}}
    head = ["contender", "a step", "autograd / this"]
    ours = ["handgrad", "1.0 ms", "2.00 (1.90 to 2.10)"]
    theirs = ["autograd *", "2.0 ms", "1.00 (1.00 to 1.00)"]
    first = [["first, empty", "first, cold", "first, warm"], ["20.0 s", "10.0 s", "3.0 s"], ["9.0 ms"] * 3]
    table = [[*row, *more] for row, more in zip([head, ours, theirs], first)]
    assert steps.table([slow, fast]) == table
    assert steps.table([slow | {"first_result_seconds": None}, fast]) == [head, ours, theirs]
    data = {"task": "names", "environment": {"threads": 1}, "results": [slow, fast]}
    steps.chart(tmp_path / "c.png", data)
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_a_ratio_that_noise_has_swallowed_is_marked(script):
    run = script("run")
    assert run.ratio_text([1.5, 1.4, 1.6]) == "1.50"
    assert run.ratio_text([1.02, 0.9, 1.1]) == "1.02 ="
    assert run.ratio_text([1.02, 0.0, None]) == "1.02 ="
    assert run.ratio_text(None) == "-"


def test_the_mean_leaves_out_what_was_not_measured_inside_a_model(script):
    run = script("run")
    ratios = {"Tanh": [2.0, 2.0, 2.0], "Linear": [8.0, 8.0, 8.0], "Add": None}
    results = [{"layer": name, "by": {"autograd": {"ratio": {"inside": r}}}} for name, r in ratios.items()]
    assert run.mean_ratio(results, "inside") == "4.00"
    assert run.mean_ratio(results, "inside", ["Tanh"]) == "2.00"


def test_the_readme_of_the_results_is_made_of_them(script):
    """`python benchmarks/run.py --only-report` writes it."""
    results = BENCHMARKS / "results"
    assert json.loads((results / "deep.json").read_text())["task"].startswith("16 x (Linear(64, 64)")
    assert script("run").markdown(results) == (results / "README.md").read_text()


def test_what_saves_memory_does_and_needs_half_at_the_most(script):
    """Of 1,024 rows, by the tensors that a step makes; the parameters move as they do without."""
    memory = script("memory")
    peaks, moved = {}, {}
    for name in memory.DEEP_CONTENDERS:
        torch.manual_seed(0)
        params, step, held = memory.deep_step("mlp1024", name)
        before = [p.detach().clone() for p in params]
        peaks[name] = memory.peak_bytes(step)
        moved[name] = sum(float((p.detach() - q).norm()) for p, q in zip(params, before))
        assert held()["held"] == sum(p.nbytes for p in params)
    ours = memory.DEEP_CONTENDERS[:4]
    assert len({moved[name] for name in ours}) == 1
    assert peaks["handgrad, Recompute and release_gradients"] < peaks["handgrad"] / 2
    assert peaks["handgrad, Recompute and release_gradients"] < min(peaks[name] for name in ours[:3])


def test_the_gpt_is_recomputed_block_by_block(script, monkeypatch):
    memory = script("memory")
    monkeypatch.setattr(memory, "BLOCKS", 2)
    counts = {}
    for name in ("handgrad, Recompute", "torch.nn, checkpoint"):
        params, step, held = memory.deep_step("gpt", name)
        step()
        counts[name] = [tuple(p.shape) for p in params]
        assert held()["held"] >= 3 * sum(p.nbytes for p in params)  # AdamW's two averages beside each
    assert counts["handgrad, Recompute"] == counts["torch.nn, checkpoint"]
