"""The mutation tool: it builds what it changes faithfully, and what it has judged is not lost."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
import textwrap

import pytest

from tests import mutate

LAYER = """
from __future__ import annotations

from typing import TYPE_CHECKING

from handgrad import Layer

if TYPE_CHECKING:
    from torch import Tensor


def third(d: Tensor) -> Tensor:
    return d / 3.0


def applied(formula, d):
    return formula(d)


class Base(Layer):
    def factor(self) -> float:
        return 2.0


class Double(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = x * 2.0
        self.push(out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        factor: Tensor = super().factor()
        self.pop(dout)

        def formula(d: Tensor | None) -> Tensor | None:
            return d * factor

        return applied(third, applied(self.tripled, formula(dout)))

    @staticmethod
    def tripled(d: Tensor) -> Tensor:
        return d * 3.0
"""
CASES_FILE = """
from types import SimpleNamespace

import doubling
from handgrad.testing import check_layer

CASES = {
    "Double": SimpleNamespace(
        covers=doubling.Double, keywords={}, run=lambda **more: check_layer(doubling.Double, x="*N", **more)
    )
}
"""


@pytest.fixture
def doubling(tmp_path, monkeypatch):
    """A module of one layer, its names for type checkers missing at run time, and the file of its case."""
    (tmp_path / "doubling.py").write_text(LAYER)
    (tmp_path / "cases.py").write_text(CASES_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("doubling")
    del sys.modules["doubling"]


def test_a_rebuilt_function_works_as_before(doubling):
    """With annotations that name nothing at run time, and with super()."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(doubling.Double.backward))).body[0]
    doubling.Double.backward = mutate.build(tree, doubling.Double, doubling)
    cases = mutate.load_cases(str(inspect.getfile(doubling)).replace("doubling.py", "cases.py"))
    assert cases["Double"].run().properties[0].examples > 0


def test_nothing_that_is_not_run_is_mutated(doubling):
    """No annotation, of the function or of one inside it; every mutant computes something else."""
    assert not [mutant.key for mutant in mutate.mutants(doubling) if "None" in mutant.key]


def test_a_formula_is_mutated_wherever_it_stands(doubling):
    """Inside the backward, beside it in the class, or in the module; called, or handed on to whoever calls it."""
    found = {mutant.key for mutant in mutate.mutants(doubling)}
    assert {
        "Double.backward: d * factor -> d / factor",  # inside, called
        "Double.tripled: d * 3.0 -> d / 3.0",  # in the class, a static method handed on
        "third: d / 3.0 -> d * 3.0",  # in the module, handed on
        "Base.factor: 2.0 -> 3.0",  # called
    } <= found


def test_what_was_judged_before_an_interrupt_is_in_the_file(doubling, tmp_path, monkeypatch, capsys):
    """Every verdict is written as it comes."""
    arguments = ["doubling", "--cases", str(tmp_path / "cases.py"), "--json", str(tmp_path / "verdicts.json")]
    judged = mutate.judge_all

    def interrupted(*what):
        verdicts = judged(*what)
        yield next(verdicts)
        yield next(verdicts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mutate, "judge_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mutate.main(arguments)
    (verdicts,) = json.loads((tmp_path / "verdicts.json").read_text()).values()
    assert len(verdicts) == 2
    capsys.readouterr()
    assert mutate.main(arguments) == 0
    shown = capsys.readouterr()
    total = len(list(mutate.mutants(doubling)))
    assert shown.out.split()[-5:] == ["doubling", str(total), str(total), "0", "0"]
    assert f"{total}/{total}" in shown.err


def test_an_edit_of_the_source_while_it_runs_changes_no_mutant(doubling, tmp_path, monkeypatch, capsys):
    """All sources are read at the start."""
    judged = mutate.judge_all

    def edited(*what):
        (tmp_path / "doubling.py").write_text("raise HandgradError\n" * 60)
        return judged(*what)

    total = str(len(list(mutate.mutants(doubling))))
    monkeypatch.setattr(mutate, "judge_all", edited)
    assert mutate.main(["doubling", "--cases", str(tmp_path / "cases.py")]) == 0
    assert capsys.readouterr().out.split()[-5:] == ["doubling", total, total, "0", "0"]
