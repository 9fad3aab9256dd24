"""Several processes that train one model together, started by torchrun; or the one that there usually is."""

from __future__ import annotations

import contextlib
import os
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from handgrad import SyncBatchNorm
from names.run import Run


class Team:
    """The processes of one training run, as one of them sees it.

    All do the same, but each steps on its part of every minibatch, and the first alone prints and writes.
    """

    def __init__(self, device: str) -> None:
        together = dist.is_available() and dist.is_torchelastic_launched()
        self.rank, self.size = (
            int(os.environ[name]) if together else i for i, name in enumerate(("RANK", "WORLD_SIZE"))
        )
        self.attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) if together else 0
        self.device = f"cuda:{os.environ['LOCAL_RANK']}" if self.size > 1 and device == "cuda" else device
        self.masks = torch.Generator()
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Team:
        if self.size > 1:
            backend = "gloo"
            if self.device.startswith("cuda"):
                backend = "nccl"
                torch.cuda.set_device(self.device)  # where NCCL puts what is no tensor, such as the names of parameters
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # which outlives the processes: what those of an earlier attempt left in it must not be met again
                store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
                own = dist.PrefixStore(f"attempt {self.attempt}", store)
                dist.init_process_group(backend, store=own, rank=self.rank, world_size=self.size)
            else:
                dist.init_process_group(backend)
            self._exit.callback(dist.destroy_process_group)
        if self.rank > 0:
            silence = self._exit.enter_context(open(os.devnull, "w"))
            self._exit.enter_context(contextlib.redirect_stdout(silence))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def prepare(self, run: Run) -> None:
        """Join the statistics of batch norms over the processes, and give each process random masks of its own.

        Minibatches are drawn by the generator of the run, in every process alike.
        """
        if self.size > 1:
            SyncBatchNorm.convert_sync_batchnorm(run.model)
            for _, layer in run.model.named_layers():
                if getattr(layer, "generator", None) is run.generator:
                    layer.generator = self.masks  # type: ignore[attr-defined]

    def begin_stretch(self, run: Run) -> None:
        """Before some steps: the masks depend on where the run is, so that a resumed one has the same."""
        self.masks.manual_seed((run.config.seed * 1_000_003 + run.step) * self.size + self.rank & (1 << 63) - 1)

    def part(self, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        """Of K minibatches of B rows, xs (K, B, T) and ys (K, B) or (K, B T), the rows of this process."""
        if self.size == 1:
            return xs, ys
        K, B = xs.shape[:2]
        rows = slice(B * self.rank // self.size, B * (self.rank + 1) // self.size)
        return xs[:, rows], ys.view(K, B, -1)[:, rows].flatten(1)

    def agree(self, asked: bool) -> bool:
        """Whether any of the processes is asked to stop."""
        if self.size == 1:
            return asked
        device = torch.device(self.device)
        answer = torch.tensor(float(asked), device=device)
        dist.all_reduce(answer)
        return bool(answer > 0)
