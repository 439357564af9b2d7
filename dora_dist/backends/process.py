"""The processes of a run: who this one is, which device it owns, and the few collectives every strategy shares."""

import datetime
import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dora_dist.errors import UserError


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
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"local rank {self.local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                    "launch no more processes than GPUs"
                )
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")

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
        alone: dict[str, Any] = {}
        if "MASTER_ADDR" not in os.environ:  # plain python: a group of one needs no address
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        if not cuda and self.local_world_size == self.world_size:
            _use_loopback()
        timeout = datetime.timedelta(seconds=timeout_s)
        # Also of the groups that DeepSpeed and device meshes make later without naming one.
        dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
        try:
            dist.init_process_group(
                backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
                timeout=timeout,
                device_id=self.device if cuda else None,
                **alone,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise UserError(_no_meeting(error, timeout_s)) from None

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

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's small Python object on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, values: list[int]) -> "Agreement":
        """Start to take the largest of each value over all ranks; nobody waits before `result()`."""
        flat = torch.tensor(values)
        work = dist.all_reduce(flat, dist.ReduceOp.MAX, async_op=True) if self.world_size > 1 else None
        return Agreement(flat, work)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def stop(self) -> None:
        """Leave the group together: a rank that closes its connections while others still use them can abort."""
        if dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()


class Agreement:
    def __init__(self, values: Tensor, work: Any):
        self._values, self._work = values, work

    def result(self) -> list[int]:
        if self._work is not None:
            self._work.wait()
        return self._values.tolist()


def _no_meeting(error: RuntimeError, timeout_s: int) -> str:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if "EADDRINUSE" in str(error):
        return f"port {port} is already in use on {address}; give the launcher a free one with --master_port"
    return (
        f"the processes did not meet at {address}:{port} within {timeout_s} s (parallel.timeout_s): "
        f"{str(error).splitlines()[0]}"
    )


def _use_loopback() -> None:
    """Keep gloo off interfaces whose address does not lead back here (sandboxes, laptops on a VPN): on one host
    the loopback serves."""
    if "GLOO_SOCKET_IFNAME" not in os.environ and any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
