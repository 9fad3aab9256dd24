"""Make all results again: ``python benchmarks/run.py``, about an hour on a machine that does nothing else.

Writes JSON, the charts and a README with the tables into benchmarks/results. Needs matplotlib; NumPy and JAX compete
where they are installed: ``pip install -e ".[models,bench]"``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from ctypes.util import find_library
from pathlib import Path
from statistics import geometric_mean
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the source beside it, also where handgrad is not installed

from memory import DEEP_HEAD, deep_rows  # noqa: E402
from memory import HEAD as MEMORY_HEAD  # noqa: E402
from memory import row as memory_row  # noqa: E402
from names_models import HEAD as MODELS_HEAD  # noqa: E402
from names_models import row as models_row  # noqa: E402
from scaling_model import HEAD as SCALING_HEAD  # noqa: E402
from scaling_model import beside_measured  # noqa: E402
from scaling_model import chart as scaling_chart  # noqa: E402
from scaling_model import row as scaling_row  # noqa: E402
from steps import chart, table  # noqa: E402

from handgrad.bench.report import inside_text  # noqa: E402
from handgrad.tables import bytes_text, seconds_text  # noqa: E402

CHARTS = {"names_mlp": chart, "deep": chart, "scaling": scaling_chart}
OF_THE_MLP = ("Linear", "BatchNorm1d", "Tanh", "CrossEntropy", "Embedding", "Flatten")


def script(name: str, *arguments: str) -> list[str]:
    """The command that runs a script of this directory."""
    return [sys.executable, str(HERE / name), *arguments]


def markdown(results: Path) -> str:
    """The tables of all results that are there."""
    text = [
        "# Results",
        "",
        "Made by `python benchmarks/run.py`. The contenders take turns; ratios are medians over the turns.",
    ]
    for name, show in (
        ("layers", layers),
        ("layers_kept", layers),
        ("names_mlp", steps),
        ("names_mlp_tcmalloc", steps),
        ("wide_1", steps),
        ("wide_1_kept", steps),
        ("wide_2", steps),
        ("wide_2_kept", steps),
        ("deep", steps),
        ("deep_tcmalloc", steps),
        ("deep_wide", steps),
        ("wide_layers", halves),
        ("models", models),
        ("memory", memory),
        ("memory_deep", deep_memory),
        ("watching", watching),
        ("checks", checks),
        ("scaling", scaling),
    ):
        path = results / f"{name}.json"
        if not path.exists():
            continue
        data = json.loads(path.read_text())
        env = data["environment"]
        title, rows, notes = show(data)
        text += ["", f"## {title}", ""]
        where = f"{env['machine']}, torch {env['torch']}, Python {env['python']}, commit {env['commit']}."
        text += [where, *textwrap.wrap(" ".join(notes), 120, break_on_hyphens=False), ""]
        if (results / f"{name}.png").exists():
            text += [f"![{title}]({name}.png)", ""]
        text += ["| " + " | ".join(row) + " |" for row in (rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:])]
    return "\n".join(text) + "\n"


def layers(data: dict[str, Any]) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """One row per layer: autograd's time over ours, inside a model and alone, and the memory at the largest size."""
    results = data["results"]
    sizes = sorted({tuple(r["size"]) for r in results})
    texts = [f"{n}x{d}" for n, d in sizes]
    sides = ["recorded: ours", "autograd's", "peak: ours", "autograd's"]
    rows = [["layer", *(f"inside, {text}" for text in texts), *(f"alone, {text}" for text in texts), *sides]]
    for name in dict.fromkeys(r["layer"] for r in results):
        by_size = {tuple(r["size"]): r["by"] for r in results if r["layer"] == name}
        ratios = [by_size[size]["autograd"]["ratio"] if size in by_size else {} for size in sizes]
        cells = [ratio_text(ratio.get(what)) for what in ("inside", "both") for ratio in ratios]
        last = by_size[max(by_size)]
        kept = [
            bytes_text(last[who][what]) for what in ("recorded_bytes", "peak_bytes") for who in ("handgrad", "autograd")
        ]
        rows.append([name, *cells, *kept])
    memory = "without fresh pages" if data.get("keep_memory") else "memory as the allocator gives it"
    notes = [
        "Autograd's time over ours, forward and backward, one thread, float32: above 1 handgrad is faster, = means no",
        f"difference beyond the noise; {memory}. Inside is what a model takes longer for having the layer: what it",
        "gains. Alone, autograd pays for each call of backward, too, which a model pays once a step. Layers with",
        "several inputs or outputs have no figure inside. Memory at the largest size.",
        f"Geometric mean inside a model {mean_ratio(results, 'inside')}, alone {mean_ratio(results, 'both')}; of",
        f"{', '.join(OF_THE_MLP)} {mean_ratio(results, 'inside', OF_THE_MLP)} and",
        f"{mean_ratio(results, 'both', OF_THE_MLP)}.",
    ]
    return "Layers against autograd" + (", freed memory kept" if data.get("keep_memory") else ""), rows, notes


def ratio_text(found: Sequence[float | None] | None) -> str:
    """A ratio of a layer's JSON, = where it is no difference; an end of None is one that noise has swallowed."""
    if found is None:
        return "-"
    value, low, high = found
    return f"{value:.2f}" + (" =" if low <= 1 and (high is None or high >= 1) else "")


def mean_ratio(results: Sequence[dict[str, Any]], what: str, names: Sequence[str] = ()) -> str:
    """The geometric mean of the layers' ratios, of all or of these."""
    ratios = [r["by"]["autograd"]["ratio"][what] for r in results if not names or r["layer"] in names]
    return f"{geometric_mean([ratio[0] for ratio in ratios if ratio]):.2f}"


def halves(data: dict[str, Any]) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """One row per layer: inside a model, and its forward and backward alone."""
    parts = ("inside", "forward", "backward")
    rows = [["layer", *(f"{part}: {who}" for part in parts for who in ("ours", "autograd's", "ratio"))]]
    for r in data["results"]:
        ours, theirs = r["by"]["handgrad"], r["by"]["autograd"]
        cells = []
        for part in parts:
            text = inside_text if part == "inside" else seconds_text
            cells += [text(ours[part]), text(theirs[part]), ratio_text(theirs["ratio"][part])]
        rows.append([r["layer"], *cells])
    n, d = data["results"][0]["size"]
    notes = ["One thread; autograd's time over ours. Inside a model; then forward and backward of the layer alone."]
    return f"Where the wide step's time goes: its layers at {n}x{d}", rows, notes


def steps(data: dict[str, Any]) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """One row per contender: the time of a step."""
    title = f"A training step: {data['task']}, {data['environment']['threads']} thread(s)"
    title += ", freed memory kept" if data.get("keep_memory") else ""
    title += f", memory by {data['allocator'].split('.')[0]}" if data.get("allocator") else ""
    notes = ["Autograd's time over this, sampling the minibatch included; * is the autograd compared with."]
    if data["results"][0]["first_result_seconds"]:
        notes += [
            "First is the time to the first result of a new process, its libraries imported, by what the compilers'",
            "caches hold: nothing (empty); what torch makes once per machine, its probes of the processor and its",
            "precompiled header (cold); all that such a process has left (warm). What compiles nothing has one figure.",
        ]
    return title, table(data["results"]), notes


def models(data: dict[str, Any]) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """One row per names model."""
    notes = [
        "Sampling the minibatch included, one thread; / is autograd's time over it. Cold and warm are the time to the",
        "compiled step's first result in a new process, with torch's probes and header alone made, or all cached.",
    ]
    return "The names models", [MODELS_HEAD, *(models_row(*item) for item in data["models"].items())], notes


def memory(data: dict[str, Any]) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """One row per contender: how far memory rises."""
    rows = [MEMORY_HEAD, *map(memory_row, data["results"])]
    title = f"Peak memory of a step: {data['depth']} x (Linear, BatchNorm1d, Tanh), width {data['width']}"
    notes = [
        f"Batch {data['batch']}, each in a fresh process, above what model, optimizer and data take. Freed memory is",
        "kept by handgrad.keep_freed_memory(); autograd gets the same settings by the environment.",
    ]
    return title, rows, notes


def deep_memory(data: dict[str, Any]) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """The contenders of each model."""
    rows = [["model", *DEEP_HEAD]]
    for task, title in data["tasks"].items():
        rows += [[title, *row] for row in deep_rows(data["results"], task)]
    notes = [
        "Each in a fresh process, one thread. Tensors at the most are parameters, optimizer state and what a step",
        "makes, at its highest moment between two operations. The bare minimum is that of a step that keeps everything",
        "till its end: parameters, optimizer state, gradients, and what backward needs. Resident memory is above what",
        "it was before the steps. The MLP's 16 pairs are recomputed in segments of 5, 4, 3, 2, 1 and 1, the GPT block",
        "by block.",
    ]
    return "Peak memory of deep models, without and with Recompute and release_gradients", rows, notes


def checks(data: dict[str, Any]) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """The slowest cases."""
    results = sorted(data["results"], key=lambda r: -r["seconds"])
    rows = [["case", "seconds", "of CPU", "examples"]]
    rows += [[r["case"], f"{r['seconds']:.2f}", f"{r['cpu_seconds']:.2f}", str(r["examples"])] for r in results[:5]]
    mean = sum(r["seconds"] for r in results) / len(results)
    notes = [f"All properties and planted faults of one case: {mean:.2f} s, the mean of {len(results)}. The slowest:"]
    return "What a check costs", rows, notes


def watching(data: dict[str, Any]) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """One row per watcher."""
    rows = [["", "a step", "times the plain one"]]
    rows += [[r["by"], seconds_text(r["seconds"]), f"{r['times the plain step']:.2f}"] for r in data["results"]]
    return "What looking inside costs", rows, ["A TrainStep of the names MLP, batch 32, one thread, in turns."]


def scaling(data: dict[str, Any]) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """One row per result, which begins with measured, fitted, stated or modelled."""
    rows = [SCALING_HEAD, *map(scaling_row, data["results"])]
    notes = [
        "Measured is what took that long here: gloo between processes of this one machine, one thread each, the",
        f"slowest of them; {data['environment']['cores']} cores, load {data['load']:.1f} before. DDP is torch's",
        "DistributedDataParallel around to_torch(model, layer_by_layer=True). Fitted are lines through that: through",
        "all_reduce, and through the steps without messages of both processes at once. Stated are public figures,",
        "named in benchmarks/scaling.py. Modelled is worked out, not measured: by the formulas of",
        "benchmarks/scaling_model.py, for a ring. Weak: each process has the same number of rows; strong: they divide",
        "one minibatch, down to a row each. Nothing here ran on a GPU, or in more than two processes.",
        f"What TrainStep took in two, beside what the model says: {'; '.join(beside_measured(data['results']))}.",
    ]
    return "Scaling: measured in two processes, modelled for many", rows, notes


def main() -> None:
    """Run everything, one after the other."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--results", type=Path, default=HERE / "results", help="directory to write to")
    p.add_argument("--quick", action="store_true", help="short turns: whether all runs, not figures to keep")
    p.add_argument("--only-report", action="store_true", help="write README and chart from the JSON files")
    args = p.parse_args()
    out = args.results.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not args.only_report:
        bench = [sys.executable, "-m", "handgrad.bench"]
        every = [*bench, "--json", str(out / "layers.json"), "--plot", str(out / "layers.png")]
        kept = [*bench, "--json", str(out / "layers_kept.json"), "--keep-memory"]
        wide = [*bench, "--json", str(out / "wide_layers.json"), "--sizes", "1024x1024"]
        for name in OF_THE_MLP:
            kept += ["--layer", name]
            wide += ["--layer", name]
        turns = ["--seconds", "2", "--no-first"] if args.quick else ["--seconds", "60"]
        sizes = ["--sizes", "32x64"] if args.quick else []
        commands = [
            [*every, "--seconds", "0.05" if args.quick else "1", *sizes],
            [*kept, "--seconds", "0.05" if args.quick else "2", *sizes],
            script("names_mlp.py", *turns, "--json", str(out / "names_mlp.json")),
            *(
                script("names_mlp.py", "--wide", "--threads", threads, *turns, *more, "--json", str(out / name))
                for threads, more, name in (
                    ("1", [], "wide_1.json"),
                    ("1", ["--keep-memory", "--no-first"], "wide_1_kept.json"),
                    ("2", ["--no-first"], "wide_2.json"),
                    ("2", ["--keep-memory", "--no-first"], "wide_2_kept.json"),
                )
            ),
            script("deep.py", *turns, "--json", str(out / "deep.json")),
            script("deep.py", "--wide", *turns, "--json", str(out / "deep_wide.json")),
            [*wide, "--seconds", "0.05" if args.quick else "2"],
            script("memory.py", "--json", str(out / "memory.json")),
            script("memory.py", "--deep", "--json", str(out / "memory_deep.json")),
            script("names_models.py", "--seconds", "1" if args.quick else "20", "--json", str(out / "models.json")),
            script("watching.py", "--seconds", "1" if args.quick else "20", "--json", str(out / "watching.json")),
            script("checks.py", *(["--only", "Tanh"] if args.quick else []), "--json", str(out / "checks.json")),
            script("scaling.py", "--seconds", "1" if args.quick else "20", "--json", str(out / "scaling.json")),
        ]
        if tcmalloc := find_library("tcmalloc_minimal"):  # Debian's libtcmalloc-minimal4
            preloaded = ["--allocator", tcmalloc, "--no-first", *turns]
            commands += [
                script(f"{name}.py", *preloaded, "--json", str(out / f"{name}_tcmalloc.json"))
                for name in ("names_mlp", "deep")
            ]
        failed = []
        for command in commands:
            print("$", " ".join(["python", *command[1:]]), flush=True)
            env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
            if subprocess.run(command, cwd=HERE.parent, env=env).returncode:
                failed.append(" ".join(command[1:]))
        if failed:
            print("failed: " + "; ".join(failed), file=sys.stderr)
    for name, draw in CHARTS.items():
        if (out / f"{name}.json").exists():
            draw(out / f"{name}.png", json.loads((out / f"{name}.json").read_text()))
    (out / "README.md").write_text(markdown(out))
    print(f"wrote {out}/README.md")


if __name__ == "__main__":
    main()
