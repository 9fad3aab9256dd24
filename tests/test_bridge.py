"""Both bridges: values and gradients against the equal torch model, and everything a torch model does with a module."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import handgrad as hg
from handgrad import (
    MSE,
    SGD,
    ArgumentError,
    BatchNorm1d,
    CrossEntropy,
    Dropout,
    DtypeError,
    Embedding,
    Flatten,
    GRUCell,
    Identity,
    IndexRangeError,
    Layer,
    LayerNorm,
    Linear,
    LinearCrossEntropy,
    LSTMCell,
    Parallel,
    Residual,
    Sequential,
    ShapeError,
    StateError,
    Sum,
    Tanh,
    TrainStep,
    Unroll,
    from_torch,
    to_torch,
)
from handgrad.bridge import LayerModule
from handgrad.testing import compare


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def close(ours, theirs, name):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, equal_nan=True, msg=lambda m: f"{name}: {m}")


def randomize(layer):
    """No parameter at its default: a weight of 1 and a bias of 0 hide errors."""
    for param in layer.parameters():
        param.copy_(torch.randn_like(param) * 0.7 + 0.1)


def mlp():
    return Sequential(Embedding(7, 3), Flatten(), Linear(6, 5), BatchNorm1d(5), Tanh(), Linear(5, 7))


def torch_mlp():
    return nn.Sequential(
        nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 7)
    )


def pair():
    """The MLP as a bridged layer and as torch's own model, with equal weights in float64."""
    layer = mlp().to(torch.float64)
    randomize(layer)
    module, reference = to_torch(layer), torch_mlp().double()
    reference.load_state_dict(module.state_dict())
    return module, reference, torch.randint(7, (4, 2)), torch.randint(7, (4,))


def same_gradients(module, reference):
    for (name, ours), (wanted, theirs) in zip(module.named_parameters(), reference.named_parameters()):
        assert name == wanted
        close(ours.grad, theirs.grad, name)


# ---------------------------------------------------------------------- to_torch


def test_module_trains_like_torch_under_a_torch_optimizer():
    module, reference, x, y = pair()
    assert list(module.state_dict()) == list(reference.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for m in (module, reference)]
    for _ in range(5):
        for model, optimizer in zip((module, reference), optimizers):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        same_gradients(module, reference)
    for name, value in module.state_dict().items():
        close(value, reference.state_dict()[name], name)
    module.eval(), reference.eval()
    with torch.no_grad():
        close(module(x), reference(x), "evaluation")


def test_module_inside_a_torch_model_passes_dx_on():
    layer = Residual(Sequential(Linear(3, 4), Tanh(), Linear(4, 3))).to(torch.float64)
    module = nn.Sequential(nn.Linear(2, 3), to_torch(layer), nn.Tanh()).double()
    inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inner.load_state_dict(layer.body.state_dict())
    x, dout = draw(5, 2), draw(5, 3)
    out = module(x)
    out.backward(dout)
    ours = module[0].weight.grad.clone()
    module[0].zero_grad()
    h = module[0](x)
    truth = torch.tanh(h + inner(h))
    truth.backward(dout)
    close(out, truth, "out")
    close(ours, module[0].weight.grad, "dx passed on")
    close(
        layer.body[0].weight.grad if layer.body[0].weight.grad is not None else torch.zeros(4, 3).double(),
        torch.zeros(4, 3).double(),
        "the layer's own gradient stays untouched",
    )
    close(module[1].get_parameter("body.0.weight").grad, inner[0].weight.grad, "body.0.weight")


def test_backward_in_any_order_repeatedly_and_never():
    """The graph holds the records: no last-in first-out, nothing left over in the layer."""
    layer = Sequential(Linear(3, 3), Tanh(), Linear(3, 2)).to(torch.float64)
    module, reference = to_torch(layer), nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    reference.load_state_dict(layer.state_dict())
    batches = [draw(n, 3) for n in (4, 2, 5)]
    for model in (module, reference):
        outs = [model(x) for x in batches]
        outs[0].square().sum().backward(retain_graph=True)
        outs[2].sin().sum().backward()
        outs[0].cos().sum().backward()
    same_gradients(module, reference)
    assert layer.pending == 0


def test_one_module_in_several_places_and_partial_use_of_outputs():
    cell = LSTMCell(3, 3).to(torch.float64)
    module, reference = to_torch(cell), nn.LSTMCell(3, 3).double()
    reference.load_state_dict(cell.state_dict())
    x = draw(2, 3)
    for model in (module, reference):
        h, c = model(x)
        h, c = model(x, (h, c))
        h.square().sum().backward()  # c of the last step is not used
    same_gradients(module, reference)


def test_nested_inputs_and_integers():
    layer = Parallel(Embedding(5, 3), Unroll(GRUCell(2, 4))).to(torch.float64)
    module = to_torch(layer)
    index, sequence = torch.tensor([1, 4]), draw(2, 3, 2).requires_grad_()
    a, b = module((index, sequence))
    (a.sum() * 2 + b.square().sum()).backward()
    assert sequence.grad.shape == sequence.shape
    assert module.get_parameter("0.weight").grad[4].tolist() == [2, 2, 2]


def test_frozen_parameters_and_inputs_get_no_gradient():
    module = to_torch(Linear(3, 2))
    module.weight.requires_grad_(False)
    x = torch.randn(4, 3)
    module(x).sum().backward()
    assert module.weight.grad is None
    assert module.bias.grad is not None
    assert x.grad is None


def test_losses_become_modules_of_two_inputs():
    x, y = draw(4, 5).requires_grad_(), torch.tensor([0, 1, 4, 4])
    (3 * to_torch(CrossEntropy())(x, y)).backward()
    ours, x.grad = x.grad, None
    (3 * nn.functional.cross_entropy(x, y)).backward()
    close(ours, x.grad, "dx")
    module = to_torch(LinearCrossEntropy(5, 7, dtype=torch.float64, reduction="none"))
    module(x, y).square().sum().backward()
    weight = module.get_parameter("linear.weight")
    ours, weight.grad = weight.grad, None
    nn.functional.cross_entropy(x @ weight.t(), y, reduction="none").square().sum().backward()
    close(ours, weight.grad, "weight")


def test_tied_weights_are_one_parameter():
    embedding, head = Embedding(5, 3), Linear(3, 5, bias=False)
    head.weight = embedding.weight
    module = to_torch(Sequential(embedding, Tanh(), head))
    assert [name for name, _ in module.named_parameters()] == ["0.weight"]
    assert list(module.state_dict()) == ["0.weight", "2.weight"]
    x, weight = torch.tensor([1, 4, 1]), module.get_parameter("0.weight")
    module(x).square().sum().backward()
    ours, weight.grad = weight.grad, None
    (torch.tanh(weight[x]) @ weight.t()).square().sum().backward()
    torch.testing.assert_close(ours, weight.grad)


def test_memory_is_shared_and_follows_conversions():
    layer = Sequential(Linear(3, 2), BatchNorm1d(2))
    weight, module = layer[0].weight, to_torch(layer)
    with torch.no_grad():
        module.get_parameter("0.weight").fill_(2)
    assert (weight == 2).all()
    module.double()
    assert weight.dtype is torch.float64
    assert layer[0].weight is weight
    with torch.no_grad():
        module.get_parameter("0.weight").fill_(3)
    assert (weight == 3).all()
    module(torch.randn(4, 3).double())
    assert layer[1].num_batches_tracked == 1
    assert layer[1].running_mean.any()
    torch.testing.assert_close(layer.state_dict(), dict(module.state_dict()))


def test_memory_stays_shared_when_a_state_is_assigned():
    """By which the module gets new parameters; also inside a torch model, and for buffers."""
    layer = Sequential(Linear(3, 2), BatchNorm1d(2))
    weight, mean, module = layer[0].weight, layer[1].running_mean, to_torch(layer)
    model = nn.Sequential(module)
    state = {name: torch.rand_like(t.double()).to(t.dtype) for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert module.get_parameter("0.weight").data_ptr() == state["0.0.weight"].data_ptr()
    assert layer[0].weight is weight
    assert layer[1].running_mean is mean
    torch.testing.assert_close(layer.state_dict(), {name.removeprefix("0."): t for name, t in state.items()})
    with torch.no_grad():
        module.get_parameter("0.weight").fill_(3)
    assert (weight == 3).all()
    model(torch.randn(4, 3)).sum().backward()
    assert module.get_parameter("0.weight").grad is not None
    torch.testing.assert_close(layer.state_dict(), dict(module.state_dict()))
    assert mean is module.get_buffer("1.running_mean")


@pytest.mark.parametrize("given", [["0.weight", "2.weight"], ["0.weight"], ["2.weight"]])
def test_tied_weights_stay_tied_when_a_state_is_assigned(given):
    embedding, head = Embedding(5, 3), Linear(3, 5, bias=False)
    head.weight = embedding.weight
    module, value = to_torch(Sequential(embedding, Tanh(), head)), torch.rand(5, 3)
    module.load_state_dict({name: value.clone() for name in given}, assign=True, strict=False)
    assert [name for name, _ in module.named_parameters()] == ["0.weight"]
    assert head.weight is embedding.weight
    assert torch.equal(head.weight, value)
    assert head.weight.data_ptr() == module.get_parameter("2.weight").data_ptr()


def test_modes_and_no_grad():
    layer = Sequential(Dropout(0.5), BatchNorm1d(3))
    model = nn.Sequential(to_torch(layer))
    model.eval()
    assert not layer[0].training
    assert not layer[1].training
    model.train()
    assert layer[1].training
    with torch.no_grad():
        out = model(torch.randn(4, 3))
    assert not out.requires_grad
    assert layer.pending == 0
    with torch.inference_mode():
        model(torch.randn(4, 3))


def test_functional_call_and_copies():
    layer = Sequential(Linear(3, 2), Tanh())
    module, x = to_torch(layer), torch.randn(4, 3)
    other = {name: torch.randn_like(p).requires_grad_() for name, p in module.named_parameters()}
    out = torch.func.functional_call(module, other, x)
    module(x).sum().backward()  # a call with other parameters in between
    out.sum().backward()
    ours = other["0.weight"].grad
    leaf = other["0.weight"].detach().requires_grad_()
    torch.tanh(nn.functional.linear(x, leaf, other["0.bias"].detach())).sum().backward()
    torch.testing.assert_close(ours, leaf.grad)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            twin.get_parameter("0.weight").zero_()
            twin.get_parameter("0.bias").zero_()
        assert not twin(x).any()
        assert module(x).any()


def test_double_backward_is_refused():
    module, x = to_torch(Tanh()), torch.randn(3, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    with pytest.raises(StateError, match=r"Tanh\(\)\.backward is written by hand and cannot be differentiated again"):
        (dx.sum() + x.sum()).backward()
    module = to_torch(Linear(3, 2))
    (dweight,) = torch.autograd.grad(module(x).sum(), module.weight, create_graph=True)
    with pytest.raises(StateError, match="cannot be differentiated again"):
        dweight.square().sum().backward()


def test_in_place_changes_before_the_backward_are_errors():
    module = to_torch(Sequential(Linear(3, 3), Tanh()))
    out = module(torch.randn(2, 3))
    with torch.no_grad():
        module.get_parameter("0.weight").add_(1)
    with pytest.raises(StateError, match="weight was changed in place"):
        out.sum().backward()
    out = module(torch.randn(2, 3))
    out.detach().zero_()
    with pytest.raises(StateError, match="was changed in place"):
        out.sum().backward()


def test_errors_keep_their_place():
    module = nn.Sequential(to_torch(Sequential(Tanh(), Linear(3, 2))))
    with pytest.raises(ShapeError, match=r"in 1 \(Linear\(3 -> 2\)\)"):
        module(torch.randn(4, 5))
    assert module[0]._layer.pending == 0
    with pytest.raises(ArgumentError, match="to_torch: expected a Layer, got Linear"):
        to_torch(nn.Linear(3, 2))


def test_nothing_is_kept_alive():
    module = to_torch(Sequential(Linear(3, 3), Tanh()))
    gc.collect()
    gc.disable()
    try:
        out = module(torch.randn(2, 3))
        alive = weakref.ref(out.grad_fn)
        del out
        assert alive() is None
    finally:
        gc.enable()


def test_calls_in_several_threads_and_a_backward_in_another():
    layer = Sequential(Linear(3, 4), Tanh(), Linear(4, 3), Tanh()).to(torch.float64)
    module, inputs = to_torch(layer), [draw(5, 3) for _ in range(3)]

    def dx_of(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(module(x).square().sum(), x)[0]

    expected = [dx_of(x) for x in inputs]
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda k: (k % 3, dx_of(inputs[k % 3])), range(600)):
            assert torch.equal(found[1], expected[found[0]])
        x = inputs[0].clone().requires_grad_()
        out = module(x).square().sum()
        pool.submit(out.backward).result()
    assert torch.equal(x.grad, expected[0])
    assert layer.pending == 0


@pytest.mark.parametrize("make", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copy_of_a_layer_and_its_module_shares_memory_as_they_do(make):
    layer = Linear(3, 2)
    twin, module = make((layer, to_torch(layer)))
    with torch.no_grad():
        module.weight.fill_(3)
    assert (twin.weight == 3).all()
    assert not (layer.weight == 3).any()


def test_memory_stays_shared_where_a_conversion_fails_halfway():
    layer = Sequential(Linear(3, 2), Linear(2, 2))
    module = to_torch(layer)

    def fail(t):
        if t.shape == (2, 2):
            raise RuntimeError("no memory")
        return t.double()

    with pytest.raises(RuntimeError, match="no memory"):
        module._apply(fail)
    for name, param in module.named_parameters():
        assert dict(layer.named_parameters())[name].data_ptr() == param.data_ptr()


def test_distributed_data_parallel_sees_the_gradients():
    """One process is enough for the reducer and its hooks to run.

    torch's process group for tests has no threads and no sockets, so it cannot wait for ever, as gloo's can:
    https://github.com/pytorch/pytorch/issues/31467 and https://github.com/pytorch/pytorch/pull/154976.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    seen = []

    def hook(state, bucket):
        seen.append(sum(g.numel() for g in bucket.gradients()))
        done = torch.futures.Future()
        done.set_result(2 * bucket.buffer())  # what the hook returns is what arrives
        return done

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        module, reference, x, y = pair()
        parallel = nn.parallel.DistributedDataParallel(module)
        parallel.register_comm_hook(None, hook)
        for model in (parallel, reference):
            nn.functional.cross_entropy(model(x), y).backward()
        for p in reference.parameters():
            p.grad.mul_(2)
        same_gradients(module, reference)
        assert sum(seen) == sum(p.numel() for p in module.parameters())
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------- from_torch


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda: nn.Linear(3, 2), [(4, 3), (2, 5, 3)]),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.LayerNorm(2)), [(4, 3), (1, 3)]),
        (lambda: nn.BatchNorm1d(3), [(4, 3), (5, 3)]),
        (lambda: nn.Conv1d(2, 3, 2), [(4, 2, 5), (1, 2, 3)]),
        (lambda: nn.Bilinear(3, 2, 4), [((4, 3), (4, 2))]),
        (lambda: nn.Identity(), [(4, 3)]),
    ],
)
def test_modules_as_layers_agree_with_themselves(make, shapes):
    batches = [tuple(draw(*s) for s in shape) if isinstance(shape[0], tuple) else (draw(*shape),) for shape in shapes]
    module = make()
    for inputs in batches:
        compare(from_torch(module), copy.deepcopy(module), inputs)


def test_layers_and_modules_in_one_model_train_like_torch():
    layer = Sequential(
        Embedding(7, 3),
        from_torch(nn.Flatten()),
        Linear(6, 5),
        from_torch(nn.BatchNorm1d(5)),
        Tanh(),
        from_torch(nn.Sequential(nn.Linear(5, 7))),
    )
    layer.to(torch.float64)
    reference = torch_mlp().double()
    named = dict(zip(reference.state_dict(), layer.state_dict()))
    reference.load_state_dict({name: layer.state_dict()[ours] for name, ours in named.items()})
    step = TrainStep(layer, CrossEntropy(), SGD(layer.parameters(), lr=0.3))
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.3)
    for _ in range(5):
        x, y = torch.randint(7, (4, 2)), torch.randint(7, (4,))
        step(x, y)
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(x), y).backward()
        optimizer.step()
    for name, ours in named.items():
        close(layer.state_dict()[ours], reference.state_dict()[name], name)
    layer.eval(), reference.eval()
    with torch.no_grad():
        close(layer(x), reference(x), "evaluation")


def test_the_module_itself_shares_the_memory_and_keeps_its_gradients():
    module = nn.Linear(3, 2)
    layer = from_torch(module)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert not layer.weight.requires_grad
    layer(torch.randn(4, 3))
    layer.backward(torch.randn(4, 2))
    assert module.weight.grad is None
    layer.weight.fill_(5)
    assert (module.weight == 5).all()


def test_frozen_parameters_are_buffers_and_nonpersistent_buffers_stay_inside():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    module[0].weight.requires_grad_(False)
    module[1].register_buffer("scratch", torch.zeros(3), persistent=False)
    layer = from_torch(module)
    assert [name for name, _ in layer.named_parameters()] == ["0.bias", "1.weight"]
    assert [name for name, _ in layer.named_buffers()] == ["0.weight"]
    layer(torch.randn(4, 3))
    layer.backward(torch.randn(4, 2))
    assert layer.state_dict()["0.weight"].grad is None


def test_shared_submodules_and_tied_parameters():
    linear = nn.Linear(3, 3)
    module = nn.Sequential(linear, nn.Tanh(), linear)
    layer = from_torch(module)
    assert list(layer.state_dict()) == list(module.state_dict())
    assert [name for name, _ in layer.named_parameters()] == ["0.weight", "0.bias"]
    compare(layer, copy.deepcopy(module), draw(4, 3))


def test_gradients_share_memory_with_nothing():
    """Behind an addition autograd hands the same tensor to both terms."""

    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))

        def forward(self, x):
            return x + self.a + self.b

    layer, dout = from_torch(Add()), torch.randn(2, 3)
    layer(torch.randn(2, 3))
    dx = layer.backward(dout)
    assert len({t.data_ptr() for t in (dx, dout, layer.a.grad, layer.b.grad)}) == 4


def test_reuse_none_wanted_and_errors():
    layer = from_torch(nn.Linear(3, 2))
    with torch.no_grad():
        layer(torch.randn(1, 3))
    assert layer.pending == 0
    layer(torch.randn(4, 3))
    assert layer.backward(torch.randn(4, 2), need_dx=False) is None
    assert layer.weight.grad is not None
    with pytest.raises(StateError, match="no forward is waiting"):
        layer.backward(torch.randn(4, 2))
    layer(torch.randn(4, 3))
    with pytest.raises(ShapeError, match=r"dout must have the shape of the output of the forward it belongs to"):
        layer.backward(torch.randn(4, 3))
    layer.weight.add_(1)
    with pytest.raises(StateError, match="was changed in place"):
        layer.backward(torch.randn(4, 2))
    with pytest.raises(ArgumentError, match=r"from_torch: expected a torch\.nn\.Module, got Tanh"):
        from_torch(Tanh())
    attention = nn.MultiheadAttention(4, 2)
    x = torch.randn(3, 4)
    with pytest.raises(DtypeError, match=r"the module's output must be a tensor or a tuple of tensors"):
        from_torch(attention)(x, x, x, None, False)


def test_a_refusal_of_the_module_names_the_layer():
    layer = from_torch(nn.BatchNorm1d(3))
    text = r"in 1 \(ModuleLayer\(BatchNorm1d\(3, .*the module refuses inputs of shape \(1, 3\): Expected more than 1 "
    with pytest.raises(ArgumentError, match=text) as caught:
        Sequential(Tanh(), layer)(torch.zeros(1, 3))
    assert isinstance(caught.value.__cause__, ValueError)
    assert layer.pending == 0
    with pytest.raises(ShapeError, match=r"^Linear\(3 -> 2\)\.forward"):  # a layer inside names itself
        from_torch(nn.Sequential(to_torch(Linear(3, 2))))(torch.zeros(4, 5))
    with torch.no_grad(), pytest.raises(ArgumentError, match="the module refuses"):
        layer(torch.zeros(1, 3))


def test_inputs_without_influence_and_integers():
    class First(nn.Module):
        def forward(self, x, y, index):
            return x[index]

    layer = from_torch(First())
    layer(torch.randn(4, 3), torch.randn(2), torch.tensor([1, 1]))
    dx, dy, dindex = layer.backward(torch.ones(2, 3))
    assert dx[1].tolist() == [2, 2, 2]
    assert dy.tolist() == [0, 0]
    assert dindex is None


class Doubles(nn.Module):
    def forward(self, x):
        return x.mul_(2)


@pytest.mark.parametrize(
    "module", [nn.ReLU(inplace=True), nn.Sequential(nn.Flatten(), nn.LeakyReLU(inplace=True), nn.Linear(3, 2))]
)
def test_a_module_that_works_in_place_gets_a_copy(module):
    x = torch.randn(4, 3)
    before, layer = x.clone(), from_torch(module)
    with torch.no_grad():
        layer(x)
    layer(x)
    assert torch.equal(x, before)
    leaf = x.clone().requires_grad_()
    dout = torch.randn_like(out := module(leaf.clone()))
    out.backward(dout)
    torch.testing.assert_close(layer.backward(dout), leaf.grad)


@pytest.mark.parametrize("x", [torch.ones(2), torch.tensor([1, 2])])
def test_a_module_that_changes_its_input_unannounced_is_refused(x):
    layer, text = (
        from_torch(Doubles()),
        r"ModuleLayer\(Doubles\(\)\)\.forward: .* must not change an input or a parameter",
    )
    with pytest.raises(ArgumentError, match=text):
        layer(x)
    with torch.no_grad(), pytest.raises(ArgumentError, match=text):
        layer(x)
    assert layer.pending == 0


def test_sparse_gradients_are_dense():
    layer, twin = from_torch(nn.Embedding(5, 2, sparse=True)), Embedding(5, 2)
    twin.weight.copy_(layer.weight)
    for embedding in (layer, twin):
        step = TrainStep(Sequential(embedding, Tanh()), MSE(), SGD(embedding.parameters(), lr=0.1, momentum=0.9))
        for _ in range(3):
            step(torch.tensor([1, 1, 4]), torch.ones(3, 2))
    torch.testing.assert_close(layer.weight, twin.weight)
    assert layer.weight.grad.layout is torch.strided


def test_targets_and_numbers_beside_x():
    x, target = torch.randn(2, 3), torch.randn(2, 3)
    layer = from_torch(nn.MSELoss())
    layer(x, target)
    dx, dtarget = layer.backward(torch.tensor(1.0))
    torch.testing.assert_close(dx, (x - target) / 3)
    torch.testing.assert_close(dtarget, -dx)

    class Times(nn.Module):
        def forward(self, x, factor):
            return x * factor

    layer = from_torch(Times())
    layer(x, 3.0)
    dx, dfactor = layer.backward(torch.ones(2, 3))
    assert (dx == 3).all()
    assert dfactor is None
    loss = from_torch(nn.CrossEntropyLoss())
    with pytest.raises(ArgumentError, match=r"refuses inputs of shape \(2, 3\), \(2,\): "):
        loss(x, torch.tensor([0.0, 1.0]))
    with pytest.raises(DtypeError, match="the module refuses inputs"):
        loss(x, 1.0)
    with pytest.raises(IndexRangeError, match="the module refuses inputs"):
        loss(x, torch.tensor([0, 3]))
    with pytest.raises(ArgumentError, match="the module refuses inputs"):
        from_torch(nn.Linear(4, 2))(x)


def test_modes_reach_single_submodules():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    layer = Sequential(from_torch(module), Identity())
    layer.eval()
    layer(torch.randn(1, 3))
    assert not module[0].training
    layer.train()
    dict(layer.named_layers())["0.0"].eval()
    layer(torch.randn(1, 3))
    assert module[1].training
    assert not module[0].training


# ---------------------------------------------------------------------- both ways


def test_layer_to_torch_and_back():
    layer = Sequential(Linear(3, 4), LayerNorm(4), Sum(Tanh(), Identity()), BatchNorm1d(4))
    back = from_torch(to_torch(copy.deepcopy(layer)))
    assert isinstance(back, Layer)
    assert list(back.state_dict()) == list(layer.state_dict())
    back.load_state_dict(layer.state_dict())
    layer.to(torch.float64), back.to(torch.float64)
    for _ in range(2):
        x, dout = draw(5, 3), draw(5, 4)
        close(back(x), layer(x), "out")
        close(back.backward(dout), layer.backward(dout), "dx")
    ours = dict(back.named_parameters())
    for name, param in layer.named_parameters():
        close(ours[name].grad, param.grad, name)
    for name, value in layer.named_buffers():
        close(back.state_dict()[name], value, name)


def test_module_to_layer_and_back():
    module = torch_mlp().double()
    back = to_torch(from_torch(copy.deepcopy(module)))
    assert list(back.state_dict()) == list(module.state_dict())
    x, y = torch.randint(7, (4, 2)), torch.randint(7, (4,))
    for model in (module, back):
        nn.functional.cross_entropy(model(x), y).backward()
    same_gradients(back, module)
    for name, value in back.state_dict().items():
        close(value, module.state_dict()[name], name)


# ---------------------------------------------------------------------- layer by layer


def test_layer_by_layer_each_layer_is_a_module():
    """With the same keys and gradients as the whole; a shared parameter is one, a tuple goes on as in a Sequential."""
    table, head = Embedding(7, 4), Linear(4, 7, bias=False)
    head.weight = table.weight
    pair = hg.GRU(4, 4, batch_first=True, return_state=True)
    layers = [table, Sequential(Linear(4, 4), BatchNorm1d(4, channels_last=True)), pair, Both(), Flatten(0, 1), head]
    model = Sequential(*layers)
    whole, apart = to_torch(copy.deepcopy(model)), to_torch(model, layer_by_layer=True)
    assert [type(m).__name__ for m in apart] == ["LayerModule", "_ModulesInARow", *["LayerModule"] * 4]
    assert list(apart.state_dict()) == list(whole.state_dict()) == list(model.state_dict())
    assert len(list(apart.parameters())) == len(list(model.parameters()))
    x, y = torch.randint(7, (3, 5)), torch.randint(7, (15,))
    for module in (whole, apart):
        nn.functional.cross_entropy(module(x), y).backward()
    for (name, p), (_, q) in zip(whole.named_parameters(), apart.named_parameters()):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    assert isinstance(to_torch(Linear(2, 3), layer_by_layer=True), LayerModule)


class Both(hg.Layer):
    """Output and state of a recurrent layer, added up."""

    def forward(self, out, state):
        self.push(out=out)
        return out + state.unsqueeze(1)

    def backward(self, dout):
        self.pop(dout)
        return dout.clone(), dout.sum(1)
