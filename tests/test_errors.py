"""Every message, pinned: what must hold, what came, and where."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import handgrad as hg

x32 = torch.ones(4, 3)


def after(layer: hg.Layer, *inputs: torch.Tensor) -> hg.Layer:
    """The layer with one forward waiting."""
    layer(*inputs)
    return layer


def stale() -> Any:
    """A record left behind, then a changed weight, then the next forward."""
    layer = after(hg.Linear(3, 2), x32)
    layer.weight.add_(1)
    return layer(x32)


def overwritten() -> Any:
    """An input changed between forward and backward."""
    layer, x = hg.Linear(3, 2), torch.ones(4, 3)
    layer(x)
    x.zero_()
    return layer.backward(torch.ones(4, 2))


def stepped() -> Any:
    """A parameter changed between forward and backward."""
    layer = after(hg.Linear(3, 2), x32)
    layer.weight.mul_(2)
    return layer.backward(torch.ones(4, 2))


ERRORS: list[tuple[Callable[[], Any], type[Exception], type[Exception], str]] = [
    # shapes
    (
        lambda: hg.Linear(30, 64)(torch.ones(32, 31)),
        hg.ShapeError,
        ValueError,
        "Linear(30 -> 64).forward: last dimension of x must be 30, got shape (32, 31)",
    ),
    (
        lambda: hg.Linear(30, 64)(torch.tensor(1.0)),
        hg.ShapeError,
        ValueError,
        "Linear(30 -> 64).forward: last dimension of x must be 30, got shape ()",
    ),
    (
        lambda: hg.BatchNorm1d(5)(torch.ones(2, 4)),
        hg.ShapeError,
        ValueError,
        "BatchNorm1d(5).forward: x must be (N, 5) or (N, 5, L), got shape (2, 4)",
    ),
    (
        lambda: hg.BatchNorm1d(5)(torch.ones(1, 5)),
        hg.ShapeError,
        ValueError,
        "BatchNorm1d(5).forward: the variance of a batch needs more than one value per channel, got shape (1, 5); "
        "evaluate a single row under eval()",
    ),
    (
        lambda: hg.Flatten(2)(x32),
        hg.ShapeError,
        ValueError,
        "Flatten(start_dim=2).forward: x must have dimensions 2 to -1 in order, got shape (4, 3)",
    ),
    (
        lambda: hg.CrossEntropy()(x32, torch.zeros(3, dtype=torch.int64)),
        hg.ShapeError,
        ValueError,
        "CrossEntropy().forward: x must be (C,) or (N, C, ...) and target the same without C, got (4, 3) and (3,)",
    ),
    (
        lambda: hg.CrossEntropy(torch.ones(4))(x32, torch.zeros(4, dtype=torch.int64)),
        hg.ShapeError,
        ValueError,
        "CrossEntropy(weight of shape (4,)).forward: x must have 4 classes, one per weight, got shape (4, 3)",
    ),
    (
        lambda: after(hg.Tanh(), x32).backward(torch.ones(3, 4)),
        hg.ShapeError,
        ValueError,
        "Tanh().backward: dout must have the shape of the output of the forward it belongs to, (4, 3), got (3, 4)",
    ),
    (
        lambda: after(hg.CrossEntropy(reduction="none"), x32, torch.zeros(4, dtype=torch.int64)).backward(),
        hg.ShapeError,
        ValueError,
        "CrossEntropy(reduction='none').backward: only a scalar loss has a default dout; "
        "this one needs dout of shape (4,)",
    ),
    (
        lambda: hg.CrossEntropy()(x32, torch.zeros(4, 2)),
        hg.ShapeError,
        ValueError,
        "CrossEntropy().forward: target must be int64, the indices of classes, or their probabilities, of the shape "
        "and dtype of x, (4, 3) torch.float32; got (4, 2) torch.float32",
    ),
    (
        lambda: hg.CrossEntropy(torch.ones(4))(x32, torch.zeros(4, 3)),
        hg.ShapeError,
        ValueError,
        "CrossEntropy(weight of shape (4,)).forward: x must have 4 classes, one per weight, got shape (4, 3)",
    ),
    # dtypes
    (
        lambda: hg.Linear(3, 2).to(torch.int64),
        hg.DtypeError,
        TypeError,
        "Linear(3 -> 2).to: the dtype must be a floating one, got torch.int64",
    ),
    (
        lambda: hg.Linear(3, 2)(x32.double()),
        hg.DtypeError,
        TypeError,
        "Linear(3 -> 2).forward: x must have torch.float32, the dtype of the parameters, got torch.float64; "
        "convert x or use layer.to(dtype)",
    ),
    (
        lambda: hg.Tanh()(torch.ones(3, dtype=torch.int64)),
        hg.DtypeError,
        TypeError,
        "Tanh().forward: x must have a floating dtype, got torch.int64; convert x or use layer.to(dtype)",
    ),
    (
        lambda: hg.Tanh()([1.0]),
        hg.DtypeError,
        TypeError,
        "Tanh().forward: x must be a torch.Tensor, got list",
    ),
    (
        lambda: hg.Embedding(4, 2)(torch.ones(3)),
        hg.DtypeError,
        TypeError,
        "Embedding(4 -> 2).forward: x must be an int64 or int32 tensor of indices, got torch.float32",
    ),
    (
        lambda: hg.CrossEntropy()(x32, torch.zeros(4)),
        hg.DtypeError,
        TypeError,
        "CrossEntropy().forward: target must be int64, the indices of classes, or their probabilities, of the shape "
        "and dtype of x, (4, 3) torch.float32; got (4,) torch.float32",
    ),
    (
        lambda: after(hg.Tanh(), x32).backward(x32.double()),
        hg.DtypeError,
        TypeError,
        "Tanh().backward: dout must have the dtype of the output, torch.float32, got torch.float64",
    ),
    (
        lambda: after(hg.Tanh(), x32).backward(None),
        hg.DtypeError,
        TypeError,
        "Tanh().backward: dout must be a torch.Tensor, got NoneType",
    ),
    (
        lambda: hg.CrossEntropy()(x32, torch.zeros(4, 3, dtype=torch.float64)),
        hg.DtypeError,
        TypeError,
        "CrossEntropy().forward: target must be int64, the indices of classes, or their probabilities, of the shape "
        "and dtype of x, (4, 3) torch.float32; got (4, 3) torch.float64",
    ),
    (
        lambda: hg.CrossEntropy()(x32, torch.zeros(4, dtype=torch.int32)),
        hg.DtypeError,
        TypeError,
        "CrossEntropy().forward: target must be an int64 tensor of class indices, got torch.int32",
    ),
    # indices
    (
        lambda: hg.Embedding(4, 2)(torch.tensor([0, 4])),
        hg.IndexRangeError,
        IndexError,
        "Embedding(4 -> 2).forward: indices must be in 0..3, got 4",
    ),
    (
        lambda: hg.Embedding(4, 2, padding_idx=0)(torch.tensor([1, -1])),
        hg.IndexRangeError,
        IndexError,
        "Embedding(4 -> 2, padding_idx=0).forward: indices must be in 0..3, got -1",
    ),
    (
        lambda: hg.CrossEntropy()(x32, torch.tensor([0, 3, 1, 1])),
        hg.IndexRangeError,
        IndexError,
        "CrossEntropy().forward: targets must be in 0..2 or ignore_index=-100, got 3",
    ),
    (
        lambda: hg.CrossEntropy(ignore_index=7)(x32, torch.tensor([0, 7, -1, 1])),
        hg.IndexRangeError,
        IndexError,
        "CrossEntropy(ignore_index=7).forward: targets must be in 0..2 or ignore_index=7, got -1",
    ),
    # arguments
    (
        lambda: hg.CrossEntropy(ignore_index=0)(x32, torch.zeros(4, 3)),
        hg.ArgumentError,
        ValueError,
        "CrossEntropy(ignore_index=0).forward: ignore_index must be left out where the target is probabilities, got 0",
    ),
    (lambda: hg.Linear(0, 3), hg.ArgumentError, ValueError, "Linear: in_features must be an int of at least 1, got 0"),
    (
        lambda: hg.Embedding(3, -1),
        hg.ArgumentError,
        ValueError,
        "Embedding: embedding_dim must be an int of at least 1, got -1",
    ),
    (
        lambda: hg.Embedding(3, 2, padding_idx=3),
        hg.ArgumentError,
        ValueError,
        "Embedding: padding_idx must be within the 3 rows, got 3",
    ),
    (
        lambda: hg.Embedding(3, 2, None, 1.0),
        hg.ArgumentError,
        ValueError,
        "Embedding: max_norm must be None, for a forward does not change its table; instead call "
        "layer.weight.renorm_(2, 0, 1.0) after each optimizer step",
    ),
    (
        lambda: hg.BatchNorm1d(0),
        hg.ArgumentError,
        ValueError,
        "BatchNorm1d: num_features must be an int of at least 1, got 0",
    ),
    (
        lambda: hg.CrossEntropy(reduction="avg"),
        hg.ArgumentError,
        ValueError,
        "CrossEntropy: reduction must be one of ('mean', 'sum', 'none'), got 'avg'",
    ),
    (
        lambda: hg.CrossEntropy(label_smoothing=2),
        hg.ArgumentError,
        ValueError,
        "CrossEntropy: label_smoothing must be in 0..1, got 2",
    ),
    (
        lambda: hg.Sequential(hg.Tanh(), torch.tanh),
        hg.ArgumentError,
        ValueError,
        "Sequential: every argument must be a Layer, got builtin_function_or_method at 1",
    ),
    (lambda: hg.SGD([torch.ones(1)], lr=-1), hg.ArgumentError, ValueError, "SGD: lr must be at least 0, got -1"),
    (
        lambda: hg.SGD([torch.ones(1)], nesterov=True),
        hg.ArgumentError,
        ValueError,
        "SGD: nesterov needs momentum above 0 and dampening 0, got 0.0 and 0.0",
    ),
    # order of calls
    (
        lambda: hg.Linear(3, 2).backward(torch.ones(4, 2)),
        hg.StateError,
        RuntimeError,
        "Linear(3 -> 2).backward: no forward is waiting for a backward; call forward first, outside torch.no_grad(), "
        "and backward once for each forward",
    ),
    (
        overwritten,
        hg.StateError,
        RuntimeError,
        "Linear(3 -> 2).backward: a recorded tensor of shape (4, 3) was changed in place after the forward that "
        "recorded it; run backward before an optimizer step or any in-place change",
    ),
    (
        stepped,
        hg.StateError,
        RuntimeError,
        "Linear(3 -> 2).backward: weight was changed in place after the forward that recorded it; "
        "run backward before an optimizer step or any in-place change",
    ),
    (
        stale,
        hg.StateError,
        RuntimeError,
        "Linear(3 -> 2).forward: 1 earlier forward(s) never had a backward, and weight has changed since; "
        "evaluate under torch.no_grad(), or discard them with drop_records()",
    ),
    (
        lambda: after(hg.Linear(3, 2), x32).to(torch.float64),
        hg.StateError,
        RuntimeError,
        "Linear(3 -> 2).to: a forward still waits for its backward; run it, or drop_records()",
    ),
    (
        lambda: hg.TrainStep(after(m := hg.Linear(3, 2), x32), hg.CrossEntropy(), hg.SGD(m.parameters()))(
            x32, torch.zeros(4, dtype=torch.int64)
        ),
        hg.StateError,
        RuntimeError,
        "Linear(3 -> 2).forward: 1 earlier forward(s) still wait for their backward; "
        "evaluate under torch.no_grad(), or drop_records()",
    ),
    # state dicts
    (
        lambda: hg.Linear(3, 2).load_state_dict("linear.pt"),
        hg.StateDictError,
        RuntimeError,
        "Linear(3 -> 2).load_state_dict: state must be a state_dict, a mapping from names to tensors; of a file, first "
        "load it; got str",
    ),
    (
        lambda: hg.Linear(3, 2).load_state_dict({"weight": torch.ones(3, 2), "gain": torch.ones(1)}),
        hg.StateDictError,
        RuntimeError,
        "Linear(3 -> 2).load_state_dict: \n  weight: expected shape (2, 3), got (3, 2)\n  bias: missing\n"
        "  gain: unexpected",
    ),
    # places
    (
        lambda: hg.Sequential(hg.Tanh(), hg.Linear(3, 2))(torch.ones(2, 4)),
        hg.ShapeError,
        ValueError,
        "in 1 (Linear(3 -> 2)): Linear(3 -> 2).forward: last dimension of x must be 3, got shape (2, 4)",
    ),
    (
        lambda: hg.Sequential(hg.Tanh(), hg.Sequential(hg.Tanh(), hg.BatchNorm1d(4)))(x32),
        hg.ShapeError,
        ValueError,
        "in 1.1 (BatchNorm1d(4)): BatchNorm1d(4).forward: x must be (N, 4) or (N, 4, L), got shape (4, 3)",
    ),
]


@pytest.mark.parametrize(("act", "kind", "builtin", "message"), ERRORS)
def test_the_error(act: Callable[[], Any], kind: type[Exception], builtin: type[Exception], message: str) -> None:
    """Its class, the builtin that it also is, and its text to the letter."""
    with pytest.raises(hg.HandgradError, match=f"^{re.escape(message)}$") as caught:
        act()
    assert type(caught.value) is kind
    assert isinstance(caught.value, builtin)


def test_a_foreign_error_keeps_its_type_and_gets_the_place() -> None:
    """An error that is not handgrad's passes through a container unchanged, with a note."""

    class Broken(hg.Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        hg.Sequential(hg.Tanh(), hg.Sequential(Broken()))(x32)
    if hasattr(caught.value, "add_note"):  # Python 3.11 and newer
        assert caught.value.__notes__ == ["in 0 (Broken())", "in 1 (Sequential())"]


def test_after_a_refused_dout_the_record_is_still_there() -> None:
    """The call can be put right."""
    layer = after(hg.Tanh(), x32)
    with pytest.raises(hg.ShapeError):
        layer.backward(torch.ones(3))
    layer.backward(torch.ones(4, 3))


def test_a_refused_state_dict_changes_nothing() -> None:
    """Not even the tensors that would have fitted."""
    layer = hg.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(hg.StateDictError):
        layer.load_state_dict({"weight": torch.zeros(2, 3), "bias": torch.zeros(5)})
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    result = layer.load_state_dict({"weight": torch.zeros(2, 3), "other": torch.zeros(1)}, strict=False)
    assert result == (["bias"], ["other"])
    assert not layer.weight.any()


def test_an_interrupted_step_leaves_nothing_behind() -> None:
    """After an error inside a step, the next step works."""
    model = hg.Linear(3, 3)
    step = hg.TrainStep(model, hg.CrossEntropy(), hg.SGD(model.parameters(), lr=0.1))
    with pytest.raises(hg.IndexRangeError):
        step(x32, torch.tensor([0, 1, 2, 3]))
    assert step.model.pending == 0
    step(x32, torch.tensor([0, 1, 2, 2]))
