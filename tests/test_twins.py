"""Which arguments handgrad's layers and torch's modules share: what twins.py says of it is so."""

from __future__ import annotations

import inspect

import pytest
from torch import nn

import handgrad
from handgrad.twins import BESIDE_TORCH, TWINS, WITHOUT_ARGUMENT

IN_TORCH = {name: getattr(nn, name) for name in TWINS if hasattr(nn, name)} | {
    "SelfAttention": nn.MultiheadAttention,
    "CrossEntropy": nn.CrossEntropyLoss,
    "MSE": nn.MSELoss,
    "BCEWithLogits": nn.BCEWithLogitsLoss,
    "LinearCrossEntropy": nn.LinearCrossEntropyLoss,
}
OTHER_DEFAULTS = {
    ("Softmax", "dim"): "torch's guess warns",
    ("LogSoftmax", "dim"): "torch's guess warns",
    ("LinearCrossEntropy", "ignore_index"): "None is taken, too, and means -100 as in torch",
}


def arguments(cls):
    """The arguments of a constructor by name; where it hands on **options, those of the one above, too."""
    found = {}
    for owner in cls.__mro__:
        own = list(inspect.signature(vars(owner)["__init__"]).parameters.values()) if "__init__" in vars(owner) else []
        named = [p for p in own[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found |= {p.name: p for p in named if p.name not in found}
        if own and not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found


def of_torch(name):
    found = arguments(IN_TORCH[name])
    if name in ("RNN", "GRU", "LSTM"):  # torch reads these from *args: a mode first; RNN has one argument more
        del found["mode"]
    return found


def without_names(arguments):
    return [p.name for p in arguments.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


def by_layer(table):
    return {(layer, argument) for argument, (layers, _) in table.items() for layer in layers.split()}


def difference(first, second):
    return {(name, argument) for name in IN_TORCH for argument in first(name).keys() - second(name).keys()}


def of_handgrad(name):
    return arguments(getattr(handgrad, name))


def test_the_tables_are_what_the_signatures_say():
    assert difference(of_torch, of_handgrad) == by_layer(WITHOUT_ARGUMENT)
    assert difference(of_handgrad, of_torch) - {("RNN", "nonlinearity")} == by_layer(BESIDE_TORCH)
    assert all(reason for table in (WITHOUT_ARGUMENT, BESIDE_TORCH) for _, reason in table.values())


@pytest.mark.parametrize("name", [name for name in IN_TORCH if name != "RNN"])
def test_what_needs_no_name_is_the_first_of_torchs_in_torchs_order(name):
    ours = without_names(of_handgrad(name))
    assert ours == without_names(of_torch(name))[: len(ours)]


def test_so_it_is_in_rnn_whose_order_torch_has_in_its_text_alone():
    ours = without_names(of_handgrad("RNN"))
    assert ours == ["input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first"]
    module = nn.RNN(3, 4, 1, "relu", False, True)
    assert (module.nonlinearity, module.bias, module.batch_first) == ("relu", False, True)


@pytest.mark.parametrize("name", IN_TORCH)
def test_what_both_have_has_torchs_default(name):
    ours, theirs = of_handgrad(name), of_torch(name)
    differing = {a for a in ours.keys() & theirs.keys() if ours[a].default != theirs[a].default}
    assert differing == {argument for layer, argument in OTHER_DEFAULTS if layer == name}


@pytest.mark.parametrize(("layer", "argument"), sorted(by_layer(WITHOUT_ARGUMENT)))
def test_an_argument_that_only_torch_has_is_a_type_error(layer, argument):
    cls = getattr(handgrad, layer)
    required = [p for p in of_handgrad(layer).values() if p.default is p.empty]
    with pytest.raises(TypeError, match=r"takes no arguments|unexpected keyword argument"):
        cls(*[4] * len(required), **{argument: None})
