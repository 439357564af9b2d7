"""Layers that take no part in the loss of text are found before any weight is read, or else by the first forward:
left out with one line, refused where nothing else is meant, and the others are not touched."""

import json
import re
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dora_dist.cli import main
from dora_dist.config import DoraConfig, ModelConfig
from dora_dist.dora.inject import inject_dora
from dora_dist.errors import UserError
from dora_dist.models import build
from dora_dist.models.huggingface import meta_model
from dora_dist.models.participation import idle_modules, refuse_idle
from tests.support.models import save_model, train_command
from tests.support.ranks import run_ranks
from tests.support.small import small_config, small_model


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


def test_experts_that_no_token_can_reach_take_no_part(tmp_path):
    """Found by the factor on their parameter: nothing calls them."""
    model = drawn("qwen3_moe", tmp_path)
    model.model.layers[1].mlp.forward = lambda x: x
    model.model.layers[1].passes_on = True  # so it is another kind of block than the first
    assert {name for name in idle_modules(model) if name.endswith("_proj")} == {
        f"model.layers.1.mlp.experts.{key}" for key in ("gate_up_proj", "down_proj")
    }
    inject_dora(model, DoraConfig(rank=2, targets=["experts"]), idle=idle_modules(model))
    assert set(model.dora.left_out) == {
        f"model.layers.1.mlp.experts.{key}" for key in ("gate_up_proj", "down_proj")
    }


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
        self.norms = nn.ModuleDict({"used": nn.LayerNorm(4), "idle": nn.LayerNorm(4)})

    def forward(self, input_ids):
        x = self.words(input_ids)
        for block in self.blocks:
            y = block["b"](x)
            x = block["a"](x) + (0 if block.throws else y)
        return Output(logits=self.norms["used"](x) @ self.aside.weight)


def test_a_block_of_each_kind_stands_for_the_others():
    with torch.device("meta"):
        model = Blocks()
    thrown_away = {f"blocks.{i}.b" for i in (1, 3, 5)}
    assert idle_modules(model, ["unused"]) == thrown_away | {"unused", "aside"}
    # What is trained in full needs no call.
    assert idle_modules(model, ["unused", "aside"]) == thrown_away | {"unused"}


def test_what_a_name_means_is_what_takes_part():
    def choose(**settings):
        with torch.device("meta"):
            model = Blocks()
        config = DoraConfig(rank=1, **settings)
        return inject_dora(model, config, None, idle_modules(model, config.modules_to_save)).dora

    thrown_away = tuple(f"blocks.{i}.b" for i in (1, 3, 5))
    for pattern in ("b", "blocks.*.b"):
        found = choose(targets=["a", pattern])
        assert {n for n in found.layers if n.endswith("b")} == {f"blocks.{i}.b" for i in (0, 2, 4)}
        assert found.left_out == thrown_away
    assert choose(targets="all-linear").left_out == (*thrown_away, "aside")
    assert choose(targets=["a"]).left_out == ()
    found = choose(targets=["a"], magnitude_only=["b"])
    assert len(found.layers) == 9 and found.left_out == thrown_away
    found = choose(targets=["a"], modules_to_save=["aside", "b"])
    assert found.saved == ("blocks.0.b", "blocks.2.b", "blocks.4.b", "aside") and found.left_out == thrown_away
    for key, pattern, told in (
        ("targets", "blocks.[135].b", "'blocks.1.b' and other modules that take no part"),
        ("targets", "^blocks.3.b", "'blocks.3.b', which takes no part"),
        ("magnitude_only", "aside", "'aside', which takes no part"),
        ("modules_to_save", "unused", "'unused', which takes no part"),
        ("modules_to_save", "blocks", "'blocks' holds 'blocks.1.b', which takes no part"),
        ("modules_to_save", "norms", "'norms' holds 'norms.idle', which takes no part"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            choose(**{"targets": ["a"], key: [pattern]})


def test_code_that_counts_its_blocks_is_tried_whole():
    class Counts(Blocks):
        def forward(self, input_ids):
            assert len(self.blocks) == 6
            return super().forward(input_ids)

    with torch.device("meta"):
        model = Counts()
    assert idle_modules(model) == {f"blocks.{i}.b" for i in (1, 3, 5)} | {"aside"}


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
    return train_command(
        tmp_path,
        model={"path": str(gemma3), "dtype": "float32", "attention": "eager"},
        dora={"rank": 2, "targets": "all-linear"},
        data={"train": str(tiny_rows), "seq_len": 16},
        train={"steps": 1},
    )


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, o_proj]"])
def test_they_are_left_out_with_one_line(command, tmp_path, capsys, targets):
    assert main([*command, f"dora.targets={targets}"]) == 0
    adapted, line, *_ = capsys.readouterr().out.partition("adapted: ")[2].splitlines()
    assert adapted.endswith(" % of the base's weights")
    assert line.startswith("left out, as they take no part in the loss of text: model.vision_tower.")
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    moved = {name for name, tensor in trained.items() if "lora_B" in name and tensor.any()}
    assert moved == {name for name in trained if "lora_B" in name}
    assert any(name.endswith("q_proj.lora_B.weight") for name in moved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dora.targets", "[fc1, q_proj]", "'fc1' means '.*vision.*fc1' and other modules"),
        ("dora.targets", "['*vision*q_proj']", "vision.*q_proj' and other modules"),
        ("dora.modules_to_save", "[vision_tower]", "dora.modules_to_save: 'vision_tower' means "),
    ],
)  # fmt: skip
def test_who_means_them_alone_is_told(command, capsys, key, value, message):
    assert main([*command, f"{key}={value}"]) == 2
    assert re.search(message, capsys.readouterr().err)


TEXT = "dora.targets=['*language_model*_proj']"


def test_where_it_is_unknown_the_first_forward_changes_nothing_else(command, tmp_path, capsys, monkeypatch):
    losses = []
    for unknown in (False, True):
        if unknown:
            monkeypatch.setattr(build, "idle_modules", lambda *_: None)
        out = tmp_path / str(unknown)
        assert main([*command, TEXT, "dora.dropout=0.5", "train.steps=3", "log.every=1", f"output_dir={out}"]) == 0
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in metrics if "loss" in line])
    assert len(losses[0]) == 3 and losses[0] == losses[1]


def train_unknowing(command: list[str]) -> None:
    build.idle_modules = lambda *_: None
    raise SystemExit(main(command))


UNKNOWN = {
    "ddp": [],
    "fsdp": ["train.activation_checkpointing=true", "train.accumulation=2"],
    "zero2": [],
    "zero3": ["train.accumulation=2"],
}


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3", pytest.param("zero2", marks=pytest.mark.slow)])
def test_where_it_is_unknown_the_first_forward_tells(command, strategy):
    settings = [*command, f"parallel.strategy={strategy}", "train.steps=2", *UNKNOWN[strategy]]
    ended = run_ranks(2, train_unknowing, settings)
    assert ended.statuses[0] == 2 and ended.statuses[1] != 0, ended.stderr[-3000:]
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"targets: no gradient of the loss of text reaches model\.vision_tower\S+ \(2\), ", line)
    assert line.endswith("; name other modules, such as 'model.language_model.layers.*'")
    ended = run_ranks(2, train_unknowing, [*settings, TEXT])
    assert ended.statuses == [0, 0], ended.stderr[-3000:]


@pytest.mark.parametrize("reached_elsewhere", [True, False])
def test_what_the_rows_of_another_rank_reach_takes_part(reached_elsewhere):
    """As a mixture's expert may."""

    class TwoRanks:
        device = torch.device("cpu")

        def agree(self, values):
            return lambda: [max(own, int(reached_elsewhere)) for own in values]

    experts = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model = inject_dora(experts, DoraConfig(rank=1, targets=["a", "b"]))
    told = nullcontext() if reached_elsewhere else pytest.raises(UserError, match="reaches 'b'|reaches b")
    with told:
        refuse_idle(model, lambda: model["a"](torch.ones(1, 2)).sum(), TwoRanks())


def test_an_attention_that_the_model_lacks_is_named(command, tmp_path, capsys):
    small_config("bloom").save_pretrained(tmp_path / "bloom")
    assert main([*command, f"model.path={tmp_path / 'bloom'}", "model.attention=sdpa"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: model.attention: sdpa does not work here, eager does: Bloom")
        and "\n" not in error.strip()
    )
