"""Each tensor of the meta model has the dtype in which transformers would load it: what a class keeps in fp32
inside a model of 16 bits stays so, in memory, in 4-bit runs and in what is written."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from dora_dist.adapters.adapter import save_adapter
from dora_dist.config import ModelConfig, QuantConfig, load_config
from dora_dist.models.build import build, make_blueprint
from dora_dist.models.huggingface import meta_model
from dora_dist.models.merge_weights import read_plan
from dora_dist.parallel.process import Processes
from dora_dist.parallel.replicated import Single
from tests.support.small import causal_types, small_config, small_model

SOME = {"deepseek_v3", "ernie4_5_moe", "gpt_oss", "llama", "rwkv"}
_MOST = 20_000_000  # parameters


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.dtype for name, tensor in tensors}


def compare(model_type: str, tmp_path: Path, dtype: str) -> bool | None:
    """None: transformers itself cannot draw this one small, or not load it."""
    try:
        config = small_config(model_type)
        with torch.device("meta"):
            size = sum(p.numel() for p in small_model(model_type).parameters())
        if size > _MOST:
            return None
        model = small_model(model_type, dtype=torch.float32)
        loaded = type(model).from_pretrained(
            None, config=copy.deepcopy(config), state_dict=model.state_dict(), dtype=getattr(torch, dtype)
        )
    except Exception:
        return None
    config.save_pretrained(tmp_path)
    ours = meta_model(ModelConfig(path=str(tmp_path), dtype=dtype, attention="eager"), tmp_path)
    return dtypes(ours) == dtypes(loaded)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", sorted(SOME))
def test_dtypes_are_those_of_from_pretrained(model_type, dtype, tmp_path):
    assert compare(model_type, tmp_path, dtype) is True


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_of_every_causal_class(dtype, tmp_path):
    found = {name: compare(name, tmp_path / name, dtype) for name in causal_types() if name not in SOME}
    assert [name for name, same in found.items() if same is False] == []
    assert sum(same is True for same in found.values()) > 100


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> Path:
    """DeepSeek-V3, small, in bf16 with a correction bias in fp32 whose size decides on experts."""
    directory = tmp_path_factory.mktemp("deepseek")
    torch.manual_seed(0)
    config = small_config("deepseek_v3")
    config.initializer_range, config.num_key_value_heads = 0.3, config.num_attention_heads
    type(small_model("deepseek_v3"))(config).to(torch.bfloat16).save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    (name,) = [name for name in tensors if name.endswith("e_score_correction_bias")]
    tensors[name] = 7.19 + 0.02 * torch.rand(tensors[name].shape)
    assert not torch.equal(tensors[name], tensors[name].bfloat16().float())
    save_file(tensors, path, {"format": "pt"})
    return directory


def run_config(model: Path, rows: Path, tmp_path: Path, **settings):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {{path: {model}, dtype: bfloat16}}\ndata: {{train: {rows}}}\noutput_dir: {tmp_path}\n"
    )
    config = load_config(path, ["parallel.strategy=single"])
    return replace(config, dora=replace(config.dora, rank=2, targets=["o_proj", "down_proj"]), **settings)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_untrained_base_computes_what_transformers_does(deepseek, tiny_rows, tmp_path, quant):
    from transformers import AutoModelForCausalLM

    config = run_config(deepseek, tiny_rows, tmp_path, quant=QuantConfig(scheme=quant, block_size=32))
    built = build(make_blueprint(config, deepseek), Single(Processes()))
    loaded = AutoModelForCausalLM.from_pretrained(deepseek, dtype=torch.bfloat16).eval()
    biases = {name: t for name, t in loaded.state_dict().items() if "correction" in name}
    assert biases
    for name, bias in biases.items():
        ours = built.model.get_buffer(name)
        assert ours.dtype == torch.float32 and torch.equal(ours, bias)
    if quant == "none":
        ids = torch.arange(3, 43)[None]
        with torch.no_grad():
            ours, theirs = built.model.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("saved", [[], ["k_proj"]], ids=["frozen", "trained in full"])
def test_a_linear_layer_kept_in_fp32_is_neither_packed_nor_written_narrower(
    tiny_llama, tiny_rows, tmp_path, monkeypatch, saved
):
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["k_proj"])
    config = run_config(tiny_llama, tiny_rows, tmp_path, quant=QuantConfig(scheme="nf4", block_size=32))
    config = replace(config, dora=replace(config.dora, modules_to_save=saved))
    built = build(make_blueprint(config, tiny_llama), Single(Processes()))
    attention = built.model.model.layers[0].self_attn
    assert attention.k_proj.weight.dtype == torch.float32 and attention.q_proj.weight.dtype == torch.uint8
    save_adapter(built.model, tmp_path / "adapter")
    blueprint = make_blueprint(config, tiny_llama)
    entries, _ = read_plan(blueprint, tmp_path / "adapter", blueprint.files)
    written = {entry.name: entry.dtype for entry in entries}
    for name, dtype in written.items():
        assert dtype == (torch.float32 if "k_proj" in name else torch.bfloat16)
