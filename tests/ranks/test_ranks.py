"""The ranks that tests fork: what is told of their ends, and that none outlives the tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launch import SECONDS, child_environment, wait_until
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.ranks


def fail_or_wait(how: str) -> None:
    print("here is", os.environ["RANK"], os.environ["WORLD_SIZE"], flush=True)
    if os.environ["RANK"] == "1":
        if how == "raise":
            raise ZeroDivisionError
        os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else sys.exit(3 if how == "exit" else how)
    time.sleep(SECONDS)


@pytest.mark.parametrize(("how", "status"), [("raise", 1), ("kill", -signal.SIGKILL), ("exit", 3), ("no more", 1)])
def test_where_a_rank_fails_the_others_are_ended(how, status):
    ended = run_ranks(2, fail_or_wait, how)
    assert ended.statuses == [-signal.SIGTERM, status]
    assert ended.returncode != 0
    assert "here is 1 2" in ended.stdout and ("ZeroDivisionError" in ended.stderr) == (how == "raise")
    assert (ended.stderr == "no more\n") == (how == "no more")


def test_what_does_not_end_is_killed():
    assert run_ranks(1, time.sleep, SECONDS, timeout=0.1).statuses == [-signal.SIGKILL]


def note_and_wait(path: Path) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(SECONDS)


SCRIPT = """
import sys
from pathlib import Path
from tests.support.ranks import run_ranks
from tests.ranks.test_ranks import note_and_wait
if __name__ == "__main__":
    run_ranks(1, note_and_wait, Path(sys.argv[1]))
"""


@pytest.mark.slow  # it imports everything once more
def test_no_rank_outlives_the_tests(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = child_environment()
    note = tmp_path / "note"
    with subprocess.Popen([sys.executable, tmp_path / "script.py", note], env=environment) as tests:
        assert wait_until(lambda: note.exists() and note.read_text(), SECONDS)
        tests.kill()
    assert wait_until(lambda: not Path(f"/proc/{note.read_text()}").exists(), SECONDS)
