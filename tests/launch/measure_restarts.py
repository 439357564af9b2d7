"""How often torchrun's restart brings back a run whose rank 1 was killed.

usage: python -m tests.launch.measure_restarts TIMES [PROCESSES]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support import ROOT
from tests.support.launch import child_environment


def recovers(directory: Path, processes: int = 2, seconds: float = 120) -> bool:
    """Whether one run, in which a rank is killed, ends well in its second life; raises where it hangs."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "--max-restarts=3", str(ROOT / "tests/launch/watched_loop.py"), str(directory), "60", "40", "kill",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=child_environment())
    lives = sorted(path.name for path in directory.glob("life-*"))
    return run.returncode == 0 and lives == ["life-0", "life-1"]


def main(times: str, processes: str = "2") -> None:
    recovered = 0
    for _ in range(int(times)):
        with tempfile.TemporaryDirectory() as directory:
            recovered += recovers(Path(directory), int(processes))
    print(f"{recovered} of {times} runs recovered from a killed rank")
    sys.exit(recovered != int(times))


if __name__ == "__main__":
    main(*sys.argv[1:])
