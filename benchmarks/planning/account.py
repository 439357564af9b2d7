"""What `dora-dist plan` counts of a 70B model on two 24 GB GPUs: configs/two-4090-70b.yaml, docs/quantization.md.

python -m benchmarks.planning.account [--tokens 2048 4096]
"""

import argparse
import io
import json
from contextlib import redirect_stdout

import torch

from benchmarks.common.results import RESULTS, ROOT, environment, write
from dora_dist import cli

CONFIG = ROOT / "configs" / "two-4090-70b.yaml"
OUT = RESULTS / "simulation" / f"plan-{CONFIG.stem}.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096], help="of a row")
    args = parser.parse_args(arguments)
    plans = {}
    for tokens in args.tokens:
        words = ["--config", str(CONFIG), "--gpus", "2", "--gpu", "rtx4090", "--json", f"data.seq_len={tokens}"]
        with redirect_stdout(io.StringIO()) as printed:
            cli.main(["plan", *words])
        plans[str(tokens)] = found = json.loads(printed.getvalue())
        print(f"{tokens} tokens: {found['peak_bytes'] / 1e9:.2f} GB of each GPU, fullest in: {found['fullest']}")
    write(OUT, {"about": environment(torch.device("cpu")), "plans": plans})


if __name__ == "__main__":
    main()
