"""What a check costs: ``python benchmarks/checks.py`` times the default check of every case, one after the other."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from handgrad.bench.report import write_json  # noqa: E402  # found by the path above
from tests.mutate import load_cases  # noqa: E402


def main() -> int:
    """Print seconds, wall and CPU, of each case; exit code 1 where the wall time of one reaches `--limit`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=str(ROOT / "tests" / "cases.py"))
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--limit", type=float, default=3.0, help="seconds that a check may take")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    given = parser.parse_args()
    rows = []
    for name, case in load_cases(given.cases).items():
        if given.only not in name:
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        report = case.run()
        row = {
            "case": name,
            "seconds": round(time.perf_counter() - wall, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "examples": report if isinstance(report, int) else sum(p.examples for p in report.properties),
        }
        rows.append(row)
        print(f"{row['case']:<40}{row['seconds']:>8}{row['cpu_seconds']:>8}{row['examples']:>8}", flush=True)
    slowest = max(rows, key=lambda r: r["seconds"])
    mean = sum(r["cpu_seconds"] for r in rows) / len(rows)
    print(f"slowest: {slowest['case']} {slowest['seconds']} s; mean {mean:.2f} s of CPU; load {os.getloadavg()[0]:.1f}")
    if given.json:
        write_json(given.json, rows, load=os.getloadavg()[0])
    return int(slowest["seconds"] >= given.limit)


if __name__ == "__main__":
    sys.exit(main())
