"""model.task: preference: DPO and its relatives over the log-probabilities of whole completions.

The reference is the model with its adapters off, which costs a forward without gradient and no memory. A loss is a
mean over the global batch's pairs (kto: rows), so it does not depend on how ranks and micro-batches share them:

    dpo     -log sigmoid(beta (r_w - r_l))                               arXiv 2305.18290
    ipo     (r_w / |w| - r_l / |l| - 1 / (2 beta))^2                     2310.12036, per token as its authors do
    orpo    -a_w - beta log sigmoid(odds(a_w) - odds(a_l))               2403.07691
    simpo   -log sigmoid(beta (a_w - a_l) - gamma)                       2405.14734
    kto     1 - sigmoid(beta (r - z)), or of a rejected row (z - r)      2402.01306

with r a completion's log-ratio log p(y|x) / p_ref(y|x), a = log p(y|x) / |y| its mean log-probability, odds(a) =
log (e^a / (1 - e^a)); w the chosen, l the rejected completion. KTO's z >= 0 is the mean log-ratio of each row's
prompt with the completion of the row before it in the global batch; no gradient flows through it.

Legend: N supervised tokens, R rows (P pairs: chosen and rejected in turn).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_dist.config import RunConfig, TrainConfig
from dora_dist.data.batches import IGNORED, MicroBatch
from dora_dist.device import to_device
from dora_dist.dora.base_alone import adapters_off
from dora_dist.errors import UserError
from dora_dist.models.head_loss import row_sums
from dora_dist.training.objectives import CausalForward, CausalObjective, over, pair_metrics

BETA = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}  # the papers' usual ones
GAMMA = 1.0  # simpo's: half its beta
Sum = Callable[[Tensor], object]
WITHOUT_REFERENCE = ("orpo", "simpo")


class Completions(NamedTuple):
    """What a loss knows of completions [R]."""

    logps: Tensor  # log-probabilities, summed over tokens
    ratios: Tensor  # of policy to reference, in logs; zeros where there is none
    tokens: Tensor  # at least 1
    real: Tensor  # bool; False: a stand-in for a rank that has no rows left

    @property
    def means(self) -> Tensor:
        return self.logps / self.tokens

    def every_other(self, first: int) -> "Completions":
        return Completions(*(tensor[first::2] for tensor in self))


class PreferenceLoss(CausalObjective):
    """Of pairs."""

    while_training = True

    def __init__(self, forward: CausalForward, model: nn.Module, config: TrainConfig, sum_: Sum):
        """`model`: without what an engine has around it; `sum_`: over all ranks, in place."""
        super().__init__(forward)
        self.model, self.sum_ = model, sum_
        self.name = objective_of(config)
        self.beta = config.beta or BETA[self.name]
        self.gamma = GAMMA if config.gamma is None else config.gamma

    def __call__(self, module: nn.Module, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        found = self.completions(module, micro)
        chosen, rejected = found.every_other(0), found.every_other(1)
        losses = LOSSES[self.name](chosen, rejected, self.beta, self.gamma)
        return over(chosen.real, losses), self._sums(chosen, rejected)

    def completions(self, module: nn.Module, micro: MicroBatch) -> Completions:
        targets = micro["targets"]
        tokens = (targets != IGNORED).sum(1)
        counts, real = (to_device(t, self.forward.device) for t in (tokens.clamp(min=1), tokens > 0))
        reference_N = None if self.name in WITHOUT_REFERENCE else self._reference(micro)
        losses_N = self.forward.each(module, micro)
        logps = row_sums(-losses_N, targets)
        if reference_N is None:
            return Completions(logps, torch.zeros_like(logps), counts, real)
        # Token by token: of two long sums the difference would have the rounding.
        return Completions(logps, row_sums(reference_N - losses_N, targets), counts, real)

    @torch.no_grad()
    def _reference(self, micro: MicroBatch) -> Tensor:
        """[N] the losses of the base alone, without what training adds to a forward, such as a router's noise."""
        training = self.model.training
        self.model.eval()
        with adapters_off(self.model):
            losses_N = self.forward.each(self.model, micro)
        self.model.train(training)
        return losses_N

    @torch.no_grad()
    def _sums(self, chosen: Completions, rejected: Completions) -> Tensor:
        """For `metrics`: of the chosen, of the rejected, and how often a chosen one has the higher reward."""
        per_token = self.name in WITHOUT_REFERENCE
        logps = [c.means if per_token else c.logps for c in (chosen, rejected)]
        rewards = [self.beta * (c.means if per_token else c.ratios) for c in (chosen, rejected)]
        right = (rewards[0] > rewards[1]).float()
        return torch.stack([over(chosen.real, values) for values in (*rewards, *logps, right)])

    def metrics(self, sums: Sequence[float], targets: int) -> dict[str, float]:
        chosen, rejected, chosen_logps, rejected_logps, right = (total / targets for total in sums)
        logps = {"logps/chosen": chosen_logps, "logps/rejected": rejected_logps}
        return {**pair_metrics(chosen, rejected, right), **logps}


class KtoLoss(PreferenceLoss):
    """Of rows that are wanted or not. A micro-batch has each row, and its prompt with another one's completion."""

    def __init__(self, forward: CausalForward, model: nn.Module, config: TrainConfig, sum_: Sum):
        super().__init__(forward, model, config, sum_)
        self.z = torch.zeros((), device=forward.device)

    @torch.no_grad()
    def prepare(self, micro_batches: Iterable[MicroBatch]) -> None:
        total = torch.zeros(2, device=self.forward.device)
        training = self.model.training
        self.model.eval()
        for micro in micro_batches:
            others = {name: micro[f"other_{name}"] for name in ("input_ids", "targets")}
            with self.around(others):
                found = self.completions(self.model, others)
            total += torch.stack([over(found.real, found.ratios), found.real.sum()])
        self.model.train(training)
        self.sum_(total)
        self.z = (total[0] / total[1]).clamp(min=0)

    def __call__(self, module: nn.Module, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        found = self.completions(module, {name: micro[name] for name in ("input_ids", "targets")})
        wanted = to_device(micro["labels"], self.forward.device) == 1
        excess = self.beta * (found.ratios - self.z)
        losses = torch.sigmoid(torch.where(wanted, -excess, excess))
        return over(found.real, losses), self._sums_of(found, wanted)

    @torch.no_grad()
    def _sums_of(self, found: Completions, wanted: Tensor) -> Tensor:
        """For `metrics`: of the wanted and of the others, their number, rewards and log-probabilities; and z."""
        rewards, ones = self.beta * found.ratios, torch.ones_like(found.ratios)
        kinds = [found.real & wanted, found.real & ~wanted]
        sums = [over(kind, values) for kind in kinds for values in (ones, rewards, found.logps)]
        return torch.stack([*sums, over(found.real, ones * self.z)])

    def metrics(self, sums: Sequence[float], targets: int) -> dict[str, float]:
        found = {"kl": sums[-1] / targets}
        for name, (count, rewards, logps) in {"chosen": sums[:3], "rejected": sums[3:6]}.items():
            if count:
                found |= {f"rewards/{name}": rewards / count, f"logps/{name}": logps / count}
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


def check_preference(config: RunConfig, world_size: int) -> None:
    """UserError: what a preference objective cannot be right with, and the configuration alone does not tell."""
    name, train = objective_of(config.train), config.train
    if config.model.task != "preference":
        return
    if config.dora.init_from is not None and name not in WITHOUT_REFERENCE:
        raise UserError(
            f"dora.init_from: the reference of train.objective: {name} is the base without an adapter; merge this "
            "one into it (dora-dist merge), and name the result in model.path"
        )
    if name == "kto" and train.micro_batch_size * train.accumulation * world_size < 2:
        raise UserError(
            "train.objective: kto compares each row of a step with another one; valid would be a "
            "train.micro_batch_size or train.accumulation of at least 2"
        )


def objective_of(config: TrainConfig) -> str:
    return config.objective or "dpo"


def _dpo(chosen: Completions, rejected: Completions, beta: float, _: float) -> Tensor:
    return -F.logsigmoid(beta * (chosen.ratios - rejected.ratios))


def _ipo(chosen: Completions, rejected: Completions, beta: float, _: float) -> Tensor:
    return (chosen.ratios / chosen.tokens - rejected.ratios / rejected.tokens - 1 / (2 * beta)).square()


def _orpo(chosen: Completions, rejected: Completions, beta: float, _: float) -> Tensor:
    return -chosen.means - beta * F.logsigmoid(_log_odds(chosen.means) - _log_odds(rejected.means))


def _log_odds(mean: Tensor) -> Tensor:
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)  # of a certain completion they are infinite
    return mean - torch.log(-torch.expm1(mean))


def _simpo(chosen: Completions, rejected: Completions, beta: float, gamma: float) -> Tensor:
    return -F.logsigmoid(beta * (chosen.means - rejected.means) - gamma)


# By objective: of chosen and rejected completions, beta and gamma, the losses [P].
LOSSES: dict[str, Callable[[Completions, Completions, float, float], Tensor]] = {
    "dpo": _dpo, "ipo": _ipo, "orpo": _orpo, "simpo": _simpo,
}  # fmt: skip
