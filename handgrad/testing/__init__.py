"""Proof that a hand-written backward is right: one line a layer.

`gradient_table` needs torch alone; everything else needs hypothesis (`pip install "handgrad[testing]"`), which is
imported on first use.
"""

from handgrad.testing.table import GradientTable, gradient_table

__all__ = ["GradientTable", "gradient_table"]
