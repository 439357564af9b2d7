"""The built-in shapes are the published models', and stand in for the hub where it is not at hand."""

import json

import pytest
import torch
import transformers

from dora_dist.errors import UserError
from dora_dist.planning.known_models import directory_to_plan, known_models

# As the model cards and the safetensors' own metadata say.
PARAMETERS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "openai/gpt-oss-120b": 116_829_156_672,
    "deepseek-ai/DeepSeek-V3": 671_026_404_352,  # without the block that predicts a second token
    "openai-community/gpt2": 124_439_808,
    "distilbert/distilbert-base-uncased": 66_362_880,  # without the head of its pre-training
}


def test_every_known_model_has_a_published_size():
    assert set(known_models()) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_known_model_has_the_published_number_of_parameters(name):
    """The last of the blocks drawn stands for all that follow."""
    config = transformers.AutoConfig.for_model(**known_models()[name])
    blocks, drawn = config.num_hidden_layers, 1 + getattr(config, "first_k_dense_replace", 0)
    config.num_hidden_layers = drawn
    auto = transformers.AutoModel if "distilbert" in name else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    *_, block = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    counted = sum(p.numel() for p in model.parameters())
    assert counted + (blocks - drawn) * sum(p.numel() for p in block.parameters()) == PARAMETERS[name]


def test_a_known_model_needs_no_hub(monkeypatch):
    def unreachable(path, config_only):
        raise UserError(f"model.path: {path!r} cannot be fetched")

    monkeypatch.setattr("dora_dist.planning.known_models.resolve_model", unreachable)
    with directory_to_plan("Qwen/Qwen3-8B") as (directory, built_in):
        assert built_in and json.loads((directory / "config.json").read_text())["num_hidden_layers"] == 36
    assert not directory.exists()
    told = "model.path: 'Qwen/Qwen3-9B'.*known without the hub: .*'Qwen/Qwen3-8B'"
    with pytest.raises(UserError, match=told), directory_to_plan("Qwen/Qwen3-9B"):
        pass
    with pytest.raises(UserError, match="'./nothing' cannot be fetched$"), directory_to_plan("./nothing"):
        pass
