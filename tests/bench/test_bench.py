"""handgrad.bench: that it measures what it says; never how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import handgrad as hg
from handgrad import bench
from handgrad.bench.__main__ import chosen, main
from handgrad.bench.measure import WrongResultError, _inside, both_sides
from handgrad.bench.timing import Ratio, Times, timed
from handgrad.twins import TWINS, Twin

SIZE = (32, 16)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """No test looks at a time that was really taken."""
    monkeypatch.setattr("handgrad.bench.timing.SECONDS_PER_BLOCK", 0.001)


@pytest.mark.parametrize("name", TWINS)
def test_both_sides_of_every_twin_agree_and_are_measured(name):
    assert TWINS[name].fits(*SIZE)
    result = bench.measure(TWINS[name], SIZE, seconds=0.0, rounds=2)
    assert list(result.entries) == ["handgrad", "autograd"]
    for entry in result.entries.values():
        assert entry.times.median() > 0
        assert entry.recorded >= 0
        assert entry.peak >= 0


IN_A_CHAIN = "10 in a chain less 2"
SEVERAL = {"LSTMCell", "MultiheadAttention", "Add", "Multiply", "Cat", "Parallel", "Losses"}
AFTER = {"CrossEntropy", "MSE", "BCEWithLogits", "LinearCrossEntropy", "Flatten", "FlattenConsecutive", "Concat"}
AFTER |= {"Conv2d", "ConvTranspose2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "Upsample"}
BEFORE = {"Embedding", "Constant"}


@pytest.mark.parametrize("name", TWINS)
def test_every_twin_has_its_arrangement_inside_a_model(name):
    twin = TWINS[name]
    sides, inputs = both_sides(twin, SIZE[1], torch.float32), twin.inputs(*SIZE, torch.float32)
    how = _inside(twin, SIZE[1], sides, inputs, sides[1](*inputs), (2, 10)).how
    expected = dict.fromkeys(SEVERAL, "not measured: several inputs or outputs")
    expected |= dict.fromkeys(AFTER, "behind a LeakyReLU, less that alone")
    expected |= dict.fromkeys(BEFORE, "with a LeakyReLU behind it, less that alone")
    assert how == expected.get(name, IN_A_CHAIN)


@pytest.mark.parametrize("name", sorted(TWINS.keys() - SEVERAL - AFTER - BEFORE))
def test_both_sides_of_a_chain_agree(name):
    twin = TWINS[name]
    layer, module = both_sides(twin, SIZE[1], torch.float64, chain=3)
    assert len(layer) == len(module) == 3
    layer.eval()  # dropout draws from two generators
    module.eval()
    (x,) = twin.inputs(*SIZE, torch.float64)
    leaf = x.clone().requires_grad_()
    expected = module(leaf)
    dout = torch.randn_like(expected)
    expected.backward(dout)
    torch.testing.assert_close(layer(x), expected.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(layer.backward(dout), leaf.grad, rtol=0, atol=1e-9)
    grads = {name: p.grad for name, p in module.named_parameters()}
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=0, atol=1e-9)


class Slow(hg.Layer):
    """As slow as it says on a clock that the test owns; `narrow` halves the columns."""

    def __init__(self, clock, narrow):
        self.clock, self.narrow = clock, narrow

    def forward(self, x):
        self.clock.now += 0.001
        out = x[:, ::2] if self.narrow else 2 * x
        self.push(x, out=out)
        return out

    def backward(self, dout):
        (x,) = self.pop(dout)
        self.clock.now += 0.002
        if not self.narrow:
            return 2 * dout
        dx = torch.zeros_like(x)
        dx[:, ::2] = dout
        return dx


class Slower(torch.nn.Module):
    """The same by autograd, twice as slow."""

    def __init__(self, clock, narrow):
        super().__init__()
        self.clock, self.narrow = clock, narrow

    def forward(self, x):
        self.clock.now += 0.002
        out = x[:, ::2] if self.narrow else 2 * x
        if out.requires_grad:
            out.register_hook(self.behind)
        return out

    def behind(self, grad):
        self.clock.now += 0.004


class Clock:
    """Reading it takes a millisecond, or what costs nothing would be called for ever."""

    now = 0.0

    def __call__(self):
        self.now += 0.001
        return self.now


@pytest.mark.parametrize("narrow", [False, True])
def test_inside_a_model_the_fixed_cost_of_a_backward_call_is_not_counted(narrow, monkeypatch):
    clock, by_torch = Clock(), torch.Tensor.backward

    def backward(self, *args):
        clock.now += 0.03
        by_torch(self, *args)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(time, "perf_counter", clock)
    twin = Twin("Slow", lambda D: Slow(clock, narrow), lambda D: Slower(clock, narrow))
    result = bench.measure(twin, SIZE, seconds=0.0, rounds=3)
    ours, theirs = result.entries["handgrad"], result.entries["autograd"]
    assert ours.times.median() == pytest.approx(0.002 + 0.003)
    assert theirs.times.median() == pytest.approx(0.002 + 0.03 + 0.006)
    assert theirs.ratio.value == pytest.approx(7.6)
    assert ours.inside.median() == pytest.approx(0.003)
    assert theirs.inside.median(0) == pytest.approx(0.002)
    assert theirs.inside.median(1) == pytest.approx(0.004)
    assert theirs.inside_ratio == pytest.approx((2, 2, 2))


def test_a_round_whose_difference_is_not_above_zero_widens_the_interval():
    more, fewer = Times([[5.0, 5.0, 5.0, 5.0]]), Times([[1.0, 6.0, 1.0, 1.0]])
    ours = bench.difference(more, fewer, 4).rounds()
    assert ours == [1.0, -0.25, 1.0, 1.0]
    assert bench.ratio(ours, [2.0] * 4) == Ratio(2.0, 0.0, float("inf"))
    rounds = [-1.0, -1.0, *[1.0] * 98]
    assert bench.ratio(rounds, [2.0] * 100) == Ratio(2.0, 2.0, 2.0)
    assert bench.ratio([-1.0] * 9, [2.0] * 9) == Ratio(1.0, 0.0, float("inf"))
    assert bench.ratio([1.0] * 9, [-2.0] * 9).verdict == "no difference"


def test_what_only_calls_others_is_measured_on_request():
    by_default = {twin.name for twin in chosen(None, None)}
    others = {"Identity", "Residual", "Sum", "Product", "Concat", "Parallel", "Sequential", "from_torch"}
    others |= {"Constant", "Graph", "Losses", "Recompute"}
    assert by_default == TWINS.keys() - others
    assert [twin.name for twin in chosen(["Residual"], None)] == ["Residual"]


def test_a_wrong_result_is_refused_before_it_is_timed():
    class Wrong(hg.Tanh):
        def backward(self, dout):
            return 2 * super().backward(dout)

    twin = Twin("Wrong", lambda D: Wrong(), lambda D: torch.nn.Tanh())
    with pytest.raises(WrongResultError, match="Wrong: dx differs from that of Tanh"):
        bench.measure(twin, SIZE, seconds=0.0, rounds=1)


def test_weights_under_other_names_are_refused():
    twin = Twin("Linear", lambda D: hg.Linear(D, D, bias=False), lambda D: torch.nn.Linear(D, D))
    with pytest.raises(WrongResultError, match=r"must have the same names for their weights: \['weight'\] and \['b"):
        bench.measure(twin, SIZE, seconds=0.0, rounds=1)


def test_recorded_bytes_counts_each_memory_once_and_no_parameter():
    model = hg.Sequential(hg.Linear(8, 4), hg.Tanh(), hg.Linear(4, 2))
    model(torch.randn(3, 8))
    assert bench.recorded_bytes(model) == 4 * (3 * 8 + 3 * 4)  # x; tanh's out, which the last Linear records, too
    model.drop_records()
    assert bench.recorded_bytes(model) == 0


def test_peak_bytes_is_the_most_alive_at_once():
    def run():
        a = torch.ones(1000)
        b = a * 2
        del a
        return torch.cat([b, b])

    assert bench.peak_bytes(run) == 4 * 3000


def test_contenders_take_turns():
    order = []

    def contender(name):
        def run(n):
            order.append(name)
            time.sleep(0.003)
            return (float(n),)

        return run

    times = bench.interleave({name: contender(name) for name in "ab"}, seconds=0.0, rounds=4)
    assert order[-8:] == list("abbaabba")
    assert times["a"].parts == [[1.0] * 4]


def test_a_ratio_whose_interval_holds_one_is_no_difference():
    assert bench.ratio([1.0] * 20, [0.9, 1.1] * 10).verdict == "no difference"
    assert bench.ratio([1.0] * 20, [2.0] * 20) == Ratio(2.0, 2.0, 2.0)
    assert Times([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]).median() == 3.0
    assert len(timed(lambda: None)(3)) == 1


def test_the_command_writes_table_json_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert main(["--layer", "Tanh", "--layer", "Flatten", "--sizes", "8x4,16x8", "--seconds", "0", *files]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 100
    assert "inside a model" in out
    assert "geometric mean" in out
    data = json.loads((tmp_path / "r.json").read_text())
    assert [(r["layer"], r["size"]) for r in data["results"]][:2] == [("Tanh", [8, 4]), ("Tanh", [16, 8])]
    tanh = data["results"][0]
    assert tanh["inside"] == IN_A_CHAIN
    assert tanh["by"]["autograd"].keys() >= {"inside", "both", "ratio"}
    assert tanh["by"]["autograd"]["ratio"].keys() == {"inside", "both", "forward", "backward"}
    assert {"machine", "torch", "commit", "threads"} <= set(data["environment"])
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_what_has_several_inputs_has_no_time_inside_a_model_and_the_command_says_so(tmp_path, capsys):
    assert main(["--layer", "Add", "--sizes", "8x4", "--seconds", "0", "--json", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert "not inside a model, for they have several inputs or outputs: Add" in out
    assert "geometric mean of autograd / handgrad: - inside a model, " in out
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert result["inside"] == "not measured: several inputs or outputs"
    assert result["by"]["handgrad"]["inside"] is None
    assert result["by"]["autograd"]["ratio"]["inside"] is None


def test_a_layer_of_ones_own_against_a_torch_module(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom handgrad import Layer\n"
        "class Swish(Layer):\n"
        "    def forward(self, x):\n        s = torch.sigmoid(x)\n        out = x * s\n"
        "        self.push(x, s, out=out)\n        return out\n"
        "    def backward(self, dout):\n        x, s = self.pop(dout)\n"
        "        return dout * (s + x * s * (1 - s))\n"
    )
    command = [sys.executable, "-m", "handgrad.bench", "--layer", "mine:Swish", "--against", "torch.nn:SiLU"]
    run = subprocess.run(
        [*command, "--sizes", "8x4", "--seconds", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(hg.__file__).parents[1])},
    )
    assert run.returncode == 0, run.stderr
    assert "Swish" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "Nope"], "give --against module:Class with it"),
        (["--against", "torch.nn:SiLU"], "--against needs exactly one --layer"),
        (["--layer", "Tanh", "--against", "SiLU"], "expected module:Class"),
        (["--sizes", "32"], "expected sizes such as 32x64"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_bad_arguments_are_a_clear_error(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        main(["--layer", "Tanh", "--plot", str(tmp_path / "r.png")])
    said = capsys.readouterr()
    assert 'pip install "handgrad[models]"' in said.err
    assert said.out == ""


def test_what_takes_long_is_timed_three_times(monkeypatch):
    monkeypatch.setattr("handgrad.bench.timing.PATIENCE", 0.0)
    assert len(bench.interleave({"a": lambda n: (0.1 * n,)}, seconds=0.0, rounds=9)["a"].rounds()) == 3
    assert len(bench.interleave({"a": lambda n: (0.1 * n,)}, seconds=0.0, rounds=2)["a"].rounds()) == 2
