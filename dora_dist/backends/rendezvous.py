"""Where the processes of a run meet: a key-value store that holds nothing of an earlier life of the run."""

import datetime
import os
import socket
import time
import uuid

import torch.distributed as dist

from dora_dist.errors import UserError


def meet(rank: int, world_size: int, one_node: bool, timeout: datetime.timedelta) -> dist.Store:
    """The store that the process group is made from.

    Raises:
        UserError: rank 0's port is taken, or the processes do not meet there in time.
    """
    if "MASTER_ADDR" not in os.environ:  # plain python: a group of one needs no address
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT")
    try:
        if one_node and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else torchrun's agent serves
            return _bound_store(address, int(port or 0), rank, world_size, timeout)
        store = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))[0]
        store.set_timeout(timeout)
        return _of_this_life(store, rank, world_size, timeout) if "TORCHELASTIC_RUN_ID" in os.environ else store
    except (dist.DistNetworkError, dist.DistStoreError, OSError) as error:
        raise UserError(no_meeting(error, timeout.total_seconds())) from None


def no_meeting(error: Exception, timeout_s: float) -> str:
    """What went wrong, for the user."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if "EADDRINUSE" in str(error) or "Address already in use" in str(error):  # torch's words; the system's
        return f"port {port} is already in use on {address}; give the launcher a free one with --master_port"
    return (
        f"the processes did not meet at {address}:{port} within {timeout_s:.0f} s (parallel.timeout_s): "
        f"{str(error).splitlines()[0]}"
    )


def _bound_store(address: str, port: int, rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """A store that listens on `address` alone, where torch's own listens on every interface to whoever calls."""
    listening = None
    if rank == 0:
        family, *_, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server((where[0], port), family=family).detach()
    return dist.TCPStore(
        address, port, world_size, rank == 0, timeout, multi_tenant=True, master_listen_fd=listening
    )


def _of_this_life(store: dist.Store, rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """A part of the store for this life alone. torchrun's agents keep one store over restarts, with the addresses
    of dead ranks in it, which the next life's ranks find and call (pytorch#135712).

    The number of restarts will not do as its name: the agent of a node whose own processes did not fail does not
    count. So rank 0 draws a name, and tells it to each rank under a word that this rank drew: nothing that an
    earlier life left there can be an answer.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"dora_dist/word/{rank}", word)
        life = store.get(f"dora_dist/life/{word}").decode()
        store.set(f"dora_dist/joined/{life}/{rank}", "")
        return dist.PrefixStore(life, store)
    deadline = time.monotonic() + timeout.total_seconds()
    missing, told = set(range(1, world_size)), set()
    while missing:
        for other in sorted(missing):
            if store.check([f"dora_dist/joined/{word}/{other}"]):
                missing.remove(other)
            elif store.check([f"dora_dist/word/{other}"]):
                theirs = store.get(f"dora_dist/word/{other}").decode()
                if theirs not in told:
                    store.set(f"dora_dist/life/{theirs}", word)
                    told.add(theirs)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"no sign of rank {min(missing)}")
        time.sleep(0.01)
    return dist.PrefixStore(word, store)
