"""How fast a layer is, and how much memory it takes, against the same layer under autograd.

From the shell, ``python -m handgrad.bench --help``. From Python:

- `measure(twin, size)` times one layer, forward and backward, against the equal torch module, inside a model and
  alone; `handgrad.twins` has the twin of each layer;
- `profile(model, x, y)` has one row per layer: where the time and the memory of a model go; its `plot(path)` makes a
  picture of it;
- `peak_bytes(run)` is the most memory that anything run takes at one moment;
- `interleave(contenders, seconds)` is the timing itself, for anything else; `ratio` compares two of its results, and
  `difference` says what the one has beyond the other.

How high the memory of a step rises is decided at the end of forward, when everything that the layers recorded is there.
Which layer holds how much of it is the column "recorded" of the profile, and the right half of its picture;
`model.summary(x)` has the same column without running a step, and `model.records()` says it of a model as it stands.
"""

from handgrad.bench.environment import environment
from handgrad.bench.measure import Entry, Measurement, measure
from handgrad.bench.memory import peak_bytes, recorded_bytes
from handgrad.bench.profiler import Profile, Row, profile
from handgrad.bench.timing import Ratio, Times, difference, interleave, ratio

__all__ = [
    "Entry",
    "Measurement",
    "Profile",
    "Ratio",
    "Row",
    "Times",
    "difference",
    "environment",
    "interleave",
    "measure",
    "peak_bytes",
    "profile",
    "ratio",
    "recorded_bytes",
]
