"""The processes of a run: who this one is, which device it owns, and the few collectives every strategy shares."""

import datetime
import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dora_dist.errors import UserError
from dora_dist.parallel.rendezvous import meet, no_meeting

T = TypeVar("T")

_ANY_TIME = datetime.timedelta(days=365)  # shorter ones over and over would each print a warning of torch's
LATER_S = 5
"""By how much gloo's own time limit is above parallel.timeout_s."""
_NCCL_TIMES = 4
"""NCCL's limit in parallel.timeout_s: it counts from when an operation is enqueued, and the host runs up to two
steps ahead of the device."""


class Processes:
    """This process among its peers, read from the launcher's environment (torchrun, deepspeed, or plain python:
    one)."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun; deepspeed
        self.local_world_size = int(local_size or 1)
        if torch.cuda.is_available():
            visible = torch.cuda.device_count()
            if self.local_rank >= visible > 1:
                raise UserError(
                    f"local rank {self.local_rank} has no GPU: this machine has {visible}; "
                    "launch no more processes than GPUs"
                )
            # A launcher may show each process a GPU of its own alone (Slurm's --gpus-per-task=1).
            self.device = torch.device("cuda", self.local_rank if visible > 1 else 0)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        self.store: dist.Store | None = None  # where a group was made: that of this life of the run
        self._meetings = 0  # in the store, so far

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def start(self, timeout_s: int, needed: bool = True) -> None:
        """Join the process group. CPU tensors always have gloo. A group that is not needed is not made.

        Raises:
            UserError: rank 0's port is taken, or the processes do not meet there in time.
        """
        if not needed or dist.is_initialized():
            return
        cuda = self.device.type == "cuda"
        one_node = self.local_world_size == self.world_size
        if one_node:
            _use_loopback(cuda)
        self.store = meet(self.rank, self.world_size, one_node, datetime.timedelta(seconds=timeout_s))
        if cuda and torch.cuda.device_count() == 1:
            self._refuse_shared_gpu(timeout_s)
        gloo_s = timeout_s + LATER_S
        timeout = datetime.timedelta(seconds=timeout_s * _NCCL_TIMES if cuda else gloo_s)
        # Also of the groups that DeepSpeed and device meshes make later without naming one.
        dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
        try:
            dist.init_process_group(
                backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=self.store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
                device_id=self.device if cuda else None,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise UserError(no_meeting(error, timeout_s)) from None
        # Later than our watchdog, which names the rank that is missing.
        gloo: Any = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        gloo._set_default_timeout(datetime.timedelta(seconds=gloo_s))

    def _refuse_shared_gpu(self, timeout_s: int) -> None:
        """UserError, on every rank of a machine: its processes see one GPU, and it is the same one."""
        assert self.store is not None
        self.store.set(f"gpu/{self.rank}", str(torch.cuda.get_device_properties(self.device).uuid))
        first = self.rank - self.local_rank
        keys = [f"gpu/{rank}" for rank in range(first, first + self.local_world_size)]
        self.store.wait(keys, datetime.timedelta(seconds=timeout_s))
        if len(set(self.store.multi_get(keys))) < len(keys):
            raise UserError(
                f"this machine has one GPU for {len(keys)} processes; launch no more processes than GPUs"
            )

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Rank 0's values on every rank, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def agree(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """Start to find the largest of each value over all ranks. Returns what waits for them and gives them: the
        next step does, so that none waits.

        Every rank calls this at the same point with as many values. It needs no group of its own: a group orders
        its collectives by the order of the calls, which is the same on all ranks.
        """
        tensor = torch.tensor(values, dtype=torch.int64)  # on the host: gloo, beside NCCL
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True) if self.world_size > 1 else None

        def largest() -> list[int]:
            if work is not None:
                work.wait()
            return tensor.tolist()

        return largest

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's few bytes, in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [data]
        lengths = torch.zeros(self.world_size, dtype=torch.int64)
        lengths[self.rank] = len(data)
        self.sum_(lengths)
        longest = max(1, int(lengths.max()))
        padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return [part.numpy().tobytes()[:n] for part, n in zip(parts, lengths.tolist(), strict=True)]

    def from_main(self, value: Any) -> Any:
        """Rank 0's small value (JSON) on every rank, however long it takes to come to this point: the others wait
        for the run's store, not in a collective, which has a time limit."""
        if self.world_size == 1:
            return value
        store = self.store
        assert store is not None
        self._meetings += 1
        key = f"told/{self._meetings}"
        if self.is_main:
            store.set(key, json.dumps(value))
            return value
        in_thread(lambda: store.wait([key], _ANY_TIME)).result()
        told = json.loads(store.get(key))
        if store.add(f"{key}/read", 1) == self.world_size - 1:
            for done in (key, f"{key}/read"):
                store.delete_key(done)
        return told

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0 alone (JSON), on every rank, as `from_main`; so with its UserError."""
        value = error = None
        if self.is_main:
            try:
                value = work()
            except UserError as mistake:
                error = str(mistake)
        value, error = self.from_main([value, error])
        if error is not None:
            raise UserError(error)
        return cast("T", value)

    def wait_for_all(self) -> None:
        """Return once every rank has come here, however long that takes: to be called before a collective, which
        has a time limit, and after what takes ranks different times."""
        if (store := self.store) is None:  # one process, or a rehearsal's
            return
        self._meetings += 1
        key = f"met/{self._meetings}"
        if store.add(key, 1) == self.world_size:
            store.set(f"{key}/all", "")
        in_thread(lambda: store.wait([f"{key}/all"], _ANY_TIME)).result()
        if store.add(key, 1) == 2 * self.world_size:
            for done in (key, f"{key}/all"):
                store.delete_key(done)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def stop(self) -> None:
        """Leave the group together: a rank that closes its connections while others still use them can abort."""
        if dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()


def in_thread(question: Callable[[], T]) -> Future[T]:
    """A request to the store: no signal reaches a process whose main thread waits there, and nothing ends a
    request to a host that is gone."""
    outcome = Future[T]()

    def ask() -> None:
        try:
            outcome.set_result(question())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return outcome


def _use_loopback(cuda: bool) -> None:
    """On one host the loopback serves: no other machine reaches it, and gloo is kept off interfaces whose address
    does not lead back here (sandboxes, laptops on a VPN)."""
    if any(name == "lo" for _, name in socket.if_nameindex()):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if cuda else ("GLOO_SOCKET_IFNAME",):
            os.environ.setdefault(variable, "lo")
