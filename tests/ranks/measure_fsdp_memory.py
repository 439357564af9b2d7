"""Run under torchrun: host memory while loading and bytes of base weights held while training, per rank.

usage: measure_fsdp_memory.py MODEL_DIR OUT_PREFIX     writes OUT_PREFIX.RANK.json, all figures in bytes
"""

import gc
import json
import sys
import threading
from pathlib import Path

import torch

from benchmarks.planning.strategy_memory import resident
from dora_dist.cli import leave
from dora_dist.config import DataConfig, DoraConfig, ModelConfig, RunConfig, TrainConfig
from dora_dist.models.build import build, make_blueprint
from dora_dist.models.weights import base_tensors
from dora_dist.parallel.fsdp import Fsdp
from dora_dist.parallel.process import Processes


class PeakMemory(threading.Thread):
    """The largest anonymous resident memory seen while the `with` block runs (files mapped are not counted)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done, self.start_bytes, self.peak = threading.Event(), resident("RssAnon"), 0

    def run(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, resident("RssAnon"))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.done.set()
        self.join()

    @property
    def growth(self) -> int:
        return self.peak - self.start_bytes


def bf16_bytes() -> int:
    """Bytes in distinct storages of bf16 tensors: only the base is bf16 and of any size here."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            local = thing._local_tensor if hasattr(thing, "_local_tensor") else thing
            if local.dtype == torch.bfloat16:
                storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def main(model_dir: str, out: str) -> None:
    processes = Processes()
    config = RunConfig(
        model=ModelConfig(path=model_dir),
        dora=DoraConfig(rank=2, targets="all-linear"),
        data=DataConfig(train="unused"),
        train=TrainConfig(),
    )
    blueprint = make_blueprint(config, Path(model_dir))
    sizes = {name: tensor.nbytes for name, tensor in base_tensors(blueprint.model).items()}
    processes.start(60)
    strategy = Fsdp(processes)
    strategy.mesh  # noqa: B018 - gloo's own buffers are not the weights'
    with PeakMemory() as loading:
        built = build(blueprint, strategy)
    resting = bf16_bytes()
    held = []
    for block in built.model.model.layers:
        block.register_forward_hook(lambda *_: held.append(bf16_bytes()))
        block.register_full_backward_hook(lambda *_: held.append(bf16_bytes()))
    built.model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.float().sum().backward()
    figures = {
        "base": sum(sizes.values()),
        "block": sum(size for name, size in sizes.items() if ".layers.0." in name),
        "loading": loading.growth,
        "resting": resting,
        "training": max(held),
        "samples": len(held),
    }
    Path(f"{out}.{processes.rank}.json").write_text(json.dumps(figures))
    processes.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
