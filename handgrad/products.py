"""Large products of matrices in a compiled program, by oneDNN where it is faster than torch's own library.

torch multiplies float32 matrices on x86 by MKL, which keeps to AVX2 on processors other than Intel's; oneDNN, which is
in torch as well, uses AVX-512 wherever there is one, and takes half the time then. Its call costs some 10 us more.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LARGE = 2**21
"""The multiplications in a product from which on it is left to oneDNN."""


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies matrices of 256 x 256 in less than 3/4 of the time here: measured once a process."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    a = torch.ones(256, 256)
    own, onednn = _seconds(lambda: a.mm(a)), _seconds(lambda: _linear(a, a, None, "none", [], ""))
    return onednn < 0.75 * own


def _seconds(product: Callable[[], Tensor]) -> float:
    """The shortest of five."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        product()
        times.append(time.perf_counter() - begun)
    return min(times)


def _linear(*args: Any) -> Tensor:
    """The input times the transposed weight."""
    return torch.ops.mkldnn._linear_pointwise(*args)  # type: ignore[no-any-return]


@functools.cache
def product() -> Any:
    """An operation ``a @ b`` of matrices that the compiler makes a call of oneDNN; nothing of it is in the program."""
    from torch._inductor import mkldnn_ir
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import lowerings, register_lowering

    @torch.library.custom_op("handgrad::product", mutates_args=())
    def plain(a: Tensor, b: Tensor) -> Tensor:
        return a.mm(b)

    @plain.register_fake
    def _(a: Tensor, b: Tensor) -> Tensor:
        return a.new_empty(a.shape[0], b.shape[1])

    linear: Any = mkldnn_ir.LinearUnary.create
    operation = torch.ops.handgrad.product.default

    @register_lowering(operation, type_promotion_kind=None)
    def _(a: Any, b: Any) -> Any:
        weight = lowerings[torch.ops.aten.permute.default](b, [1, 0])
        return TensorBox.create(linear(a, weight, None, "none", [], ""))

    return operation
