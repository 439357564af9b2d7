"""The loop over a run's steps: what is due after each one, and how the run ends."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

from torch import Tensor

from dora_dist.config import LogConfig
from dora_dist.data.run_data import RunData
from dora_dist.device import peak_memory
from dora_dist.errors import RunFailed, Stopped
from dora_dist.parallel.phases import Phase
from dora_dist.training.checkpoint import Checkpoints
from dora_dist.training.health import SpeedCheck, StepCheck, StopSignals
from dora_dist.training.run_log import RunLog, show
from dora_dist.training.trainer import Evaluation, Trainer, finite

_SPEED_STEPS = 50  # between two comparisons of the ranks' speeds


def evaluates_at(step: int, every: int | None, steps: int) -> bool:
    """Whether an evaluation is due between a step and the next."""
    return every is not None and step % every == 0 and step < steps


class Loop:
    """Trains from where the trainer stands to the last step."""

    def __init__(
        self,
        trainer: Trainer,
        data: RunData,
        config: LogConfig,
        log: RunLog,
        checkpoints: Checkpoints,
        signals: StopSignals,
    ):
        """`signals`: what ends `run` early."""
        self.trainer, self.data, self.config, self.log = trainer, data, config, log
        self.checkpoints, self.signals = checkpoints, signals
        self.processes, self.progress = trainer.processes, trainer.progress
        self.check = StepCheck(self.processes.rank, trainer.config.max_skipped_steps, self._warn)
        self.speed = SpeedCheck(
            self.processes.rank, self.processes.world_size, trainer.device, self.processes.sum_
        )
        self._saved_at, self._evaluated_at = self.progress.step, -1
        self._asked: Callable[[], list[int]]  # whether any rank is to end

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Stopped: a signal ended it, with a checkpoint of where it was.
        """
        progress, steps = self.progress, self.trainer.steps
        self._asked = self.processes.agree([0])
        if progress.step == 0:
            progress.before, progress.samples = self._evaluate(), self._sample()
        elif evaluates_at(progress.step, self.trainer.config.eval_every, steps):
            self._evaluate()  # which comes after its step's checkpoint
        self._start_clock()
        while progress.step < steps:
            self._next_step()
        self.check.finish()
        after = self._evaluate()
        self.log.say(*self.data.news(last=True))
        self._summary(after, self._sample())

    def _next_step(self) -> None:
        """One step, and what is due after it."""
        trainer, progress = self.trainer, self.progress
        first = progress.step == trainer.first_step
        trainer.current = progress.step + 1
        trainer.at(Phase.DATA, watched=not first)  # a stream is read up to where it was
        batch = self.data.plan.global_batch(progress.step)
        self.log.say(*self.data.news())
        if first and not trainer.built.all_take_part:
            trainer.refuse_idle(batch.micro_batches[0])
        loss, grad_norm = trainer.train_step(batch)
        progress.tokens += batch.tokens
        step, last = progress.step, progress.step == trainer.steps
        self.check.add(step, loss * self.processes.world_size, grad_norm)
        if step % self.config.every == 0 or step == 1 or last:
            self._report(loss, grad_norm, batch.targets)
            self._start_clock()
        if step % _SPEED_STEPS == 0 and self.processes.world_size > 1:
            trainer.at(Phase.SPEEDS)
            self.speed.run(step)
        every = self.checkpoints.config.every
        if every is not None and (step % every == 0 or last):
            self._save()
        self._end_if_asked()
        if evaluates_at(step, trainer.config.eval_every, trainer.steps):
            self._evaluate()
        if step in (self._saved_at, self._evaluated_at):
            self._start_clock()

    def _evaluate(self) -> Evaluation:
        if self.data.evaluation is None:
            return {}
        found = self.trainer.evaluate(self.data.evaluation, self._end_if_asked)
        self.log.evaluation(self.progress.step, found)
        self._evaluated_at = self.progress.step
        return found

    def _sample(self) -> list[str]:
        return self.trainer.sample(self.data, self.config.sample_prompts, self.config.sample_tokens)

    def _end_if_asked(self) -> None:
        """End the run, with a checkpoint, where any rank had received a signal when this was called last: every
        rank has the same answer by now, and none has waited for it.

        Raises:
            Stopped: it had.
        """
        self.trainer.at(Phase.AGREEMENT)
        asked = self._asked()[0]
        self._asked = self.processes.agree([int(self.signals.received is not None)])
        if not asked:
            return
        step = self.progress.step
        told = f"stopped by {self.signals.received or 'a signal to another rank'} after step {step}"
        if step == 0 or (self._saved_at != step and not self._save()):
            raise Stopped(told)
        raise Stopped(f"{told}; its checkpoint is written, and the same command goes on from there")

    def keep(self) -> str:
        """Make a checkpoint unless there is one of the last step. Returns words on the newest."""
        if self._saved_at != self.progress.step:
            with suppress(RunFailed):
                self._save()
        newest = self.checkpoints.newest()
        if newest is None:
            return "nor can a checkpoint"
        return f"the newest checkpoint is {newest}, from which the same command goes on"

    def _save(self) -> bool:
        self.trainer.at(Phase.CHECKPOINT, watched=False)
        built, step = self.trainer.built, self.progress.step
        scale = built.engine.loss_scale
        counters = asdict(self.progress) | {
            "loss_scale": [scale.value, scale.good_steps],
            "log": self.log.state(),
        }
        problem = self.checkpoints.save(step, built, counters, before=self.log.flush)
        if problem is not None:
            self._warn(problem)
            return False
        self._saved_at = step
        return True

    def _warn(self, text: str) -> None:
        self.log.say(f"warning: {text}")

    def _start_clock(self) -> None:
        self._clock = (time.perf_counter(), self.progress.step, self.progress.tokens)

    def _report(self, loss: Tensor, grad_norm: Tensor, targets: int) -> None:
        """Log a step; its times are means over the steps since the clock was started."""
        self.trainer.at(Phase.LOG)
        mean_loss, norm = self.processes.sum_(loss).item(), grad_norm.item()  # waits for the device
        more = self.trainer.step_metrics(targets)
        start, steps_before, tokens_before = self._clock
        seconds = time.perf_counter() - start
        step, tokens = self.progress.step, self.progress.tokens
        self.log.training(
            step,
            {
                "loss": finite(mean_loss),
                "grad_norm": finite(norm),
                **more,
                "lr": self.trainer.config.lr * self.trainer.lr_factor(step - 1),
                "tokens": tokens,
                "tokens_per_second": (tokens - tokens_before) / seconds,
                "step_seconds": seconds / (step - steps_before),
                "norm_seconds": self.trainer.norm_clock.seconds(),
                "peak_memory_bytes": peak_memory(self.trainer.device),
            },
        )

    def _summary(self, after: Evaluation, last: list[str]) -> None:
        before, first = self.progress.before, self.progress.samples
        for name in after:
            self.log.say(f"{name}: {show(before.get(name))} before, {show(after[name])} after")
        for prompt, old, new in zip(self.config.sample_prompts, first, last, strict=False):
            self.log.say(f"\n{prompt.rstrip()}\n  before: {old.strip()!r}\n  after:  {new.strip()!r}")
