"""Tables as text and as HTML; times and bytes in the unit that suits them."""

from __future__ import annotations

import pytest

from handgrad.tables import BYTES, Shown, Table, bytes_text, html_table, seconds_text, text_table, unit_of


def test_a_wide_table_has_its_longest_text_in_several_lines_and_loses_nothing():
    reason = "skipped because " + "it says nothing-at-all -> about this layer " * 4
    path = "a_name_without_any_spaces." * 3
    rows = [["", "rows", "note"], [path, "1,234,567", reason], ["1", "2", "short"]]
    lines = text_table(rows, "lrl").splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) > 3
    whole = "".join("".join(lines).split())
    for cell in ("1,234,567", "short"):
        assert cell in whole
    starts = "".join(line[: lines[0].index("rows") - 6].strip() for line in lines[1:-1])
    assert starts.startswith(path[:20])
    words = [word for line in lines[1:-1] for word in line[lines[0].index("note") :].split()]
    assert words == reason.split()
    assert lines[-1].split() == ["1", "2", "short"]


def test_numbers_are_never_taken_apart():
    number = "9" * 60
    assert text_table([["a", "b"], [number, number]], "rr").splitlines()[1] == f"{number}  {number}"
    assert number in text_table([["some text", "b"], ["some more text " * 5, number * 2]], "lr")


def test_html_says_everything_and_escapes_it():
    html = html_table([["layer", "rows"], ["x" * 200 + " <b>", "5"]], "lr")
    assert html.startswith('<table><tr><th style="text-align: left">layer</th>')
    assert "x" * 200 + " &lt;b&gt;</td>" in html
    assert '<td style="text-align: right">5</td>' in html


def test_what_is_shown_has_lines_and_tables():
    class Both(Shown):
        def parts(self):
            return ["a < b", "", Table([["n"], ["1"]], "r")]

    assert repr(Both()) == str(Both()) == "a < b\n\nn\n1"
    assert Both()._repr_html_().startswith("<p>a &lt; b</p><table>")
    with pytest.raises(NotImplementedError, match="Shown must define parts"):
        str(Shown())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (1 << 10, "1.0 KB"), (999 << 10, "999.0 KB"), (5 << 30, "5.0 GB")],
)
def test_bytes(count, text):
    assert bytes_text(count) == text


def test_the_largest_unit_goes_on():
    assert bytes_text(4096 << 30) == "4096.0 GB"
    assert seconds_text(5000) == "5000.0 s"
    assert seconds_text(999.96e-6) == "1.0 ms"
    assert unit_of(0, BYTES) == ("B", 1)
