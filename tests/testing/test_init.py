"""What needs hypothesis and what does not."""

from __future__ import annotations

import subprocess
import sys


def test_the_table_needs_no_hypothesis():
    """A model script may use it where only torch is installed."""
    code = "import sys; sys.modules['hypothesis'] = None; from handgrad.testing import gradient_table, compare"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    code = "import sys; sys.modules['hypothesis'] = None; from handgrad.testing import check_layer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert 'pip install "handgrad[testing]"' in done.stderr
