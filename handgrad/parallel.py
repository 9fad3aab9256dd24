"""One model trained by several processes on torch.distributed: each has a part of every minibatch.

Every process has the whole model. Each runs forward and backward on its part, and the gradients are added up before the
update, so that all take the same step: that of the joined minibatch. `TrainStep(..., process_group=True)` does it all.
Start so many processes with ``torchrun --nproc-per-node 2 script.py``, and in each:

    torch.distributed.init_process_group("gloo")  # on GPUs "nccl", after torch.cuda.set_device of a GPU per process
    step = TrainStep(model, loss, optimizer, process_group=True)
    step(x[rank::world], target[rank::world])

In a loop of one's own `broadcast_model` comes first, and `average_gradients` between backward and update.

Two things of torch do their work on the plain tensors of a model as they are. An optimizer whose state is divided among
the processes, here of SGD with momentum (handgrad's, or any of torch.optim), and which is an optimizer like any other:

    torch.distributed.optim.ZeroRedundancyOptimizer(model.parameters(), optimizer_class=SGD, lr=0.1, momentum=0.9)

And DistributedDataParallel, around the model as a torch module. It sends gradients while the backward still runs, where
each layer is a module of its own:

    module = torch.nn.parallel.DistributedDataParallel(to_torch(model, layer_by_layer=True))
    loss = to_torch(CrossEntropy())

It takes the plain mean over the processes, which is the joined gradient for parts of equal size alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from handgrad.errors import ArgumentError, CompileError, ProcessError, ShapeError, StateError
from handgrad.layer import Layer
from handgrad.layers.batchnorm import BatchNorm
from handgrad.pieces import wide

BUCKET = 25 * 2**20  # bytes of gradients that go in one message


def average_gradients(model: Layer, rows: float, group: Any = None) -> None:
    """Make every gradient that of the joined minibatch, in all processes of the group alike.

    To be called in each of them, between backward and update. `rows` is the number of rows of this process's part, and
    the loss a mean over these. (More exactly it is what the mean divided by: without the ignored rows, for example.)
    Parts may be of any size, or empty. A parameter that has a gradient in some process gets one in all of them; one
    that nobody has stays None. Without a group, all processes are meant.

    With a SyncBatchNorm in the model, parts must be of one size (or let a TrainStep do it, for any).

    Raises StateError where torch.distributed is not initialised; ProcessError where another process has ended, or does
    not come within the time limit of the group; ArgumentError.

    >>> from handgrad import Linear
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> layer, x = Linear(3, 2), torch.ones(4, 3)
    >>> _ = layer(x), layer.backward(torch.ones(4, 2) / 4)
    >>> average_gradients(layer, rows=4)
    >>> layer.bias.grad
    tensor([1., 1.])
    >>> dist.destroy_process_group()
    """
    if isinstance(rows, bool) or not isinstance(rows, Real) or not 0 <= float(rows) < math.inf:
        raise ArgumentError(f"average_gradients: rows must be a number from 0 on, got {rows!r}")
    processes, params = Processes(group, "average_gradients"), list(model.parameters())
    has = [p.grad is not None for p in params]
    total, *having = processes.add(numbers_near([rows, *has], params)).tolist()
    for p in params:
        if p.grad is not None:  # of no rows it is zero, whatever came out of 0/0
            p.grad = p.grad.mul_(float(rows) / total) if rows > 0 else p.grad.zero_()
    processes.add_gradients([p for p, h in zip(params, having) if h > 0])


def broadcast_model(model: Layer, group: Any = None) -> None:
    """Give the model of every process the parameters and buffers that the first process of the group has.

    To be called in each of them, before the first step. Without a group, all processes are meant.

    Raises ArgumentError, in every process, where the models differ in the names, shapes or dtypes of their tensors;
    what `average_gradients` raises.
    """
    Processes(group, "broadcast_model").make_same([model], {})


class Processes:
    """The processes of a group, and what they tell each other. All must call the same, in the same order."""

    def __init__(self, group: Any, who: str) -> None:
        """Take a group, or None for all processes; errors begin with `who` asks."""
        if not (dist.is_available() and dist.is_initialized()):
            problem = "torch.distributed has no process group; call torch.distributed.init_process_group first, in "
            raise StateError(f"{who}: {problem}every process")
        self.group: Any = dist.group.WORLD if group is None else group
        self.who = who
        if not isinstance(self.group, dist.ProcessGroup):
            problem = "the process group must be one of torch.distributed, and this process be in it"
            raise ArgumentError(f"{who}: {problem}; got {group!r}")
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def __deepcopy__(self, memo: Any) -> Processes:
        return self

    def add(self, message: Tensor) -> Tensor:
        """The sum of the processes' messages, in place."""
        self.refuse_device(message)
        with self._talking():
            dist.all_reduce(message, group=self.group)
        return message

    def gather(self, message: Tensor) -> Tensor:
        """The processes' messages (F,), one a row: (size, F)."""
        self.refuse_device(message)
        rows = [torch.empty_like(message) for _ in range(self.size)]
        with self._talking():
            dist.all_gather(rows, message, group=self.group)
        return torch.stack(rows)

    def add_after(self, work: Callable[[], Tensor], length: int, near: Sequence[Tensor], announce: bool) -> Tensor:
        """The sum of the messages that come of the processes' work; where it fails in one of them, it fails in all.

        Messages have a length and are near some tensors. Without `announce` the others learn of a failure by the end of
        that process alone.
        """
        try:
            message = work()
        except Exception:
            if announce:
                with suppress(ProcessError):
                    self.add(numbers_near([0] * length + [1], near))
            raise
        *_, failed = message = self.add(torch.cat([message, message.new_zeros(1)]))
        if failed > 0:
            raise ProcessError(
                f"{self.who}: another process failed in this step, and nothing has changed; see its error"
            )
        return message[:-1]

    def add_gradients(self, params: Sequence[Tensor]) -> None:
        """Make the gradient of each parameter the sum over the processes; None counts as zero."""
        buckets = [(bucket, _flat([_gradient(p) for p in bucket])) for bucket in _buckets(params)]
        with self._talking():
            under_way = [dist.all_reduce(flat, group=self.group, async_op=True) for _, flat in buckets]
            for (bucket, flat), work in zip(buckets, under_way):
                work.wait()
                for p, total in zip(bucket, flat.split_with_sizes([p.numel() for p in bucket])):
                    if p.grad is None:
                        p.grad = total.view_as(p).clone()
                    elif p.grad.data_ptr() != total.data_ptr():
                        p.grad.copy_(total.view_as(p))

    def make_same(self, parts: Sequence[Layer], options: dict[str, Any]) -> None:
        """Give the tensors of the parts the values that they have in the first process; refuse parts that differ."""
        named = {
            f"{part._head()}.{name}" if i else name: tensor
            for i, part in enumerate(parts)
            for name, tensor in (*part.named_parameters(), *part.named_buffers())
        }
        for tensor in named.values():
            self.refuse_device(tensor)
        own = {name: f"{tuple(t.shape)} {t.dtype}" for name, t in named.items()}
        self._refuse_differences(own | {name: str(value) for name, value in options.items()})
        first = dist.get_global_rank(self.group, 0)
        with self._talking():
            for bucket in _buckets(list(named.values())):
                flat = _flat(bucket)
                dist.broadcast(flat, first, group=self.group)
                for tensor, value in zip(bucket, flat.split_with_sizes([t.numel() for t in bucket])):
                    if tensor.data_ptr() != value.data_ptr():
                        tensor.copy_(value.view_as(tensor))

    def refuse_device(self, tensor: Tensor) -> None:
        """Raise where the group cannot send the tensor: NCCL takes those on a GPU alone."""
        backends = dict(pair.split(":") for pair in str(dist.get_backend_config(self.group)).split(","))
        if tensor.device.type not in backends:
            names, devices = (", ".join(dict.fromkeys(part)) for part in (backends.values(), backends))
            problem = f"the backend of the process group, {names}, takes tensors on {devices}, got one on "
            remedy = f"{tensor.device}; move the model there, or choose another backend (on a CPU gloo)"
            raise ArgumentError(f"{self.who}: {problem}{remedy}")

    def _refuse_differences(self, own: dict[str, str]) -> None:
        everyone: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(everyone, own, group=self.group)
        first, *others = everyone
        for rank, other in enumerate(others, 1):
            for name in dict.fromkeys((*first, *other)):
                if first.get(name) != other.get(name):
                    came = " and ".join(
                        f"{name} {what[name]} in process {r}" if name in what else f"no {name} in process {r}"
                        for r, what in ((0, first), (rank, other))
                    )
                    raise ArgumentError(f"{self.who}: all processes must have the same model and options; got {came}")

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Torch's errors, said so that one knows where to look."""
        try:
            yield
        except RuntimeError as error:
            problem = "another process has ended, does something else, or did not come within the time limit of the "
            remedy = "group (the timeout of init_process_group); look for the first error among the processes'"
            raise ProcessError(f"{self.who}: {problem}{remedy}. Torch says: {error}") from error


def numbers_near(numbers: Sequence[Any], near: Sequence[Tensor]) -> Tensor:
    """Some numbers as a tensor on the device of others."""
    return torch.tensor(numbers, dtype=torch.float64, device=near[0].device if near else None)


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one after the other; of a single one its own memory, where that is in order."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors by dtype and device, as many together as a message holds, in an order that all processes share."""
    done: list[list[Tensor]] = []
    filling: dict[Any, list[Tensor]] = {}
    for t in tensors:
        bucket = filling.get((t.dtype, t.device))
        if bucket is None or sum(b.nbytes for b in bucket) + t.nbytes > BUCKET:
            bucket = filling[t.dtype, t.device] = []
            done.append(bucket)
        bucket.append(t)
    return done


class SyncBatchNorm(BatchNorm):
    """Batch norm with the mean and variance of the joined minibatch, of which each process has a part.

    Forward:   xhat = (x - mean) rstd,  rstd = 1/sqrt(var + eps),  out = xhat weight + bias
               In training, process r has n_r values per channel, their mean mean_r and squares_r = sum (x - mean_r)^2.
               All tell each other, and with sums over the processes
               n = sum n_r,  mean = sum n_r mean_r / n,  squares = sum (squares_r + n_r (mean_r - mean)^2),
               var = squares/m with m = n, or m = n - 1 if `unbiased`.
               The running statistics, and evaluation, are as in BatchNorm.
    Shapes:    x (N, C), (N, C, L), (N, C, H, W), ..., or (..., C) if `channels_last`; weight, bias, running_mean,
               running_var (C,); out like x
    Backward:  dbias = sum dout,  dweight = sum dout xhat, over the rows of this process: those of all are added up with
               all gradients. But x acts through mean and var on the rows of every process, so that in
               dx = scale (dout - (dbias + xhat dweight n/m)/n),  scale = rstd weight,
               as BatchNorm derives it, dbias and dweight are the sums over the processes.
               In evaluation dx = dout scale.
    Recorded:  x, mean, rstd, weight
    Raises:    ArgumentError; ShapeError, also for one value per channel in all processes together in training;
               DtypeError; StateError; ProcessError where another process does not come.
    Source:    torch.nn.SyncBatchNorm. As there, without torch.distributed initialised it is a batch norm of its own.

    Every process must run forward and backward of the same layers in the same order, one without rows, too.

    >>> layer = SyncBatchNorm(2)
    >>> layer(torch.tensor([[1.0, 0.0], [3.0, 8.0]])).round(decimals=3)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """

    forms = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}  # noqa: RUF012 - as in BatchNorm
    _processes: Processes | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        *,
        unbiased: bool = False,
        channels_last: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        options: dict[str, Any] = {
            "unbiased": unbiased,
            "channels_last": channels_last,
            "dtype": dtype,
            "device": device,
        }
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        if process_group is not None:
            self._processes = Processes(process_group, "SyncBatchNorm")

    @classmethod
    def convert_sync_batchnorm(cls, model: Layer, process_group: Any = None) -> Layer:
        """Make each BatchNorm1d and BatchNorm2d in the model a SyncBatchNorm, and return the model.

        They stay the same objects, with the same tensors: optimizers and references stay valid.

        >>> from handgrad import BatchNorm1d, Linear, Sequential
        >>> SyncBatchNorm.convert_sync_batchnorm(Sequential(Linear(2, 3), BatchNorm1d(3)))[1]
        SyncBatchNorm(3)
        """
        for _, layer in model.named_layers():
            if isinstance(layer, BatchNorm):
                layer.__class__ = cls  # which has no state of its own but the group
                if process_group is not None:
                    vars(layer)["_processes"] = Processes(process_group, "SyncBatchNorm")
        return model

    def forward(self, x: Tensor) -> Tensor:
        self.check_shape(x)
        column, processes = self._channels(x)[0], self._partners()
        n, m = 0, None  # None: mean and var are constants, and the backward has nothing to send through them
        if self.training or self.running_mean is None or self.running_var is None:
            n, mean, squares = self._joined(x, processes)
            if n == 1:
                problem = f"the variance of a batch needs more than one value per channel, got shape {tuple(x.shape)}; "
                raise self.error(ShapeError, "forward", problem + "evaluate a single row under eval()")
            m = max(n - 1 if self.unbiased else n, 1)
            rstd = (squares / m + self.eps).rsqrt()
            self._follow(n, mean, squares)
        else:
            mean, rstd = self.running_mean.clone(), (self.running_var + self.eps).rsqrt()
        xhat = (x - column(mean)) * column(rstd)
        out = xhat if self.weight is None or self.bias is None else xhat * column(self.weight) + column(self.bias)
        out = out.to(x.dtype)
        self.push(x, mean, rstd, self.weight, n, m, processes, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Tensor | None:
        x, mean, rstd, weight, n, m, processes = self.pop(dout)
        column, others = self._channels(x)
        xhat = (x - column(mean)) * column(rstd)
        # out = xhat weight + bias
        dbias, dweight = dout.sum(others, dtype=xhat.dtype), (dout * xhat).sum(others)
        self.add_grad(weight, dweight)
        self.add_grad(self.bias, dbias)
        if not need_dx:
            return None
        scale = column(rstd if weight is None else rstd * weight)
        if m is None:
            return (dout * scale).to(x.dtype)
        if processes is not None:
            dbias, dweight = processes.add(torch.stack([dbias, dweight]))
        # xhat = (x - mean) rstd,  rstd = 1/sqrt(squares/m + eps)
        dx: Tensor = scale * (dout - (column(dbias) + xhat * column(dweight) * (n / m)) / max(n, 1))
        return dx.to(x.dtype)

    def _joined(self, x: Tensor, processes: Processes | None) -> tuple[int, Tensor, Tensor]:
        """Of the values per channel in all processes: how many, their mean, and their squares about it."""
        C, (column, others) = self.num_features, self._channels(x)
        n = x.numel() // C
        mean = x.sum(others, dtype=wide(x.dtype)) / max(n, 1)
        squares = (x - column(mean)).square().sum(others)
        if processes is None:
            return n, mean, squares
        told = processes.gather(torch.cat([mean.new_tensor([n]), mean, squares]).double())
        n_r, mean_r, squares_r = told.split_with_sizes([1, C, C], 1)
        n = int(n_r.sum())
        joined = (n_r * mean_r).sum(0) / max(n, 1)
        squares = (squares_r + n_r * (mean_r - joined).square()).sum(0).to(mean.dtype)
        return n, joined.to(mean.dtype), squares

    def _follow(self, n: int, mean: Tensor, squares: Tensor) -> None:
        """In training, move the running statistics towards those of the batch."""
        running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.training or running_mean is None or running_var is None or batches is None:
            return
        batches.add_(1)  # also for a batch of nothing, as torch does
        if n > 0:
            share: Any = 1 / batches.to(mean.dtype) if self.momentum is None else self.momentum
            for running, own in ((running_mean, mean), (running_var, squares / (n - 1))):
                running.copy_(running + share * (own - running))

    def _partners(self) -> Processes | None:
        """The processes that share the batch, where there are several: as in torch, only in training."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        if self._processes is None and dist.get_world_size() == 1:
            return None
        if is_compiling():
            problem = "its messages to other processes are no part of a graph; use the step without compile()"
            raise self.error(CompileError, "forward", problem)
        return self._processes or Processes(None, "SyncBatchNorm")

    def _channels(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], list[int]]:
        """How to broadcast a number per channel over x, and the dimensions of x beside the channels."""
        channel = x.dim() - 1 if self.channels_last else 1
        shape = [-1, *[1] * (x.dim() - 1 - channel)]
        return lambda per_channel: per_channel.view(shape), [d for d in range(x.dim()) if d != channel]
