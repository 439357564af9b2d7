"""The cost model on traces written by hand: what overlaps is hidden, what depends waits."""

from dataclasses import replace

import pytest
import torch

from dora_dist.errors import UserError
from dora_dist.planning.cost import collective_parts, kernel_time, simulate, step_time
from dora_dist.planning.hardware import ASSUMPTIONS, GPUS, Cluster, Link, find_cluster
from dora_dist.planning.rehearse import Rehearsed, Short
from dora_dist.planning.trace import Call, Collective

DEVICE = replace(
    GPUS["h100"], bandwidth=1e9, flops_16=1e12, link=Link(1e9, 0.0), product_share=1.0, memory_share=1.0,
    link_share=1.0, kernel_s=0.0, launch_s=0.0,
)  # fmt: skip
ONE_NODE = Cluster(DEVICE, 8)


def kernel(seconds, reads=(), writes=(), **fields):
    return Call("k", "forward", tuple(reads), tuple(writes), bytes=round(seconds * 1e9), **fields)


def send(kind, seconds, reads=(), writes=(), blocks=True):
    """A collective of 8 ranks of one machine that takes `seconds`."""
    size = round(seconds * 1e9 * 8 / 7)
    return Call(kind, "forward", tuple(reads), tuple(writes), collective=Collective(kind, size, 8, 1, blocks))


def test_a_part_of_each_gpu_is_not_for_the_run():
    told = "1.2 GB of each GPU and 3 % of its memory are not for the run"
    assert any(line.startswith(told) for line in ASSUMPTIONS)
    for gpu in GPUS.values():
        assert gpu.usable() == pytest.approx(gpu.memory * (1 - 0.03) - 1.2e9)


def test_kernels_take_the_slower_of_arithmetic_and_memory():
    assert kernel_time(kernel(0.5), ONE_NODE) == pytest.approx(0.5)
    assert kernel_time(kernel(0.5, flops=2 * 10**12, dtype=torch.bfloat16), ONE_NODE) == pytest.approx(2.0)
    slow = replace(ONE_NODE, device=replace(DEVICE, kernel_s=0.7))
    assert kernel_time(kernel(0.5), slow) == 0.7


def test_a_gather_hides_behind_kernels_and_is_waited_for():
    calls = [
        send("all_gather", 1.0, writes=[1]),
        kernel(0.0, reads=[1]),  # copies out: the next gather may begin
        send("all_gather", 1.0, writes=[2]),
        kernel(3.0, reads=[9]),
        kernel(1.0, reads=[2]),
    ]
    time = simulate(calls, ONE_NODE)
    assert time.total == pytest.approx(5.0) and time.kernels == pytest.approx(4.0)
    assert time.exposed == pytest.approx(1.0)  # the first gather's
    calls[3] = kernel(0.25, reads=[9])
    assert simulate(calls, ONE_NODE).total == pytest.approx(3.0)  # the second gather is longer than its cover


def test_gloo_blocks():
    blocking = replace(ONE_NODE, device=replace(DEVICE, blocking=True))
    calls = [send("all_gather", 1.0, writes=[1]), kernel(2.0), send("all_gather", 1.0, writes=[2])]
    assert simulate(calls, blocking).total == pytest.approx(4.0)
    loose = [send("all_reduce", 0.5, writes=[1], blocks=False), kernel(2.0)]
    assert simulate(loose, blocking).total == pytest.approx(2.0)
    by_cores = replace(blocking, lost={("all_reduce", False): Link(1e9, 0.3 - loose[0].collective.bytes / 1e9)})
    assert simulate(loose, by_cores).total == pytest.approx(2.3)  # which compute meanwhile, and more slowly


def test_a_reduction_waits_for_what_it_sums_and_ends_the_step():
    calls = [kernel(1.0, writes=[5]), send("reduce_scatter", 2.0, reads=[5], writes=[6]), kernel(0.5)]
    assert simulate(calls, ONE_NODE).total == pytest.approx(3.0)


def test_a_host_that_launches_slowly_is_waited_for():
    slow = replace(ONE_NODE, device=replace(DEVICE, launch_s=0.5))
    assert simulate([kernel(0.1)] * 4, slow).total == pytest.approx(2.1)


def test_rings():
    inside = Collective("all_gather", 8_000_000_000, 8, 1, True)
    assert sum(collective_parts(inside, ONE_NODE)) == pytest.approx(7.0)
    assert sum(collective_parts(inside._replace(kind="all_reduce"), ONE_NODE)) == pytest.approx(14.0)
    assert sum(collective_parts(inside._replace(ranks=1), ONE_NODE)) == 0
    across = Cluster(DEVICE, 16, 2, Link(0.05e9, 0.25))  # 8 links a machine: 0.4e9 between them
    expected = 8e9 * 15 / 16 / 0.4e9 + 0.25
    assert sum(collective_parts(inside._replace(ranks=16), across)) == pytest.approx(expected)
    hops = replace(across, device=replace(DEVICE, link=Link(1e9, 0.125)))  # 14 of the 15 steps are inside machines
    assert sum(collective_parts(inside._replace(ranks=16), hops)) == pytest.approx(expected + 14 * 0.125)
    replicas = inside._replace(kind="all_reduce", ranks=2, stride=8)  # one rank of each machine
    assert sum(collective_parts(replicas, across)) == pytest.approx(2 * (8e9 / 2 / 0.05e9 + 0.25))
    measured = replace(ONE_NODE, measured={"all_gather": Link(4e9, 1.0)})
    assert sum(collective_parts(inside, measured)) == pytest.approx(3.0)


def test_more_micro_batches_and_more_blocks_than_were_rehearsed():
    def run(blocks):
        calls = [kernel(1.0, micro=1) for _ in range(blocks)] + [kernel(1.0, micro=2) for _ in range(blocks)]
        return Short("fsdp", blocks, {}, [*calls, kernel(0.5)])

    class Job:
        class config:
            class train:
                accumulation = 5

    time = step_time(Rehearsed(Job, "fsdp", "as told", 10, (run(3), run(5))), ONE_NODE)
    assert time.total == pytest.approx(5 * 10 + 0.5)


def test_words_that_name_no_cluster():
    for arguments, named in (
        (("rtx5090", 1), "rtx4090, a100-80, h100, h200, b200"),
        (("h100", 10, 4), "10 GPUs"),
        (("h100", 8, 1, "fast"), "--net"),
        (("h100", 8, 1, "0g"), "--net"),
    ):
        with pytest.raises(UserError, match=named):
            find_cluster(*arguments)
    assert find_cluster("h100", 16, 2, "100g").net.rate == 12.5e9
