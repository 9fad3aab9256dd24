"""On another device than the CPU: all tensors lie on it, and no value of one is read back, for that would wait for it.

No such device need be there: `FakeTensorMode` gives tensors of any device without values, and reading one is an error.
"""

from __future__ import annotations

import copy

import hypothesis
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import handgrad as hg
from handgrad.testing.strategies import samples_of
from handgrad.testing.subject import unwrap
from handgrad.twins import TWINS
from tests.cases import CASES


def device_of_fakes() -> torch.device:
    """A device that is not the CPU: cuda, or meta where this torch cannot take a row of a tensor that is not there.

    Builds for the CPU alone cannot, nor older ones without a GPU.
    """
    try:
        with FakeTensorMode():
            return torch.empty(2, device="cuda")[0].device
    except RuntimeError:
        return torch.device("meta")


DEVICE = device_of_fakes()
FROM_TORCH = (
    "it compares addresses in memory, which such tensors have not, and autograd's engine needs the device itself"
)


class OnlyThere(TorchDispatchMode):
    """Every tensor that an operation takes or gives must lie on the device; torch lets single CPU numbers pass."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        out = func(*args, **(kwargs or {}))
        elsewhere = [
            t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.device.type != DEVICE.type
        ]
        assert not elsewhere, f"{func} takes or gives a tensor on {elsewhere[0].device}"
        return out


@pytest.fixture
def fake():
    """Tensors without values, in whatever runs inside."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def there(t):
    """A tensor like it, on the device."""
    return torch.empty(t.shape, dtype=t.dtype, device=DEVICE)


def moved(layer):
    """A copy of the layer on the device, drawing from the same generators."""
    tensors = [t for _, t in (*layer.named_parameters(), *layer.named_buffers())]
    drawing = [la.generator for _, la in layer.named_layers() if getattr(la, "generator", None) is not None]
    return copy.deepcopy(layer, {id(t): there(t) for t in tensors} | {id(g): g for g in drawing})


def forward_backward(layer, inputs):
    """Both run there, and dx and the gradients are as they must be."""
    with OnlyThere() as only:
        out = layer(*inputs)
        douts = tree_map(lambda t: torch.empty_like(t) if t.is_floating_point() else None, out)
        dx = layer.backward(douts)
    given = inputs[:1] if isinstance(layer, hg.Loss) else inputs
    for x, d in zip(tree_leaves(given), tree_leaves(dx)):
        assert (d.shape, d.device.type) == (x.shape, DEVICE.type) if x.is_floating_point() else d is None
    for _, param in layer.named_parameters():
        assert param.device.type == DEVICE.type
        assert param.grad is None or param.grad.shape == param.shape
    return only.operations


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("training", [True, False])
def test_made_and_run_there(fake, name, training):
    if name == "from_torch":
        pytest.skip(FROM_TORCH)
    with DEVICE:
        layer, inputs = TWINS[name].layer(16), TWINS[name].inputs(16, 16, torch.float32)
    assert forward_backward(layer.train(training), inputs) > 0 or name == "Identity"


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_there(name):
    if name.startswith("from_torch"):
        pytest.skip(FROM_TORCH)
    if "with masks" in name:
        pytest.skip("the case makes its masks in its forward, of numbers drawn on the CPU; below they are there")
    case = CASES[name]
    make, *x = case.args
    drawing = {key: case.keywords[key] for key in ("options", "sizes", "distinct") if key in case.keywords}

    @hypothesis.settings(max_examples=6, database=None, deadline=None, derandomize=True)
    @hypothesis.given(samples_of(make, x if len(x) > 1 else x[0], **drawing))
    def run(sample):
        with FakeTensorMode(allow_non_fake_inputs=True):
            forward_backward(moved(unwrap(sample.layer)), sample.layer.pack(tuple(map(there, sample.inputs))))

    run()


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_attention_with_masks_runs_there(fake, kind):
    with DEVICE:
        layer, x = hg.MultiheadAttention(6, 2, batch_first=True), torch.randn(4, 3, 6)
        masks = {"key_padding_mask": torch.zeros(4, 3, dtype=kind), "attn_mask": torch.zeros(3, 3, dtype=kind)}
    with OnlyThere():
        dxs = layer.backward(layer(x, x, x, **masks))
    assert [dx.device.type for dx in dxs] == [DEVICE.type] * 3


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
@pytest.mark.parametrize(
    "loss", [{}, {"ignore_index": 0, "label_smoothing": 0.1}, {"weight": torch.ones(5)}], ids=lambda o: " ".join(o)
)
def test_a_whole_step_runs_there(fake, options, loss):
    step, x, target = names_step(options, moved(hg.CrossEntropy(**loss)))
    with OnlyThere() as only:
        assert step(x, target).device.type == DEVICE.type
        assert step.many([x, x], [target, target]).shape == (2,)
    assert only.operations > 50
    assert all(p.grad.device.type == DEVICE.type for p in step.params)


def names_step(options=None, loss=None):
    """A small names MLP in training, and a batch."""
    with DEVICE:
        mlp = [hg.Embedding(5, 3, padding_idx=0), hg.Flatten(), hg.Linear(6, 8), hg.BatchNorm1d(8), hg.Tanh()]
        model = hg.Sequential(*mlp, hg.Linear(8, 5))
        x, target = torch.randint(5, (4, 2)), torch.randint(5, (4,))
    return hg.TrainStep(model, loss or hg.CrossEntropy(), hg.SGD(model.parameters(), 0.1, **(options or {}))), x, target


def test_what_looks_inside_sees_tensors_that_are_there(fake):
    step, x, target = names_step()
    seen = []
    look = lambda path, layer, t: seen.append(t.device.type)  # noqa: E731
    with OnlyThere(), hg.watch(step.model, out=look, dout=look, grad=look):
        step(x, target)
    assert len(seen) > 18
    assert set(seen) == {DEVICE.type}


def test_statistics_are_read_all_at_once_in_the_end(fake):
    """Not in the steps, which would wait for the device each time."""
    step, x, target = names_step()
    step.optimizer = torch.optim.SGD(step.params, 0.1, foreach=False)  # of foreach, a fake tensor counts no change
    stats = hg.Statistics(step.model, step.optimizer).__enter__()
    with OnlyThere() as only:
        step.many([x] * 3, [target] * 3)
    assert only.operations > 300
    with pytest.raises(DataDependentOutputException):
        stats.__exit__()


def test_a_tripwire_reads_a_value_per_look(fake):
    """Or it could not stop at the first that is not finite."""
    step, x, target = names_step()
    with pytest.raises(DataDependentOutputException), hg.tripwire(step.model):
        step(x, target)


class Reads(hg.Layer):
    """out = x / sum(x), with the sum as a number of Python."""

    def forward(self, x):
        return x / float(x.sum())


class Leaves(hg.Layer):
    """out = 2 x, with the 2 on the CPU."""

    def forward(self, x):
        return x * torch.tensor(2.0)


class Selects(hg.Layer):
    """out = the positive x: how many there are is a value."""

    def forward(self, x):
        return x[x > 0]


@pytest.mark.parametrize("layer", [Reads(), Leaves(), Selects()], ids=lambda layer: type(layer).__name__)
def test_a_layer_that_looks_at_values_or_leaves_the_device_would_be_seen(fake, layer):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, AssertionError)), OnlyThere():
        layer(torch.ones(3, device=DEVICE))
