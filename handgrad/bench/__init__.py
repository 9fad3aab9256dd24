"""How fast a layer is, and how much memory it takes, against the same layer under autograd.

From the shell, ``python -m handgrad.bench --help``. From Python:

- `measure(twin, size)` times one layer, forward and backward, against the equal torch module; `handgrad.twins` has
  the twin of each layer;
- `profile(model, x, y)` has one row per layer: where the time and the memory of a model go;
- `interleave(contenders, seconds)` is the timing itself, for anything else.
"""

from handgrad.bench.environment import environment
from handgrad.bench.measure import Entry, Measurement, measure
from handgrad.bench.memory import peak_bytes, recorded_bytes
from handgrad.bench.profiler import Profile, Row, profile
from handgrad.bench.timing import Ratio, Times, interleave, ratio

__all__ = [
    "Entry",
    "Measurement",
    "Profile",
    "Ratio",
    "Row",
    "Times",
    "environment",
    "interleave",
    "measure",
    "peak_bytes",
    "profile",
    "ratio",
    "recorded_bytes",
]
