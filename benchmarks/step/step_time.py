"""Time and memory of a whole training step: DoRA and LoRA, ours and PEFT's, in the same model.

A step is forward, cross-entropy, backward, AdamW and, for our DoRA, the refresh of the norms. The contenders share
one set of frozen weights and take turns; the ratios are medians over rounds of each round's own ratio. Before
anything is timed, ours and PEFT's must give the same loss from the same A, B and m.

The record `memory` has what autograd keeps from the forward for the backward: each storage that is saved once, but
for parameters; on a GPU also the most that a step holds, were the contender alone there.

    python -m benchmarks.step.step_time [--rank 64] [--four-bit] [--compile] [--checkpointing] [--hidden 768 ...]
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import contenders as of
from benchmarks.common.results import default_path, ratios, save, spread
from benchmarks.common.timing import Seconds, time_rounds
from dora_dist.parallel.shards import blocks

RATIOS = [
    ("ours dora", "ours lora"), ("ours dora", "peft lora"), ("ours dora", "peft dora"), ("ours lora", "peft lora"),
    ("ours dora", "peft lora 16-bit"), ("ours dora", "peft dora 16-bit"),
    ("ours qdora", "ours qlora"), ("ours qdora", "peft qlora"), ("ours qdora", "peft qdora"),
]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    args = of.parse(__doc__, arguments)
    base, ids = of.prepare(args)
    device = ids.device
    contenders = of.make_contenders(base, args.rank, four_bit=args.four_bit)
    for contender in contenders.values() if args.compile else ():
        for block in blocks(contender.model):
            block.compile()
    losses = {name: contender.loss(ids).item() for name, contender in contenders.items()}
    of.check_losses(losses, of.TOLERANCE[base.dtype])
    works = {name: lambda c=contender: c.step(ids) for name, contender in contenders.items()}
    peaks = {}
    for name in [*works, *works]:  # warm up; the optimizer makes its state in the first step
        peaks[name] = contenders[name].peak_bytes(works[name], device)
    found = {"memory": memory(contenders, ids, peaks)} if not args.compile else {}
    found["step_time"] = times(time_rounds(works, args.rounds, device), peaks if ids.is_cuda else {}, losses)
    for script, record in found.items():
        record = {"settings": of.settings_of(args), **record}
        save(args.out or default_path(device), script, of.case_name(args), device, record)


def times(seconds: Seconds, peaks: dict[str, int], losses: dict[str, float]) -> dict[str, Any]:
    found = ratios(seconds, RATIOS)
    for name, other in RATIOS:
        if peaks and f"{name} / {other}" in found:
            found[f"{name} / {other}"]["peak_memory"] = peaks[name] / peaks[other]
    return {
        "rounds": len(next(iter(seconds.values()))),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratios": found,
        "peak_memory_bytes": peaks,
        "first_loss": losses,
    }


def memory(contenders: dict[str, of.Contender], ids: Tensor, peaks: dict[str, int]) -> dict[str, Any]:
    """Of each contender, and the ratios of our DoRA to the others."""
    found = {
        name: {
            "saved_bytes": saved_bytes(contender.model, lambda c=contender: c.loss(ids)),
            "peak_bytes": peaks[name] or None,
        }
        for name, contender in contenders.items()
    }
    quotients = {
        f"{name} / {other}": {
            key: found[name][f"{key}_bytes"] / found[other][f"{key}_bytes"]
            for key in ("saved", "peak")
            if found[other][f"{key}_bytes"]
        }
        for name, other in RATIOS
        if name.endswith("dora") and name in found and other in found
    }
    return {"contenders": found, "ratios": quotients}


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """What the forward leaves for the backward."""
    parameters = {t.untyped_storage().data_ptr() for t in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


if __name__ == "__main__":
    main()
