"""Make names_mlp_by_hand.ipynb of names_mlp_by_hand.py: its cells, each with what it prints.

The script is the source: change it, then run this. (It needs jupytext, nbclient and ipykernel: the extra `dev`.)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

SCRIPT = Path(__file__).with_name("names_mlp_by_hand.py")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def make() -> nbformat.NotebookNode:
    """The notebook with its outputs, and nothing in it that another run would make anew, such as the time."""
    notebook = jupytext.read(SCRIPT)
    notebook.cells = [cell for cell in notebook.cells if "active-py" not in cell.metadata.get("tags", [])]
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    where = {"metadata": {"path": str(SCRIPT.parent)}}
    quiet = ["--log-level=ERROR"]  # not: that what goes to the kernel, on this machine, is not encrypted
    NotebookClient(notebook, timeout=120, record_timing=False, resources=where, extra_arguments=quiet).execute()
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    return notebook


def main() -> int:
    """Write the notebook."""
    parser = argparse.ArgumentParser(description=__doc__)
    path = SCRIPT.with_suffix(".ipynb")
    parser.add_argument("path", nargs="?", type=Path, default=path, help="where to (default: beside the script)")
    nbformat.write(make(), parser.parse_args().path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
