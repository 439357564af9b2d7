"""What training does with a model: optimizer steps, evaluation, samples. It never asks which strategy it has.

The loss is the sum over supervised tokens divided by the number of such tokens in the *global* batch, which every
rank knows from the data alone; so the same global batch gives the same loss and gradients however it is formed.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dora_dist.config import ModelConfig, TrainConfig
from dora_dist.data.batches import EvaluationBatches, GlobalBatch
from dora_dist.data.packing import additive_mask, packed_attention
from dora_dist.data.run_data import RunData, encode_prompt
from dora_dist.device import Stopwatch, to_device
from dora_dist.dora.norm_cache import dora_layers, refresh_norms
from dora_dist.models.attention import CausalAttention
from dora_dist.models.head_loss import summed_loss
from dora_dist.models.participation import refuse_idle
from dora_dist.parallel.phases import Phase
from dora_dist.parallel.watchdog import Watchdog
from dora_dist.training.optim import TrainableModel, lr_factor

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
        self.causal = model.task == "causal_lm"
        self.eager_dtype = getattr(torch, model.dtype) if model.attention == "eager" else None
        # Compiled blocks would be compiled anew for each pack's lengths.
        without_mask = self.causal and not (train.compile and packing) and CausalAttention.fits(built.model)
        self.attention = CausalAttention(built.model) if without_mask else None
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
        for index, micro in enumerate(batch.micro_batches):
            # Both around the backward, too: it may run the forward again.
            with engine.micro_batch(last=index == last), self._attention_over(micro):
                self.at(Phase.FORWARD, index + 1, watched)
                part = self._loss_sum(engine.module, micro)[0] / batch.targets
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

    def refuse_idle(self, micro: dict[str, Tensor]) -> None:
        """See participation.py. In training mode, which holds no more than a training forward does."""
        self.at(Phase.FORWARD, 1, watched=False)
        self._train_mode()
        model = self.built.model
        with self._attention_over(micro):
            refuse_idle(model, lambda: self._loss_sum(model, micro)[0], self.processes)

    def _train_mode(self) -> None:
        if not self.built.engine.module.training:  # to set it walks over all modules
            self.built.engine.module.train()

    @torch.no_grad()
    def evaluate(self, batches: EvaluationBatches, before_each: Callable[[], None] = lambda: None) -> Evaluation:
        """Mean loss per supervised token (per row and with accuracy, for a classifier). `before_each`: is called
        before each batch, and may end the run."""
        self.built.engine.module.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index, micro in enumerate(batches):
            before_each()
            self.at(Phase.EVALUATION, index + 1, watched=not self.config.compile)
            with self._attention_over(micro):
                totals += torch.stack(self._loss_sum(self.built.model, micro)).double()
        loss, correct = (self.processes.sum_(totals) / batches.targets).tolist()
        found = {"eval_loss": loss} if self.causal else {"eval_loss": loss, "eval_accuracy": correct}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    @torch.no_grad()
    def sample(self, data: RunData, prompts: Sequence[str], tokens: int) -> list[str]:
        """Greedy completions of `prompts`; all ranks compute them in step."""
        self.built.engine.module.eval()
        texts = []
        for prompt in prompts if self.causal else ():
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
            mask = packed_attention(to_device(lengths, self.device), targets.shape[1])
            inputs["attention_mask"] = mask if self.eager_dtype is None else additive_mask(mask, self.eager_dtype)
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
