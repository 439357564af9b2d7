"""Run under torchrun (or alone): train each case and write its losses and first gradients.

usage: run_cases.py CASES.json OUT.pt       CASES: {name: {override: value}}, laid over "base"
"""

import json
import sys
from functools import partialmethod
from pathlib import Path

import torch
import torch._dynamo.utils
import yaml
from torch import nn

from dora_dist.adapters.adapter import save_adapter
from dora_dist.cli import leave
from dora_dist.config import load_config
from dora_dist.data.run_data import RunData, load_tokenizer
from dora_dist.dora.norm_cache import dora_layers
from dora_dist.models.build import make_blueprint, sizes_of
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.training.optim import build_to_train
from dora_dist.training.trainer import Trainer


def run_case(config, processes: Processes, adapter: Path) -> dict:
    """All steps' losses and gradient norms, the first step's gradients, and the norms at the end."""
    directory = Path(config.model.path)
    blueprint = make_blueprint(config, directory, processes.world_size)
    strategy = choose_strategy(config.parallel, config.train, sizes_of(blueprint.model), processes)
    data = RunData(
        config.data, config.train, config.model.task, blueprint.model, load_tokenizer(directory), processes
    )
    processes.start(60, needed=strategy.needs_group)
    built = build_to_train(blueprint, strategy)
    shards = built.shards
    layers = dora_layers(built.model)
    magnitudes = shards.gather([layer.magnitude for layer in layers.values()])
    for layer, magnitude in zip(layers.values(), magnitudes, strict=True):
        assert torch.equal(magnitude, layer.norm)  # to the bit: step 0 is the base model
    named = {n: p for n, p in built.model.named_parameters() if p.requires_grad}
    first: dict[str, torch.Tensor] = {}
    take_step = built.engine.step

    def note_first_and_step():
        if not first:
            first.update({name: g.clone() for name, g in zip(named, gradients(), strict=True)})
        return take_step()

    def gradients() -> list[torch.Tensor]:
        if not strategy.name.startswith("zero"):
            return shards.gather([p.grad for p in named.values()])
        from deepspeed.utils import safe_get_full_grad

        return [safe_get_full_grad(p) for p in named.values()]

    built.engine.step = note_first_and_step
    trainer = Trainer(built, config.model, config.train, config.data.packing, data.steps)
    losses, norms, evaluation = [], [], {}
    for step in range(data.steps):
        if step == 1 and data.evaluation is not None:
            evaluation = trainer.evaluate(data.evaluation)  # leaves nothing behind in the steps that follow
        batch = data.plan.global_batch(step)
        loss, grad_norm = trainer.train_step(batch)
        losses.append(processes.sum_(loss).item())
        norms.append(grad_norm.item())
    metrics = trainer.step_metrics(batch.targets)
    cached = {name: layer.norm.clone() for name, layer in layers.items()}
    for norm in cached.values():
        assert torch.equal(processes.broadcast_(norm.clone()), norm)  # ranks that differ would drift apart
    shards.reshard(built.model)
    weights = dict(zip(named, shards.gather(list(named.values())), strict=True))
    save_adapter(built.model, adapter, "base", shards)
    found = {"losses": losses, "grad_norms": norms, "gradients": first, "norms": cached, "weights": weights}
    return {**found, "metrics": metrics, "evaluation": evaluation}


def main(cases_file: str, out: str) -> None:
    cases = json.loads(Path(cases_file).read_text())
    base = cases.pop("base")
    processes = Processes()
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # graphs, but no generated code
    results = {}
    for name, overrides in cases.items():
        path = Path(out).with_suffix(f".{processes.rank}.yaml")
        path.write_text(yaml.safe_dump(base))
        config = load_config(path, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
        results[name] = run_case(config, processes, Path(out).parent / "adapters" / name)
        assert not torch._dynamo.utils.counters["graph_break"]
    if processes.is_main:
        torch.save(results, out)
    processes.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
