"""Faults of one process that writes checkpoints: killed, its files damaged, its disk full."""

import dataclasses
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from dora_dist.config import load_config
from dora_dist.data.run_data import RunData, load_tokenizer
from dora_dist.models.build import make_blueprint, sizes_of
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.training.checkpoint import Checkpoints
from dora_dist.training.health import StopSignals
from dora_dist.training.loop import Loop
from dora_dist.training.optim import build_to_train
from dora_dist.training.resume import describe_run
from dora_dist.training.run_log import RunLog
from dora_dist.training.trainer import Trainer
from tests.faults.case import Case
from tests.unit.io.test_durable import in_child

Counted = tuple[int, int, str]  # held, tried, note


def make_loop(case: Case, place: Path, *overrides: str) -> Loop:
    torch.set_num_threads(1)  # a forked child has no thread pool
    config = load_config(case.config, [f"output_dir={place}", "parallel.strategy=single", *overrides])
    directory, processes = Path(config.model.path), Processes()
    blueprint = make_blueprint(config, directory)
    strategy = choose_strategy(config.parallel, config.train, sizes_of(blueprint.model), processes)
    tokenizer = load_tokenizer(directory)
    data = RunData(config.data, config.train, config.model.task, blueprint.model, tokenizer, processes)
    place.mkdir(parents=True, exist_ok=True)
    run = describe_run(dataclasses.asdict(config), 1, "cpu", strategy.name, {})
    checkpoints = Checkpoints(place / "checkpoints", config.checkpoint, processes, run)
    quiet = dataclasses.replace(config.log, every=10**6)
    log = RunLog(quiet, place, data.steps, {}, is_main=True)
    built = build_to_train(blueprint, strategy)
    trainer = Trainer(built, config.model, config.train, config.data.packing, data.steps)
    return Loop(trainer, data, quiet, log, checkpoints, StopSignals())


def train_and_save(loop: Loop) -> bool:
    loop.trainer.train_step(loop.data.plan.global_batch(loop.progress.step))
    return loop._save()


def is_clean(loop: Loop) -> bool:
    """No orphans."""
    directory = loop.checkpoints.directory
    return not [path for path in directory.parent.rglob("*") if path.name.startswith(".")]


def killed_saves(case: Case, every: int = 1, random_kills: int = 50) -> Counted:
    loop = make_loop(case, case.scratch / "killed-saves")
    directory, held = loop.checkpoints.directory, 0
    train_and_save(loop)
    loop.trainer.train_step(loop.data.plan.global_batch(1))
    operations = in_child(loop._save)
    shutil.rmtree(directory / "step-00000002")
    for n in range(0, operations, every):
        assert in_child(loop._save, kill_before=n) == -1
        found, _ = loop.checkpoints.find()
        held += found is not None and found.step in (1, 2) and is_clean(loop)
        shutil.rmtree(directory / "step-00000002", ignore_errors=True)
    chance = random.Random(4)
    for _ in range(random_kills):
        reported = killed_at(loop, chance.uniform(0.0, 0.1))
        found, _ = loop.checkpoints.find()
        held += found is not None and found.step >= reported and is_clean(loop)
    tried = len(range(0, operations, every)) + random_kills
    return held, tried, f"{operations} operations, {random_kills} random moments"


def killed_at(loop: Loop, seconds: float) -> int:
    """Save again and again in a child, kill it, and return the last step that it had reported as saved."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        while True:
            loop.progress.step += 1
            loop._save()
            os.write(write, b"%d\n" % loop.progress.step)
    os.close(write)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(read) as pipe:
        steps = pipe.read().split()
    return int(steps[-1]) if steps else 0


def damaged_checkpoints(case: Case, flips: int = 200) -> Counted:
    loop = make_loop(case, case.scratch / "damaged")
    directory = loop.checkpoints.directory
    train_and_save(loop)
    train_and_save(loop)
    newest, whole = directory / "step-00000002", directory.parent / "whole"
    newest.rename(whole)
    files = sorted(path.name for path in whole.iterdir())
    chance = random.Random(5)
    damages = [(name, kind) for name in files for kind in ("deleted", "half", "shorter", "empty", "longer")]
    damages += [(chance.choice(files), "flipped") for _ in range(flips)]
    held = 0
    for name, kind in damages:
        shutil.copytree(whole, newest)
        damage(newest / name, kind, chance)
        found, notices = loop.checkpoints.find()
        held += found is not None and found.step == 1 and any(name in notice for notice in notices)
        loop.checkpoints.begin(found)
        for path in directory.glob("aside-*"):
            shutil.rmtree(path)
    return held, len(damages), f"{len(files)} files, {flips} bit flips"


def damage(path: Path, kind: str, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "deleted":
        path.unlink()
        return
    if kind == "flipped":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    kept = {"half": data[: len(data) // 2], "shorter": data[:-1], "empty": b"", "longer": data + b"\0"}
    path.write_bytes(kept.get(kind, data))


def full_disks(case: Case, times: int = 20) -> Counted:
    """On a small file system of its own, filled so far that no checkpoint fits."""
    place = case.scratch / "small-disk"
    held, chance = 0, random.Random(6)
    with small_disk(place) as kind:
        loop = make_loop(case, place / "run")
        assert train_and_save(loop)
        size = sum(path.stat().st_size for path in (loop.checkpoints.directory / "step-00000001").iterdir())
        for _ in range(times):
            with filled(place, leaving=chance.randrange(size)):
                failed = not train_and_save(loop)
            found, _ = loop.checkpoints.find()
            held += failed and found is not None and found.step == 1 and is_clean(loop)
        held -= not train_and_save(loop)  # with room again
    return held, times, kind


@contextmanager
def small_disk(place: Path):
    """A file system of 2 MB, where this process may mount one; else a limit on the size of files."""
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield "RLIMIT_FSIZE"
        return
    try:
        yield "a tmpfs of 2 MB"
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def filled(place: Path, leaving: int):
    if not os.path.ismount(place):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (leaving // 8, hard))  # the largest file has half of the bytes
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return
    ballast = place / "ballast"
    free = os.statvfs(place)
    with ballast.open("wb") as file:
        file.write(b"\0" * max(0, free.f_bavail * free.f_frsize - leaving))
    try:
        yield
    finally:
        ballast.unlink()
