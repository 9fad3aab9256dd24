"""What is refused: arguments that cannot be, of every layer; dtypes that are not floating; torch.autocast."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import handgrad as hg
from handgrad import ArgumentError, DtypeError, HandgradError, Layer, ShapeError, parameter
from handgrad.arguments import floating, integer, integers, number
from handgrad.twins import TWINS
from tests.test_twins import arguments

# ---------------------------------------------------------------------- the checks themselves


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_any_integer_type_is_an_int(value):
    found = integer(None, "size", value)
    assert type(found) is int
    assert found == 3
    assert integers(None, "size", value, 2) == (3, 3)


@pytest.mark.parametrize("value", [0, -1, 5.0, "5", None, True, [3], torch.tensor(3.0), math.nan])
def test_nothing_else_is_a_size(value):
    with pytest.raises(ArgumentError, match=re.escape(f"Linear: size must be an int of at least 1, got {value!r}")):
        integer(nn.Linear(1, 1), "size", value)


def test_ints_are_as_many_as_wanted():
    assert integers(None, "shape", [3, 4], None) == (3, 4)
    assert integers(None, "padding", 0, 2, 0) == (0, 0)
    for value in ((1, 2, 3), (1,), (), "12", (1, 0), (1, 2.0), None):
        with pytest.raises(ArgumentError, match=r"stride must be an int of at least 1, or 2 of them, got "):
            integers(None, "stride", value, 2)
    with pytest.raises(ArgumentError, match=r"stride must be an int of at least 1, got \(1, 2\)"):
        integers(None, "stride", (1, 2), 1)


def test_a_number_is_within_its_range():
    assert [number(None, "p", p, 0, 1) for p in (0, 1, 0.5, np.float32(0.5))] == [0, 1, 0.5, 0.5]
    for p in (-0.1, 1.1, math.nan, "0.5", None, True, torch.tensor(0.5)):
        with pytest.raises(ArgumentError, match=re.escape(f"p must be in 0..1, got {p!r}")):
            number(None, "p", p, 0, 1)
    with pytest.raises(ArgumentError, match="eps must be at least 0, got -1"):
        number(None, "eps", -1, 0)
    with pytest.raises(ArgumentError, match="slope must be a number, got nan"):
        number(None, "slope", math.nan)


def test_a_weight_is_a_floating_tensor():
    weight = torch.ones(2)
    assert floating(None, "weight", weight) is weight
    assert floating(None, "weight", None) is None
    for value, came in (([1.0, 2.0], "list"), (torch.arange(2), r"torch\.int64"), (weight.cfloat(), "torch.complex64")):
        with pytest.raises(DtypeError, match=f"weight must be a tensor of a floating dtype, got {came}"):
            floating(None, "weight", value)


# ---------------------------------------------------------------------- constructors

MAKERS = {
    "Linear": (hg.Linear, {"in_features": 3, "out_features": 2, "gain": 1.0}),
    "Embedding": (hg.Embedding, {"num_embeddings": 3, "embedding_dim": 2, "padding_idx": 1}),
    "Flatten": (hg.Flatten, {"start_dim": 1, "end_dim": -1}),
    "FlattenConsecutive": (hg.FlattenConsecutive, {"size": 2}),
    "LeakyReLU": (hg.LeakyReLU, {"negative_slope": 0.1}),
    "Softmax": (hg.Softmax, {"dim": 0}),
    "LogSoftmax": (hg.LogSoftmax, {"dim": 0}),
    "GELU": (hg.GELU, {"approximate": "tanh"}),
    "BatchNorm1d": (hg.BatchNorm1d, {"num_features": 3, "eps": 0.1, "momentum": 0.1}),
    "SyncBatchNorm": (hg.SyncBatchNorm, {"num_features": 3, "eps": 0.1, "momentum": 0.1}),
    "LayerNorm": (hg.LayerNorm, {"normalized_shape": 3, "eps": 0.1}),
    "RMSNorm": (hg.RMSNorm, {"normalized_shape": (3, 2), "eps": 0.1}),
    "GroupNorm": (hg.GroupNorm, {"num_groups": 2, "num_channels": 4, "eps": 0.1}),
    "Dropout": (hg.Dropout, {"p": 0.1}),
    "Conv1d": (hg.Conv1d, {"in_channels": 2, "out_channels": 2, "kernel_size": 2, "stride": 1, "dilation": 1}),
    "Conv2d": (hg.Conv2d, {"in_channels": 2, "out_channels": 2, "kernel_size": 2, "padding": 1, "groups": 1}),
    "ConvTranspose2d": (
        hg.ConvTranspose2d,
        {"in_channels": 2, "out_channels": 2, "kernel_size": 2, "stride": 2, "output_padding": 1},
    ),
    "MaxPool2d": (hg.MaxPool2d, {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 1}),
    "AvgPool2d": (hg.AvgPool2d, {"kernel_size": 2, "stride": 1, "padding": 1, "divisor_override": 1}),
    "AdaptiveAvgPool2d": (hg.AdaptiveAvgPool2d, {"output_size": 2}),
    "Upsample to a size": (hg.Upsample, {"size": 2}),
    "Upsample by a factor": (hg.Upsample, {"scale_factor": 2}),
    "RNNCell": (hg.RNNCell, {"input_size": 3, "hidden_size": 5, "nonlinearity": "relu"}),
    "GRU": (hg.GRU, {"input_size": 3, "hidden_size": 5, "num_layers": 1}),
    "Unroll": (hg.Unroll, {"cell": hg.RNNCell(3, 2), "dim": 1, "steps": 1}),
    "MultiheadAttention": (hg.MultiheadAttention, {"embed_dim": 4, "num_heads": 2, "dropout": 0.1}),
    "SelfAttention": (hg.SelfAttention, {"embed_dim": 4, "num_heads": 2}),
    "Cat": (hg.Cat, {"dim": 0}),
    "Concat": (lambda dim: hg.Concat(hg.Tanh(), dim=dim), {"dim": 0}),
    "CrossEntropy": (
        hg.CrossEntropy,
        {"weight": torch.ones(2), "ignore_index": 1, "label_smoothing": 0.1, "reduction": "sum"},
    ),
    "BCEWithLogits": (hg.BCEWithLogits, {"weight": torch.ones(2), "pos_weight": torch.ones(2), "reduction": "sum"}),
    "MSE": (hg.MSE, {"reduction": "sum"}),
    "Losses": (lambda weights: hg.Losses(hg.MSE(), weights=weights), {"weights": [1.0]}),
    "LinearCrossEntropy": (
        hg.LinearCrossEntropy,
        {"in_features": 3, "num_classes": 2, "weight": torch.ones(2), "chunk_size": 2, "ignore_index": 1},
    ),
}
OPTIONAL = {"gain", "padding_idx", "divisor_override", "steps", "weight", "pos_weight", "weights"}
OPTIONAL |= {
    "MaxPool2d.stride",
    "AvgPool2d.stride",
    "RMSNorm.eps",
    "BatchNorm1d.momentum",
    "SyncBatchNorm.momentum",
    "LinearCrossEntropy.ignore_index",
}


@pytest.mark.parametrize(("name", "argument"), [(name, a) for name, (_, given) in MAKERS.items() for a in given])
@pytest.mark.parametrize(
    "value",
    [None, "a", math.nan, [1.5, 2.5, 3.5], object(), {}, torch.ones(2, 2), -1e9],
    ids=lambda value: "object" if type(value) is object else repr(value),
)
def test_what_an_argument_cannot_be_is_refused(name, argument, value):
    """By an error of ours, whatever it is; None only where it means something."""
    make, given = MAKERS[name]
    make(**given)
    may_be_left_out = value is None and (argument in OPTIONAL or f"{name}.{argument}" in OPTIONAL)
    any_number = name == "LeakyReLU" and isinstance(value, float) and value < 0
    any_shape = name == "BCEWithLogits" and isinstance(value, Tensor) and argument != "reduction"
    if may_be_left_out or any_number or any_shape:
        make(**given | {argument: value})
        return
    with pytest.raises(HandgradError, match=r"^\w+: "):
        make(**given | {argument: value})


@pytest.mark.parametrize(
    "make",
    [
        lambda: hg.BatchNorm1d(3, eps=0.0),
        lambda: hg.BatchNorm1d(3, momentum=1.5),
        lambda: hg.LayerNorm(3, eps=-1e-5),
        lambda: hg.AvgPool2d(2, divisor_override=0),
        lambda: hg.Embedding(3, 2, padding_idx=-4),
        lambda: hg.SelfAttention(4, 0),
        lambda: hg.Upsample(size=2.5),
        lambda: hg.Losses(hg.MSE(), weights=["1"]),
    ],
)
def test_values_that_cannot_work_are_refused(make):
    with pytest.raises(ArgumentError):
        make()


def test_no_classes_are_refused():
    for target in (torch.zeros(2, dtype=torch.int64), torch.full((2,), -100), torch.zeros(2, 0)):
        with pytest.raises(ShapeError, match=r"x must have at least one class, got shape \(2, 0\)"):
            hg.CrossEntropy()(torch.zeros(2, 0), target)


# ---------------------------------------------------------------------- arguments that a layer does not have

LAYERS = {name: getattr(hg, name) for name in TWINS if name != "from_torch"}


@pytest.mark.parametrize("name", LAYERS)
def test_an_unknown_argument_is_a_type_error(name):
    if name == "Graph":  # whose keywords are its nodes
        pytest.skip("any keyword is a node of it")
    with pytest.raises(TypeError):
        LAYERS[name](no_such_argument=1)


def test_so_it_is_for_a_layer_of_ones_own():
    class Plain(Layer):
        pass

    class Sized(Layer):
        def __init__(self, size):
            self.size = size

    class Below(Sized):
        pass

    for args, options in (((0.1,), {}), ((), {"negative_slope": 0.1})):
        with pytest.raises(TypeError, match=r"Plain\(\) takes no arguments"):
            Plain(*args, **options)
    assert Below(3).size == 3
    with pytest.raises(TypeError):
        Below()


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, "float32"])
@pytest.mark.parametrize("name", [name for name, cls in LAYERS.items() if "dtype" in arguments(cls)])
def test_a_dtype_that_is_no_floating_one_is_refused(name, dtype):
    required = [p for p in arguments(LAYERS[name]).values() if p.default is p.empty]
    assert LAYERS[name](*[2] * len(required), dtype=torch.float16)
    with pytest.raises(DtypeError, match=rf"\w+: dtype must be a floating torch\.dtype, got {dtype!r}"):
        LAYERS[name](*[2] * len(required), dtype=dtype)


def test_so_it_is_for_parameters_of_ones_own_layer():
    class Scale(Layer):
        weight: Tensor = parameter("D")

        def __init__(self, size, *, dtype=None):
            self.weight = torch.ones(size, dtype=dtype)

    class OneHot(Layer):
        def __init__(self, dtype):
            self.dtype = dtype

    assert Scale(3, dtype=torch.float16).weight.dtype is torch.float16
    with pytest.raises(DtypeError, match=r"Scale: dtype must be a floating torch\.dtype, got torch\.complex64"):
        Scale(3, dtype=torch.complex64)
    assert OneHot(dtype=torch.int64).dtype is torch.int64  # not that of a parameter


def ordinary(name, D=16):
    return TWINS[name].layer(D), TWINS[name].inputs(D, D, torch.float32)


@pytest.mark.parametrize("name", [name for name in TWINS if name != "from_torch"])
def test_complex_inputs_are_refused_by(name):
    layer, inputs = ordinary(name)
    for dtype in (torch.complex64, torch.int32) if name not in ("Embedding", "Constant") else (torch.complex64,):
        wrong = tree_map(lambda x, dtype=dtype: x.to(dtype), inputs)
        with pytest.raises(DtypeError):
            layer(*wrong)
        assert layer.pending == 0
        layer.drop_records()


@pytest.mark.parametrize(
    ("name", "inputs", "wrong"),
    [
        ("MultiheadAttention", ("query", "key", "value"), (0, 1, 2)),
        ("RNNCell", ("x", "h"), (0, 1)),
        ("GRU", ("x", "h"), (0, 1)),
        ("MSE", ("x", "target"), (0, 1)),
        ("CrossEntropy", ("x", "target"), (0, 1)),
    ],
)
def test_an_error_names_the_input_that_is_wrong(name, inputs, wrong):
    layer, given = ordinary(name)
    given = [*given, torch.zeros(given[0].shape[0], 16)] if len(given) < len(inputs) else [*given]
    for i in wrong:
        with pytest.raises(DtypeError, match=rf"\.forward: {inputs[i]} must "):
            layer(*[[1.0] if i == j else x for j, x in enumerate(given)])


# ---------------------------------------------------------------------- autocast


RIGHT_UNDER_AUTOCAST = {"Embedding": "a copy", "from_torch": "the module's own affair"}
OFF = r"torch\.autocast must be off, for a layer computes in the dtype of its parameters"


@pytest.mark.parametrize("name", sorted(TWINS.keys() - RIGHT_UNDER_AUTOCAST.keys()))
def test_autocast_is_refused_by_the_forward_of(name):
    layer, inputs = ordinary(name)
    for recording in (True, False):
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.set_grad_enabled(recording),
            pytest.raises(DtypeError, match=rf"\.forward: {OFF}"),
        ):
            layer(*inputs)
        layer.drop_records()


@pytest.mark.parametrize("name", sorted(TWINS.keys() - RIGHT_UNDER_AUTOCAST.keys()))
def test_the_backward_is_right_under_autocast_or_refuses_in(name):
    """Where no operation of it is autocast's, it is what it is without."""
    layer, inputs = ordinary(name)
    layer.eval()
    out = layer(*inputs)
    dout = () if isinstance(layer, hg.Loss) else (tree_map(torch.ones_like, out),)
    wanted = [layer.backward(*dout), [p.grad for p in layer.parameters()]]
    layer.zero_grad()
    layer(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            found = [layer.backward(*dout), [p.grad for p in layer.parameters()]]
        except DtypeError as error:
            assert re.search(rf"\.backward: {OFF}", str(error))  # noqa: PT017 - or it is right
            return
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_so_does_that_of_a_frozen_layer():
    layer = hg.Linear(3, 2).freeze()
    layer(torch.ones(4, 3))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(DtypeError, match=OFF):
        layer.backward(torch.ones(4, 2))
