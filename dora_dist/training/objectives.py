"""What a run minimises: of a micro-batch, the summed loss and the sums of its metrics.

Sums, because several micro-batches on several ranks form a global batch: only their totals, divided by what all
ranks know of it from the data alone, are the same however it is formed.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_dist.config import ModelConfig
from dora_dist.data.batches import IGNORED, MicroBatch
from dora_dist.data.packing import additive_mask, packed_attention
from dora_dist.device import to_device
from dora_dist.models.attention import CausalAttention
from dora_dist.models.build import ShardedModel
from dora_dist.models.head_loss import summed_loss, supervised_positions, token_losses


class Objective:
    """Of a task. Every rank calls each method at the same point."""

    while_training = False  # whether a training step's metrics are told, too

    def prepare(self, micro_batches: Iterable[MicroBatch]) -> None:
        """Before the first of a step's, or of an evaluation's, micro-batches of this rank."""

    def around(self, micro: MicroBatch) -> AbstractContextManager:
        """Around the forward and the backward of a micro-batch: the backward may run the forward again."""
        return nullcontext()

    def __call__(self, module: nn.Module, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """(the summed loss, [M] the sums that `metrics` takes) of a forward of `module`, the model or what an
        engine has around it."""
        raise NotImplementedError

    def metrics(self, sums: Sequence[float], targets: int) -> dict[str, float]:
        """By name, of sums over a whole global batch or evaluation; `targets`: what its loss is a mean over."""
        return {}


class CausalForward:
    """Forwards of a causal language model: the losses of a micro-batch's targets."""

    def __init__(self, built: ShardedModel, model: ModelConfig, device: torch.device, without_mask: bool):
        """`without_mask`: attention need not be told where documents end."""
        self.head_loss, self.device = built.head_loss, device
        self.eager_dtype = getattr(torch, model.dtype) if model.attention == "eager" else None
        fits = without_mask and CausalAttention.fits(built.model)
        self.attention = CausalAttention(built.model) if fits else None

    def around(self, micro: MicroBatch) -> AbstractContextManager:
        if self.attention is None:
            return nullcontext()
        lengths = micro.get("document_lengths")
        documents = None if lengths is None else [[n for n in row if n] for row in lengths.tolist()]
        return self.attention.over(documents)

    def summed(self, module: nn.Module, micro: MicroBatch) -> Tensor:
        """The sum over all targets."""
        inputs, targets = self._inputs(micro), micro["targets"]
        if self.head_loss is None:
            return summed_loss(module(**inputs).logits, to_device(targets, self.device))
        return self.head_loss.losses(module, inputs, targets).sum()

    def each(self, module: nn.Module, micro: MicroBatch) -> Tensor:
        """[N] that of each supervised position."""
        inputs, targets = self._inputs(micro), micro["targets"]
        if self.head_loss is not None:
            return self.head_loss.losses(module, inputs, targets)
        positions_N = to_device(supervised_positions(targets), self.device)
        logits, targets = module(**inputs).logits.flatten(0, -2), to_device(targets.flatten(), self.device)
        return token_losses(logits[positions_N], targets[positions_N])

    def _inputs(self, micro: MicroBatch) -> dict[str, Tensor]:
        host = {name: t for name, t in micro.items() if name not in ("targets", "labels", "document_lengths")}
        inputs = {name: to_device(tensor, self.device) for name, tensor in host.items()}
        lengths = micro.get("document_lengths")
        if lengths is not None and self.attention is None:
            mask = packed_attention(to_device(lengths, self.device), micro["targets"].shape[1])
            inputs["attention_mask"] = mask if self.eager_dtype is None else additive_mask(mask, self.eager_dtype)
        return inputs


class CausalObjective(Objective):
    """Of a task that predicts tokens."""

    def __init__(self, forward: CausalForward):
        self.forward = forward

    def around(self, micro: MicroBatch) -> AbstractContextManager:
        return self.forward.around(micro)


class TokenLoss(CausalObjective):
    """causal_lm: the cross-entropy of the supervised tokens."""

    def __call__(self, module: nn.Module, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        loss = self.forward.summed(module, micro)
        return loss, loss.new_zeros(0)


class LabelLoss(Objective):
    """sequence_classification: the cross-entropy of the rows' labels."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, module: nn.Module, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        inputs = {name: to_device(tensor, self.device) for name, tensor in micro.items()}
        labels = inputs.pop("labels")
        logits = module(**inputs).logits
        return summed_loss(logits, labels), (logits.argmax(-1) == labels).sum().float().reshape(1)

    def metrics(self, sums: Sequence[float], targets: int) -> dict[str, float]:
        return {"accuracy": sums[0] / targets}


class RewardLoss(Objective):
    """reward_model: how likely the chosen of two rows is by Bradley and Terry's model, -log sigmoid(r_w - r_l)."""

    while_training = True

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, module: nn.Module, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        inputs = {name: to_device(tensor, self.device) for name, tensor in micro.items()}
        real = inputs.pop("labels")[::2] != IGNORED
        rewards = module(**inputs).logits.squeeze(-1).float()
        chosen, rejected = rewards[::2], rewards[1::2]
        sums = [chosen.detach(), rejected.detach(), (chosen > rejected).float()]
        losses = -F.logsigmoid(chosen - rejected)
        return over(real, losses), torch.stack([over(real, values) for values in sums])

    def metrics(self, sums: Sequence[float], targets: int) -> dict[str, float]:
        return pair_metrics(*(total / targets for total in sums))


def pair_metrics(chosen: float, rejected: float, right: float) -> dict[str, float]:
    """Of rewards' means, and of how often the chosen one has the higher."""
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": right,
    }


def over(real: Tensor, values: Tensor) -> Tensor:
    """The sum of the values of what is real: a rank that has no rows left has stand-ins."""
    return torch.where(real, values, 0).sum()
