"""Process groups of which one rank is here and the others are not: what a run would send, without sending it.

torch's "fake" backend takes every collective and moves nothing, so FSDP2, DDP and DeepSpeed go through their own
code at any world size. Where that code waits for values that another rank would have sent, it is told that all
ranks are alike.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from dora_dist.planning.trace import Collective

_KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
}
_SENDS_NOTHING = {"barrier", "monitored_barrier_", "wait_tensor"}
_EVERY_RANK_ALIKE = {
    "assert_ints_same_as_other_ranks": lambda ints: None,
    "is_invalid_grad_norm": lambda norm: False,
}


@contextmanager
def fake_group(world_size: int, ranks_per_node: int, rank: int = 0) -> Iterator[None]:
    """This process as one of many, the others absent. Once in a process: DeepSpeed keeps groups for its
    lifetime."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    here = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank % ranks_per_node,
        "LOCAL_WORLD_SIZE": min(world_size, ranks_per_node),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 1,
        "DS_ACCELERATOR": "cpu",
    }
    with mock.patch.dict(os.environ, {name: str(value) for name, value in here.items()}):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield
        finally:
            dist.destroy_process_group()


def every_rank_alike(zero: bool) -> Iterator[tuple[Any, str, Callable]]:
    """(module, name, what answers there): DeepSpeed does not compare the ranks, and finds every gradient finite.
    `zero`: it is what runs."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("deepspeed.runtime.zero.")]
    for name, answer in _EVERY_RANK_ALIKE.items():
        found = [module for module in modules if hasattr(module, name)]
        if zero and not found:
            raise LookupError(f"{name} of DeepSpeed is to be replaced in a rehearsal, and is not there")
        yield from ((module, name, answer) for module in found)


def shapes_uncounted(pause: Callable[[], AbstractContextManager]) -> tuple[Any, str, Callable]:
    """(owner, name, what makes its replacement): DTensor runs an operator once more, on whole tensors, to learn
    the shapes of its results: inside `pause`."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    def paused(original: Callable) -> Callable:
        def propagate(propagator: Any, schema: Any) -> Any:
            with pause():
                return original(propagator, schema)

        return propagate

    return ShardingPropagator, "_propagate_tensor_meta_non_cached", paused


def reduce_in_python(module: nn.Module) -> None:
    """DDP reads the results of its own collectives in C++, where the fake group has none: those of its gradients
    are sent by a hook, and its buckets stay in their first order, which the ranks would agree on."""
    if isinstance(module, DistributedDataParallel):
        module.register_comm_hook(None, _all_reduce_bucket)
        if not hasattr(module.reducer, "_rebuild_buckets"):
            raise LookupError("DDP's _rebuild_buckets is to be replaced in a rehearsal, and is not there")
        module.reducer = _FirstBuckets(module.reducer)  # type: ignore[assignment]


class _FirstBuckets:
    def __init__(self, reducer: Any):
        self._reducer = reducer

    def _rebuild_buckets(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)


def _all_reduce_bucket(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    buffer = bucket.buffer()
    dist.all_reduce(buffer, async_op=True)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(buffer)
    return done


def collective_of(func: Any, args: tuple, kwargs: dict[str, Any]) -> Collective | None:
    """What a call of one of torch.distributed's operators sends; None for any other operator.

    Raises:
        LookupError: it sends something, and what is not known here.
    """
    if func.namespace not in ("c10d", "_c10d_functional") or func._opname in _SENDS_NOTHING:
        return None
    if func.namespace != "c10d" or func._opname not in _KINDS:
        raise LookupError(f"a rehearsal cannot count what {func.namespace}.{func._opname} sends")
    kind = _KINDS[func._opname]
    names = [argument.name for argument in func._schema.arguments]
    given = {"async_op": True, **dict(zip(names, args, strict=False)), **kwargs}
    ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(given["process_group"]))
    whole = tree_leaves(args[1] if kind == "reduce_scatter" else args[0])
    stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    return Collective(kind, sum(t.nbytes for t in whole), len(ranks), stride, not given["async_op"])
