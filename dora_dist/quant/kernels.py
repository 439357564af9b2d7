# mypy: disable-error-code="no-untyped-def"
"""4-bit weights made dense by a fused Triton kernel on CUDA devices, and what kernels share: where they run and
how they are launched."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from dora_dist.device import constant_when_compiled, gpu_is_rehearsed
from dora_dist.quant import nf4
from dora_dist.quant.nf4 import KERNEL_DTYPES, Nf4


def available(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels run on tensors of `device`, for a base of `dtype`."""
    if dtype not in KERNEL_DTYPES:
        return False
    return gpu_is_rehearsed() or (device.type in ("cuda", "cpu") and _constant_run_on(device.type, device.index))


@constant_when_compiled
def _constant_run_on(kind: str, index: int | None) -> bool:
    return _run_on(kind, index)


@cache
def _run_on(kind: str, index: int | None) -> bool:
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":  # the interpreter, for tests
        return False
    if kind == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(index) < (8, 0)):
        return False  # no bf16 or tf32 products
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **constants: Any) -> None:
    """Start a Triton program on the device of `first`, or none where the grid is empty."""
    from triton import language  # only here: not all machines have Triton

    if 0 in grid:
        return
    constants["DTYPE"] = getattr(language, str(constants["DTYPE"]).removeprefix("torch."))
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, **constants)


def strides(*tensors: Tensor | None) -> list[int]:
    """Those of all; two zeros for what is None."""
    return [step for tensor in tensors for step in ((0, 0) if tensor is None else tensor.stride())]


def operator(name: str) -> Callable[[Callable], Any]:
    """Make a function a custom operator where torch.compile or a rehearsal must know it by its shapes alone (its
    `op`). Elsewhere it is called as it is: torch's dispatcher would take as long as a small layer."""

    def wrap(function: Callable) -> Any:
        op = custom_op(name, mutates_args=())(function)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            by_shapes = torch.compiler.is_compiling() or gpu_is_rehearsed()
            return (op if by_shapes else function)(*arguments)

        call.op = op  # type: ignore[attr-defined]
        return call

    return wrap


@operator("dora_dist::dequantize")
def _dequantize(packed: Tensor, scales: Tensor, columns: int, block_size: int, dtype: torch.dtype) -> Tensor:
    from dora_dist.quant.triton_kernels import dequantize_kernel  # it needs Triton

    M_NK = packed.new_empty(packed.shape[0], columns, dtype=dtype)
    BN, BK = 16, 128
    launch(
        dequantize_kernel, (-(-M_NK.shape[0] // BN), -(-columns // BK)), packed, scales, nf4.codes(packed.device),
        M_NK, *M_NK.shape, *strides(packed, scales), BLOCK=block_size, DTYPE=dtype, BN=BN, BK=BK, num_warps=4,
    )  # fmt: skip
    return M_NK


@_dequantize.op.register_fake
def _(packed, scales, columns, block_size, dtype):
    return packed.new_empty(packed.shape[0], columns, dtype=dtype)


def dequantize(parts: Sequence[Tensor], layout: Nf4, row_factors: Tensor | None = None) -> Tensor:
    """The same as nf4.py's, to the bit. On a GPU without bitsandbytes it is made in one pass here: torch's own
    operators make it by several, through tensors of five times its size."""
    if nf4.has_kernels(layout, parts[0].device) or not available(parts[0].device, layout.dtype):
        return nf4.dequantize(parts, layout, row_factors)
    packed, scales = nf4.codes_and_scales(parts, layout, row_factors)
    return _dequantize(packed, scales, layout.columns, layout.block_size, layout.dtype)
