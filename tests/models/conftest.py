"""The names that the tests of the names models train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from names.data import DATA
from tests.models.building import build_train


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fortieth of the shipped names, so that a run starts at once; all letters of the alphabet occur."""
    path = tmp_path_factory.mktemp("data") / "names.txt"
    path.write_text("\n".join(DATA.read_text().splitlines()[::40]))
    return path


@pytest.fixture(scope="session")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of models/cpp."""
    return build_train(tmp_path_factory.mktemp("cpp"))
