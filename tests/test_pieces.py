"""What goes through memory in pieces is what the formula gives of the whole."""

from __future__ import annotations

import math

import pytest
import torch

from handgrad import pieces
from handgrad.pieces import blockwise, eager_on_cpu, exp, is_whole, normal_cdf, normal_pdf, precise, where_positive


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of no more than four numbers, if not one row."""
    monkeypatch.setattr(pieces, "WHOLE", 4)
    monkeypatch.setattr(pieces, "PIECE", 4)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 2), (3, 9), (2, 1, 3)])
def test_rows_are_joined_and_sums_added(small_pieces, shape):
    a, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    counted = []

    def formula(a, b):
        counted.append(a.shape)
        return a * b, a.sum(0), (a + b).sum(0)

    if a.dim() == 0:
        assert torch.equal(blockwise(torch.mul, a, b), a * b)
        return
    rows, one, both = blockwise(formula, a, b)
    torch.testing.assert_close(rows, a * b, rtol=0, atol=0)
    torch.testing.assert_close(one, a.sum(0))
    torch.testing.assert_close(both, (a + b).sum(0))
    assert sum(shape[0] for shape in counted) == a.shape[0]
    assert len(counted) == 1 or max(shape.numel() for shape in counted) <= max(4, a[0].numel())


def test_what_a_formula_gets_whole(small_pieces):
    """What is small, or on a device of its own; not half precision, which it gets in float32."""
    small, large = torch.ones(2, 2), torch.ones(5, 1)
    cases = [(small, True), (large, False), (large.to("meta"), True), (small.half(), False), (small.bfloat16(), False)]
    for x, whole in cases:
        assert is_whole(x) is whole
        handed = []
        blockwise(lambda x, handed=handed: handed.append(x) or x, x)
        assert (handed[0] is x) is whole


def test_rows_may_have_another_width_and_dtype(small_pieces):
    x = torch.arange(24.0).view(8, 3)
    out = blockwise(lambda rows: rows.sum(1, keepdim=True).to(torch.float64), x)
    assert torch.equal(out, x.sum(1, keepdim=True).to(torch.float64))


def test_sums_may_come_without_rows(small_pieces):
    x = torch.randn(8, 3, dtype=torch.float64)
    rows, sums = blockwise(lambda piece: (None, piece.sum(0)), x)
    assert rows is None
    torch.testing.assert_close(sums, x.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_formula_may_write_its_rows_where_they_belong(small_pieces, dtype):
    """In half precision it computes in float32, and gets no place."""
    x, places = torch.randn(8, 3).to(dtype), []

    def formula(x, dx=None):
        places.append(dx)
        return torch.mul(x, 2, out=dx), x.sum(0)

    rows, sums = blockwise(formula, x)
    assert torch.equal(rows, 2 * x)
    torch.testing.assert_close(sums, x.float().sum(0))
    assert rows.dtype is dtype
    assert rows.is_contiguous()
    assert len(places) == 8
    for i, place in enumerate(places):
        assert place is None if dtype is torch.float16 else place.data_ptr() == rows[i].data_ptr()


def test_rows_that_are_elsewhere_are_copied_to_their_place(small_pieces):
    x = torch.randn(8, 3)
    assert torch.equal(blockwise(lambda x, dx=None: 2 * x, x), 2 * x)


def test_the_place_is_none_where_the_tensor_is_whole():
    x = torch.randn(8, 3)
    assert blockwise(lambda x, dx=None: dx, x) is None


def test_a_small_tensor_comes_whole():
    x = torch.randn(8, 3)
    assert blockwise(lambda rows: rows, x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_of_many_numbers_is_exp(dtype):
    x = torch.linspace(-80, 80, pieces.FEW + 1, dtype=dtype)
    eps = torch.finfo(dtype).eps
    relative = (exp(x) / torch.exp(x.double()).to(dtype) - 1).abs()
    assert bool((relative <= 4 * eps * (1 + x.abs())).all())
    assert torch.equal(exp(x[:5]), torch.exp(x[:5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_normal_distribution_of_many_numbers_is_that_of_few(dtype):
    """By gelu(x)/x, which is 0/0 at 0 and has no digits where x has none."""
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 2e-30, torch.finfo(dtype).tiny, -5e-324, 1e4, -1e4, 1e30, -1e30])
    x = torch.cat([special.to(dtype), torch.tensor([5e-324, 1e-45, -1e-45], dtype=dtype)])
    x = torch.cat([x, torch.linspace(-40, 40, pieces.FEW, dtype=dtype)])
    eps = torch.finfo(dtype).eps
    assert len(x) >= pieces.FEW
    expected = torch.special.ndtr(x.double())
    assert bool(((normal_cdf(x) - expected).abs() <= 4 * eps).all())
    assert bool(((normal_cdf(x[:20]) - expected[:20]).abs() <= eps).all())
    expected = torch.exp(x.double() ** 2 / -2) / math.sqrt(2 * math.pi)
    assert bool(((normal_pdf(x) - expected).abs() <= 4 * eps * (1 + x.double() ** 2) * expected + 1e-37).all())


@pytest.mark.parametrize("count", [3, 8])
def test_half_precision_is_computed_in_float32_and_its_rows_rounded(small_pieces, count):
    """Whole or in pieces; the sums stay in float32, where they are more than half precision holds."""
    x = torch.full((count, 2), 300.0, dtype=torch.float16)
    rows, sums = blockwise(lambda x: (x * x / 300, (x * x).sum(0)), x)
    assert rows.dtype is torch.float16
    assert (rows == 300).all()
    assert sums.dtype is torch.float32
    assert (sums == count * 90000).all()
    assert precise(lambda x: (None, x.sum()), x)[0] is None


@pytest.mark.parametrize("compiling", [False, True])
def test_where_positive_is_the_mask(monkeypatch, compiling):
    monkeypatch.setattr(pieces, "is_compiling", lambda: compiling)
    out, numbers = torch.tensor([0.0, -0.0, 1e-40, 3.0, torch.inf, torch.nan]), [2.0, -2.0, torch.inf, torch.nan]
    for dout in torch.tensor(numbers).unsqueeze(1).expand(-1, 6).unbind():
        torch.testing.assert_close(where_positive(dout, out), dout.where(out > 0, 0), equal_nan=True, rtol=0, atol=0)


def test_only_on_the_cpu_and_not_while_compiling_is_a_tensor_in_pieces_or_looked_at(small_pieces, monkeypatch):
    x, elsewhere, seen = torch.ones(6, 2), torch.ones(6, 2, device="meta"), []
    assert eager_on_cpu(x)
    assert not eager_on_cpu(elsewhere)
    blockwise(lambda t: seen.append(len(t)) or t, elsewhere)
    monkeypatch.setattr(pieces, "is_compiling", lambda: True)
    assert not eager_on_cpu(x)
    blockwise(lambda t: seen.append(len(t)) or t, x)
    assert seen == [6, 6]
