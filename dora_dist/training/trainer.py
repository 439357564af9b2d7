"""The loop over optimizer steps: forward, backward, step, norms, evaluation. It never asks which strategy it has.

The loss is the sum over supervised tokens divided by the number of such tokens in the *global* batch, which every
rank knows from the data alone; so the same global batch gives the same loss and gradients however it is formed.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dora_dist.config import RunConfig
from dora_dist.data.batches import GlobalBatch
from dora_dist.data.packing import additive_mask, packed_attention
from dora_dist.data.run_data import RunData
from dora_dist.device import Stopwatch, peak_memory, to_device
from dora_dist.dora.norm_cache import dora_layers, refresh_norms
from dora_dist.errors import RunFailed, Stopped
from dora_dist.models.attention import CausalAttention
from dora_dist.models.head_loss import summed_loss
from dora_dist.models.participation import refuse_idle
from dora_dist.parallel.phases import Phase
from dora_dist.parallel.process import Agreement
from dora_dist.parallel.strategy import Strategy
from dora_dist.parallel.watchdog import Watchdog
from dora_dist.training.checkpoint import Checkpoint, Checkpoints
from dora_dist.training.health import SpeedCheck, StepCheck, StopSignals
from dora_dist.training.optim import TrainableModel, lr_factor
from dora_dist.training.run_log import RunLog, show

_SPEED_STEPS = 50  # between two comparisons of the ranks' speeds
Evaluation = dict[str, float | None]  # by name; None: not finite


@dataclass
class Progress:
    """How far a run is; with the tensors, all that a checkpoint needs to go on."""

    step: int = 0
    tokens: int = 0
    before: Evaluation = field(default_factory=dict)  # before the first step
    samples: list[str] = field(default_factory=list)  # completions, before the first step

    @staticmethod
    def of(found: Checkpoint) -> "Progress":
        counters = {name: found.counters[name] for name in ("tokens", "before", "samples")}
        return Progress(found.step, **counters)


def evaluates_at(step: int, config: RunConfig, steps: int) -> bool:
    """Whether an evaluation is due between a step and the next."""
    every = config.train.eval_every
    return every is not None and step % every == 0 and step < steps


class Trainer:
    """The loop over optimizer steps."""

    def __init__(
        self,
        config: RunConfig,
        built: TrainableModel,
        strategy: Strategy,
        data: RunData,
        log: RunLog,
        watch: Watchdog | None = None,
        checkpoints: Checkpoints | None = None,
        progress: Progress | None = None,
        signals: StopSignals | None = None,
    ):
        """`watch`: is told what the loop does; `checkpoints`: None writes none; `progress`: of a resumed run;
        `signals`: what ends `run` early."""
        self.config, self.built, self.strategy, self.data, self.log = config, built, strategy, data, log
        self.checkpoints, self.progress = checkpoints, progress or Progress()
        self.signals = signals or StopSignals()
        self.watch = watch or Watchdog(strategy.processes, config.parallel.timeout_s)
        self.processes = strategy.processes
        self.device = self.processes.device
        self.base_rates = [group["lr"] for group in built.optimizer.param_groups]
        self.lr_factor = lr_factor(config.train, data.steps)
        self.speed = SpeedCheck(self.processes.rank, self.processes.world_size, self.device, self.processes.sum_)
        self.norm_clock = Stopwatch(self.device)
        self.eager_dtype = getattr(torch, config.model.dtype) if config.model.attention == "eager" else None
        # Compiled blocks would be compiled anew for each pack's lengths.
        compiled_packs = config.train.compile and config.data.packing
        without_mask = data.causal and not compiled_packs and CausalAttention.fits(built.model)
        self.attention = CausalAttention(built.model) if without_mask else None
        self.first_step = self.current = self.progress.step  # `current`: the step that is made, or was made last
        self._layers, self._is_training = list(dora_layers(built.model).values()), False
        self._saved_at = self._evaluated_at = -1
        self._asked: Agreement | None = None  # on whether to end; None outside `run`

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Stopped: a signal ended it, with a checkpoint of where it was.
        """
        progress = self.progress
        self._saved_at = progress.step
        self._asked = self.processes.agree([0])
        check = StepCheck(self.processes.rank, self.config.train.max_skipped_steps, self._warn)
        if progress.step == 0:
            progress.before, progress.samples = self.evaluate(0), self.sample()
        elif evaluates_at(progress.step, self.config, self.data.steps):
            self.evaluate(progress.step)  # which comes after its step's checkpoint
        self._start_clock()
        while progress.step < self.data.steps:
            self._next_step(check)
        check.finish()
        after = self.evaluate(self.data.steps)
        for line in self.data.news(last=True):
            self.log.say(line)
        self._summary(after, self.sample())

    def _next_step(self, check: StepCheck) -> None:
        """One step, and what is due after it."""
        self.current = self.progress.step + 1
        self._at(Phase.DATA, watched=self.progress.step > self.first_step)  # a stream is read up to where it was
        batch = self.data.plan.global_batch(self.progress.step)
        for line in self.data.news():
            self.log.say(line)
        if self.progress.step == self.first_step and not self.built.all_take_part:
            self._refuse_idle(batch.micro_batches[0])
        loss, grad_norm = self.train_step(batch)
        self.progress.tokens += batch.tokens
        step = self.progress.step
        check.add(step, loss * self.processes.world_size, grad_norm)
        if step % self.config.log.every == 0 or step in (1, self.data.steps):
            self._report(loss, grad_norm)
            self._start_clock()
        if step % _SPEED_STEPS == 0 and self.processes.world_size > 1:
            self._at(Phase.SPEEDS)
            self.speed.run(step)
        every = self.config.checkpoint.every
        if every is not None and (step % every == 0 or step == self.data.steps):
            self._save()
        self._end_if_asked()
        if evaluates_at(step, self.config, self.data.steps):
            self.evaluate(step)
        if step in (self._saved_at, self._evaluated_at):
            self._start_clock()

    def train_step(self, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns this rank's part of the loss, and the global gradient norm. Where a rank's
        loss or gradient is not finite, no rank changes anything."""
        engine = self.built.engine
        self._train_mode()
        compiles = self.config.train.compile and self.progress.step == self.first_step
        factor = self.lr_factor(self.progress.step)
        for group, rate in zip(self.built.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        last = len(batch.micro_batches) - 1
        loss = torch.zeros((), device=self.device)
        for index, micro in enumerate(batch.micro_batches):
            # Both around the backward, too: it may run the forward again.
            with engine.micro_batch(last=index == last), self._attention_over(micro):
                self._at(Phase.FORWARD, index + 1, watched=not compiles)
                part = self._loss_sum(engine.module, micro)[0] / batch.targets
                loss += part.detach()
                part = part * (part.detach() * 0 + 1)  # of an infinite loss every gradient shall be NaN
                self._at(Phase.BACKWARD, index + 1, watched=not compiles)
                # Engines average gradients over the ranks; the loss is a sum over them.
                engine.backward(part * self.processes.world_size)
        self._at(Phase.STEP)
        grad_norm = engine.step()
        self._at(Phase.NORMS)
        with self.norm_clock:
            refresh_norms(self.built.model, self.built.shards, self._layers)
        self.progress.step += 1
        return loss, grad_norm

    def _refuse_idle(self, micro: dict[str, Tensor]) -> None:
        """See participation.py. In training mode, which holds no more than a training forward does."""
        self._at(Phase.FORWARD, 1, watched=False)
        self._train_mode()
        model = self.built.model
        with self._attention_over(micro):
            refuse_idle(model, lambda: self._loss_sum(model, micro)[0], self.processes)

    def _train_mode(self) -> None:
        if not self._is_training:
            self.built.engine.module.train()
            self._is_training = True

    @torch.no_grad()
    def evaluate(self, step: int) -> Evaluation:
        """Mean loss per supervised token (per row and with accuracy, for a classifier) over data.eval."""
        if self.data.evaluation is None:
            return {}
        self.built.engine.module.eval()
        self._is_training = False
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index, micro in enumerate(self.data.evaluation):
            self._end_if_asked()
            self._at(Phase.EVALUATION, index + 1, watched=not self.config.train.compile)
            with self._attention_over(micro):
                totals += torch.stack(self._loss_sum(self.built.model, micro)).double()
        loss, correct = (self.processes.sum_(totals) / self.data.evaluation.targets).tolist()
        found = {"eval_loss": loss} if self.data.causal else {"eval_loss": loss, "eval_accuracy": correct}
        metrics = {name: value if math.isfinite(value) else None for name, value in found.items()}
        self.log.evaluation(step, metrics)
        self._evaluated_at = step
        return metrics

    @torch.no_grad()
    def sample(self) -> list[str]:
        """Greedy completions of log.sample_prompts; all ranks compute them in step."""
        model, tokenizer = self.built.model, self.data.tokenizer
        model.eval()
        self._is_training = False
        texts = []
        for prompt in self.config.log.sample_prompts if self.data.causal else ():
            self._at(Phase.SAMPLING, watched=False)
            encoded = self.data.encode_prompt(prompt).to(self.device)
            with torch.compiler.set_stance("force_eager"):  # graphs for a cache would use up dynamo's limit
                output = model.generate(  # type: ignore[operator]
                    **encoded,
                    max_new_tokens=self.config.log.sample_tokens,
                    do_sample=False,
                    use_cache=True,
                    synced_gpus=self.processes.world_size > 1,
                    pad_token_id=self.data.pad_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            texts.append(tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
        return texts

    def _loss_sum(self, module: nn.Module, micro: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(summed loss, number right) of one micro-batch; the second of classifiers alone."""
        host = dict(micro)
        targets, lengths = host.pop("targets", None), host.pop("document_lengths", None)
        inputs = {name: to_device(tensor, self.device) for name, tensor in host.items()}
        if targets is None:
            labels = inputs.pop("labels")
            logits = module(**inputs).logits
            return summed_loss(logits, labels), (logits.argmax(-1) == labels).sum().float()
        if lengths is not None and self.attention is None:
            inputs["attention_mask"] = self._dense_mask(lengths, targets.shape[1])
        if self.built.head_loss is None:
            loss = summed_loss(module(**inputs).logits, to_device(targets, self.device))
        else:
            loss = self.built.head_loss.summed(module, inputs, targets)
        return loss, loss.new_zeros(())

    def _attention_over(self, micro: dict[str, Tensor]) -> AbstractContextManager:
        if self.attention is None:
            return nullcontext()
        lengths = micro.get("document_lengths")
        documents = None if lengths is None else [[n for n in row if n] for row in lengths.tolist()]
        return self.attention.over(documents)

    def _dense_mask(self, lengths: Tensor, T: int) -> Tensor:
        mask = packed_attention(to_device(lengths, self.device), T)
        return mask if self.eager_dtype is None else additive_mask(mask, self.eager_dtype)

    def _end_if_asked(self) -> None:
        """End the run, with a checkpoint, where any rank had received a signal when this was called last: every
        rank has the same answer by now, and none has waited for it.

        Raises:
            Stopped: it had.
        """
        if self._asked is None:
            return
        self._at(Phase.AGREEMENT)
        asked = self._asked.read()[0]
        self._asked = self.processes.agree([int(self.signals.received is not None)])
        if not asked:
            return
        told = f"stopped by {self.signals.received or 'a signal to another rank'} after step {self.progress.step}"
        if self.checkpoints is None or self.progress.step == 0:
            raise Stopped(told)
        if self._saved_at != self.progress.step and not self._save():
            raise Stopped(told)
        raise Stopped(f"{told}; its checkpoint is written, and the same command goes on from there")

    def keep(self) -> Path | None:
        """The run's newest checkpoint, made now unless it is of the last step; None: there is none, nor can be."""
        if self.checkpoints is None:
            return None
        if self._saved_at != self.progress.step:
            with suppress(RunFailed):
                self._save()
        return self.checkpoints.newest()

    def _save(self) -> bool:
        assert self.checkpoints is not None
        self._at(Phase.CHECKPOINT, watched=False)
        scale = self.built.engine.loss_scale
        counters = {
            **asdict(self.progress),
            "loss_scale": [scale.value, scale.good_steps],
            "log": self.log.state(),
        }
        problem = self.checkpoints.save(
            self.progress.step, self.built, counters, self.config.model.path, before=self.log.flush
        )
        if problem is not None:
            self._warn(problem)
            return False
        self._saved_at = self.progress.step
        return True

    def _at(self, phase: Phase, number: int = 0, watched: bool = True) -> None:
        """Tell the watchdog what comes next."""
        self.watch.at(self.current, phase, number, watched)

    def _warn(self, text: str) -> None:
        self.log.say(f"warning: {text}")

    def _start_clock(self) -> None:
        self._clock = (time.perf_counter(), self.progress.step, self.progress.tokens)

    def _report(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Log a step; its times are means over the steps since the clock was started."""
        self._at(Phase.LOG)
        mean_loss, norm = self.processes.sum_(loss).item(), grad_norm.item()  # waits for the device
        start, steps_before, tokens_before = self._clock
        seconds = time.perf_counter() - start
        step, tokens = self.progress.step, self.progress.tokens
        self.log.training(
            step,
            {
                "loss": mean_loss if math.isfinite(mean_loss) else None,
                "grad_norm": norm if math.isfinite(norm) else None,
                "lr": self.config.train.lr * self.lr_factor(step - 1),
                "tokens": tokens,
                "tokens_per_second": (tokens - tokens_before) / seconds,
                "step_seconds": seconds / (step - steps_before),
                "norm_seconds": self.norm_clock.seconds(),
                "peak_memory_bytes": peak_memory(self.device),
            },
        )

    def _summary(self, after: Evaluation, last: list[str]) -> None:
        before, first = self.progress.before, self.progress.samples
        for name in after:
            self.log.say(f"{name}: {show(before.get(name))} before, {show(after[name])} after")
        for prompt, old, new in zip(self.config.log.sample_prompts, first, last, strict=False):
            self.log.say(f"\n{prompt.rstrip()}\n  before: {old.strip()!r}\n  after:  {new.strip()!r}")
