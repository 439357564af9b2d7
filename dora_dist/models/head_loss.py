"""The cross-entropy of a language model, token by token, without ever holding all its logits.

For 4096 tokens and 128k words the logits and what the loss makes of them take gigabytes, more than the rest of a
step under activation checkpointing. Here the output head makes them for a few tokens at a time, and where it is
frozen, as it nearly always is, makes their gradient at once: what the backward needs is d loss / d hidden alone,
so neither logits nor the head's weight are touched again. (Liger Kernel does so too, arXiv 2410.10989.)

It all happens inside the head's own forward, which gives out the losses in place of logits: there its weight is
whole under any sharding, and may be dense or in 4 bits. Models that change the head's logits (soft capping,
scaling) are found by `has_plain_logits` and left alone.

Legend: N supervised positions, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_dist.data.batches import IGNORED
from dora_dist.device import to_device, wide_dtype

_CHUNK_BYTES = 64 << 20  # of a chunk's fp32 logits; a quarter of it costs a CPU 1.4 times the time
_LEAST_ROWS = 256  # with fewer, reading the head's weight takes longer than multiplying by it
_FP16_SCALE = 64.0  # probabilities below 6e-5 lose digits in fp16


class HeadLoss:
    """Has a causal model's head compute the targets' losses, and no logits."""

    def __init__(self, head: nn.Module, vocabulary: int):
        self._compute, self._vocabulary = head.forward, vocabulary
        self._frozen = not any(p.requires_grad for p in head.parameters())
        self._asked: tuple[Tensor, Tensor] | None = None
        head.forward = self._forward

    def losses(self, model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """[N] fp32, the losses of a forward of `model` at the `supervised_positions` of `targets`. These lie on
        the host, where the number of supervised ones is known without a wait."""
        positions_N = supervised_positions(targets)
        device = inputs["input_ids"].device
        with self.of(to_device(positions_N, device), to_device(targets.flatten()[positions_N], device)):
            losses_N: Tensor = model(**inputs).logits
        return losses_N

    @contextmanager
    def of(self, positions_N: Tensor, targets_N: Tensor) -> Iterator[None]:
        """Inside, the head gives out the losses [N] of `targets_N`; `positions_N` says where they are in the
        flattened batch. Give a position even where none is supervised, with the target -100, whose loss is 0: a
        trained head has to get its gradient on every rank."""
        self._asked = (positions_N, targets_N)
        try:
            yield
        finally:
            self._asked = None

    def backward_reads_head(self) -> bool:
        """Whether the backward of a forward now will read the head's weight. Asked where it is sharded."""
        return not self._frozen or self._asked is None

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._asked is None:
            return self._compute(hidden)
        positions_N, targets_N = self._asked
        hidden_NH = hidden.flatten(0, -2).index_select(0, positions_N)
        rows = max(_CHUNK_BYTES // (4 * self._vocabulary), _LEAST_ROWS)
        if self._frozen:
            return _FrozenHeadLoss.apply(hidden_NH, targets_N, self._compute, rows)
        return _recomputed(hidden_NH, targets_N, self._compute, rows)


class _FrozenHeadLoss(torch.autograd.Function):
    """The losses of a head without trained parameters; their gradients are made in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, targets_N: Tensor, compute: Any, rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient_NH = torch.empty_like(hidden_NH) if wanted else None
        ctx.scale = _FP16_SCALE if hidden_NH.dtype == torch.float16 else 1.0
        losses_N = hidden_NH.new_empty(len(targets_N), dtype=wide_dtype(hidden_NH.dtype))
        for start in range(0, len(targets_N), rows):
            part = slice(start, start + rows)
            x = hidden_NH[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = compute(x)
            losses_N[part], d_logits = _losses_and_gradients(logits.detach(), targets_N[part], ctx.scale, wanted)
            if gradient_NH is not None:
                (d_x,) = torch.autograd.grad(logits, x, d_logits)
                gradient_NH[part] = d_x.masked_fill_((targets_N[part] == IGNORED)[:, None], 0)
        ctx.save_for_backward(*(() if gradient_NH is None else (gradient_NH,)))
        return losses_N

    @staticmethod
    def backward(ctx: Any, d_losses_N: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        factor_N1 = (d_losses_N / ctx.scale)[:, None]
        return torch.mul(gradient_NH, factor_N1, out=torch.empty_like(gradient_NH)), None, None, None


def _losses_and_gradients(logits: Tensor, targets: Tensor, scale: float, wanted: bool) -> tuple[Tensor, Tensor]:
    """The losses of a chunk, and `scale` x each one's gradient by its logits, in their dtype. Rows that are
    ignored get one, too."""
    ignored, chosen = targets == IGNORED, targets.clamp(min=0)[:, None]
    wide = torch.log_softmax(logits, -1, dtype=wide_dtype(logits.dtype))
    losses = -wide.gather(1, chosen).squeeze(1).masked_fill_(ignored, 0)
    if not wanted:
        return losses, logits
    wide.exp_().scatter_add_(1, chosen, wide.new_full((1, 1), -1.0).expand_as(chosen))
    return losses, (wide if scale == 1 else wide.mul_(scale)).to(logits.dtype)


def _recomputed(hidden_NH: Tensor, targets_N: Tensor, compute: Any, rows: int) -> Tensor:
    """The losses of a head that is trained: its backward makes each chunk's logits again."""

    def losses(x: Tensor, targets: Tensor) -> Tensor:
        return token_losses(compute(x), targets)

    parts = zip(hidden_NH.split(rows), targets_N.split(rows), strict=True)
    return torch.cat([checkpoint(losses, x, targets, use_reentrant=False) for x, targets in parts])


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Of whole logits [..., V] and targets [...]."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Of whole logits [N, V] and targets [N], each one's; 0 where it is ignored."""
    return F.cross_entropy(logits.to(wide_dtype(logits.dtype)), targets, ignore_index=IGNORED, reduction="none")


def row_sums(values_N: Tensor, targets: Tensor) -> Tensor:
    """[B] the sums over each row of what the supervised positions of `targets` [B, T], on the host, have."""
    positions_N = to_device(supervised_positions(targets), values_N.device)
    flat = values_N.new_zeros(targets.numel()).index_copy(0, positions_N, values_N)
    return flat.view(targets.shape).sum(1)


def supervised_positions(targets: Tensor) -> Tensor:
    """[N] where the flattened targets are to be learned; one position where none is."""
    positions = (targets.flatten() != IGNORED).nonzero().squeeze(1)
    return positions if len(positions) else positions.new_zeros(1)


def attach_head_loss(model: nn.Module) -> HeadLoss | None:
    """For a causal model that `has_plain_logits`, once its modules are what they will be and before it is sharded.
    None where the head's output is not the loss's to replace: a head that is trained in fp32 inside a 16-bit model
    has hooks that would round it."""
    head, config = model.get_output_embeddings(), model.config  # type: ignore[operator]
    if head._forward_hooks or head._forward_pre_hooks:
        return None
    return HeadLoss(head, config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]


def has_plain_logits(model: nn.Module) -> bool:
    """Whether a causal language model's forward gives out what its head makes of all positions, unchanged.

    Found by running the forward on the meta device with the head and all below it replaced: the very tensor that
    the head gave must come out.
    """
    head, bases = model.get_output_embeddings(), _bases(model)  # type: ignore[operator]
    if head is None:
        return False
    hidden_BTH = torch.empty(2, 3, 4, device="meta")
    made = torch.empty((), device="meta")
    seen: list[torch.Size] = []

    def give_hidden(*_: Any, **__: Any) -> _BaseOutput:
        return _BaseOutput(hidden_BTH)

    def give_made(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape)
        return made

    training = model.training
    ids = torch.zeros(2, 3, dtype=torch.long, device="meta")
    try:
        with ExitStack() as replaced:
            for base in bases:
                replaced.enter_context(_replaced_forward(base, give_hidden))
            replaced.enter_context(_replaced_forward(head, give_made))
            outputs = [model.train(mode).forward(input_ids=ids).logits for mode in (True, False)]
    except Exception:  # whatever a model's code makes of outputs that are not its base's
        return False
    finally:
        model.train(training)
    return all(logits is made for logits in outputs) and seen == [hidden_BTH.shape] * 2


def _bases(model: nn.Module) -> list[nn.Module]:
    """What a causal model may call for the hidden states of its head."""
    found = {getattr(model, name, None) for name in ("base_model", "model")} - {model}
    found |= {getattr(base, "decoder", None) for base in found}
    return [base for base in found if isinstance(base, nn.Module)]


class _BaseOutput:
    """What a base model gives out, as far as heads read it: hidden states, and nothing else."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


@contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
