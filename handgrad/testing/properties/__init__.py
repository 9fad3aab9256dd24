"""The fourteen properties of a right layer, one `assert_<name>` each; to import them is to register them.

Each takes a Sample (from `strategies.samples`), or a layer, an x and optionally a dout.
"""

from handgrad.testing.properties import memory, order, values

__all__ = ["memory", "order", "values"]
