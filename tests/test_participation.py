"""Layers that take no part in the loss of text are found before any weight is read: left out of all-linear with
one line, refused where they are named, and the others are not touched."""

import re

import pytest
import torch
import yaml
from conftest import save_model
from support_small import small_config, small_model
from torch import nn

from dora_dist.cli import main
from dora_dist.config import ModelConfig
from dora_dist.hf_model import meta_model
from dora_dist.participation import idle_modules


def drawn(model_type: str, directory, layers: int = 2, dtype: str = "float32") -> nn.Module:
    small_config(model_type, layers).save_pretrained(directory)
    return meta_model(ModelConfig(path=str(directory), dtype=dtype, attention="eager"), directory)


def kinds(names) -> set[str]:
    return {re.sub(r"\.\d+\.", ".*.", name) for name in names}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2_moe", "mixtral", "gemma2", "deepseek_v3", "bloom"])
def test_in_a_plain_decoder_all_layers_take_part(model_type, tmp_path):
    if model_type == "deepseek_v3":
        config = small_config(model_type)
        config.num_key_value_heads = config.num_attention_heads
        config.save_pretrained(tmp_path)
        model = meta_model(ModelConfig(path=str(tmp_path), attention="eager"), tmp_path)
    else:
        model = drawn(model_type, tmp_path, layers=6)
    before = [name for name, _ in model.named_modules()]
    assert idle_modules(model) == frozenset()
    assert [name for name, _ in model.named_modules()] == before
    assert not any(module._forward_hooks for module in model.modules())


def test_the_tower_for_images_takes_no_part(tmp_path):
    model = drawn("gemma3", tmp_path, layers=6)
    idle = idle_modules(model)
    vision = {n for n, m in model.named_modules() if type(m) is nn.Linear and "vision" in n}
    assert vision and vision == {name for name in idle if "embedding" not in name}


def test_a_weight_that_is_read_without_a_call_takes_no_part(tmp_path):
    idle = idle_modules(drawn("mamba", tmp_path, layers=6))
    assert idle == {f"backbone.layers.{i}.mixer.dt_proj" for i in range(6)}


class Output(dict):
    __getattr__ = dict.__getitem__


class Blocks(nn.Module):
    """Blocks of two kinds that alternate; one layer of the second is called, but its output is thrown away."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in range(6))
        for i, block in enumerate(self.blocks):
            block.throws = i % 2 == 1
        self.aside = nn.Linear(4, 4)
        self.unused = nn.LayerNorm(4)

    def forward(self, input_ids):
        x = self.words(input_ids)
        for block in self.blocks:
            y = block["b"](x)
            x = block["a"](x) + (0 if block.throws else y)
        return Output(logits=x @ self.aside.weight)


def test_a_block_of_each_kind_stands_for_the_others():
    with torch.device("meta"):
        model = Blocks()
    assert idle_modules(model, ["unused", "aside"]) == {"unused"} | {"aside"} | {
        f"blocks.{i}.b" for i in (1, 3, 5)
    }


def test_code_that_asks_for_values_is_unknown():
    class Asks(Blocks):
        def forward(self, input_ids):
            return super().forward(input_ids) if self.words(input_ids).sum().item() > 0 else None

    with torch.device("meta"):
        model = Asks()
    assert idle_modules(model) is None


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    torch.manual_seed(0)
    return save_model(small_model("gemma3", dtype=torch.float32), tmp_path_factory.mktemp("gemma3"))


@pytest.fixture
def command(gemma3, tiny_rows, tmp_path):
    config = {
        "model": {"path": str(gemma3), "dtype": "float32", "attention": "eager"},
        "dora": {"rank": 2, "targets": "all-linear"},
        "data": {"train": str(tiny_rows), "seq_len": 16},
        "train": {"steps": 1},
        "parallel": {"force": True},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["train", "--config", str(path)]


def test_all_linear_leaves_them_out_and_says_so(command, tmp_path, capsys):
    from safetensors.torch import load_file

    assert main(command) == 0
    assert "all-linear leaves out what takes no part in the loss of text: " in capsys.readouterr().out
    names = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert names and not any("vision" in name for name in names)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dora.targets", "[q_proj]", "'q_proj' means .*vision.*; those that do are '.*language_model.*q_proj'"),
        ("dora.modules_to_save", "[vision_tower]", "dora.modules_to_save: 'vision_tower' means "),
    ],
)  # fmt: skip
def test_who_names_them_is_told(command, capsys, key, value, message):
    assert main([*command, f"{key}={value}"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_attention_that_the_model_lacks_is_named(command, tmp_path, capsys):
    small_config("bloom").save_pretrained(tmp_path / "bloom")
    assert main([*command, f"model.path={tmp_path / 'bloom'}", "model.attention=sdpa"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: model.attention: sdpa does not work here, eager does: Bloom")
        and "\n" not in error.strip()
    )
