"""The training run: data, the loop, evaluation, and what it leaves behind. It never asks which strategy it has.

The loss is the sum over supervised tokens divided by the number of such tokens in the *global* batch, which every
rank knows from the data alone; so the same global batch gives the same loss and gradients however it is formed.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from dora_dist.adapter import save_adapter
from dora_dist.attention import CausalAttention, to_device
from dora_dist.backends.process import Processes
from dora_dist.build import Built, Strategy, build, choose_strategy, draw_blueprint, resolve_model
from dora_dist.config import RunConfig
from dora_dist.data import GlobalBatch, additive_mask, packed_attention
from dora_dist.errors import UserError
from dora_dist.loss import summed_loss, supervised_positions
from dora_dist.norms import refresh_norms
from dora_dist.optim import lr_factor
from dora_dist.progress import RunLog, Stopwatch, peak_memory
from dora_dist.rundata import RunData, load_tokenizer
from dora_dist.weights import packed_layers


def run_training(config: RunConfig) -> None:
    """The `train` verb. Everything that can be wrong with the settings and the data is found before any weight
    is read.

    Raises:
        UserError: a mistake of the user's, on every rank alike.
    """
    processes = Processes()
    _run(config, processes)
    processes.stop()  # once the model is gone: DDP's last breath would wait for a group that waits for it


def _run(config: RunConfig, processes: Processes) -> None:
    directory = resolve_model(config.model.path)
    blueprint = draw_blueprint(config, directory, processes.world_size)
    tokenizer = load_tokenizer(directory)
    strategy = choose_strategy(config, blueprint.model, processes)
    data = RunData(blueprint, tokenizer, processes)
    processes.start(config.parallel.timeout_s, needed=strategy.needs_group)
    output_dir = _prepare_output(config, processes, {"config.yaml": config.to_yaml(), **strategy.files})
    torch.manual_seed(config.train.seed + processes.rank)  # dropout differs between ranks
    with RunLog(config.log, output_dir, data.steps, dataclasses.asdict(config), processes.is_main) as log:
        log.say(data.describe())
        built = build(blueprint, strategy)
        log.say(describe(built, strategy))
        Trainer(config, built, strategy, data, log).run()
        save_adapter(built.model, output_dir / "adapter", config.model.path, built.shards)
        log.say(f"adapter: {output_dir / 'adapter'}")


class Trainer:
    """The loop over optimizer steps."""

    def __init__(self, config: RunConfig, built: Built, strategy: Strategy, data: RunData, log: RunLog):
        self.config, self.built, self.strategy, self.data, self.log = config, built, strategy, data, log
        self.processes = strategy.processes
        self.device = self.processes.device
        self.schedule = torch.optim.lr_scheduler.LambdaLR(built.optimizer, lr_factor(config.train, data.steps))
        self.norm_clock = Stopwatch(self.device)
        self.eager_dtype = getattr(torch, config.model.dtype) if config.model.attention == "eager" else None
        # Compiled blocks would be compiled anew for each pack's lengths.
        compiled_packs = config.train.compile and config.data.packing
        without_mask = data.causal and not compiled_packs and CausalAttention.fits(built.model)
        self.attention = CausalAttention(built.model) if without_mask else None

    def run(self) -> None:
        before = self.evaluate(0)
        samples = self.sample()
        tokens = 0
        self._start_clock(0, 0)
        for step in range(1, self.data.steps + 1):
            batch = self.data.plan.global_batch(step - 1)
            lr = self.built.optimizer.param_groups[-1]["lr"]
            loss, grad_norm = self.train_step(batch)
            tokens += batch.tokens
            if step % self.config.log.every == 0 or step in (1, self.data.steps):
                self._report(step, tokens, lr, loss, grad_norm)
                self._start_clock(step, tokens)
            if (
                self.config.train.eval_every
                and step % self.config.train.eval_every == 0
                and step < self.data.steps
            ):
                self.evaluate(step)
                self._start_clock(step, tokens)
        after = self.evaluate(self.data.steps)
        self._summary(before, after, samples, self.sample())

    def train_step(self, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns this rank's part of the loss, and the global gradient norm."""
        engine = self.built.engine
        engine.module.train()
        last = len(batch.micro_batches) - 1
        loss = torch.zeros((), device=self.device)
        for index, micro in enumerate(batch.micro_batches):
            with self._attention_over(micro):  # around the backward, too: it may run the forward again
                part = self._loss_sum(engine.module, micro)[0] / batch.targets
                # Engines average gradients over the ranks; the loss is a sum over them.
                engine.backward(part * self.processes.world_size, last=index == last)
            loss += part.detach()
        grad_norm, taken = engine.step()
        if taken:
            with self.norm_clock:
                refresh_norms(self.built.model, self.built.shards)
        self.schedule.step()
        return loss, grad_norm

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Mean loss per supervised token (per row and with accuracy, for a classifier) over data.eval."""
        if self.data.evaluation is None:
            return {}
        self.built.engine.module.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro in self.data.evaluation:
            with self._attention_over(micro):
                totals += torch.stack(self._loss_sum(self.built.model, micro)).double()
        loss, correct = (self.processes.sum_(totals) / self.data.evaluation.targets).tolist()
        metrics = {"eval_loss": loss} if self.data.causal else {"eval_loss": loss, "eval_accuracy": correct}
        self.log.evaluation(step, metrics)
        return metrics

    @torch.no_grad()
    def sample(self) -> list[str]:
        """Greedy completions of log.sample_prompts; all ranks compute them in step."""
        model, tokenizer = self.built.model, self.data.tokenizer
        model.eval()
        texts = []
        for prompt in self.config.log.sample_prompts if self.data.causal else ():
            encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(self.device)
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
            positions = supervised_positions(targets)  # of the host's copy, so that nothing waits for the number
            learned = (positions, targets.flatten()[positions])
            with self.built.head_loss.of(*(to_device(tensor, self.device) for tensor in learned)):
                loss = module(**inputs).logits
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

    def _start_clock(self, step: int, tokens: int) -> None:
        self._clock = (time.perf_counter(), step, tokens)

    def _report(self, step: int, tokens: int, lr: float, loss: Tensor, grad_norm: Tensor) -> None:
        """Log a step; its times are means over the steps since the clock was started."""
        mean_loss, norm = self.processes.sum_(loss).item(), grad_norm.item()  # waits for the device
        start, steps_before, tokens_before = self._clock
        seconds = time.perf_counter() - start
        if not math.isfinite(mean_loss):
            raise RuntimeError(f"step {step}: the loss is {mean_loss}; no adapter was written")
        self.log.training(
            step,
            {
                "loss": mean_loss,
                "grad_norm": norm if math.isfinite(norm) else None,
                "lr": lr,
                "tokens": tokens,
                "tokens_per_second": (tokens - tokens_before) / seconds,
                "step_seconds": seconds / (step - steps_before),
                "norm_seconds": self.norm_clock.seconds(),
                "peak_memory_bytes": peak_memory(self.device),
            },
        )

    def _summary(
        self, before: dict[str, float], after: dict[str, float], first: list[str], last: list[str]
    ) -> None:
        for name in after:
            self.log.say(f"{name}: {before[name]:.4f} before, {after[name]:.4f} after")
        for prompt, old, new in zip(self.config.log.sample_prompts, first, last, strict=False):
            self.log.say(f"\n{prompt.rstrip()}\n  before: {old.strip()!r}\n  after:  {new.strip()!r}")


def describe(built: Built, strategy: Strategy) -> str:
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
