"""The training run: what is read and checked before it, where it goes on from, and what it leaves behind."""

import dataclasses
import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_dist.adapters.adapter import save_adapter, try_saving
from dora_dist.config import RunConfig
from dora_dist.data.run_data import RunData, load_tokenizer
from dora_dist.dora.inject import injection_of
from dora_dist.errors import RunFailed, Stopped, UserError
from dora_dist.models.build import Blueprint, make_blueprint, sizes_of
from dora_dist.models.huggingface import resolve_model
from dora_dist.models.participation import summary
from dora_dist.models.weights import packed_layers
from dora_dist.parallel.phases import Phase
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import Strategy, choose_strategy, device_memory
from dora_dist.parallel.watchdog import Watchdog
from dora_dist.schema import difference_between_ranks
from dora_dist.training.checkpoint import Checkpoint, Checkpoints
from dora_dist.training.health import StopSignals
from dora_dist.training.optim import TrainableModel, build_to_train, optimizer_class
from dora_dist.training.resume_rules import contradictions, describe_run, free_changes
from dora_dist.training.run_log import Resumed, RunLog
from dora_dist.training.trainer import Progress, Trainer, evaluates_at

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
    processes.start(config.parallel.timeout_s, needed=processes.world_size > 1)
    _refuse_different_settings(config, processes)
    directory = resolve_model(config.model.path, config.model.allow_pickle)
    blueprint = make_blueprint(config, directory, processes.world_size)
    tokenizer = load_tokenizer(directory)
    processes.wait_for_all()  # one that had to download the model is late
    # Of the smallest device: what follows from it is the same on all ranks.
    memory = -processes.agree([-int(device_memory(processes))]).read()[0]
    strategy = choose_strategy(config.parallel, config.train, sizes_of(blueprint.model), processes, memory)
    optimizer_class(config.train)  # raises UserError where its package is missing
    unplanned = check_fits(config, directory, blueprint.model, processes, memory) if check_fits is not None else []
    data = RunData(config, blueprint.model, tokenizer, processes)
    processes.start(config.parallel.timeout_s, needed=strategy.needs_group)
    processes.wait_for_all()  # reading rows takes some longer than others
    output_dir = Path(config.output_dir)
    run = _describe(blueprint, data, strategy)
    checkpoints = Checkpoints(output_dir / "checkpoints", config.checkpoint, processes, run)
    with _alone_in(output_dir, processes), StopSignals() as signals:
        found, notices = checkpoints.find()
        if found is not None:
            notices += _compare(found, run, config, data.steps)
        _prepare_output(config, processes, {"config.yaml": config.to_yaml(), **strategy.files})
        # Dropout differs between ranks, and from what it was before a checkpoint of another number of ranks.
        torch.manual_seed(config.train.seed + processes.rank + (found.step << 32 if found else 0))
        resumed = _log_position(found, checkpoints, config, data.steps)
        settings = dataclasses.asdict(config)
        with RunLog(config.log, output_dir, data.steps, settings, processes.is_main, resumed) as log:
            for line in (*unplanned, *notices, data.describe()):
                log.say(line)
            built = build_to_train(blueprint, strategy)
            adapter = (built.model, output_dir / "adapter", config.model.path, built.shards)
            log.say(describe(built, strategy))
            for line in _left_out(built.model):
                log.say(line)
            problem = _attempt(partial(try_saving, *adapter), processes)
            if problem is not None:
                raise UserError(f"output_dir: the adapter could not be written at the end: {problem}")
            progress = Progress()
            if found is not None:
                checkpoints.restore(found, built)
                progress = Progress.of(found)
            for line in checkpoints.begin(found):
                log.say(line)
            trainer = Trainer(config, built, strategy, data, log, watch, checkpoints, progress, signals)
            signals.heed(signal.SIGINT)  # until now it had nothing to save
            trainer.run()
            watch.at(data.steps, Phase.ADAPTER, watched=False)
            problem = _attempt(partial(save_adapter, *adapter), processes)
            if problem is not None:
                raise RunFailed(_lost_adapter(problem, trainer.keep()))
            log.say(f"adapter: {output_dir / 'adapter'}")


def _attempt(save: Callable[[], None], processes: Processes) -> str | None:
    """Have rank 0 write files. Returns what kept it from doing so, the same on every rank."""
    problem = None
    try:
        save()
    except OSError as error:
        problem = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    except Exception as error:  # whatever it is, what was trained shall not be lost for it
        if not processes.is_main:
            raise
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return processes.from_main(problem)


def _lost_adapter(problem: str, checkpoint: Path | None) -> str:
    line = f"output_dir: the adapter cannot be written: {problem}"
    if checkpoint is None:
        return f"{line}; nor can a checkpoint"
    return f"{line}; the newest checkpoint is {checkpoint}, from which the same command goes on"


@contextmanager
def _alone_in(output_dir: Path, processes: Processes) -> Iterator[None]:
    """Hold a run's directory, where the file system has locks. UserError: another run does."""
    handle, problem = None, None
    if processes.is_main:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            handle = os.open(output_dir, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"output_dir: another run is training in {str(output_dir)!r}; choose another directory"
        except OSError as error:
            if handle is None:
                problem = f"output_dir: {str(output_dir)!r} cannot be written: {error.strerror}"
    problem = processes.from_main(problem)
    try:
        if problem is not None:
            raise UserError(problem)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _log_position(
    found: Checkpoint | None, checkpoints: Checkpoints, config: RunConfig, steps: int
) -> Resumed | None:
    """Where metrics.jsonl goes on: a run that goes on from another's checkpoint has a log of its own."""
    if found is None or found.path.parent.resolve() != checkpoints.directory.resolve():
        return None
    again = evaluates_at(found.step, config, steps) or found.step >= steps
    return Resumed(found.step, found.counters["log"], again)


def _refuse_different_settings(config: RunConfig, processes: Processes) -> None:
    """UserError, on every rank: the ranks were not given the same settings."""
    tree = dataclasses.asdict(config)
    del tree["output_dir"]  # each node may have its own
    settings = processes.all_gather_bytes(json.dumps(tree).encode())
    problem = difference_between_ranks([json.loads(text) for text in settings])
    if problem is not None:
        raise UserError(problem)


def _describe(blueprint: Blueprint, data: RunData, strategy: Strategy) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run. UserError, on every rank: the ranks read different rows."""
    processes = strategy.processes
    fingerprints = {"base": blueprint.base.fingerprint, **data.fingerprints()}
    everyones = processes.all_gather_bytes(json.dumps({"fingerprint": fingerprints}).encode())
    problem = difference_between_ranks([json.loads(text) for text in everyones])
    if problem is not None:
        raise UserError(f"the ranks do not read the same files: {problem}")
    run = describe_run(blueprint.config, processes.world_size, processes.device.type, strategy.name, fingerprints)
    return processes.from_main(run)


def _compare(found: Checkpoint, run: dict[str, Any], config: RunConfig, steps: int) -> list[str]:
    """Lines that say where the run goes on and what has changed. UserError: it cannot go on from there."""
    then = found.manifest["run"]
    problems = contradictions(then, run)
    if problems and not config.checkpoint.force:
        raise UserError(
            f"checkpoint.resume: {str(found.path)!r} belongs to another run: {'; '.join(problems)}. Set "
            "checkpoint.force=true to go on from it all the same, or checkpoint.resume=none to begin anew"
        )
    lines = [f"resumed from {found.path}, after step {found.step} of {steps}"]
    if found.step >= steps:
        lines.append("no step is left to train; to begin anew, set checkpoint.resume=none")
    changes = [*problems, *free_changes(then, run)]
    return lines + ([f"changed since then: {'; '.join(changes)}"] if changes else [])


def describe(built: TrainableModel, strategy: Strategy) -> str:
    sizes = {p: built.shards.shape(p).numel() for p in built.model.parameters()}
    packed = 0
    for layer in packed_layers(built.model).values():
        assert layer.layout is not None
        sizes |= dict.fromkeys(layer.weight_parts, 0)
        sizes[layer.weight] = layer.layout.rows * layer.layout.columns
        packed += sizes[layer.weight]
    trained = sum(size for p, size in sizes.items() if p.requires_grad)
    total = sum(sizes.values())
    world = strategy.processes.world_size
    in_4_bits = f", {packed / 1e6:,.1f} M in 4 bits" if packed else ""
    return (
        f"model: {total / 1e6:,.1f} M parameters{in_4_bits}, {trained / 1e6:,.2f} M trained; "
        f"strategy {strategy.name}, "
        f"{world} process{'es' if world > 1 else ''} on {strategy.processes.device.type}"
    )


def _left_out(model: nn.Module) -> list[str]:
    names = injection_of(model).left_out
    return [f"left out, as they take no part in the loss of text: {summary(names)}"] if names else []


def _prepare_output(config: RunConfig, processes: Processes, files: Mapping[str, str]) -> Path:
    output_dir = Path(config.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if processes.is_main:
            (output_dir / "deepspeed.json").unlink(missing_ok=True)  # of an earlier run
            for name, text in files.items():
                (output_dir / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"output_dir: {config.output_dir!r} cannot be written: {error.strerror}") from None
    return output_dir
