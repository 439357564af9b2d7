"""A part of trl_runs.py: GRPO with vLLM, of which a stand-in server generates with the weights that it is sent."""

from pathlib import Path

import pytest
import torch
import trl.generation.vllm_generation
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from dora_dist import DoraConfig, UserError, inject_dora, iter_merged_weights
from dora_dist.integrations import DoraTrainerMixin
from tests.ranks.trl_runs import SETTINGS, Case, Noting, fresh_accelerate
from tests.support.engine import StandInEngine

STEPS, LONGEST = 20, 8
PROMPTS = Dataset.from_list([{"prompt": text} for text in ("the cat", "a dog", "it was", "one day")])


class Client:
    """In VLLMClient's place."""

    def __init__(self, directory: str):
        self.engine, self.syncs = StandInEngine(Path(directory)), 0
        self.model = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.engine.tensors = self.model.state_dict()

    def __call__(self, **_):
        return self

    def init_communicator(self, device):
        pass

    def reset_prefix_cache(self):
        self.syncs += 1

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named_params):
        self.engine.received.clear()
        self.engine.load_weights(named_params)
        assert [name for name, _, _ in metadata] == self.engine.received
        for name, dtype, shape in metadata:
            tensor = self.engine.tensors[name]
            assert (str(tensor.dtype), list(tensor.shape)) == (f"torch.{dtype}", shape)

    @torch.no_grad()
    def generate(self, prompts, features, n, temperature, max_tokens, **_):
        found = {"prompt_ids": prompts, "completion_ids": [], "logprobs": [], "logprob_token_ids": []}
        for prompt in prompts:
            for _ in range(n):
                ids, logprobs = list(prompt), []
                while len(logprobs) < max_tokens and ids[-1] != self.model.config.eos_token_id:
                    logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature
                    ids.append(torch.multinomial(logits.softmax(0), 1).item())
                    logprobs.append([logits.log_softmax(0)[ids[-1]].item()])
                found["completion_ids"].append(ids[len(prompt) :])
                found["logprobs"].append(logprobs)
                found["logprob_token_ids"].append([[each] for each in ids[len(prompt) :]])
        return found


class Grpo(Noting, DoraTrainerMixin, GRPOTrainer): ...


def brevity(completion_ids, **_):
    return [-float(len(ids)) for ids in completion_ids]


def made(case: Case, model: torch.nn.Module) -> Grpo:
    config = GRPOConfig(
        str(case.out), bf16=False, max_steps=STEPS, per_device_train_batch_size=8, num_generations=8,
        max_completion_length=LONGEST, learning_rate=0.02, lr_scheduler_type="constant", beta=0.0, use_vllm=True,
        vllm_mode="server", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no",
        logging_steps=1, ddp_backend="gloo" if case.ranks > 1 else None, **SETTINGS[case.setting],
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(case.directory)
    tokenizer.pad_token = tokenizer.eos_token
    return Grpo(model=model, args=config, reward_funcs=brevity, train_dataset=PROMPTS, processing_class=tokenizer)


def check_vllm(case: Case) -> None:
    """The reward rises, by what the server's weights generate, and these are the model's after each step."""
    vllm = trl.generation.vllm_generation
    client = vllm.VLLMClient = Client(case.directory)
    vllm.is_vllm_available = lambda: True
    fresh_accelerate(case)
    model = AutoModelForCausalLM.from_pretrained(case.directory, dtype=torch.float32)
    config = AutoConfig.from_pretrained(case.directory, tie_word_embeddings=True)
    tied = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        made(case, inject_dora(tied, DoraConfig(rank=2, targets=["embed_tokens"])))
    fresh_accelerate(case)
    trainer = made(case, inject_dora(model, DoraConfig(rank=4, targets=["*_proj"])))
    trainer.train()
    log = [line for line in trainer.state.log_history if "reward" in line]
    rewards = [line["reward"] for line in log]
    assert len(log) == STEPS and client.syncs == (STEPS if trainer.accelerator.is_main_process else 0)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 1, rewards
    for line in log:  # of what the server sampled, in its numbers and in the trainer's
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
    trainer.vllm_generation.sync_weights()
    for name, tensor in iter_merged_weights(trainer.dora_model):
        if trainer.accelerator.is_main_process:
            assert torch.equal(client.engine.tensors[name], tensor)
