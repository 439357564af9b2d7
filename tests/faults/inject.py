"""Faults on purpose: launch/train.py with something going wrong at a chosen rank, step and point.

usage: DORA_DIST_FAULTS="rank=1 step=5 point=backward kind=kill; ..." torchrun ... inject.py --config C.yaml

point   forward, backward (their beginning), step (before the optimizer's), save, evaluate, write (a file-system
        operation of a checkpoint, the `nth` of the step's, from 0)
kind    kill (SIGKILL), stop (SIGSTOP), term, usr1, full (ENOSPC);
        launcher (SIGKILL to the parent), launcher_term (SIGTERM);
        nan, inf: at backward alone, in this rank's gradients;
        hash: no fault; prints a hash of all trained tensors, as this rank knows them
rank    default: all
restart how often torchrun has restarted the ranks when it happens; default: 0
"""

import errno
import hashlib
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dora_dist.io import durable
from dora_dist.training import checkpoint
from dora_dist.training.trainer import Trainer

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
VARIABLE = "DORA_DIST_FAULTS"
OTHER_SETTINGS = "DORA_DIST_RANK_1"  # an override that rank 1 alone is given
RANK = int(os.environ.get("RANK", 0))


@dataclass
class Fault:
    point: str
    kind: str
    step: int  # from 1, as in metrics.jsonl
    rank: int | None = None
    nth: int = 0
    restart: int = 0

    @staticmethod
    def read(text: str) -> "Fault":
        values = dict(word.split("=", 1) for word in text.split())
        numbers = {key: int(value) for key, value in values.items() if key not in ("point", "kind")}
        return Fault(point=values["point"], kind=values["kind"], **numbers)

    def is_here(self) -> bool:
        mine = self.rank is None or self.rank == RANK
        return mine and self.restart == int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def tell(line: str) -> None:
    """In one piece, as several ranks write to one place."""
    sys.stdout.flush()
    os.write(1, f"{line}\n".encode())


class Injector:
    def __init__(self, faults: list[Fault]):
        self.faults = [fault for fault in faults if fault.is_here()]
        self.trainer: Trainer | None = None
        self.operations = 0

    def reach(self, point: str, step: int, nth: int = 0) -> float:
        """Let what is due here happen, once. Returns what the loss is multiplied by."""
        factor = 1.0
        for fault in [f for f in self.faults if (f.point, f.step, f.nth) == (point, step, nth)]:
            self.faults.remove(fault)
            if fault.kind in ("nan", "inf"):
                factor = float(fault.kind)
            else:
                self._do(fault.kind)
        return factor

    def _do(self, kind: str) -> None:
        if kind != "hash":
            tell(f"fault {kind} rank {RANK}")
        if kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[kind])
        elif kind == "launcher":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(10)  # the step of a large model: these ranks look for their launcher once a second
        elif kind == "launcher_term":
            os.kill(os.getppid(), signal.SIGTERM)
        elif kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif kind == "hash":
            assert self.trainer is not None
            built = self.trainer.built
            built.shards.reshard(built.model)
            whole = built.shards.gather([p for p in built.model.parameters() if p.requires_grad])
            digest = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in whole)).hexdigest()
            tell(f"hash rank {RANK} step {self.trainer.progress.step} {digest}")
        else:
            raise ValueError(kind)

    def install(self) -> None:
        """Wrap the loop's methods, and the file-system operations that durable.py makes."""
        self._wrap(Trainer, "train_step", "forward", 1)
        self._wrap(Trainer, "evaluate", "evaluate", 0)
        self._wrap(checkpoint.Checkpoints, "save", "save", 0)
        self._watch_engine()
        for owner, name in (
            (durable.NewFile, "write"), (os, "fsync"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree"),
        ):  # fmt: skip
            self._wrap_operation(owner, name)

    def _wrap(self, owner: type, name: str, point: str, ahead: int) -> None:
        original = getattr(owner, name)

        def wrapped(this, *args, **options):
            if isinstance(this, Trainer):
                self.trainer = this
            self.operations = 0
            self.saving = point == "save"
            self.reach(point, self.trainer.progress.step + ahead)
            result = original(this, *args, **options)
            self.saving = False
            return result

        setattr(owner, name, wrapped)

    def _watch_engine(self) -> None:
        init = Trainer.__init__

        def with_watched_engine(trainer, *args, **options):
            init(trainer, *args, **options)
            engine = trainer.built.engine
            backward, step = engine.backward, engine.step

            def watched_backward(loss):
                factor = self.reach("backward", trainer.progress.step + 1)
                backward(loss if factor == 1 else loss * factor)

            def watched_step():
                self.reach("step", trainer.progress.step + 1)
                return step()

            engine.backward, engine.step = watched_backward, watched_step

        Trainer.__init__ = with_watched_engine

    saving = False

    def _wrap_operation(self, owner: object, name: str) -> None:
        original = getattr(owner, name)

        def operation(*args, **options):
            if self.saving and self.trainer is not None:
                self.operations += 1
                self.reach("write", self.trainer.progress.step, self.operations - 1)
            return original(*args, **options)

        setattr(owner, name, operation)


if __name__ == "__main__":
    from dora_dist.cli import entry

    Injector([Fault.read(text) for text in os.environ.get(VARIABLE, "").split(";") if text.strip()]).install()
    sys.argv.insert(1, "train")
    if os.environ.get(OTHER_SETTINGS) and RANK == 1:
        sys.argv.append(os.environ[OTHER_SETTINGS])
    entry()
