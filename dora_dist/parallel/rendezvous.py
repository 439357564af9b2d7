"""Where the processes of a run meet: a key-value store that holds nothing of an earlier life of the run.

The faults (docs/reliability.md): after a restart, ranks call the addresses of dead ones ("Restarts"); a port is
taken, or ranks never come, and torch prints stacks; on one node the store listens to whoever calls, and on several
gloo chooses an address that leads nowhere ("The network must be private").
"""

import datetime
import fcntl
import ipaddress
import os
import socket
import struct
import time
import uuid
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from dora_dist.errors import UserError

_LOOK_S = 0.01  # between two looks into the store, or at a port where nobody listens yet
_CONNECT_S = 5.0  # for one connection, whose first packet may have been lost
_NAMED = 8  # ranks or hosts that a line names
_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def meet(rank: int, world_size: int, one_node: bool, timeout: datetime.timedelta) -> dist.Store:
    """The store that the process group is made from.

    Raises:
        UserError: rank 0's port is taken, or the processes do not meet there in time.
    """
    if "MASTER_ADDR" not in os.environ:  # plain python: a group of one needs no address
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT") or 0)
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent serves
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        if one_node and not of_agent:
            return _bound_store(address, port, rank, world_size, timeout)
        serves = rank == 0 and not of_agent
        if not serves:
            _wait_for_rank_0(rank, address, port, deadline)
        store: dist.Store = dist.TCPStore(address, port, None, serves, timeout, wait_for_workers=False)
        store.set_timeout(timeout)
        store = _of_this_life(store, rank, world_size, deadline)
        if not one_node:
            _use_route(store, rank, world_size, address)
        return store
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


def connect(address: str, port: int, deadline: float) -> socket.socket:
    """A connection to what listens there, or comes to listen before `deadline` (of time.monotonic).

    Raises:
        OSError: nothing has, or the name is not known.
    """
    while True:
        left = deadline - time.monotonic()
        try:
            return socket.create_connection((address, port), max(0.1, min(left, _CONNECT_S)))
        except OSError:
            if left <= 0:
                raise
        time.sleep(_LOOK_S)


def _wait_for_rank_0(rank: int, address: str, port: int, deadline: float) -> None:
    """torch's own client waits for longer than it is told, and prints stacks."""
    try:
        connect(address, port, deadline).close()
    except OSError as error:
        raise dist.DistStoreError(f"rank {rank} ({socket.gethostname()}) does not reach it: {error}") from None


def _bound_store(address: str, port: int, rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """A store that listens on `address` alone, where torch's own listens on every interface to whoever calls."""
    listening = None
    if rank == 0:
        family, *_, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server((where[0], port), family=family).detach()
    return dist.TCPStore(
        address, port, world_size, rank == 0, timeout, multi_tenant=True, master_listen_fd=listening
    )


def _of_this_life(store: dist.Store, rank: int, world_size: int, deadline: float) -> dist.Store:
    """A part of the store for this life alone. torchrun's agents keep one store over restarts, with the addresses
    of dead ranks in it, which the next life's ranks find and call (pytorch#135712).

    The number of restarts will not do as its name: the agent of a node whose own processes did not fail does not
    count. So rank 0 draws a name, and tells it to each rank under a word that this rank drew: nothing that an
    earlier life left there can be an answer.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"dora_dist/word/{rank}", word)
        left = datetime.timedelta(seconds=max(0.1, deadline - time.monotonic()))
        try:
            store.wait([f"dora_dist/life/{word}"], left)
        except dist.DistStoreError:
            raise dist.DistStoreError(
                f"rank {rank} ({socket.gethostname()}) has had no answer of rank 0"
            ) from None
        life = store.get(f"dora_dist/life/{word}").decode()
        store.set(f"dora_dist/joined/{life}/{rank}", socket.gethostname())
        return dist.PrefixStore(life, store)
    hosts, told = {0: socket.gethostname()}, set()
    while len(hosts) < world_size:
        for other in sorted(set(range(world_size)) - set(hosts)):
            if store.check([f"dora_dist/joined/{word}/{other}"]):
                hosts[other] = store.get(f"dora_dist/joined/{word}/{other}").decode()
            elif store.check([f"dora_dist/word/{other}"]):
                theirs = store.get(f"dora_dist/word/{other}").decode()
                if theirs not in told:
                    store.set(f"dora_dist/life/{theirs}", word)
                    told.add(theirs)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(_who_came(hosts, world_size))
        time.sleep(_LOOK_S)
    return dist.PrefixStore(word, store)


def _who_came(hosts: dict[int, str], world_size: int) -> str:
    """Which ranks are missing, and from where the others are."""
    missing = [str(rank) for rank in range(world_size) if rank not in hosts]
    names = list(dict.fromkeys(hosts[rank] for rank in sorted(hosts)))
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing[:_NAMED])}{more}"
    return f"no sign of {ranks} of {world_size}; those of {', '.join(names[:_NAMED])} are here"


def _use_route(store: dist.Store, rank: int, world_size: int, master: str) -> None:
    """Put gloo on the interface that leads to the other hosts, unless the user has named one. Its own choice is
    the address of the host's name, which on many machines is 127.0.1.1."""
    own = source_address(master)
    store.set(f"dora_dist/address/{rank}", own)
    if ipaddress.ip_address(own).is_loopback:  # the master's name, on the master: ask for the way to another host
        everyones = [store.get(f"dora_dist/address/{other}").decode() for other in range(world_size)]
        elsewhere = [address for address in everyones if not ipaddress.ip_address(address).is_loopback]
        own = source_address(elsewhere[0]) if elsewhere else own
    interface = _interface(own)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def source_address(host: str) -> str:
    """This machine's address on the route to `host`; nothing is sent."""
    family, kind, protocol, _, where = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0]).partition("%")[0]


def resolved(host: str) -> str:
    """The address that a name has here."""
    return str(socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0][4][0]).partition("%")[0]


def _interface(address: str) -> str | None:
    """The name of the interface with this address, if there is one."""
    wanted = ipaddress.ip_address(address)
    if wanted.version == 6:
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((row[5] for row in rows if int(row[0], 16) == int(wanted)), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if answer[20:24] == wanted.packed:
                    return name
    return None
