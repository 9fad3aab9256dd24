"""Make all results again: ``python benchmarks/run.py``, some twenty minutes on a machine that does nothing else.

Writes JSON, the charts and a README with the tables into benchmarks/results. Needs matplotlib; NumPy and JAX compete
where they are installed: ``pip install -e ".[models,bench]"``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the source beside it, also where handgrad is not installed

from memory import HEAD as MEMORY_HEAD  # noqa: E402
from memory import row as memory_row  # noqa: E402
from names_mlp import chart  # noqa: E402

from handgrad.tables import bytes_text, seconds_text  # noqa: E402

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
        ("wide_1", steps),
        ("wide_1_kept", steps),
        ("wide_2", steps),
        ("wide_2_kept", steps),
        ("wide_layers", halves),
        ("memory", memory),
        ("watching", watching),
        ("checks", checks),
    ):
        path = results / f"{name}.json"
        if not path.exists():
            continue
        data = json.loads(path.read_text())
        env = data["environment"]
        title, rows, notes = show(data)
        text += ["", f"## {title}", ""]
        text += [f"{env['machine']}, torch {env['torch']}, Python {env['python']}, commit {env['commit']}.", *notes, ""]
        if (results / f"{name}.png").exists():
            text += [f"![{title}]({name}.png)", ""]
        text += ["| " + " | ".join(row) + " |" for row in (rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:])]
    return "\n".join(text) + "\n"


def layers(data: dict[str, Any]) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """One row per layer: autograd's time over ours at each size, and the memory at the largest."""
    results = data["results"]
    sizes = sorted({tuple(r["size"]) for r in results})
    rows = [["layer", *(f"{n}x{d}" for n, d in sizes), "recorded: ours", "autograd's", "peak: ours", "autograd's"]]
    for name in dict.fromkeys(r["layer"] for r in results):
        by_size = {tuple(r["size"]): r["by"] for r in results if r["layer"] == name}
        cells = []
        for size in sizes:
            value, low, high = by_size[size]["autograd"]["ratio"]["both"] if size in by_size else (math.nan,) * 3
            cells.append(f"{value:.2f}" + (" =" if low <= 1 <= high else ""))
        last = by_size[max(by_size)]
        kept = [
            bytes_text(last[who][what]) for what in ("recorded_bytes", "peak_bytes") for who in ("handgrad", "autograd")
        ]
        rows.append([name, *cells, *kept])
    ratios = [(r["layer"], r["by"]["autograd"]["ratio"]["both"][0]) for r in results]
    mean = geometric_mean([ratio for _, ratio in ratios])
    of_model = geometric_mean([ratio for name, ratio in ratios if name in OF_THE_MLP])
    memory = "without fresh pages" if data.get("keep_memory") else "memory as the allocator gives it"
    notes = [
        "Autograd's time over ours, forward and backward, one thread, float32: above 1 handgrad is faster, = means no",
        f"difference beyond the noise; {memory}. Geometric mean {mean:.2f}; of {', '.join(OF_THE_MLP)} {of_model:.2f}.",
        "Memory at the largest size.",
    ]
    return "Layers against autograd" + (", freed memory kept" if data.get("keep_memory") else ""), rows, notes


def halves(data: dict[str, Any]) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """One row per layer: forward and backward by themselves."""
    rows = [["layer", "forward: ours", "autograd's", "ratio", "backward: ours", "autograd's", "ratio"]]
    for r in data["results"]:
        ours, theirs = r["by"]["handgrad"], r["by"]["autograd"]
        cells = []
        for half in ("forward", "backward"):
            cells += [seconds_text(ours[half]), seconds_text(theirs[half]), f"{theirs['ratio'][half][0]:.2f}"]
        rows.append([r["layer"], *cells])
    n, d = data["results"][0]["size"]
    return f"Where the wide step's time goes: its layers at {n}x{d}", rows, ["One thread; autograd's time over ours."]


def steps(data: dict[str, Any]) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """One row per contender: the time of a step."""
    results = sorted(data["results"], key=lambda r: r["seconds"])
    rows = [["contender", "a step", "spread", "autograd's time over this", "to the first result"]]
    for r in results:
        value, low, high = r["autograd_over_this"]
        star = " (the best autograd)" if r["best_autograd"] else ""
        cells = [seconds_text(r["seconds"]), f"{r['spread']:.0%}", f"{value:.2f} ({low:.2f} to {high:.2f})"]
        rows.append([r["contender"] + star, *cells, seconds_text(r["first_result_seconds"])])
    first = results[0]
    title = f"A step of the names MLP: hidden {first['hidden']}, batch {first['batch']}, {first['threads']} thread(s)"
    title += ", freed memory kept" if data.get("keep_memory") else ""
    return title, rows, ["Sampling the minibatch included; the time to the first result includes compiling."]


def memory(data: dict[str, Any]) -> tuple[str, Sequence[Sequence[str]], list[str]]:
    """One row per contender: how far memory rises."""
    rows = [MEMORY_HEAD, *map(memory_row, data["results"])]
    title = f"Peak memory of a step: {data['depth']} x (Linear, BatchNorm1d, Tanh), width {data['width']}"
    notes = [
        f"Batch {data['batch']}, each in a fresh process, above what model, optimizer and data take. Freed memory is",
        "kept by handgrad.keep_freed_memory(); autograd gets the same settings by the environment.",
    ]
    return title, rows, notes


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
        turns, sizes = "2" if args.quick else "60", ["--sizes", "32x64"] if args.quick else []
        commands = [
            [*every, "--seconds", "0.05" if args.quick else "1", *sizes],
            [*kept, "--seconds", "0.05" if args.quick else "2", *sizes],
            script("names_mlp.py", "--seconds", turns, "--json", str(out / "names_mlp.json")),
            *(
                script(
                    "names_mlp.py", "--wide", "--threads", threads, "--seconds", turns, *keep, "--json", str(out / name)
                )
                for threads in ("1", "2")
                for keep, name in (([], f"wide_{threads}.json"), (["--keep-memory"], f"wide_{threads}_kept.json"))
            ),
            [*wide, "--seconds", "0.05" if args.quick else "2"],
            script("memory.py", "--json", str(out / "memory.json")),
            script("models.py", "--seconds", "1" if args.quick else "20", "--json", str(out / "models.json")),
            script("watching.py", "--seconds", "1" if args.quick else "20", "--json", str(out / "watching.json")),
            script("checks.py", *(["--only", "Tanh"] if args.quick else []), "--json", str(out / "checks.json")),
        ]
        failed = []
        for command in commands:
            print("$", " ".join(["python", *command[1:]]), flush=True)
            env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
            if subprocess.run(command, cwd=HERE.parent, env=env).returncode:
                failed.append(" ".join(command[1:]))
        if failed:
            print("failed: " + "; ".join(failed), file=sys.stderr)
    if (out / "names_mlp.json").exists():
        chart(out / "names_mlp.png", json.loads((out / "names_mlp.json").read_text())["results"])
    (out / "README.md").write_text(markdown(out))
    print(f"wrote {out}/README.md")


if __name__ == "__main__":
    main()
