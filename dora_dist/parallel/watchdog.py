"""A run of several ranks in which one hangs ends, and says which: one thread a rank tells the others where it is.

The fault: a rank hangs, is late or dies, or its host or network is gone, while the others wait for it in a
collective (docs/reliability.md, "Hung collectives"). The error of a collective's own time limit names a socket.
Here every rank writes a count of its beats and its place in the step into the run's store, and a rank that has
waited too long reads those of all.
"""

import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, TypeVar

import torch.distributed as dist

from dora_dist.errors import Stopped
from dora_dist.parallel.orphans import free_from_lost_host
from dora_dist.parallel.phases import Phase
from dora_dist.parallel.process import Processes, in_thread

LOST = 69  # exit status of a rank that ends because another, or the network, is gone: EX_UNAVAILABLE
_BEAT_S = 1.0
_MEETING_S = 0.1  # between two looks for the store, before the processes have met
_LISTEN_S = 3.0  # a rank without a beat for as long is not there
_QUIET_S = 30.0  # nor is one at a place that is not watched, where a library may hold all of Python's threads
_EARLY_S = 8.0  # before the limit: to listen, to speak, and to end before a collective's own limit does it mutely
_ASLEEP_S = 5.0  # a thread that overslept by as much was stopped itself, and its waiting does not count
_STORE_S = 2.0  # for an answer of the store, whose host may be the one that is gone
_NAMED = 4  # ranks that a line names
_APART_S = 0.01  # between the looks of two ranks where nothing is urgent: each asks the store for all ranks' beats
_KEY = "watchdog/{}"  # of a rank's beat, in the store
_SENTENCES = {  # {}: the micro-batch or batch
    Phase.LOADING: "loading the model",
    Phase.FORWARD: "forward of micro-batch {}",
    Phase.BACKWARD: "backward of micro-batch {}",
    Phase.STEP: "gradient norm and optimizer step",
    Phase.NORMS: "norm refresh",
    Phase.SPEEDS: "comparison of the ranks' speeds",
    Phase.LOG: "mean of the loss",
    Phase.AGREEMENT: "agreement on whether to end",
    Phase.EVALUATION: "evaluation, batch {}",
    Phase.CHECKPOINT: "saving the checkpoint",
    Phase.ADAPTER: "saving the adapter",
}  # others go by their names

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a rank's training loop is. `index` counts the phases of a step, which are the same on all ranks, so
    that the lesser (step, index) is behind. `number`: of the micro-batch, from 1, or of an evaluation's batch."""

    step: int
    index: int
    phase: Phase
    number: int = 0
    watched: bool = True
    since: float = dataclasses.field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"step {self.step}, {_SENTENCES.get(self.phase, self.phase.value).format(self.number)}"


@dataclass(frozen=True)
class Beat:
    """What a rank last told of itself."""

    count: int
    place: Place
    host: str

    @property
    def ended(self) -> bool:
        return self.place.phase == Phase.END


Beats = dict[int, Beat]  # by rank


class Watchdog:
    """Ends this process where its training loop stands still for `timeout_s` seconds (or 5 s less, see _EARLY_S),
    after one rank has said on stderr which is missing. It goes around the whole run:

        with Watchdog(processes, timeout_s) as watch:
            watch.at(0, Phase.LOADING, watched=False)
            ...
            watch.at(step, Phase.FORWARD, 2)

    What is not watched may take any time, but there, too, no rank may be silent for half of `timeout_s` (at least
    30 s). An error of a collective that a missing rank has caused ends the process in the same way. A single
    process is not watched. On GPUs an operation is the one that the host is in: the device may be behind it.
    """

    def __init__(self, processes: Processes, timeout_s: float):
        self.processes, self.timeout_s = processes, timeout_s
        self._place = Place(0, 0, Phase.START, watched=False)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._board = _Board(processes)
        self._missing = partial(describe_missing, processes.rank, processes.world_size)

    def __enter__(self) -> "Watchdog":
        if self.processes.world_size > 1:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        line = None if error is None else self.explain(error)
        self._over.set()
        if line is not None:
            _leave(line, self._board.gone)
        if self._thread is not None and (error is None or isinstance(error, Stopped)):
            self._thread.join()
            self._board.write(Place(self._place.step, self._place.index + 1, Phase.END))

    @property
    def _me(self) -> str:
        return f"rank {self.processes.rank} ({self._board.host})"

    def at(self, step: int, phase: Phase, number: int = 0, watched: bool = True) -> None:
        """What the training loop does next: the same phases in the same order on every rank. `watched=False` where
        it may take any time, such as loading weights."""
        index = self._place.index + 1 if self._place.step == step else 0
        self._place = Place(step, index, phase, number, watched)

    def explain(self, error: BaseException) -> str | None:
        """One line on which rank is missing, for an error of a collective; "" where another rank says it. None for
        any other error. Takes the seconds that it needs to hear who lives."""
        of_collective = isinstance(error, RuntimeError) and (
            isinstance(error, dist.DistError) or "gloo" in str(error)  # gloo's name the file of gloo's that raised
        )
        if self.processes.world_size == 1 or self.processes.store is None or not of_collective:
            return None
        place = dataclasses.replace(self._place, watched=True)  # by now something is wrong
        # The thread goes on to beat, and says nothing.
        self._place = dataclasses.replace(place, watched=False, since=time.monotonic())
        before = self._board.read()
        time.sleep(_LISTEN_S)
        missing = self._missing(place, before, self._board.read())
        first_line = str(error).strip().partition("\n")[0]
        lost = f"has lost {missing}" if missing else f"lost a collective, but no rank: {first_line}"
        return self._one_voice(f"error: {place}: {self._me} {lost}")

    def _watch(self) -> None:
        """The thread: a beat a second; shortly before the limit a look at the others' beats, and another later."""
        last, awake, pause = time.monotonic(), 0.0, 0.0
        look: tuple[Place, float, Beats | None] | None = None  # where this rank stood, when, and what it saw
        while not self._over.wait(pause):
            now, place = time.monotonic(), self._place
            awake = now if now - last > _BEAT_S + _ASLEEP_S else awake
            met = self._board.write(place)
            last, pause = now, _BEAT_S if met else _MEETING_S
            since = max(place.since, awake)
            if not met or now - since < self._patience(place):
                continue
            if look is None or look[0] is not place or look[1] < since:
                look = (place, now, self._board.read(self._answer_s(place)))
            left = look[1] + (_LISTEN_S if place.watched else max(_QUIET_S, self.timeout_s / 2)) - now
            if left <= 0:
                look = (place, now, self._give_up(place, now - since, look[2]))
            else:
                pause = min(_BEAT_S, max(left, 0.01))

    def _patience(self, place: Place) -> float:
        """Seconds in one place before this rank looks at the others' beats."""
        half = self.timeout_s / 2
        return max(half, self.timeout_s - _EARLY_S) if place.watched else half + _APART_S * self.processes.rank

    def _answer_s(self, place: Place) -> float:
        """Seconds that the store has for an answer."""
        return _STORE_S if place.watched else max(_STORE_S, self.timeout_s / 4)

    def _give_up(self, place: Place, waited: float, before: Beats | None) -> Beats | None:
        """End this process, unless nobody is missing: then the second look is returned."""
        now = self._board.read(self._answer_s(place))
        missing = self._missing(place, before, now)
        if missing is None:  # long work; or the network, where the collective's own limit ends it
            if place.watched and self._place is place:  # from now on only silence counts
                self._place = dataclasses.replace(place, watched=False, since=time.monotonic())
            return now
        limit = f"parallel.timeout_s: {self.timeout_s:g}"
        told = f"has waited for {waited:.0f} s ({limit}); missing is {missing}"
        line = self._one_voice(f"error: {place}: {self._me} {told}")
        if self._place is place:  # else the loop has gone on in the meantime, or speaks itself
            _leave(line, self._board.gone)
        return now

    def _one_voice(self, line: str) -> str:
        """The line on one rank, the lowest that lives, since that asks first; "" on the others."""
        rank = self.processes.rank
        time.sleep(0 if rank == 0 else 0.5 + 0.05 * min(rank, 10))
        return line if self._board.claim() else ""


class _Board:
    """What the ranks tell each other, over a connection of its own to the run's store: the training loop's is
    locked for as long as a rank waits for an answer there."""

    def __init__(self, processes: Processes):
        self._processes = processes
        self.host = socket.gethostname()
        self._store: dist.Store | None = None
        self.gone = False
        self._beats = 0

    def write(self, place: Place) -> bool:
        """Once the processes have met. Does not wait for an answer. False before they have."""
        try:
            if self._store is None and not self.gone and self._processes.store is not None:
                self._store = self._processes.store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs
            if self._store is not None:
                self._beats += 1
                where = [place.step, place.index, place.phase.value, place.number]
                self._store.set(_KEY.format(self._processes.rank), json.dumps([self._beats, where, self.host]))
        except RuntimeError:
            self._store, self.gone = None, True
        return self._store is not None or self.gone

    def read(self, limit: float = _STORE_S) -> Beats | None:
        """Each rank's last beat, of those that had one; None where the store does not answer within `limit`
        seconds."""
        return self._ask(self._read, limit)

    def claim(self) -> bool:
        """Whether nobody has before; also where the store does not answer, as then nobody knows."""
        return self._ask(lambda store: store.add("watchdog/spoken", 1)) in (1, None)

    def _read(self, store: dist.Store) -> Beats:
        keys = {rank: _KEY.format(rank) for rank in range(self._processes.world_size)}
        there = keys if store.check(list(keys.values())) else {r: k for r, k in keys.items() if store.check([k])}
        beats = {}
        for rank, text in zip(there, store.multi_get(list(there.values())), strict=True):
            count, (step, index, phase, number), host = json.loads(text)
            beats[rank] = Beat(count, Place(step, index, Phase(phase), number), host)
        return beats

    def _ask(self, question: Callable[[dist.Store], T], limit: float = _STORE_S) -> T | None:
        if (store := self._store) is None:
            return None
        try:
            return in_thread(lambda: question(store)).result(limit)
        except (RuntimeError, futures.TimeoutError):  # the store's own limit does not end it
            self._store, self.gone = None, True
            return None


def describe_missing(
    rank: int, world_size: int, place: Place, before: Beats | None, now: Beats | None
) -> str | None:
    """The ranks that `rank` waits for, by two looks at the beats: those without a beat in between, or else those
    at an earlier operation than the others; None where it is none of them. At a place that is not watched others
    may be late, or not have come yet."""
    if before is None or now is None:
        host, agents = os.environ.get("MASTER_ADDR", "?"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
        store = f"torchrun on {host}" if agents == "True" else f"rank 0 ({host})"
        return f"{store}, which keeps the run's store and no longer answers"
    others = [other for other in range(world_size) if other != rank]
    silent = [
        r for r in others if r in before and r in now and before[r].count == now[r].count and not now[r].ended
    ]
    if place.watched:
        silent = sorted({*silent, *(r for r in others if r not in now)})
    if silent:
        return _names(silent, now, "which no longer answers and was last heard of in")
    living = {r: beat.place for r, beat in now.items() if not beat.ended} | {rank: place}
    furthest = max((p.step, p.index) for p in living.values())
    behind = [r for r, p in sorted(living.items()) if (p.step, p.index) < furthest]
    if not behind or not place.watched:
        return None
    if rank in behind:
        return "this rank, for which others wait"
    return _names(behind, now, "which is still in")


def _names(ranks: list[int], beats: Beats, state: str) -> str:
    parts = [
        f"rank {r} ({beats[r].host}), {state} {beats[r].place}" if r in beats else f"rank {r}, never heard of"
        for r in ranks[:_NAMED]
    ]
    return "; ".join(parts + ([f"{len(ranks) - _NAMED} more"] if len(ranks) > _NAMED else []))


def _leave(line: str, store_lost: bool) -> NoReturn:
    """End this process, whatever its main thread does."""
    if store_lost:
        free_from_lost_host()
    if line:
        with suppress(OSError):  # the launcher that read it may be gone
            print(line, file=sys.stderr, flush=True)
    os._exit(LOST)
