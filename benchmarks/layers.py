"""Every layer against the equal torch module under autograd, at three sizes; the flags of ``python -m handgrad.bench``.

python benchmarks/layers.py
"""

from handgrad.bench.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
