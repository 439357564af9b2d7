"""All experts of a projection in one launch on CUDA devices, for ranks up to 64. The loop in grouped.py has some
six launches an expert, and the host waits to know how many tokens each has. Here tokens are counted, and tiles of
them handed out, on the device. Symbols are those of grouped.py; the programs are in triton_grouped.py.

A pass reads the weights of the experts that have tokens once for every 64 of them (mostly from the L2 cache),
tokens once for every block of features, and writes what it makes once. A 4-bit weight is made dense tile by tile,
in registers: no dense copy of an expert exists. Products are held in fp32 until the ratio has met them. Nothing is
tuned at run time, and no sum goes through atomics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_dist.device import gpu_is_rehearsed
from dora_dist.dora.functional import Constants, Grads, Kept
from dora_dist.dora.kernels import MAX_RANK, _power_of_2
from dora_dist.quant.kernels import available, launch
from dora_dist.quant.modules import Grouping, Groups, Spans
from dora_dist.quant.nf4 import codes

TOKENS = 64  # of a tile
_MOST_PRODUCTS = 1 << 32
"""Multiplications of an average expert's tokens up to which all experts go in one launch. That many take a GPU of
2e14 a second 20 us, and the loop's launches for an expert as long; beyond, BLAS libraries' products hide them."""
force: bool | None = None  # for comparisons: whether to group, whatever the size


def worthwhile(x_SI: Tensor, num_experts: int, shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether a loop over experts would take longer for its launches than for its products: the one place where
    that is decided, before the host knows how many tokens each expert has. A rehearsal follows the loop, whose
    products it counts."""
    if gpu_is_rehearsed() or not available(x_SI.device, x_SI.dtype):
        return False
    largest = max(out * columns for out, columns in shapes.values())
    return len(x_SI) * largest <= _MOST_PRODUCTS * num_experts if force is None else force


@dataclass(frozen=True, eq=False)
class DeviceGroups(Grouping):
    """Groups that only the device knows, until something asks for the `spans`; and tiles of their tokens."""

    num_experts: int
    starts: Tensor  # [E + 2] where a group begins; the last but one is of tokens without an expert
    first_tile: Tensor  # [E + 2] of a group
    tile_expert: Tensor  # of a tile; above E: it has no tokens
    tile_start: Tensor

    @classmethod
    def of_sorted(cls, experts_S: Tensor, num_experts: int) -> "DeviceGroups":
        """From the expert of each token, sorted; those from `num_experts` on are none."""
        every = torch.arange(num_experts + 1, dtype=experts_S.dtype, device=experts_S.device)
        starts = torch.searchsorted(experts_S, every, out_int32=True)
        starts = F.pad(starts, (0, 1), value=len(experts_S))
        ends = ((starts.diff() + (TOKENS - 1)) // TOKENS).cumsum(0, dtype=torch.int32)
        first = F.pad(ends, (1, 0))
        tiles = len(experts_S) // TOKENS + num_experts + 1  # a group fills up less than one
        number = torch.arange(tiles, dtype=torch.int32, device=ends.device)
        group = torch.searchsorted(ends, number, right=True, out_int32=True)
        known = group.clamp(max=num_experts)
        return cls(num_experts, starts, first, group, starts[known] + (number - first[known]) * TOKENS)

    @cached_property
    def spans(self) -> Spans:  # type: ignore[override]
        """The host waits for them."""
        return Groups.of(self.starts.diff()[:-1].tolist()).spans


def run_on(groups: Grouping, x: Tensor, A: Tensor | None) -> TypeGuard[DeviceGroups]:
    """Whether the kernels do this projection."""
    small = A is None or A.shape[0] <= MAX_RANK * groups.num_experts
    return isinstance(groups, DeviceGroups) and small and available(x.device, x.dtype)


def outputs(
    kept: Kept, constants: Constants, on_inputs: bool, groups: DeviceGroups, parts: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """y, of x's dtype, and z of all tokens; zeros where a token has no expert."""
    from dora_dist.dora.triton_grouped import outputs_kernel

    x_SI = kept.x_TI.contiguous()
    (O, I), rank = groups.shape(parts, constants.layout), _rank(kept, groups)  # noqa: E741
    y_SO = x_SI.new_empty(x_SI.shape[0], O)
    z_SR = x_SI.new_empty(x_SI.shape[0], rank) if rank else None
    weight, strides, block = _weight(parts, constants)
    BO, BI, options = _blocks(x_SI.dtype, rank, block > 0, on_inputs)
    launch(
        outputs_kernel, (len(groups.tile_expert), -(-O // BO)), x_SI, *weight, _narrow_A(kept), kept.B_OR, kept.g,
        _bytes(kept.keep_TI), y_SO, z_SR, groups.tile_expert, groups.tile_start, groups.starts,
        groups.num_experts, O, I, constants.scaling, constants.keep_scale, *strides, ON_INPUTS=on_inputs, R=rank,
        BLOCK=block, DTYPE=x_SI.dtype, BT=TOKENS, BO=BO, BI=BI, BR=max(16, _power_of_2(rank)), **options,
    )  # fmt: skip
    return y_SO, z_SR


def grads(
    dy_SO: Tensor,
    y_SO: Tensor | None,
    kept: Kept,
    constants: Constants,
    on_inputs: bool,
    groups: DeviceGroups,
    parts: Sequence[Tensor],
) -> Grads:
    """Of `outputs`; all zero for an expert without tokens."""
    dy_SO, x_SI = dy_SO.contiguous(), kept.x_TI.contiguous()
    dx_SI, dz_SR, parts_PI = _input_grads(dy_SO, x_SI, kept, constants, on_inputs, groups, parts)
    dA = dB = dm = None
    g_O = None if on_inputs else kept.g
    if kept.g is not None:
        dm = torch.empty_like(kept.g)
    if kept.A_RI is not None and kept.B_OR is not None:
        dA, dB = torch.empty_like(kept.A_RI), torch.empty_like(kept.B_OR)
        g_I, keep = kept.g if on_inputs else None, _bytes(kept.keep_TI)
        _factor_grads(x_SI, dz_SR, groups, dA.view(groups.num_experts, -1, dA.shape[1]).transpose(1, 2),
                      constants.keep_scale, g_I, keep=keep)  # fmt: skip
    if dB is not None or g_O is not None:
        out = None if dB is None else dB.view(groups.num_experts, -1, dB.shape[1])
        _factor_grads(dy_SO, kept.z_TR, groups, out, constants.scaling, g_O, kept.n, y_SO, dm)
    if on_inputs and dm is not None:
        _sum_tiles(parts_PI, kept.n, dm, groups)
    return Grads(dx_SI, dA, dB, dm)


def _input_grads(
    dy_SO: Tensor,
    x_SI: Tensor,
    kept: Kept,
    constants: Constants,
    on_inputs: bool,
    groups: DeviceGroups,
    parts: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dz and, where the ratio is on inputs, each tile's sums of x * (dy V)."""
    from dora_dist.dora.triton_grouped import inputs_kernel

    (O, I), rank = groups.shape(parts, constants.layout), _rank(kept, groups)  # noqa: E741
    dx_SI = torch.empty_like(x_SI)
    dz_SR = x_SI.new_empty(x_SI.shape[0], rank) if rank else None
    tiles = len(groups.tile_expert)
    parts_PI = x_SI.new_empty(tiles, I, dtype=torch.float32) if on_inputs else None
    weight, strides, block = _weight(parts, constants)
    BI, BO, options = _blocks(x_SI.dtype, rank, block > 0, on_inputs)
    launch(
        inputs_kernel, (tiles, -(-I // BI)), dy_SO, *weight, _narrow_A(kept), kept.B_OR, kept.g,
        _bytes(kept.keep_TI), x_SI, dx_SI, dz_SR, parts_PI, groups.tile_expert, groups.tile_start, groups.starts,
        groups.num_experts, O, I, constants.scaling, constants.keep_scale, *strides, ON_INPUTS=on_inputs, R=rank,
        BLOCK=block, DTYPE=x_SI.dtype, BT=TOKENS, BO=BO, BI=BI, BR=max(16, _power_of_2(rank)), **options,
    )  # fmt: skip
    return dx_SI, dz_SR, parts_PI


def _factor_grads(
    v_SN: Tensor,
    u_SR: Tensor | None,
    groups: DeviceGroups,
    out_ENR: Tensor | None,
    factor: float,
    g: Tensor | None,
    n: Tensor | None = None,
    other_SN: Tensor | None = None,
    total: Tensor | None = None,
    keep: Tensor | None = None,
) -> None:
    """factor (g v)^T u into `out`; with `other`, sum(v * other) / (g n) into `total`."""
    from dora_dist.dora.triton_grouped import factors_kernel

    rank, BN = 0 if u_SR is None else u_SR.shape[1], 64 if v_SN.dtype != torch.float32 else 32
    launch(
        factors_kernel, (groups.num_experts, -(-v_SN.shape[1] // BN)), v_SN, u_SR, other_SN, g, n, keep, out_ENR,
        total, groups.starts, v_SN.shape[1], factor, *((0, 0, 0) if out_ENR is None else out_ENR.stride()),
        R=rank, DTYPE=v_SN.dtype, BT=TOKENS, BN=BN, BR=max(16, _power_of_2(rank)), num_warps=8, num_stages=2,
    )  # fmt: skip


def _sum_tiles(parts_PI: Tensor | None, n: Tensor | None, out: Tensor, groups: DeviceGroups) -> None:
    """dm of each expert from its tiles' sums."""
    from dora_dist.dora.triton_grouped import tile_sums_kernel

    assert parts_PI is not None
    columns = parts_PI.shape[1]
    launch(
        tile_sums_kernel, (groups.num_experts, -(-columns // 256)), parts_PI, n, out, groups.first_tile, columns,
        DTYPE=torch.float32, BLOCK=256, num_warps=4,
    )  # fmt: skip


def _blocks(dtype: torch.dtype, rank: int, packed: bool, on_inputs: bool) -> tuple[int, int, dict[str, int]]:
    """Tile sizes in the features that a program makes and in those that it sums over, and Triton's options: as
    much as registers hold, of which dequantizing takes many."""
    if dtype == torch.float32:
        return *((64, 32) if rank <= 32 else (32, 16)), {"num_warps": 8, "num_stages": 2}
    if packed:
        return 64, 64 if rank <= 32 and not on_inputs else 32, {"num_warps": 8, "num_stages": 2}
    return 128, 64 if rank <= 32 and not on_inputs else 32, {"num_warps": 8, "num_stages": 3}


def _rank(kept: Kept, groups: DeviceGroups) -> int:
    return 0 if kept.A_RI is None else kept.A_RI.shape[0] // groups.num_experts


def _weight(parts: Sequence[Tensor], constants: Constants) -> tuple[list[Tensor | None], tuple[int, int], int]:
    """Codes or values, scales, ranges and the table of codes; rows' strides; the block size."""
    layout, held = constants.layout, [part.contiguous() for part in parts]
    if layout is None:
        return [held[0], None, None, None], (held[0].stride(0), 0), 0
    ranges = held[2] if layout.double_quant else None
    strides = held[0].stride(0), held[1].stride(0)
    return [held[0], held[1], ranges, codes(held[0].device)], strides, layout.block_size


def _narrow_A(kept: Kept) -> Tensor | None:
    """A in x's dtype, as the low-rank path multiplies by it."""
    return None if kept.A_RI is None else kept.A_RI.to(kept.x_TI.dtype)


def _bytes(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep.view(torch.uint8)
