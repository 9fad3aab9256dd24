"""The fourteen properties of a right layer, one `assert_<name>` each.

Each takes a Sample (from `strategies.samples`), or a layer, an x and optionally a dout.
"""

from handgrad.testing.properties.memory import assert_aliasing, assert_layouts, assert_ownership, assert_plumbing
from handgrad.testing.properties.order import assert_accumulation, assert_modes, assert_reuse, assert_rng
from handgrad.testing.properties.values import (
    assert_dtypes,
    assert_edges,
    assert_gradients,
    assert_linearity,
    assert_special,
    assert_state,
)

__all__ = [
    "assert_accumulation",
    "assert_aliasing",
    "assert_dtypes",
    "assert_edges",
    "assert_gradients",
    "assert_layouts",
    "assert_linearity",
    "assert_modes",
    "assert_ownership",
    "assert_plumbing",
    "assert_reuse",
    "assert_rng",
    "assert_special",
    "assert_state",
]
