"""benchmarks/: that everybody takes the same steps, and that what is reported is what was measured; never a time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
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


def test_a_ring_sends_each_part_twice_round(script):
    """Four processes, 8 MB, 1 GB/s, 10 us: 6 hops of 2 MB each."""
    link = script("scaling_model").Link(10e-6, 1e9)
    assert link.all_reduce(8e6, 4) == pytest.approx(6 * (2e-3 + 10e-6))
    assert link.all_reduce(8e6, 2) == pytest.approx(2 * (4e-3 + 10e-6))
    assert link.all_reduce(8e6, 1) == 0


def small_task(model, **options):
    given = {"fixed": 1e-3, "per_row": 1e-4, "tensors": 6, "gradient_bytes": 1_000_000, "minibatch": 32, "rows": 32}
    return model.Task("a", **(given | options))


def test_the_messages_are_two_short_ones_and_full_buckets_and_the_rest(script):
    model = script("scaling_model")
    assert small_task(model).messages == [16, 64, 1_000_000]
    assert small_task(model, gradient_bytes=2 * 26_214_400 + 8).messages == [16, 64, 26_214_400, 26_214_400, 8]
    assert small_task(model, gradient_bytes=26_214_400).messages == [16, 64, 26_214_400]


def test_the_messages_are_those_that_a_train_step_sends(script, monkeypatch):
    import torch.distributed as dist

    from handgrad import SGD, CrossEntropy, Linear, Sequential, Tanh, TrainStep

    sent, all_reduce = [], dist.all_reduce
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = Sequential(Linear(4, 5), Tanh(), Linear(5, 3))
        step = TrainStep(net, CrossEntropy(), SGD(net.parameters(), lr=0.1), process_group=True)
        monkeypatch.setattr(dist, "all_reduce", lambda t, **options: sent.append(t.nbytes) or all_reduce(t, **options))
        step(torch.randn(2, 4), torch.tensor([0, 1]))
    finally:
        dist.destroy_process_group()
    params = list(net.parameters())
    task = small_task(script("scaling_model"), tensors=len(params), gradient_bytes=sum(p.nbytes for p in params))
    assert sent == task.messages == [16, 48, 172]


def test_a_step_on_paper_by_hand(script):
    """Computing takes 1 + 8 x 0.1 = 1.8 ms; each message 2 hops of 0.1 ms, the last one and 1 ms: 1.6 ms."""
    model = script("scaling_model")
    task, link = small_task(model), model.Link(1e-4, 1e9)
    seconds, compute, communication = model.step(task, link, rows=8, processes=2, overlap=0)
    assert compute == pytest.approx(1.8e-3)
    assert communication == pytest.approx(1.6e-3, rel=1e-3)
    assert seconds == pytest.approx(3.4e-3, rel=1e-3)
    hidden = seconds - model.step(task, link, rows=8, processes=2, overlap=1).seconds
    assert hidden == pytest.approx(0.4e-3, rel=1e-3)  # all but the last message
    hidden = seconds - model.step(task, link, rows=8, processes=2, overlap=0.1).seconds
    assert hidden == pytest.approx(0.18e-3)  # as long as something is computed
    assert model.step(task, link, rows=8, processes=1, overlap=0.5) == (compute, compute, 0)


def test_weak_and_strong_scaling_by_hand(script):
    """Nothing to send: weak scaling is perfect; strong scaling repeats the fixed part in every process."""
    model = script("scaling_model")
    link = model.Link(0.0, float("inf"))
    found = {(r["scaling"], r["processes"]): r for r in model.modelled(small_task(model), "free", link, [0.0])}
    assert all(found["weak", p]["efficiency"] == pytest.approx(1) for p in model.PROCESSES)
    assert [found["weak", p]["rows"] for p in model.PROCESSES] == [32] * 5
    assert [found["strong", p]["rows"] for p in model.PROCESSES] == [32, 16, 4, 1, 1]
    assert found["strong", 2]["seconds"] == pytest.approx(2.6e-3)
    assert found["strong", 2]["efficiency"] == pytest.approx(4.2 / (2 * 2.6))
    assert found["strong", 512]["efficiency"] == pytest.approx(4.2 / (512 * 1.1))
    assert {r["kind"] for r in found.values()} == {"modelled"}


def test_a_line_through_points_on_one_is_that_one_and_never_below_zero(script):
    model = script("scaling_model")
    assert model.line([1, 2, 10], [5, 7, 23]) == pytest.approx((3, 2))
    assert model.line([1, 2, 3], [1, 3, 5]) == pytest.approx((0, (1 + 2 / 3 + 3 / 5) / (1 + 4 / 9 + 9 / 25)))
    assert model.line([1, 2], [3, 1]) == pytest.approx(((1 / 3 + 1) / (1 / 9 + 1), 0))
    with pytest.raises(ValueError, match=r"a line needs two sizes or more, got \[4\]"):
        model.line([4, 4], [1, 2])
    link = model.fitted_link([1e6, 3e6], [2e-3, 4e-3])
    assert (link.latency, link.bandwidth) == pytest.approx((0.5e-3, 1e9))
    assert model.fitted_link([1, 2], [3, 1]).bandwidth == float("inf")


SCALING = {
    "load": 0.5,
    "environment": {"cores": 2},
    "results": [
        {"kind": "measured", "what": "step", "task": "a", "by": "TrainStep", "processes": 2, "rows": 16}
        | {"seconds": 0.02},
        {"kind": "measured", "what": "all_reduce", "bytes": 4096, "seconds": 5e-4},
        {"kind": "fitted", "what": "compute", "task": "a", "fixed": 1e-3, "per_row": 1e-4},
        {"kind": "stated", "what": "link", "links": "stated links", "latency": 5e-6, "bandwidth": 25e9},
        {"kind": "fitted", "what": "link", "links": "measured links", "latency": 5e-6, "bandwidth": None},
        {"kind": "modelled", "what": "step", "task": "a", "links": "stated links", "scaling": "weak", "overlap": 0.5}
        | {"processes": 64, "rows": 16, "seconds": 0.025, "efficiency": 0.8},
        {"kind": "modelled", "what": "step", "task": "b", "links": "stated links", "scaling": "strong", "overlap": 0.0}
        | {"processes": 64, "rows": 1, "seconds": 2.0, "efficiency": 0.00123},
    ],
}


def test_every_row_says_whether_it_was_measured(script, tmp_path):
    title, rows, notes = script("run").scaling(SCALING)
    assert title == "Scaling: measured in two processes, modelled for many"
    assert "2 cores, load 0.5 before" in " ".join(notes)
    assert rows[1:] == [
        ["measured", "a", "TrainStep", "2", "16", "20.0 ms", ""],
        ["measured", "all_reduce, 4.0 KB", "", "2", "", "500.0 us", ""],
        ["fitted", "a", "compute = 1.0 ms + 100.0 us a row", "", "", "", ""],
        ["stated", "stated links", "latency 5.0 us, 25.00 GB/s", "", "", "", ""],
        ["fitted", "measured links", "latency 5.0 us, without limit", "", "", "", ""],
        ["modelled", "a", "weak, stated links, overlap 0.50", "64", "16", "25.0 ms", "80 %"],
        ["modelled", "b", "strong, stated links", "64", "1", "2.0 s", "0.123 %"],
    ]
    assert {len(row) for row in rows} == {7}
    pytest.importorskip("matplotlib")
    script("scaling_model").chart(tmp_path / "c.png", SCALING)
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_the_model_is_told_beside_what_was_measured(script):
    """In two processes, with as many rows, by TrainStep, over the links of this machine."""
    model = script("scaling_model")
    task, link = small_task(model), model.Link(1e-4, float("inf"))  # three messages of two hops: 0.6 ms
    found = model.modelled(task, "measured links", link, [0.0]) + model.modelled(task, "stated links", link, [0.0])
    step = {
        "kind": "measured",
        "what": "step",
        "task": "a",
        "by": "TrainStep",
        "processes": 2,
        "rows": 16,
        "seconds": 4e-3,
    }
    others = [step | {"by": "DDP"}, step | {"processes": 1}, step | {"task": "b"}, step | {"rows": 8}]
    assert model.beside_measured([step, *others, *found]) == ["a, strong: 4.0 ms measured, 3.2 ms modelled"]
    assert model.beside_measured([*others, *found]) == []


def test_the_model_begins_with_the_steps_without_messages_in_two_processes(script):
    scaling = script("scaling")
    alone = [
        scaling.result("step", task="MLP 8 x 256", by="no messages", processes=2, rows=n, seconds=1 + n) for n in (1, 2)
    ]
    others = [
        scaling.result("step", task="MLP 8 x 256", by="no messages", processes=1, rows=1, seconds=9.0),
        scaling.result("step", task="MLP 8 x 256", by="DDP", processes=2, rows=1, seconds=9.0),
        *(scaling.result("all_reduce", bytes=n, seconds=2e-3 + n * 1e-9) for n in (1e6, 2e6)),
    ]
    link, (task,) = scaling.fitted([*alone, *others], [scaling.mlp()])
    assert (link.latency, link.bandwidth) == pytest.approx((1e-3, 1e9))
    assert (task.fixed, task.per_row) == pytest.approx((1, 1))
    assert (task.tensors, task.gradient_bytes, task.minibatch) == (16, 8 * (256 * 256 + 256) * 4, 256)


def test_the_stated_gpt(script):
    """A token costs 6 FLOP a parameter."""
    scaling = script("scaling")
    task = scaling.gpt(scaling.parser().parse_args(["--parameters", "2e6", "--tokens", "10", "--speed", "1e9"]))
    assert task.name == "GPT of 2 million parameters"
    assert (task.fixed, task.per_row, task.gradient_bytes) == (0, pytest.approx(0.12), 4_000_000)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--speed", "0"], "expected a number above 0, got 0"),
        (["--overlap", "2"], "expected a number from 0 to 1, got 2"),
        (["--rows", "0"], "expected a whole number from 1 on, got 0"),
    ],
)
def test_what_cannot_be_stated_is_refused(flags, problem, script, capsys):
    with pytest.raises(SystemExit):
        script("scaling").parser().parse_args(flags)
    assert problem in capsys.readouterr().err


def run_script(name, *flags):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / name), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)


@pytest.mark.slow
def test_scaling_is_measured_in_one_and_two_processes(script, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    done = run_script("scaling.py", "--seconds", 0, "--json", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "s.json").read_text())["results"]
    steps = {(r["task"], r["by"], r["processes"], r["rows"]) for r in results if r["kind"] == "measured" and "by" in r}
    for task, batch in (("names_gpt", 32), ("MLP 8 x 256", 256)):
        for by in ("no messages", "TrainStep", "DDP"):
            assert {(task, by, 1, batch), (task, by, 2, batch // 2)} <= steps
    assert {r["kind"] for r in results} == {"measured", "fitted", "stated", "modelled"}
    assert all(r["seconds"] > 0 for r in results if "seconds" in r)
    assert (tmp_path / "s.png").exists()


def test_without_a_gpu_its_benchmark_says_so(script, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert script("gpu").main() == 1
    assert capsys.readouterr().err == "gpu.py: there is no CUDA device here; --device cpu shows that the script runs\n"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--sizes", "4"], "expected rows x columns, such as 256x512, got '4'"),
        (["--layers", "Linear,Lin"], "--layers: handgrad has no layer Lin"),
        (["--dtypes", "float8"], "invalid choice: 'float8'"),
    ],
)
def test_what_the_benchmark_of_a_gpu_cannot_use_is_refused(flags, problem, script, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu.py", *flags])
    with pytest.raises(SystemExit):
        script("gpu").main()
    assert problem in capsys.readouterr().err


def test_the_benchmark_of_a_gpu_runs_on_the_cpu(script, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("handgrad.bench.timing.SECONDS_PER_BLOCK", 0.0001)
    flags = ["--device", "cpu", "--sizes", "32x64", "--seconds", "0", "--json", str(tmp_path / "g.json")]
    monkeypatch.setattr("sys.argv", ["gpu.py", *flags])
    gpu = script("gpu")
    assert gpu.main() == 0
    data = json.loads((tmp_path / "g.json").read_text())
    lines = {(r["what"], r["dtype"]) for r in data["results"]}
    assert lines == {(what, dtype) for what in (*gpu.LAYERS.split(","), "step") for dtype in gpu.DTYPES}
    assert data["device"] == "the CPU"
    assert all(min(r["seconds"].values()) > 0 for r in data["results"])
    assert "32x64" in capsys.readouterr().out


def test_the_benchmark_of_a_gpu_refuses_sides_that_differ(script, monkeypatch):
    gpu = script("gpu")
    monkeypatch.setattr("handgrad.Linear.backward", lambda self, dout: (self.pop(dout), dout @ self.weight * 2)[1])
    monkeypatch.setattr("handgrad.Linear.parameters", lambda self: iter(()))
    with pytest.raises(SystemExit, match=r"Linear, float32: handgrad and torch\.nn differ by"):
        gpu.compare("Linear", (8, 16), "float32", torch.device("cpu"), 0.0)


def test_on_a_gpu_the_time_is_that_between_two_events(script, monkeypatch):
    """All earlier work is waited for, and the last event, too; milliseconds are told."""
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("record")

        def synchronize(self):
            said.append("wait for the event")

        def elapsed_time(self, end):
            said.append("read")
            return 500.0

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: said.append("wait for all"))
    contender = script("gpu").timed_on(torch.device("cuda"), lambda: said.append("call"))
    assert contender(2) == (0.5,)
    assert said == ["wait for all", "record", "call", "call", "record", "wait for the event", "read"]
