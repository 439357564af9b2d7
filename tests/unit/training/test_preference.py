"""Preference objectives against plain mathematics in fp64: the loss, its gradients and what is logged."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from dora_dist.config import DataConfig, DoraConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from dora_dist.data.run_data import RunData, load_tokenizer
from dora_dist.dora.norm_cache import dora_layers, refresh_norms
from dora_dist.models.build import make_blueprint, sizes_of
from dora_dist.models.head_loss import attach_head_loss
from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.training.objectives import CausalForward
from dora_dist.training.optim import build_to_train
from dora_dist.training.trainer import Trainer
from tests.support.models import make_labelled, make_pairs
from tests.support.rounding import MODEL, TRAINED, assert_near

OBJECTIVES = ("dpo", "ipo", "orpo", "simpo", "kto")
ROWS = 12
ROUNDED = 1e-4  # log-probabilities of some 20 tokens, twice the same
BETA, GAMMA = {"dpo": 0.7, "ipo": 0.4, "orpo": 0.3, "simpo": 2.0, "kto": 0.6}, 0.4


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """By objective: a file."""
    directory = tmp_path_factory.mktemp("preferences")
    pairs = make_pairs(directory / "pairs.jsonl", ROWS)
    labelled = make_labelled(directory / "labelled.jsonl", ROWS)
    return {name: labelled if name == "kto" else pairs for name in OBJECTIVES}


def run_config(model, rows, objective, **train):
    gamma = {"gamma": GAMMA} if objective == "simpo" else {}
    settings = {"steps": 4, "micro_batch_size": ROWS, "lr": 0.01, "beta": BETA[objective], **gamma, **train}
    return RunConfig(
        model=ModelConfig(path=str(model), task="preference", dtype="float32"),
        data=DataConfig(train=str(rows[objective]), eval=str(rows[objective]), seq_len=48),
        dora=DoraConfig(rank=2, alpha=3, targets="all-linear"),
        train=TrainConfig(objective=objective, **settings),
        parallel=ParallelConfig(strategy="single"),
    )


def make(config):
    processes, model = Processes(), config.model.path
    blueprint = make_blueprint(config, Path(model))
    strategy = choose_strategy(config.parallel, config.train, sizes_of(blueprint.model), processes)
    data = RunData(config.data, config.train, "preference", blueprint.model, load_tokenizer(model), processes)
    return Trainer(build_to_train(blueprint, strategy), config.model, config.train, False, data.steps), data


def trained(trainer):
    return {name: p for name, p in trainer.built.model.named_parameters() if p.requires_grad}


def disturb(trainer):
    """Adapters that are not the base."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained(trainer).items():
            parameter.add_(torch.randn_like(parameter) * (0.02 if "magnitude" in name else 0.2))
    refresh_norms(trainer.built.model, trainer.built.shards)


def by_hand(trainer, config, batch):
    """(loss, gradients, logged) of a global batch in fp64, by the definitions."""
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64).eval()
    adapters = {name: p.detach().double().requires_grad_() for name, p in trained(trainer).items()}
    scaling, merged = config.dora.alpha / config.dora.rank, {}
    for name in dora_layers(trainer.built.model):
        A, B, m = (adapters[f"{name}.{key}"] for key in ("lora_A", "lora_B", "magnitude"))
        V = base.get_parameter(f"{name}.weight").detach() + scaling * B @ A
        merged[f"{name}.weight"] = (m / V.norm(dim=1).detach())[:, None] * V

    def logps(weights, ids, targets):
        logits = functional_call(base, weights, args=(ids,)).logits
        taken = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        return torch.where(targets != -100, taken, 0).sum(1), (targets != -100).sum(1)

    (micro,) = batch.micro_batches
    sums, counts = logps(merged, micro["input_ids"], micro["targets"])
    ratios = sums - logps({}, micro["input_ids"], micro["targets"])[0].detach()
    name, beta = config.train.objective, config.train.beta
    if name == "kto":
        other = micro["other_input_ids"], micro["other_targets"]
        with torch.no_grad():
            z = (logps(merged, *other)[0] - logps({}, *other)[0]).mean().clamp(min=0)
        wanted = micro["labels"] == 1
        losses = torch.where(wanted, 1 - (beta * (ratios - z)).sigmoid(), 1 - (beta * (z - ratios)).sigmoid())
        logged = {"kl": z, "rewards/chosen": beta * ratios[wanted], "rewards/rejected": beta * ratios[~wanted]}
        logged |= {"logps/chosen": sums[wanted], "logps/rejected": sums[~wanted]}
    else:
        (w, l), (mean_w, mean_l) = ((x[0::2], x[1::2]) for x in (ratios, sums / counts))  # noqa: E741
        count_w, count_l = counts[0::2], counts[1::2]
        losses = {
            "dpo": lambda: -F.logsigmoid(beta * (w - l)),
            "ipo": lambda: (w / count_w - l / count_l - 1 / (2 * beta)) ** 2,
            "simpo": lambda: -F.logsigmoid(beta * (mean_w - mean_l) - GAMMA),
            "orpo": lambda: -mean_w - beta * (odds(mean_w) / odds(mean_l)).log().sigmoid().log(),
        }[name]()
        rewards = (beta * mean_w, beta * mean_l) if name in ("orpo", "simpo") else (beta * w, beta * l)
        taken = (mean_w, mean_l) if name in ("orpo", "simpo") else (sums[0::2], sums[1::2])
        logged = {"rewards/chosen": rewards[0], "rewards/rejected": rewards[1]}
        logged |= {"logps/chosen": taken[0], "logps/rejected": taken[1]}
        logged["rewards/accuracies"] = (rewards[0] > rewards[1]).double()
    loss = losses.mean()
    logged = {key: value.detach().mean().item() for key, value in logged.items()}
    logged["rewards/margins"] = logged["rewards/chosen"] - logged["rewards/rejected"]
    gradients = dict(zip(adapters, torch.autograd.grad(loss, list(adapters.values())), strict=True))
    return loss.detach(), gradients, logged


def test_the_reference_is_the_base_to_the_bit(tiny_llama, rows):
    trainer, data = make(run_config(tiny_llama, rows, "dpo"))
    disturb(trainer)
    micro = data.plan.global_batch(0).micro_batches[0]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    plain = SimpleNamespace(model=base, head_loss=attach_head_loss(base))
    forward = CausalForward(plain, ModelConfig(path="m"), trainer.device, without_mask=True)
    with torch.no_grad(), forward.around(micro):
        want = forward.each(base, micro)
    with trainer.objective.around(micro):
        got = trainer.objective._reference(micro)
        policy = trainer.objective.forward.each(trainer.built.model, micro)
    assert got.equal(want) and not policy.isclose(want).all()


def odds(mean):
    return mean.exp() / (1 - mean.exp())


@pytest.mark.parametrize(("objective", "by_chunks"), [(name, True) for name in OBJECTIVES] + [("dpo", False)])
def test_losses_gradients_and_metrics_are_the_definitions(objective, by_chunks, tiny_llama, rows):
    config = run_config(tiny_llama, rows, objective)
    trainer, data = make(config)
    disturb(trainer)
    if not by_chunks:  # as of models that change their logits
        trainer.objective.forward.head_loss = None
    batch = data.plan.global_batch(0)
    want, gradients, logged = by_hand(trainer, config, batch)
    seen = {}
    trainer.built.engine.step = lambda: seen.update({n: p.grad for n, p in trained(trainer).items()}) or want
    loss, _ = trainer.train_step(batch)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for name, gradient in gradients.items():
        assert_near(seen[name], gradient, MODEL, torch.float32, about=name)
    assert trainer.step_metrics(batch.targets) == pytest.approx(logged, rel=1e-4, abs=1e-5)


def test_at_first_the_policy_is_the_reference(tiny_llama, rows):
    """The magnitudes are the norms, B is 0: the loss is log 2, and nobody is preferred."""
    for objective, loss in {"dpo": math.log(2), "ipo": 1 / (2 * BETA["ipo"]) ** 2, "kto": 0.5}.items():
        trainer, data = make(run_config(tiny_llama, rows, objective))
        batch = data.plan.global_batch(0)
        assert trainer.train_step(batch)[0].item() == pytest.approx(loss, rel=TRAINED)
        logged = trainer.step_metrics(batch.targets)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert abs(logged[name]) < ROUNDED, name


SPLITS = [{"micro_batch_size": 4, "accumulation": 3}, {"micro_batch_size": 1, "accumulation": ROWS}]


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_no_number_depends_on_how_the_batch_is_split(objective, tiny_llama, rows):
    def numbers(**split):
        config = run_config(tiny_llama, rows, objective, activation_checkpointing=bool(split), **split)
        trainer, data = make(config)
        disturb(trainer)
        losses = []
        for step in range(2):
            batch = data.plan.global_batch(step)
            losses.append(trainer.train_step(batch)[0].item())
        # 5 divides no number of rows: the last ones of an evaluation stand in for none.
        evaluation = replace(data.evaluation._split, micro_batch_size=5) if split else data.evaluation._split
        data.evaluation._split = evaluation
        return losses, trainer.step_metrics(batch.targets), trainer.evaluate(data.evaluation)

    whole = numbers()
    assert whole[2]["eval_loss"] is not None and f"eval_{next(iter(whole[1]))}" in whole[2]
    for split in SPLITS:
        for got, want in zip(numbers(**split), whole, strict=True):
            assert got == pytest.approx(want, rel=TRAINED, abs=1e-6)
