"""What a check says: on a terminal and in a notebook."""

from __future__ import annotations

import pytest

from handgrad import Dropout, Tanh
from handgrad.testing import check_layer
from handgrad.testing.report import PropertyReport, Report

REASON = "there is a reason for it that takes more than one line of any terminal that anybody would sit at"


@pytest.fixture(scope="module")
def report():
    """Of a layer with a property that does not apply, and one skipped."""
    return check_layer(lambda: Dropout(0.5), x="*N", skip={"plumbing": REASON}, examples=10)


def test_the_report_is_at_most_100_columns_wide_and_says_everything(report):
    lines = str(report).splitlines()
    assert lines[0] == "Dropout: right, by autograd through forward"
    assert max(map(len, lines)) <= 100
    assert lines[2].split() == ["property", "examples", "distinct", "elements", "worst/limit", "seconds"]
    rows = {line.split()[1]: line for line in lines if line.startswith("P")}
    assert list(rows) == [p.name for p in report.properties]
    first = report.properties[0]
    numbers = [str(n) for n in (first.examples, first.distinct, first.elements)]
    assert rows["gradients"].split()[:5] == ["P1", "gradients", *numbers]
    assert " ".join(rows["accumulation"].split()) == "P2 accumulation does not apply: no parameters"
    start = rows["plumbing"].index("skipped")
    said = " ".join(line[start:].strip() for line in lines[lines.index(rows["plumbing"]) :]).split("  ")[0]
    assert said.startswith(f"skipped: {REASON}")
    faults = {line.split("  ")[0].strip() for line in lines}
    assert report.faults.keys() <= faults


def test_a_property_that_is_no_longer_registered_has_no_number():
    report = Report("Mine", "reference", [PropertyReport("odd", 5, 4, 3, 0.5, 0.25, remark="not all of it")])
    assert str(report).splitlines()[-1].split() == ["odd", "5", "4", "3", "0.5", "0.25", "not", "all", "of", "it"]
    assert repr(report) == str(report)


def test_a_notebook_shows_the_report_as_tables(report):
    html = report._repr_html_()
    assert html.startswith("<p>Dropout: right, by autograd through forward</p><table><tr><th ")
    assert html.count("<table>") == 2
    assert html.count("<tr>") == 2 + len(report.properties) + len(report.faults)
    assert f"skipped: {REASON}</td>" in html
    html = check_layer(Tanh, x="*N", skip={"edges": "a < b", "sensitivity": "elsewhere"}, examples=10)._repr_html_()
    assert "skipped: a &lt; b</td>" in html
    assert "skipped: elsewhere</td>" in html
