"""Where a rank hangs, or it or its launcher dies, a run ends or goes on, and says who was missing."""

import os
import re
import signal
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dora_dist.parallel.phases import Phase
from dora_dist.parallel.process import Processes
from dora_dist.parallel.rendezvous import meet
from dora_dist.parallel.watchdog import Beat, Place, Watchdog, describe_missing
from tests.launch.measure_restarts import recovers
from tests.support.launch import SECONDS, Launch, free_port, wait_until
from tests.support.ranks import Ended, Ranks, run_ranks

pytestmark = pytest.mark.ranks

HERE = Path(__file__).parent
SUM = "mean of the loss"  # Phase.LOG, which the watched loop sums in


def start(directory: Path, *arguments: str) -> Ranks:
    return Ranks(2, HERE / "watched_loop.py", directory, *arguments)


def launch(directory: Path, *arguments: str, launcher: str, ranks: int) -> Launch:
    if launcher == "torchrun":
        command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    else:
        command = ["deepspeed.launcher.runner", f"--num_gpus={ranks}", f"--master_port={free_port()}"]
    script = [str(HERE / "watched_loop.py"), str(directory), *arguments]
    return Launch([sys.executable, "-m", *command, *script], directory)


def runs(directory: Path) -> bool:
    """And has for longer than a beat takes."""
    return wait_until(lambda: any(int(p.read_text() or 0) > 150 for p in directory.glob("life-*")), SECONDS)


def errors(ended: Ended) -> list[str]:
    return [line.partition("error: ")[2] for line in ended.stderr.splitlines() if "error: " in line]


def test_a_stopped_rank_is_named_and_the_run_ends(tmp_path):
    with start(tmp_path, "4", "1000000") as launch:
        assert runs(tmp_path)
        other, stopped = launch.processes
        os.kill(stopped.pid, signal.SIGSTOP)
        assert wait_until(lambda: other not in launch.living(), SECONDS)
        stopped.kill()  # as torchrun does, but 30 s later
        ended = launch.end()
    assert ended.returncode != 0
    (line,) = errors(ended)
    missing = (
        rf"missing is rank 1 \(\S+\), which no longer answers and was last heard of in step \d+, ({SUM}|data)"
    )
    assert re.fullmatch(
        rf"step \d+, {SUM}: rank 0 \(\S+\) has waited for \d+ s \(parallel.timeout_s: 4\); {missing}",
        line,
    )


def test_a_rank_that_is_late_is_named(tmp_path):
    with start(tmp_path, "4", "1000000", "dawdle") as launch:
        ended = launch.end()
    assert ended.returncode != 0
    (line,) = errors(ended)
    said = r"has waited for \d+ s \(parallel.timeout_s: 4\); missing is rank 1 \(\S+\), which is still in"
    assert re.fullmatch(rf"step 20, {SUM}: rank 0 \(\S+\) {said} step 20, data", line)


def test_a_rank_that_is_lost_while_another_saves_is_named(tmp_path):
    """Nobody has to be quick there, but all have to live."""
    with start(tmp_path, "4", "1000000", "save") as launch:
        assert runs(tmp_path)
        saving, waiting = launch.processes
        assert not wait_until(lambda: saving not in launch.living(), 6)
        os.kill(waiting.pid, signal.SIGSTOP)
        assert wait_until(lambda: saving not in launch.living(), SECONDS)
        waiting.kill()
        ended = launch.end()
    assert ended.returncode != 0
    (line,) = errors(ended)
    assert line.startswith("step 20, saving the checkpoint: rank 0 ")
    silent = r"missing is rank 1 \(\S+\), which no longer answers and was last heard of in"
    assert re.search(rf"{silent} step 20, saving the checkpoint$", line)


@pytest.mark.parametrize("mishap", ["leave", "fail"])
def test_the_error_of_a_collective_becomes_the_name_of_the_rank_that_has_left(tmp_path, mishap):
    with start(tmp_path, "60", "1000000", mishap) as launch:
        ended = launch.end()
    assert ended.returncode != 0
    assert "gloo" not in ended.stdout + ended.stderr
    (line,) = errors(ended)
    said = r"has lost rank 1 \(\S+\), which no longer answers and was last heard of in"
    assert re.fullmatch(rf"step 20, {SUM}: rank 0 \(\S+\) {said} step \d+, (start|{SUM}|data)", line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "ranks", "number"), [("torchrun", 1, signal.SIGKILL), ("deepspeed", 2, signal.SIGTERM)]
)
def test_where_the_launcher_dies_no_process_stays(tmp_path, launcher, ranks, number):
    if launcher == "deepspeed" and torch.cuda.is_available():
        pytest.skip("the deepspeed launcher would show its processes the GPUs, which these tests hide")
    with launch(tmp_path, "60", "1000000", launcher=launcher, ranks=ranks) as started:
        assert runs(tmp_path)
        started.launcher.send_signal(number)
        started.launcher.wait(SECONDS)
        assert wait_until(lambda: not started.processes(), SECONDS)


@pytest.mark.slow
def test_a_restart_brings_back_a_run_whose_rank_was_killed(tmp_path):
    assert recovers(tmp_path)


def test_small_collectives_on_two_ranks_and_on_one():
    done = run_ranks(2, HERE / "collective_cases.py")
    assert done.returncode == 0, done.stderr[-3000:]
    one = Processes()
    assert one.agree([3, 0])() == [3, 0]
    assert one.all_gather_bytes(b"x") == [b"x"]
    assert one.from_main("m") == "m"


def test_who_is_missing_follows_from_two_looks_at_the_beats(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node-a")

    def beats(**counts):
        return {int(name[1:]): Beat(count, place[int(name[1:])], "h") for name, count in counts.items()}

    sums = Place(7, 3, Phase.BACKWARD, 2)
    place = {0: sums, 1: sums, 2: Place(7, 1, Phase.DATA), 3: Place(6, 9, Phase.LOG)}
    before = beats(r0=5, r1=5, r2=5, r3=5)
    assert (
        describe_missing(0, 4, place[0], None, before)
        == "rank 0 (node-a), which keeps the run's store and no longer answers"
    )
    all_live = beats(r0=8, r1=8, r2=8, r3=8)
    behind = "rank 2 (h), which is still in step 7, data; rank 3 (h), which is still in step 6, mean of the loss"
    assert describe_missing(0, 4, place[0], before, all_live) == behind
    assert describe_missing(2, 4, place[2], before, all_live) == "this rank, for which others wait"
    silent = "rank 1 (h), which no longer answers and was last heard of in step 7, backward of micro-batch 2"
    assert describe_missing(0, 4, place[0], before, beats(r0=8, r1=5, r2=8, r3=8)) == silent
    assert describe_missing(0, 2, place[0], {}, beats(r0=8)) == "rank 1, never heard of"
    assert describe_missing(0, 2, place[0], before, beats(r0=8, r1=8)) is None
    saves = Place(7, 4, Phase.CHECKPOINT, watched=False)
    assert describe_missing(0, 4, saves, before, all_live) is None
    assert describe_missing(0, 4, saves, before, beats(r0=8, r1=5, r2=8, r3=8)) == silent
    assert describe_missing(0, 2, saves, {}, beats(r0=8)) is None
    place[1] = Place(8, 0, Phase.END)
    assert describe_missing(0, 2, saves, before, beats(r0=8, r1=5)) is None


def test_other_errors_and_single_processes_are_not_explained():
    assert Watchdog(Processes(), 1).explain(dist.DistNetworkError("Connection closed by peer")) is None
    with pytest.raises(ValueError, match="mine"), Watchdog(Processes(), 1):
        raise ValueError("mine")


def test_on_one_node_the_store_listens_on_the_loopback_alone(monkeypatch):
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    store = meet(0, 1, True, timedelta(seconds=10))
    store.set("key", "value")
    assert store.get("key") == b"value"
    listening = [
        words[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for words in map(str.split, Path(table).read_text().splitlines()[1:])
        if words[3] == "0A" and words[1].endswith(f":{port:04X}")
    ]
    assert listening == [f"0100007F:{port:04X}"]
