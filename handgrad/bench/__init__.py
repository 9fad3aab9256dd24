"""How fast a layer is, and how much memory it takes, against the same layer under autograd.

From the shell, ``python -m handgrad.bench --help``. From Python:

- `compare(case, size)` times one layer, forward and backward, against the equal torch module;
- `profile(model, x, y)` has one row a layer: where the time and the memory of a model go;
- `interleave(contenders, seconds)` is the timing itself, for anything else.
"""

from handgrad.bench.cases import CASES, Case
from handgrad.bench.compare import Comparison, Entry, compare
from handgrad.bench.environment import environment
from handgrad.bench.memory import peak_bytes, recorded_bytes
from handgrad.bench.profiler import Profile, Row, profile
from handgrad.bench.timing import Ratio, Times, interleave, ratio

__all__ = [
    "CASES",
    "Case",
    "Comparison",
    "Entry",
    "Profile",
    "Ratio",
    "Row",
    "Times",
    "compare",
    "environment",
    "interleave",
    "peak_bytes",
    "profile",
    "ratio",
    "recorded_bytes",
]
