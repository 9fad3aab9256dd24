"""A state copied into a model, and a model converted: all of it or nothing, whatever is wrong, and wherever."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import handgrad as hg
from handgrad import StateDictError
from handgrad.state import convert, copy_all, misfits


def model() -> hg.Sequential:
    return hg.Sequential(hg.Linear(3, 4), hg.BatchNorm1d(4), hg.Linear(4, 2))


def unchanged(layer, before):
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def state_of(layer):
    return {key: tensor.clone() for key, tensor in layer.state_dict().items()}


WRONG = {
    "array": (np.zeros((2, 4), dtype=np.float32), "expected a tensor, got ndarray"),
    "list": ([[0.0] * 4] * 2, "expected a tensor, got list"),
    "none": (None, "expected a tensor, got NoneType"),
    "shape": (torch.zeros(4, 2), r"expected shape \(2, 4\), got \(4, 2\)"),
    "sparse": (torch.zeros(2, 4).to_sparse(), r"expected an ordinary dense tensor, got a torch\.sparse_coo one"),
    "meta": (torch.zeros(2, 4, device="meta"), "expected values, but the tensor given has none, being on the device"),
    "complex": (torch.zeros(2, 4, dtype=torch.complex64), r"expected torch\.float32, got torch\.complex64"),
    "overflow": (
        torch.full((2, 4), 1e300, dtype=torch.float64),
        r"expected torch\.float32, got finite values of torch\.float64 that are infinite there",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_value_is_named_and_nothing_is_copied(kind):
    value, text = WRONG[kind]
    layer = model()
    before = state_of(layer)
    for strict in (True, False):  # the last weight, after all the others
        state = {key: torch.rand_like(t.double()).to(t.dtype) for key, t in before.items()} | {"2.weight": value}
        with pytest.raises(StateDictError, match=rf"load_state_dict: \n  2\.weight: {text}"):
            layer.load_state_dict(state, strict=strict)
        unchanged(layer, before)


def test_every_bad_key_is_listed():
    state = {**state_of(model()), "0.weight": None, "1.num_batches_tracked": torch.tensor(2.5), "3.bias": 1}
    del state["2.bias"]
    with pytest.raises(StateDictError) as caught:
        model().load_state_dict(state)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "0.weight: expected a tensor, got NoneType",
        "1.num_batches_tracked: expected torch.int64, got torch.float32",
        "2.bias: missing",
        "3.bias: unexpected",
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool])
def test_what_loses_no_more_than_rounding_is_converted(dtype):
    layer, value = model(), torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]]).to(dtype)
    layer.load_state_dict({"2.weight": value}, strict=False)
    assert layer[2].weight.dtype is torch.float32
    assert torch.equal(layer[2].weight, value.float())
    layer.load_state_dict({"2.weight": torch.full((2, 4), float("inf"), dtype=torch.float64)}, strict=False)
    assert layer[2].weight.isinf().all()


def test_a_model_without_memory_takes_no_values():
    with pytest.raises(StateDictError, match="weight: expected values, but this model's own tensor has none"):
        hg.Linear(2, 2, device="meta").load_state_dict({"weight": torch.ones(2, 2)}, strict=False)


def test_an_error_while_copying_puts_back_what_was_copied():
    layer = model()
    layer[2].bias = torch.zeros(()).expand(2)  # which cannot be written to
    before, state = state_of(layer), state_of(model())
    with pytest.raises(StateDictError, match=r"2\.bias: unsupported operation"):
        layer.load_state_dict(state)
    unchanged(layer, before)


def test_an_interruption_while_copying_puts_back_what_was_copied():
    class Slow(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.copy_:
                raise KeyboardInterrupt
            return super().__torch_function__(function, types, args, kwargs)

    layer = model()
    before = state_of(layer)
    state = {**state_of(model()), "2.bias": torch.ones(2).as_subclass(Slow)}
    with pytest.raises(KeyboardInterrupt):
        layer.load_state_dict(state)
    unchanged(layer, before)


def test_values_in_the_models_own_memory_are_read_before_they_are_overwritten():
    layer = hg.Sequential(hg.Linear(3, 3), hg.Linear(3, 3))
    a, b = layer[0].weight.clone(), layer[1].weight.clone()
    layer.load_state_dict({"0.weight": layer[1].weight, "1.weight": layer[0].weight}, strict=False)
    assert torch.equal(layer[0].weight, b)
    assert torch.equal(layer[1].weight, a)
    layer.load_state_dict({"0.weight": layer[0].weight.t()}, strict=False)
    assert torch.equal(layer[0].weight, b.t())


def test_two_values_for_one_shared_tensor_must_be_equal():
    layer = hg.Sequential(hg.Linear(3, 3), hg.Linear(3, 3))
    layer[1].weight = layer[0].weight
    state = state_of(layer)
    state["0.weight"] = state["1.weight"] = torch.full((3, 3), float("nan"))
    layer.load_state_dict({**state, "1.weight": state["0.weight"].clone()})
    assert layer[0].weight.isnan().all()
    with pytest.raises(StateDictError, match=r"1\.weight: expected the values of 0\.weight, which is the same tensor"):
        layer.load_state_dict({**state, "1.weight": torch.ones(3, 3)})
    assert layer[0].weight.isnan().all()


def test_the_functions_themselves():
    own = {"a": torch.zeros(2), "b": torch.zeros(2)}
    assert misfits(own, {"a": torch.ones(2)}) == []
    assert copy_all(own, {"a": torch.ones(2)}) == []
    assert own["a"].tolist() == [1, 1]
    convert(list(own.values()), [torch.float64])
    assert own["b"].dtype is torch.float64


# ---------------------------------------------------------------------- to


def with_gradients():
    layer = model()
    for param in layer.parameters():
        param.grad = torch.rand_like(param)
    return layer


@pytest.mark.parametrize("target", ["meta", "cuda:77", "nonsense"])
def test_a_conversion_that_fails_changes_nothing(target):
    layer = with_gradients()
    twin = copy.deepcopy(layer)
    with pytest.raises((RuntimeError, AssertionError)):  # torch's own
        layer.to(torch.float64, target)
    unchanged(layer, twin.state_dict())
    for p, q in zip(layer.parameters(), twin.parameters()):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("failing", range(1, 9))
def test_memory_that_runs_out_halfway_changes_nothing(failing, monkeypatch):
    layer, calls, plain = with_gradients(), [], torch.Tensor.to
    twin = copy.deepcopy(layer)

    def to(self, *args):
        calls.append(self)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("no memory")
        return plain(self, *args)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError):
        layer.to(torch.float64)
    monkeypatch.undo()
    unchanged(layer, twin.state_dict())
    for p, q in zip(layer.parameters(), twin.parameters()):
        assert torch.equal(p.grad, q.grad)
    assert layer.to(torch.float64)[0].weight.grad.dtype is torch.float64
