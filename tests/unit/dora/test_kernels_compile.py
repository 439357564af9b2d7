"""Every Triton kernel compiles to machine code for sm_80, sm_89 and sm_90, spills no register and fits in the
shared memory of a block. ptxas comes with Triton, so that no GPU is needed.

The kernels are called as training calls them, through kernels.py, on meta tensors: block sizes, options and
specializations are those of the real launches. Only the last step differs, which compiles and does not launch.
"""

import subprocess
from itertools import product

import pytest
import torch

from dora_dist.dora import grouped_kernels, kernels
from dora_dist.dora.functional import Constants, Kept
from dora_dist.dora.grouped_kernels import DeviceGroups
from dora_dist.quant import kernels as nf4_kernels
from dora_dist.quant import nf4
from dora_dist.quant.nf4 import Nf4, PackedMatrix
from tests.unit.dora.test_kernels import INTERPRETED

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter compiles nothing")

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""The most that a block may use, from "Technical specifications per compute capability" in NVIDIA's CUDA C++
Programming Guide."""
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
T, O, I = 4096, 14336, 4096  # noqa: E741


def empty(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def norms(dtype, rank, dim=0, double_quant=None, odd=0, conv1d=False):
    """`double_quant`: of a 4-bit matrix; None: of a dense one. `odd`: of sizes that are no multiple of 16, which
    models hardly have; addresses of single elements take the registers there, and some are spilled. A Conv1D has
    the factors transposed."""
    rows, columns = O - odd, I - odd
    matrix = empty(rows, columns, dtype=dtype)
    if double_quant is not None:
        layout = Nf4(rows, columns, dtype, double_quant=double_quant)
        matrix = PackedMatrix(layout.empty(torch.device("meta")), layout)
    factors = (
        (empty(rank, rows).t(), empty(columns, rank).t()) if conv1d else (empty(rows, rank), empty(rank, columns))
    )
    kernels.squared_norms(matrix, *factors, 2.0, dim)


def dequantized(dtype, double_quant=True):
    layout = Nf4(O, I, dtype, double_quant=double_quant)
    packed, scales = nf4.codes_and_scales(layout.empty(torch.device("meta")), layout)
    nf4_kernels._dequantize(packed, scales, I, layout.block_size, dtype)


def norms_alone(dtype, dim=0):
    """Of a matrix without an adapter, as magnitudes begin."""
    kernels.squared_norms(empty(O, I, dtype=dtype), None, None, 2.0, dim)


def compose(dtype, rank, bias=False, base=FP32, odd=0):
    o = O - odd
    z, B = (empty(T, rank, dtype=dtype), empty(o, rank)) if rank else (None, None)
    kernels.compose(empty(T, o, dtype=base), z, B, empty(o), empty(o, dtype=dtype) if bias else None, 2.0, dtype)


def backward(dtype, rank, odd=0, keep_dh=True):
    o = O - odd
    dy, h_TO = empty(T, o, dtype=dtype), empty(T, o, dtype=dtype)
    kernels.backward(dy, h_TO, empty(o, rank) if rank else None, empty(o), empty(o), 2.0, keep_dh)


def ratio():
    kernels.nonzero_ratio(empty(O), empty(O), 1e-20)


def experts(dtype, rank, axis="out", double_quant=None, odd=0, dropout=False, magnitude=True):
    """A mixture's projection, forward and backward, of Qwen3-30B-A3B's shape."""
    number, tokens, out, columns = 128, 32768, 1536 - odd, 2048 - odd
    groups = DeviceGroups(number, *(empty(n, dtype=torch.int32) for n in (number + 2, number + 2, 641, 641)))
    layout, parts = None, [empty(number * out, columns, dtype=dtype)]
    if double_quant is not None:
        layout = Nf4(number * out, columns, dtype, double_quant=double_quant)
        parts = layout.empty(torch.device("meta"))
    x, y = empty(tokens, columns, dtype=dtype), empty(tokens, out, dtype=dtype)
    A, B = (empty(number * rank, columns), empty(number * out, rank)) if rank else (None, None)
    g = empty(number * (out if axis == "out" else columns)) if magnitude else None
    z = empty(tokens, rank, dtype=dtype) if rank else None
    kept = Kept(x, A, B, g, g, z, empty(tokens, columns, dtype=torch.bool) if dropout else None)
    constants = Constants(2.0, layout=layout)
    grouped_kernels.outputs(kept, constants, axis == "in", groups, parts)
    saved = y if axis == "out" and magnitude else None
    grouped_kernels.grads(y, saved, kept, constants, axis == "in", groups, parts)


USUAL = [
    (norms, {"dtype": BF16, "rank": 16}),
    (norms, {"dtype": BF16, "rank": 64, "dim": 1}),
    (norms, {"dtype": BF16, "rank": 16, "double_quant": True}),
    (dequantized, {"dtype": BF16}),
    (compose, {"dtype": BF16, "rank": 64, "bias": True}),
    (backward, {"dtype": BF16, "rank": 64}),
    (backward, {"dtype": BF16, "rank": 16, "keep_dh": False}),
    (ratio, {}),
    (experts, {"dtype": BF16, "rank": 16, "axis": "in"}),
]
RARE = [
    *((dequantized, {"dtype": d}) for d in (FP32, FP16)),
    *((norms, {"dtype": d, "rank": r, "dim": dim}) for d, r, dim in product((FP32, BF16), (32, 64), (0, 1))),
    *((norms, {"dtype": d, "rank": 16, "dim": dim}) for d, dim in product((FP32, FP16), (0, 1))),
    *((norms_alone, {"dtype": d, "dim": dim}) for d, dim in [(FP32, 1), (BF16, 0), (FP16, 0)]),
    *(
        (norms, {"dtype": d, "rank": r, "dim": dim, "double_quant": double})
        for d, r, dim, double in [
            (FP32, 16, 1, True), (BF16, 32, 0, False), (BF16, 64, 0, True), (BF16, 64, 1, True),
            (FP16, 64, 0, False),
        ]
    ),
    (norms, {"dtype": BF16, "rank": 17, "odd": 3}),
    (norms, {"dtype": FP32, "rank": 63, "dim": 1, "odd": 3}),
    (norms, {"dtype": BF16, "rank": 16, "dim": 1, "conv1d": True}),
    (norms, {"dtype": FP32, "rank": 64, "conv1d": True}),
    *((compose, {"dtype": d, "rank": r, "bias": True}) for d, r in product((FP32, BF16), (16, 32, 64))),
    *((compose, {"dtype": d, "rank": 64, "base": d}) for d in (FP32, BF16, FP16)),
    (compose, {"dtype": BF16, "rank": 0}),
    (compose, {"dtype": FP32, "rank": 0, "bias": True}),
    (compose, {"dtype": BF16, "rank": 17, "bias": True, "odd": 3}),
    *((backward, {"dtype": d, "rank": r}) for d, r in product((FP32, BF16), (16, 32, 64))),
    *((backward, {"dtype": d, "rank": 64}) for d in (FP32, FP16)),
    *((backward, {"dtype": d, "rank": r, "keep_dh": False}) for d, r in [(FP32, 64), (FP16, 64), (BF16, 0)]),
    (backward, {"dtype": BF16, "rank": 0}),
    (backward, {"dtype": BF16, "rank": 17, "odd": 3}),
    (experts, {"dtype": BF16, "rank": 16, "double_quant": True}),
    (experts, {"dtype": BF16, "rank": 64, "dropout": True}),
    (experts, {"dtype": BF16, "rank": 64, "axis": "in", "double_quant": False, "dropout": True}),
    (experts, {"dtype": FP32, "rank": 64, "axis": "in", "dropout": True}),
    (experts, {"dtype": BF16, "rank": 17, "odd": 3}),
]  # fmt: skip


def name(case):
    call, settings = case
    return "-".join([call.__name__, *(f"{k}_{str(v).removeprefix('torch.')}" for k, v in settings.items())])


class Target:
    """Stands for the driver of a GPU that is not there. The device's number is its architecture's, so that Triton
    keeps what it compiled for each apart."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """compile_for(arch, call, **settings) -> what the call would launch: (kernel's name, shared bytes, bytes of
    spilled registers)."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        found.append((self.__name__, compiled.metadata.shared, stack_bytes(compiled.asm["cubin"], tmp_path)))

    monkeypatch.setattr(JITFunction, "run", compile_only)

    def compile_for(arch, call, **settings):
        found.clear()
        monkeypatch.setattr(driver, "_active", Target(arch))
        call(**settings)
        return list(found)

    return compile_for


def stack_bytes(cubin, scratch):
    """A thread's memory outside registers, where spilled ones go: no kernel here has arrays of its own."""
    path = scratch / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    told = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    fields = dict(field.split(":") for field in told.split("\n Function ")[1].split()[1:] if field.count(":") == 1)
    return int(fields["STACK"]) + int(fields["LOCAL"])


def check(compile_for, arch, case):
    call, settings = case
    launched = compile_for(arch, call, **settings)
    assert launched
    for kernel, shared, spilled in launched:
        assert shared <= SHARED_BYTES[arch], f"{kernel} needs {shared} bytes of shared memory on sm_{arch}"
        assert spilled == 0 or settings.get("odd"), f"{kernel} spills {spilled} bytes a thread on sm_{arch}"
    return {kernel for kernel, _, _ in launched}


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_usual_launches_compile_and_fit(arch, compile_for):
    from dora_dist.dora import triton_grouped, triton_kernels
    from dora_dist.quant import triton_kernels as nf4_triton

    compiled = set().union(*(check(compile_for, arch, case) for case in USUAL))
    assert compiled == {
        n for n in {**vars(nf4_triton), **vars(triton_kernels), **vars(triton_grouped)} if n.endswith("_kernel")
    }


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("case", RARE, ids=name)
def test_rare_launches_compile_and_fit(case, arch, compile_for):
    check(compile_for, arch, case)


@pytest.mark.parametrize(
    ("broken", "call", "complaint"),
    [
        ((64, 128, 64, {"num_warps": 8}), norms, "bytes of shared memory on sm_89"),
        ((64, 128, 16, {"num_warps": 1}), compose, "spills .* bytes a thread on sm_89"),
    ],
)
def test_too_large_blocks_are_refused(broken, call, complaint, compile_for, monkeypatch):
    monkeypatch.setattr(kernels, "_blocks", lambda *_, **__: broken)
    with pytest.raises(AssertionError, match=complaint):
        check(compile_for, 89, (call, {"dtype": FP32, "rank": 16}))
