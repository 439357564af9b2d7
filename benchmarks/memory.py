"""Memory of a training step: DoRA and LoRA, ours and PEFT's, in the same model over the same frozen weights.

What autograd keeps from the forward for the backward is counted on every device: each storage that is saved once,
but for parameters. A GPU also tells the most that a step holds, were the contender alone there with its weights
and its optimizer's state.

    python benchmarks/memory.py [--rank 384] [--four-bit] [--checkpointing] [--hidden 768 --layers 4 ...]
"""

import argparse
from typing import Any

import torch
from _contenders import Contender, add_model_arguments, case_name, make_contenders, prepare, settings_of
from _results import add_arguments, default_path, save
from torch import Tensor

BASELINES = ("ours lora", "ours qlora", "peft lora", "peft qlora")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    base, ids = prepare(args)
    device = ids.device
    found: dict[str, dict[str, Any]] = {}
    for name, contender in make_contenders(base, args).items():
        contender.step(ids)  # makes the optimizer's state
        found[name] = {"saved_bytes": saved_bytes(contender, ids), "peak_bytes": peak_bytes(contender, ids)}
    settings = settings_of(args)
    record = {"settings": settings, "contenders": found, "ratios": ratios(found)}
    save(args.out or default_path(device), "memory", case_name(args), device, record)
    print(f"{case_name(args)}: memory of a training step")
    for name, values in found.items():
        peak = f"   peak {values['peak_bytes'] / 2**20:,.0f} MiB" if values["peak_bytes"] else ""
        print(f"  {name:18} kept for the backward {values['saved_bytes'] / 2**20:10,.1f} MiB{peak}")
    for name, values in record["ratios"].items():
        print(f"  {name:28} " + "   ".join(f"{key} {value:.3f}" for key, value in values.items()))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_arguments(parser)
    add_arguments(parser)
    return parser.parse_args(arguments)


def saved_bytes(contender: Contender, ids: Tensor) -> int:
    """What the forward leaves for the backward."""
    parameters = {p.untyped_storage().data_ptr() for p in contender.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = contender.loss(ids)
    del loss
    return sum(kept.values())


def peak_bytes(contender: Contender, ids: Tensor) -> int | None:
    """The most that a step holds, were this contender alone on the GPU."""
    if not ids.is_cuda:
        return None
    torch.cuda.synchronize(ids.device)
    torch.cuda.reset_peak_memory_stats(ids.device)
    before = torch.cuda.memory_allocated(ids.device)
    contender.step(ids)
    return contender.held_bytes() + torch.cuda.max_memory_allocated(ids.device) - before


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of our DoRA to each of the LoRAs, and to PEFT's DoRA."""
    ours = next(name for name in found if name.startswith("ours") and name.endswith("dora"))
    others = [name for name in found if name in BASELINES or name in ("peft dora", "peft qdora")]
    return {
        f"{ours} / {other}": {
            key: found[ours][f"{key}_bytes"] / found[other][f"{key}_bytes"]
            for key in ("saved", "peak")
            if found[other][f"{key}_bytes"]
        }
        for other in others
    }


if __name__ == "__main__":
    main()
