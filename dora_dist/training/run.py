"""The training run: what is read and checked before it, where it goes on from, and what it leaves behind."""

import dataclasses
import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_dist.adapters.adapter import save_adapter, try_saving
from dora_dist.config import RunConfig
from dora_dist.data.run_data import RunData, check_lengths, load_tokenizer
from dora_dist.errors import RunFailed, Stopped, UserError
from dora_dist.models.build import Blueprint, describe_loading, make_blueprint, sizes_of
from dora_dist.models.huggingface import resolve_model
from dora_dist.models.weights import packed_layers
from dora_dist.parallel.phases import Phase
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import Strategy, choose_strategy, device_memory
from dora_dist.parallel.watchdog import Watchdog
from dora_dist.schema import difference_between_ranks
from dora_dist.training.checkpoint import Checkpoints
from dora_dist.training.health import StopSignals
from dora_dist.training.loop import Loop, evaluates_at
from dora_dist.training.optim import TrainableModel, build_to_train, optimizer_class
from dora_dist.training.preference import check_preference
from dora_dist.training.resume import Checkpoint, compare, describe_run
from dora_dist.training.run_log import Resumed, RunLog
from dora_dist.training.trainer import Progress, Trainer

CheckFits = Callable[[RunConfig, Path, nn.Module, Processes, float], list[str]]


def run_training(config: RunConfig, check_fits: CheckFits | None = None) -> None:
    """The `train` verb. Everything that can be wrong with the settings, the data and the checkpoint is found
    before any weight is read. `check_fits` refuses what a device of so many bytes cannot hold, and gives warnings.

    Raises:
        UserError: a mistake of the user's, on every rank alike.
        Stopped: a signal ended the run, with a checkpoint.
        RunFailed: it cannot go on: no finite gradient, or no room for a checkpoint or the adapter.
    """
    processes, stopped = Processes(), None
    try:
        with Watchdog(processes, config.parallel.timeout_s) as watch:
            _run(config, processes, watch, check_fits)
    except Stopped as told:
        stopped = Stopped(*told.args)  # without the frames, which hold the model
    processes.stop()  # once the model is gone: DDP's last breath would wait for a group that waits for it
    if stopped is not None:
        raise stopped


def _run(config: RunConfig, processes: Processes, watch: Watchdog, check_fits: CheckFits | None) -> None:
    watch.at(0, Phase.LOADING, watched=False)
    blueprint, strategy, data, warnings = _check(config, processes, check_fits)
    about, output_dir = _describe(blueprint, strategy, data), Path(config.output_dir)
    checkpoints = Checkpoints(output_dir / "checkpoints", config.checkpoint, processes, about)
    with _alone_in(output_dir, processes), StopSignals() as signals:
        found, notices = checkpoints.find()
        if found is not None:
            notices += compare(found, about, config.checkpoint.force, data.steps)
        _prepare_output(output_dir, processes, {"config.yaml": config.to_yaml(), **strategy.files})
        # Dropout differs between ranks, and from what it was before a checkpoint of another number of ranks.
        torch.manual_seed(config.train.seed + processes.rank + (found.step << 32 if found else 0))
        resumed = _log_position(found, checkpoints, config.train.eval_every, data.steps)
        with RunLog(config.log, output_dir, data.steps, about["config"], processes.is_main, resumed) as log:
            log.say(*warnings, *notices, f"data: {data.report}", *describe_loading(blueprint))
            built = build_to_train(blueprint, strategy)
            adapter = (built, output_dir / "adapter", config.model.path)
            log.say(*describe(built, strategy), *blueprint.coverage)
            if problem := _problem_of(try_saving, *adapter):
                raise UserError(f"output_dir: the adapter could not be written at the end: {problem}")
            progress = Progress()
            if found is not None:
                checkpoints.restore(found, built)
                told = {name: found.counters[name] for name in ("tokens", "before", "samples")}
                progress = Progress(found.step, **told)
            log.say(*checkpoints.begin(found))
            packing = config.data.packing
            trainer = Trainer(built, config.model, config.train, packing, data.steps, watch, progress)
            signals.heed(signal.SIGINT)  # until now it had nothing to save
            loop = Loop(trainer, data, config.log, log, checkpoints, signals)
            loop.run()
            watch.at(data.steps, Phase.ADAPTER, watched=False)
            if problem := _problem_of(save_adapter, *adapter):
                raise RunFailed(f"output_dir: the adapter cannot be written: {problem}; {loop.keep()}")
            log.say(f"adapter: {adapter[1]}")


def _check(
    config: RunConfig, processes: Processes, check_fits: CheckFits | None
) -> tuple[Blueprint, Strategy, RunData, list[str]]:
    """Start the processes, and find what is wrong with the settings, the model's files and the data."""
    processes.start(config.parallel.timeout_s, needed=processes.world_size > 1)
    settings = dataclasses.asdict(config)
    del settings["output_dir"]  # each node may have its own
    _refuse_different(settings, processes)
    directory = resolve_model(config.model.path, config.model.allow_pickle)
    blueprint = make_blueprint(config, directory, processes.world_size)
    tokenizer = load_tokenizer(directory)
    processes.wait_for_all()  # one that had to download the model is late
    # Of the smallest device: what follows from it is the same on all ranks.
    memory = -processes.agree([-int(device_memory(processes))])()[0]
    strategy = choose_strategy(config.parallel, config.train, sizes_of(blueprint.model), processes, memory)
    optimizer_class(config.train)  # raises UserError where its package is missing
    check_preference(config, processes.world_size)
    warnings = check_fits(config, directory, blueprint.model, processes, memory) if check_fits is not None else []
    prompts = config.log.sample_prompts if config.model.causal else []
    check_lengths(blueprint.model, tokenizer, config.data.seq_len, prompts, config.log.sample_tokens)
    data = RunData(config.data, config.train, config.model.task, blueprint.model, tokenizer, processes)
    processes.start(config.parallel.timeout_s, needed=strategy.needs_group)
    processes.wait_for_all()  # reading rows takes some longer than others
    return blueprint, strategy, data, warnings


def _refuse_different(tree: Mapping[str, Any], processes: Processes, what: str = "") -> None:
    """UserError, on every rank: the ranks do not have the same values."""
    everyones = processes.all_gather_bytes(json.dumps(tree).encode())
    problem = difference_between_ranks([json.loads(text) for text in everyones])
    if problem is not None:
        raise UserError(what + problem)


def _describe(blueprint: Blueprint, strategy: Strategy, data: RunData) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run. UserError, on every rank: the ranks read different rows."""
    processes, settings = strategy.processes, dataclasses.asdict(blueprint.config)
    fingerprints = {"base": blueprint.base.fingerprint, **data.fingerprints()}
    _refuse_different({"fingerprint": fingerprints}, processes, "the ranks do not read the same files: ")
    world_size, device = processes.world_size, processes.device.type
    return processes.from_main(describe_run(settings, world_size, device, strategy.name, fingerprints))


def _problem_of(save: Callable, built: TrainableModel, directory: Path, base_model: str) -> str | None:
    """Why the adapter cannot be saved, as every rank knows it; rank 0 writes it. None: it was."""
    problem = None
    try:
        save(built.model, directory, base_model, built.shards)
    except OSError as error:
        problem = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    except Exception as error:  # whatever it is, what was trained shall not be lost for it
        if not built.processes.is_main:
            raise
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return built.processes.from_main(problem)


@contextmanager
def _alone_in(output_dir: Path, processes: Processes) -> Iterator[None]:
    """Hold a run's directory, where the file system has locks. UserError: another run does."""

    def hold() -> int:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            handle = os.open(output_dir, os.O_RDONLY)
        except OSError as error:
            raise _not_writable(output_dir, error) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"output_dir: another run is training in {str(output_dir)!r}; choose another directory"
            ) from None
        except OSError:  # there are no locks
            pass
        return handle

    handle = processes.on_main(hold)
    try:
        yield
    finally:
        if processes.is_main:
            os.close(handle)


def _log_position(
    found: Checkpoint | None, checkpoints: Checkpoints, eval_every: int | None, steps: int
) -> Resumed | None:
    """Where metrics.jsonl goes on: a run that goes on from another's checkpoint has a log of its own."""
    if found is None or not checkpoints.is_own(found):
        return None
    again = evaluates_at(found.step, eval_every, steps) or found.step >= steps
    return Resumed(found.step, found.counters["log"], again)


def describe(built: TrainableModel, strategy: Strategy) -> list[str]:
    """Lines for the person who watches."""
    sizes = {p: built.shards.shape(p).numel() for p in built.model.parameters()}
    packed = 0
    for layer in packed_layers(built.model).values():
        assert layer.layout is not None
        sizes |= dict.fromkeys(layer.weight_parts, 0)
        sizes[layer.weight] = layer.layout.rows * layer.layout.columns
        packed += sizes[layer.weight]
    trained = sum(size for p, size in sizes.items() if p.requires_grad)
    total = sum(sizes.values())
    world, device = strategy.processes.world_size, strategy.processes.device.type
    in_4_bits = f", {packed / 1e6:,.1f} M in 4 bits" if packed else ""
    sizes_told = f"{total / 1e6:,.1f} M parameters{in_4_bits}, {trained / 1e6:,.2f} M trained"
    where = f"strategy {strategy.name}, {world} process{'es' if world > 1 else ''} on {device}"
    return [f"model: {sizes_told}; {where}"]


def _prepare_output(output_dir: Path, processes: Processes, files: Mapping[str, str]) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if processes.is_main:
            (output_dir / "deepspeed.json").unlink(missing_ok=True)  # of an earlier run
            for name, text in files.items():
                (output_dir / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _not_writable(output_dir, error) from None


def _not_writable(output_dir: Path, error: OSError) -> UserError:
    return UserError(f"output_dir: {str(output_dir)!r} cannot be written: {error.strerror}")
