"""What training does with a model: optimizer steps, evaluation, samples. It never asks which strategy it has.

The loss is a sum divided by the number of targets in the *global* batch (supervised tokens, rows or pairs), which
every rank knows from the data alone; so the same global batch gives the same loss and gradients however it is
formed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dora_dist.config import ModelConfig, TrainConfig
from dora_dist.data.batches import EvaluationBatches, GlobalBatch, MicroBatch
from dora_dist.data.run_data import RunData, encode_prompt
from dora_dist.device import Stopwatch
from dora_dist.dora.norm_cache import dora_layers, refresh_norms
from dora_dist.models.participation import refuse_idle
from dora_dist.parallel.phases import Phase
from dora_dist.parallel.watchdog import Watchdog
from dora_dist.training.objectives import CausalForward, LabelLoss, Objective, RewardLoss, TokenLoss
from dora_dist.training.optim import TrainableModel, lr_factor
from dora_dist.training.preference import KtoLoss, PreferenceLoss

Evaluation = dict[str, float | None]  # by name; None: not finite


@dataclass
class Progress:
    """How far a run is; with the tensors, all that a checkpoint needs to go on."""

    step: int = 0
    tokens: int = 0
    before: Evaluation = field(default_factory=dict)  # before the first step
    samples: list[str] = field(default_factory=list)  # completions, before the first step


class Trainer:
    def __init__(
        self,
        built: TrainableModel,
        model: ModelConfig,
        train: TrainConfig,
        packing: bool,
        steps: int,
        watch: Watchdog | None = None,
        progress: Progress | None = None,
    ):
        """`steps`: of the whole run; `watch`: is told what comes next; `progress`: of a resumed run."""
        self.built, self.processes, self.config, self.steps = built, built.processes, train, steps
        self.watch = watch or Watchdog(self.processes, math.inf)  # never entered, it watches nothing
        self.progress = progress or Progress()
        self.device = self.processes.device
        self.base_rates = [group["lr"] for group in built.optimizer.param_groups]
        self.lr_factor = lr_factor(train, steps)
        self.norm_clock = Stopwatch(self.device)
        self.generates = model.causal
        self.objective = _objective(built, model, train, packing)
        self.sums = torch.zeros(0, device=self.device)  # this rank's, of the objective in the last step
        self.first_step = self.current = self.progress.step  # `current`: the step that is made, or was made last
        self._layers = list(dora_layers(built.model).values())
        built.engine.module.train()

    def train_step(self, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns this rank's part of the loss, and the global gradient norm. Where a rank's
        loss or gradient is not finite, no rank changes anything."""
        engine = self.built.engine
        self._train_mode()
        factor = self.lr_factor(self.progress.step)
        for group, rate in zip(self.built.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        watched = not (self.config.compile and self.progress.step == self.first_step)  # compiling takes its time
        last = len(batch.micro_batches) - 1
        loss = torch.zeros((), device=self.device)
        self.objective.prepare(self._announced(batch.micro_batches, Phase.FORWARD, watched))
        for index, micro in enumerate(batch.micro_batches):
            # Both around the backward, too: it may run the forward again.
            with engine.micro_batch(last=index == last), self.objective.around(micro):
                self.at(Phase.FORWARD, index + 1, watched)
                summed, sums = self.objective(engine.module, micro)
                self.sums = sums if index == 0 else self.sums + sums
                part = summed / batch.targets
                loss += part.detach()
                part = part * (part.detach() * 0 + 1)  # of an infinite loss every gradient shall be NaN
                self.at(Phase.BACKWARD, index + 1, watched)
                # Engines average gradients over the ranks; the loss is a sum over them.
                engine.backward(part * self.processes.world_size)
        self.at(Phase.STEP)
        grad_norm = engine.step()
        self.at(Phase.NORMS)
        with self.norm_clock:
            refresh_norms(self.built.model, self.built.shards, self._layers)
        self.progress.step += 1
        return loss, grad_norm

    def at(self, phase: Phase, number: int = 0, watched: bool = True) -> None:
        self.watch.at(self.current, phase, number, watched)

    def _announced(self, micros: Iterable[MicroBatch], phase: Phase, watched: bool) -> Iterator[MicroBatch]:
        for index, micro in enumerate(micros):
            self.at(phase, index + 1, watched)
            yield micro

    def refuse_idle(self, micro: dict[str, Tensor]) -> None:
        """See participation.py. In training mode, which holds no more than a training forward does."""
        self.at(Phase.FORWARD, 1, watched=False)
        self._train_mode()
        model = self.built.model
        with self.objective.around(micro):
            refuse_idle(model, lambda: self.objective(model, micro)[0], self.processes)

    def _train_mode(self) -> None:
        if not self.built.engine.module.training:  # to set it walks over all modules
            self.built.engine.module.train()

    @torch.no_grad()
    def evaluate(self, batches: EvaluationBatches, before_each: Callable[[], None] = lambda: None) -> Evaluation:
        """Mean loss per target, and the objective's metrics. `before_each`: is called before each batch, and may
        end the run."""
        self.built.engine.module.eval()
        self.objective.prepare(self._announced(batches, Phase.EVALUATION, not self.config.compile))
        totals = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, micro in enumerate(batches):
            before_each()
            self.at(Phase.EVALUATION, index + 1, watched=not self.config.compile)
            with self.objective.around(micro):
                loss, sums = self.objective(self.built.model, micro)
            totals = totals + torch.cat([loss.reshape(1), sums]).double()
        total, *parts = self.processes.sum_(totals).tolist()
        found = {"loss": total / batches.targets, **self.objective.metrics(parts, batches.targets)}
        return {f"eval_{name}": finite(value) for name, value in found.items()}

    def step_metrics(self, targets: int) -> Evaluation:
        """The objective's, of the last step's global batch, whose `targets` these are. All ranks call this."""
        if not self.objective.while_training:
            return {}
        sums = self.processes.sum_(self.sums.clone()).tolist()
        return {name: finite(value) for name, value in self.objective.metrics(sums, targets).items()}

    @torch.no_grad()
    def sample(self, data: RunData, prompts: Sequence[str], tokens: int) -> list[str]:
        """Greedy completions of `prompts`; all ranks compute them in step."""
        self.built.engine.module.eval()
        texts = []
        for prompt in prompts if self.generates else ():
            self.at(Phase.SAMPLING, watched=False)
            encoded = encode_prompt(data.tokenizer, prompt).to(self.device)
            with torch.compiler.set_stance("force_eager"):  # graphs for a cache would use up dynamo's limit
                output = self.built.model.generate(  # type: ignore[operator]
                    **encoded,
                    max_new_tokens=tokens,
                    do_sample=False,
                    use_cache=True,
                    synced_gpus=self.processes.world_size > 1,
                    pad_token_id=data.pad_id,
                    eos_token_id=data.tokenizer.eos_token_id,
                )
            completion = output[0, encoded["input_ids"].shape[1] :]
            texts.append(data.tokenizer.decode(completion, skip_special_tokens=True))
        return texts


def _objective(built: TrainableModel, model: ModelConfig, train: TrainConfig, packing: bool) -> Objective:
    device, processes = built.processes.device, built.processes
    if not model.causal:
        return (RewardLoss if model.task == "reward_model" else LabelLoss)(device)
    # Compiled blocks would be compiled anew for each pack's lengths.
    forward = CausalForward(built, model, device, without_mask=not (train.compile and packing))
    if model.task == "causal_lm":
        return TokenLoss(forward)
    kind = KtoLoss if train.objective == "kto" else PreferenceLoss
    return kind(forward, built.model, train, processes.sum_)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
