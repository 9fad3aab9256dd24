"""Every layer against the equal torch module, inside a model and alone; the flags of ``python -m handgrad.bench``.

python benchmarks/layers.py
"""

from handgrad.bench.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
