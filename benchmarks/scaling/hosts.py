"""Several hosts on one machine: network and UTS namespaces, joined by links of a given rate and delay.

Each host has a TUN device `eth0`, and one relay process moves packets between them, so that no kernel module for
delays (netem) is needed. The relay also watches over it all: where the process that asked for the hosts ends, in
whatever way, it ends the processes of the hosts, and with the last of them the kernel takes the devices away.
Needs root. Packets are up to 60,000 bytes, so that Python keeps up with 1 Gb/s (a fifth of a CPU).
"""

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_MTU = 60_000
_BACKLOG_S = 0.02  # of packets that wait for their link: more stay with the sender, as in a network card's queue
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x1, 0x1000  # linux/if_tun.h


class Hosts:
    """`count` hosts named host-0, host-1, ... that reach each other by name and by address, and nothing else.

        with Hosts(2, mbit=1000, delay_ms=5.0) as hosts:
            hosts.popen(0, ["torchrun", "--nnodes", "2", ...], cwd=ROOT).wait()

    `mbit`: what a host can send; None for no limit. `delay_ms`: of a packet in one direction. `loopback_names`: a
    host's own name leads to 127.0.1.1 there, as Debian sets it up. RuntimeError: `available` says why not.
    """

    def __init__(
        self, count: int, mbit: float | None = None, delay_ms: float = 0.0, loopback_names: bool = False
    ) -> None:
        self.names = [f"host-{i}" for i in range(count)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(count)]
        self._settings = {"mbit": mbit, "delay_ms": delay_ms, "loopback_names": loopback_names}
        self._relay: subprocess.Popen[str] | None = None
        self._holders: list[int] = []
        self._directory = ""

    def __enter__(self) -> "Hosts":
        if (reason := available()) is not None:
            raise RuntimeError(f"no hosts can be made here: {reason}")
        settings = {**self._settings, "names": self.names, "addresses": self.addresses}
        self._relay = subprocess.Popen(
            [sys.executable, __file__, json.dumps(settings)],
            stdin=subprocess.PIPE,  # never written to: its end is this process's end
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C is for this process, which then leaves the `with`
        )
        assert self._relay.stdout is not None
        answer = self._relay.stdout.readline()
        if not answer:
            self.__exit__()
            raise RuntimeError("no hosts can be made here: the relay ended, and said why on stderr")
        told = json.loads(answer)
        self._holders, self._directory = told["holders"], told["directory"]
        return self

    def __exit__(self, *exception: object) -> None:
        if self._relay is None:
            return
        assert self._relay.stdin is not None and self._relay.stdout is not None
        self._relay.stdin.close()
        self._relay.wait()
        self._relay.stdout.close()
        self._relay = None

    def popen(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """`subprocess.Popen` inside a host. Its pid is that of the command itself."""
        return subprocess.Popen(self.command(host, command), **options)

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """What to run outside for `command` to run inside a host."""
        names = f"{self._directory}/{self.names[host]}"
        no_dns = f"mount --bind {self._directory}/resolv.conf /etc/resolv.conf"  # it would be waited for in vain
        mount = f'mount --bind {names} /etc/hosts && {no_dns} && exec "$@"'
        enter = ["nsenter", f"--target={self._holders[host]}", "--net", "--uts"]
        return [*enter, "unshare", "--mount", "sh", "-c", mount, "sh", *command]

    def processes(self, host: int) -> list[int]:
        """Those that run inside a host, but the one that keeps it."""
        holder = self._holders[host]
        return [pid for pid in _processes(_namespace(holder)) if pid != holder]

    def kill(self, host: int) -> None:
        """As a loss of power: the link goes down first, so that nobody hears of the end of its processes."""
        _in_network(self._holders[host], "ip", "link", "set", "eth0", "down")
        _kill_all(_namespace(self._holders[host]), spare=self._holders[host])


def available() -> str | None:
    """Why there can be no hosts on this machine; None where there can."""
    if sys.platform != "linux":
        return "this is not Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "nsenter", "unshare", "mount"):
        if shutil.which(tool) is None:
            return f"there is no command {tool!r}"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"namespaces are refused: {tried.stderr.strip()}"


def _namespace(pid: int) -> int:
    """The number of a process's network namespace; 0 where the process has ended."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def _processes(namespace: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if namespace and _namespace(pid) == namespace]


def _kill_all(namespace: int, spare: int = 0) -> None:
    """Until none is left: one may be starting another just now."""
    while pids := [pid for pid in _processes(namespace) if pid != spare]:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _in_network(pid: int, *command: str) -> None:
    subprocess.run(["nsenter", f"--target={pid}", "--net", *command], check=True)


class _Relay:
    """The process that is the network: reads a packet of one host and gives it to another when it is due."""

    def __init__(self, tuns: list[int], addresses: list[str], mbit: float | None, delay_ms: float):
        self.tuns, self.delay_s = tuns, delay_ms / 1e3
        self.seconds_per_byte = 0.0 if mbit is None else 8 / (mbit * 1e6)
        self.by_address = {bytes(map(int, address.split("."))): i for i, address in enumerate(addresses)}
        self.free = [0.0] * len(tuns)  # when each host's link has sent all that was read of it
        self.waiting: list[deque[tuple[float, int, bytes]]] = [deque() for _ in tuns]  # by sender, in order

    def run(self) -> None:
        """Until stdin ends."""
        while True:
            now = time.monotonic()
            self._deliver(now)
            ready = [tun for i, tun in enumerate(self.tuns) if self.free[i] - now <= _BACKLOG_S]
            times = [queue[0][0] for queue in self.waiting if queue]
            times += [free - _BACKLOG_S for free in self.free if free - now > _BACKLOG_S]
            pause = max(0.0, min(times) - time.monotonic()) if times else None
            readable, _, _ = select.select([0, *ready], [], [], pause)
            for descriptor in readable:
                if descriptor == 0:
                    return
                self._take(self.tuns.index(descriptor))

    def _take(self, sender: int) -> None:
        try:
            packet = os.read(self.tuns[sender], _MTU + 100)
        except OSError:
            return
        receiver = self.by_address.get(packet[16:20]) if packet[0] >> 4 == 4 else None  # IPv4's destination
        if receiver is None:
            return
        self.free[sender] = max(self.free[sender], time.monotonic()) + len(packet) * self.seconds_per_byte
        self.waiting[sender].append((self.free[sender] + self.delay_s, receiver, packet))

    def _deliver(self, now: float) -> None:
        for queue in self.waiting:
            while queue and queue[0][0] <= now:
                _, receiver, packet = queue.popleft()
                with suppress(OSError):  # a link that is down loses it
                    os.write(self.tuns[receiver], packet)


def _open_tun(holder: int, address: str) -> int:
    """A device in the network of a host, whose packets this process sends and receives."""
    with open("/proc/self/ns/net", "rb") as ours, open(f"/proc/{holder}/ns/net", "rb") as theirs:
        _enter(theirs.fileno())
        try:
            tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TUN | _IFF_NO_PI))
        finally:
            _enter(ours.fileno())
    _in_network(holder, "ip", "address", "add", f"{address}/24", "dev", "eth0")
    _in_network(holder, "ip", "link", "set", "eth0", "up", "mtu", str(_MTU))
    _in_network(holder, "ip", "link", "set", "lo", "up")
    return tun


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0) != 0:  # os.setns is there from Python 3.12 on
        raise OSError(ctypes.get_errno(), "setns")


def _names_file(settings: dict[str, Any], host: int) -> str:
    """/etc/hosts of one host."""
    own = "127.0.1.1" if settings["loopback_names"] else settings["addresses"][host]
    addresses = [own if i == host else address for i, address in enumerate(settings["addresses"])]
    lines = [f"{a} {name}\n" for a, name in zip(addresses, settings["names"], strict=True)]
    return "127.0.0.1 localhost\n" + "".join(lines)


def _hold(name: str) -> subprocess.Popen[str]:
    """A process that keeps the namespaces of a host."""
    script = f"hostname {name} && echo && exec sleep infinity"
    holder = subprocess.Popen(
        ["unshare", "--net", "--uts", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


def _main(settings: dict[str, Any]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # stdin's end is the word
    with suppress(OSError):
        os.nice(-10)  # a link does not slow down because the hosts compute
    holders = []
    with tempfile.TemporaryDirectory(prefix="hosts-") as directory:
        try:
            Path(directory, "resolv.conf").write_text("nameserver 127.0.0.1\n")  # where nobody listens
            for host, name in enumerate(settings["names"]):
                Path(directory, name).write_text(_names_file(settings, host))
                holders.append(_hold(name))
            pids = [holder.pid for holder in holders]
            tuns = [_open_tun(pid, address) for pid, address in zip(pids, settings["addresses"], strict=True)]
            print(json.dumps({"holders": pids, "directory": directory}), flush=True)
            _Relay(tuns, settings["addresses"], settings["mbit"], settings["delay_ms"]).run()
        finally:
            for holder in holders:
                # Until it is waited for its number is its own; one that failed may be in our own network.
                if _namespace(holder.pid) != _namespace(os.getpid()):
                    _kill_all(_namespace(holder.pid))
                holder.kill()
                holder.wait()


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
