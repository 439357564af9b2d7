"""Fine-tune as a YAML says: torchrun --nproc-per-node N launch/train.py --config C.yaml [key.sub=value ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from dora_dist.cli import entry

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    entry()
