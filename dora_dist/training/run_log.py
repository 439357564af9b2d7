"""What a run shows and keeps: metrics.jsonl, TensorBoard, wandb, a progress bar. Only rank 0 does any of it."""

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dora_dist.config import LogConfig
from dora_dist.errors import UserError
from dora_dist.io.durable import replaced


class Resumed(NamedTuple):
    step: int  # the last that stands
    state: dict[str, Any]  # what `RunLog.state()` was then
    evaluates: bool  # whether the evaluation after that step is made again


class RunLog(AbstractContextManager):
    """Metrics and messages of one run; on ranks other than 0 every method does nothing.

    On a terminal a bar with loss, tokens/s and the remaining time moves; elsewhere (a log file) one line is
    printed for every logged step.
    """

    def __init__(
        self,
        config: LogConfig,
        output_dir: Path,
        total_steps: int,
        settings: dict,
        is_main: bool,
        resumed: "Resumed | None" = None,
    ):
        """`resumed`: None begins anew."""
        self._is_main = is_main
        self._console = Console(highlight=False, quiet=not is_main, soft_wrap=True)
        self._writers: list[Any] = []
        if not is_main:
            return
        self._total, self._path, self._resumed = total_steps, output_dir / "metrics.jsonl", resumed
        step, state = (resumed.step, resumed.state) if resumed is not None else (0, {})
        if config.tensorboard:
            self._writers.append(_TensorBoard(output_dir, step))
        if config.wandb:
            self._writers.append(_Wandb(output_dir, settings, state.get("wandb")))
        columns = ("[bold]{task.description}", "{task.fields[status]}")
        self._bar = Progress(
            TextColumn(columns[0]), BarColumn(), MofNCompleteColumn(), TextColumn(columns[1]),
            TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=total_steps, completed=step, status="")
        self._bar.start()

    @cached_property
    def _metrics(self) -> IO[str]:
        """Opened for the first line: a run that cannot load its model leaves what an earlier one wrote."""
        try:
            if self._resumed is not None and self._path.is_file():
                _cut_back(self._path, self._resumed)
            return self._path.open("a" if self._resumed is not None else "w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"output_dir: {str(error.filename)!r} cannot be written: {error.strerror}") from None

    def say(self, *lines: str) -> None:
        for line in lines:
            self._console.print(line, markup=False)

    def training(self, step: int, metrics: dict[str, Any]) -> None:
        """The metrics of optimizer step `step` (from 1), one line of metrics.jsonl."""
        if not self._is_main:
            return
        self._write(step, metrics)
        told = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
        shown = [f"{word} {show(metrics[name])}" for name, word in told.items() if name in metrics]
        status = "  ".join([*shown, f"{metrics['tokens_per_second']:,.0f} tok/s"])
        self._bar.update(self._task, completed=step, status=status)
        if not self._console.is_terminal:
            remaining = (self._total - step) * metrics["step_seconds"]
            self.say(f"step {step}/{self._total}  {status}  lr {metrics['lr']:.2e}  ETA {remaining:.0f} s")

    def evaluation(self, step: int, metrics: Mapping[str, float | None]) -> None:
        if self._is_main:
            self._write(step, metrics)
            self.say(f"step {step}: " + "  ".join(f"{name} {show(value)}" for name, value in metrics.items()))

    def flush(self) -> None:
        """Make what was written last, before a checkpoint that a run may go on from. On rank 0 alone."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same curves."""
        return {"wandb": next((writer.id for writer in self._writers if isinstance(writer, _Wandb)), None)}

    def _write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        try:
            self._metrics.flush()
        except OSError as error:  # the next flush tries again
            self.say(f"warning: step {step}: metrics.jsonl cannot be written: {error.strerror}")
        numbers = {name: value for name, value in metrics.items() if value is not None}
        for writer in self._writers:
            writer.write(step, numbers)

    def __exit__(self, *exception: object) -> None:
        if self._is_main:
            self._bar.stop()
            if "_metrics" in self.__dict__:
                with suppress(OSError):  # a full disk, which was told
                    self._metrics.close()
            for writer in self._writers:
                writer.close()


def show(value: float | None) -> str:
    """A loss or the like; None stands for one that is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def _cut_back(path: Path, resumed: Resumed) -> None:
    """Keep of metrics.jsonl what the run does not write again. A last line that a killed run left unfinished goes,
    too."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            metrics = json.loads(line)
            again = "eval_loss" in metrics and metrics["step"] == resumed.step and resumed.evaluates
            if metrics["step"] <= resumed.step and not again:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with replaced(path) as file:
        file.write("".join(kept).encode())


class _TensorBoard:
    def __init__(self, output_dir: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "log.tensorboard: the package tensorboard is not installed (pip install tensorboard)"
            ) from None
        self._writer = SummaryWriter(output_dir / "tensorboard", purge_step=step + 1 if step else None)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(("eval/" if name.startswith("eval") else "train/") + name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, output_dir: Path, settings: dict, run_id: str | None):
        try:
            import wandb
        except ImportError:
            raise UserError("log.wandb: the package wandb is not installed (pip install wandb)") from None
        self._run = wandb.init(
            dir=output_dir, name=output_dir.name, config=settings, id=run_id, resume="allow" if run_id else None
        )
        self.id: str = self._run.id

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()
