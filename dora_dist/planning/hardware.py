"""What GPUs and networks can do, as their makers publish it, and the shares of that which programs reach.

Units: bytes, bytes/s, FLOP/s, seconds. Rates are for one GPU and one direction; products are dense.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dora_dist.errors import UserError

GB, TERA = 10**9, 10**12


@dataclass(frozen=True)
class Link:
    """A message of n bytes over one hop takes `latency + n / rate`."""

    rate: float
    latency: float

    def seconds(self, size: float) -> float:
        return self.latency + size / self.rate


@dataclass(frozen=True)
class Device:
    """One GPU (or, for measurements against the model, one CPU process)."""

    name: str
    memory: float  # bytes in all
    bandwidth: float  # of its memory
    flops_16: float  # products of bf16 or fp16, summed in fp32
    flops_32: float  # products of fp32
    link: Link  # to the other GPUs of its machine
    host: float  # PCIe, to host memory
    reserved: float = 1.2 * GB  # CUDA's context, NCCL's buffers, libraries' workspaces
    # Shares of the published rates that large kernels and messages reach.
    product_share: float = 0.70
    memory_share: float = 0.80
    link_share: float = 0.80
    kernel_s: float = 4e-6  # the least that a kernel takes
    launch_s: float = 7e-6  # of the host, before the next can be launched
    blocking: bool = False  # the host waits for each collective that does not say otherwise (gloo)

    def usable(self) -> float:
        """Bytes that a run may hold: 3 % are lost to fragments."""
        return 0.97 * self.memory - self.reserved

    def flops(self, dtype: torch.dtype) -> float:
        return self.flops_16 if dtype in (torch.bfloat16, torch.float16) else self.flops_32


def _gpu(
    name: str, memory: float, bandwidth: float, flops: tuple[float, float], link: float, host: float
) -> Device:
    wires = Link(link * GB, 3e-6 if link > 100 else 8e-6)
    return Device(name, memory * GB, bandwidth * GB, flops[0] * TERA, flops[1] * TERA, wires, host * GB)


# Data sheets; memory as the driver reports it. The 4090 has no links but PCIe, which goes through the host.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("rtx4090", 25.3, 1008, (165, 82.6), 12, 25),
        _gpu("a100-80", 85.0, 2039, (312, 19.5), 300, 25),
        _gpu("h100", 85.0, 3350, (989, 67), 450, 55),
        _gpu("h200", 150.0, 4800, (989, 67), 450, 55),
        _gpu("b200", 191.0, 8000, (2250, 80), 900, 55),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Machines of equal GPUs."""

    device: Device
    gpus: int  # in all
    nodes: int = 1
    net: Link = field(default_factory=lambda: Link(50 * GB, 1e-5))  # for each GPU, between machines
    measured: Mapping[str, Link] = field(default_factory=dict)  # of whole collectives, by kind; used where given
    # Where the cores that compute send, too: the seconds that computing loses to a collective, by its kind and
    # whether it is waited for.
    lost: Mapping[tuple[str, bool], Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise UserError(f"--gpus: {self.gpus} GPUs cannot be shared out evenly among {self.nodes} nodes")

    @property
    def per_node(self) -> int:
        return self.gpus // self.nodes

    def __str__(self) -> str:
        machines = f"{self.nodes} machines of {self.per_node}" if self.nodes > 1 else "one machine"
        net = f", {self.net.rate * 8 / 1e9:.0f} Gb/s a GPU" if self.nodes > 1 else ""
        return f"{self.gpus} x {self.device.name}, {machines}{net}"


def find_cluster(gpu: str, gpus: int, nodes: int = 1, net: str = "400g") -> Cluster:
    """Of the command line's words. Raises UserError: what is not known."""
    if gpu not in GPUS:
        raise UserError(f"--gpu: {gpu!r} is not known; expected one of {', '.join(GPUS)}")
    rate = re.fullmatch(r"(\d+(?:\.\d+)?)g", net.lower())
    if rate is None or float(rate[1]) == 0:
        raise UserError(f"--net: {net!r} is not a rate in Gb/s for each GPU, such as 100g or 400g")
    return Cluster(GPUS[gpu], gpus, nodes, Link(float(rate[1]) * GB / 8, 1e-5))


ASSUMPTIONS = (
    "GPU rates are the makers'; products reach 70 % of them, memory and links 80 %",
    "1.2 GB of each GPU and 3 % of its memory are not for the run (CUDA, NCCL, fragments)",
    "every GPU has its own network link at the rate of --net, and machines do not share a bottleneck behind it",
    "no GPU is slower than another, rows are full, and reading data takes no time",
)
BALANCED = "a mixture's experts get equally many tokens each"
