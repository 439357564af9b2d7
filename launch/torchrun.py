"""torchrun, and with it: one line on which host is missing or which rank has died, and the ranks' exit status.

    python launch/torchrun.py [torchrun's options] launch/train.py --config C.yaml [key.sub=value ...]

The faults (docs/launching.md, "What one sees"): a host never comes, or none reaches the one where all meet; a rank
dies or is asked to stop. torchrun itself trains just as well, but its errors are stacks, and its status is always
1. This one ends with the status of the rank that ended first (2: a mistake in the settings; 69: another rank or
host is gone; 75: stopped by a signal, with a checkpoint; 128 + N: killed by signal N): Slurm and Kubernetes decide
by it.
"""

import errno
import ipaddress
import os
import signal
import socket
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from dora_dist.errors import UserError
from dora_dist.parallel.orphans import children
from dora_dist.parallel.rendezvous import connect, resolved, source_address
from dora_dist.parallel.watchdog import LOST

_JOIN_S, _STATIC_S = 600.0, 900.0  # torchrun's own defaults
_LOOK_S = 0.1
_C10D_PORT, _STATIC_PORT = 29400, 29500  # torchrun's own defaults
_NAMED = 8  # hosts that a line names
_NAME_S, _NAME_LENGTH = 5.0, 200  # for a host to tell its name
_ALL = "all"
_MISTAKE = 2


def main(arguments: list[str]) -> int:
    """The exit status."""
    # These are for the ranks: ended by torchrun they could not say how they ended. With restarts they would be
    # started again.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _to_the_ranks)
    options = run.parse_args(["--signals-to-handle=SIGHUP,SIGQUIT", *arguments])
    for name in ("SIGTERM", "SIGINT") if options.max_restarts > 0 else ():
        if name not in options.signals_to_handle:
            options.signals_to_handle += f",{name}"
    try:
        _call_the_roll(options)
        run.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            return _say(f"rank {rank} ({socket.gethostname()}) was killed by {name}", 128 - failure.exitcode)
        return failure.exitcode
    except SignalException as ended:
        return 128 + ended.sigval
    except UserError as error:
        return _say(str(error), _MISTAKE)
    except _Absent as error:
        return _say(str(error), LOST)
    except (RendezvousError, dist.DistError) as error:
        what = (str(error) or type(error).__name__).splitlines()[0]
        return _say(f"torchrun on {socket.gethostname()} has lost the others: {what}", LOST)
    return 0


def _say(line: str, status: int) -> int:
    print(f"error: {line}", file=sys.stderr, flush=True)
    return status


def _to_the_ranks(number: int, frame: FrameType | None) -> None:
    ranks = children()
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, number)
    if not ranks:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


class _Absent(Exception):
    """Not all hosts have come."""


def _call_the_roll(options: Namespace) -> None:
    """Wait for the other hosts where torchrun will wait for them, but say who is missing. Not where hosts may come
    and go.

    Raises:
        _Absent: not all came in time (torchrun's --rdzv-conf join_timeout; timeout without --rdzv-backend).
        UserError: the port is taken.
    """
    least, most = run.parse_min_max_nnodes(options.nnodes)
    static = options.rdzv_backend == "static"
    fixed = least == most and options.max_restarts == 0 and not options.standalone
    if most == 1 or not fixed or options.rdzv_backend not in ("static", "c10d"):
        return
    if "store_type" in options.rdzv_conf:  # a file's: they meet without a port
        return
    seconds, is_host, address, port = _meeting_place(options, static, most)
    deadline = time.monotonic() + seconds
    name = f"{socket.gethostname()} (node rank {options.node_rank})" if static else socket.gethostname()
    try:
        serves = _is_here(address, deadline) if is_host is None else is_host
        said = _serve_roll(port, most, deadline, name) if serves else _answer_roll(address, port, deadline, name)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is already in use on {address}; give a free one") from None
        said = f"{name} does not reach {address}:{port}: {error}"
    if said != _ALL:
        raise _Absent(f"{said}, within {seconds:.0f} s")


def _meeting_place(options: Namespace, static: bool, nodes: int) -> tuple[float, bool | None, str, int]:
    """Seconds to wait, whether this host serves (None: to be found), address, port. UserError: there is none."""
    try:
        pairs = [pair.partition("=") for pair in options.rdzv_conf.split(",")] if options.rdzv_conf.strip() else []
        given = {key.strip(): value.strip() for key, _, value in pairs}
        if not all(key and value for key, value in given.items()):
            raise ValueError("expected key=value, separated by commas")
        settings = RendezvousParameters(options.rdzv_backend, "", "roll", nodes, nodes, **given)
        seconds = float(settings.get("timeout", _STATIC_S) if static else settings.get("join_timeout", _JOIN_S))
        if static and not options.rdzv_endpoint:
            return seconds, options.node_rank == 0, options.master_addr, options.master_port or _STATIC_PORT
        host, port = parse_rendezvous_endpoint(options.rdzv_endpoint, _C10D_PORT)
        return seconds, options.node_rank == 0 if static else settings.get_as_bool("is_host"), host, port
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--rdzv-endpoint {options.rdzv_endpoint!r}, --rdzv-conf {options.rdzv_conf!r}: {error}"
        ) from None


def _is_here(host: str, deadline: float) -> bool:
    """Whether a name leads to this machine. OSError: it is not known, nor becomes so."""
    while True:
        try:
            address = resolved(host)
            return ipaddress.ip_address(address).is_loopback or source_address(host) == address
        except OSError:  # a cluster's names may come after its machines
            if time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_S)


def _serve_roll(port: int, hosts: int, deadline: float, own: str) -> str:
    """Collect every host's name, and tell all of them whether any is missing. The port is free again by then."""
    names, connections = [own], []
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=both) as server:
        while len(names) < hosts and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with suppress(TimeoutError, ConnectionError):
                connection, _ = server.accept()
                connection.settimeout(_NAME_S)
                connections.append(connection)
                if name := connection.makefile(errors="replace").readline(_NAME_LENGTH).strip():
                    names.append(name)
    shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    few = f"only {len(names)} of {hosts} hosts came to port {port} of {own}: {shown}"
    said = _ALL if len(names) == hosts else few
    for connection in connections:
        with suppress(OSError), connection:
            connection.sendall(said.encode())
    return said


def _answer_roll(address: str, port: int, deadline: float, own: str) -> str:
    with connect(address, port, deadline) as connection:
        connection.sendall(f"{own}\n".encode())
        connection.settimeout(max(0.0, deadline - time.monotonic()) + _NAME_S)
        said = connection.makefile().read()
    if said == _ALL:
        connect(address, port, deadline).close()  # torchrun's own client prints stacks until its server is there
    return said or f"{address}:{port} has ended, where {own} waited for the other hosts"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
