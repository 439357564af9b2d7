"""Checkpoints that are in 4 bits already: what is loaded dequantizes to bitsandbytes' own values, to the bit."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dora_dist.cli import main
from dora_dist.config import DataConfig, DoraConfig, ModelConfig, QuantConfig, RunConfig
from dora_dist.errors import UserError
from dora_dist.models.build import make_blueprint
from dora_dist.quant.bitsandbytes_files import find_four_bit
from tests.support.models import letter_tokenizer, llama
from tests.support.ranks import run_ranks
from tests.support.rounding import MODEL, assert_near

functional = pytest.importorskip("bitsandbytes.functional")

QUANTIZATION = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_quant_storage": "uint8", "bnb_4bit_compute_dtype": "float32", "bnb_4bit_use_double_quant": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A Llama whose rows are whole blocks; 3 ranks cannot share its 2 rows of k and v."""
    directory = tmp_path_factory.mktemp("dense")
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 32, "head_dim": 2}
    llama(**sizes, attention_bias=True, max_position_embeddings=64).save_pretrained(directory)
    return directory


def quantized(dense, directory, nested: bool = True, block_size: int = 64, kind: str = "nf4"):
    """A copy as transformers saves it from bitsandbytes' layers."""
    shutil.copytree(dense, directory)
    tensors = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor
            continue
        codes, state = functional.quantize_4bit(
            tensor, blocksize=block_size, compress_statistics=nested, quant_type=kind
        )
        tensors[name] = codes
        tensors.update({f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()})
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    set_quantization(directory, QUANTIZATION)
    return directory


def set_quantization(directory, value) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": value}))


def theirs(directory) -> dict[str, torch.Tensor]:
    """Each 4-bit weight, dequantized by bitsandbytes alone."""
    tensors, found = load_file(directory / "model.safetensors"), {}
    for name in (n for n in tensors if n.endswith("proj.weight")):
        state = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(state, device=torch.device("cpu"))
        found[name] = functional.dequantize_4bit(tensors[name], state)
    return found


SCRIPT = """
import sys
from pathlib import Path

import torch

from dora_dist.parallel.process import Processes
from dora_dist.parallel.strategy import choose_strategy
from dora_dist.models.build import make_blueprint, sizes_of
from dora_dist.training.optim import build_to_train
from dora_dist.cli import leave
from dora_dist.config import DataConfig, DoraConfig, ModelConfig, ParallelConfig, QuantConfig, RunConfig
from dora_dist.quant.modules import BaseWeight
from dora_dist.quant.nf4 import dequantize

out, *names = sys.argv[1:]
processes, loaded = Processes(), {}
processes.start(60, needed=processes.world_size > 1)
for name in names:
    directory, strategy = name.split(":")
    config = RunConfig(
        ModelConfig(directory, dtype="float32"), DataConfig("unused"), quant=QuantConfig(scheme="nf4"),
        dora=DoraConfig(rank=2, targets=["q_proj", "k_proj", "down_proj"]),
        parallel=ParallelConfig(strategy=strategy),
    )
    blueprint = make_blueprint(config, Path(directory), processes.world_size)
    sizes = sizes_of(blueprint.model)
    built = build_to_train(blueprint, choose_strategy(config.parallel, config.train, sizes, processes))
    weights = loaded[name] = {}
    for layer_name, layer in built.model.named_modules():
        if isinstance(layer, BaseWeight) and layer.layout is not None:
            parts = [p[: layer.layout.rows].contiguous() for p in built.shards.gather(layer.weight_parts)]
            weights[f"{layer_name}.weight"] = dequantize(parts, layer.layout)
            assert parts[1].dtype == torch.float32 and len(parts) == 2
    ids = torch.tensor([[5, 9, 11, 20, 3]])
    with torch.no_grad():
        weights["logits"] = built.engine.module(input_ids=ids).logits
if processes.is_main:
    torch.save(loaded, out)
processes.stop()
leave(0)
"""


def loaded(tmp_path, ranks: int, *names: str) -> dict[str, dict[str, torch.Tensor]]:
    script, out = tmp_path / "script.py", tmp_path / f"out{ranks}.pt"
    script.write_text(SCRIPT)
    run = run_ranks(ranks, script, str(out), *names)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(out)


def dense_logits(dense, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense)
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 9, 11, 20, 3]])).logits


@pytest.mark.ranks
def test_values_are_those_of_bitsandbytes(dense, tmp_path):
    pytest.importorskip("deepspeed")
    nested = quantized(dense, tmp_path / "nested")
    plain = quantized(dense, tmp_path / "plain", nested=False)
    want = {str(directory): theirs(directory) for directory in (nested, plain)}
    single = loaded(tmp_path, 1, f"{nested}:single", f"{plain}:single")
    sharded = loaded(tmp_path, 2, f"{nested}:fsdp", f"{plain}:fsdp", f"{nested}:zero3", f"{plain}:zero3")
    for name, weights in {**single, **sharded}.items():
        expected = want[name.split(":")[0]]
        logits = weights.pop("logits")
        assert weights.keys() == expected.keys() and len(weights) == 14
        assert all(torch.equal(weights[n], expected[n]) for n in expected), name
        assert_near(logits, dense_logits(dense, expected), MODEL, about=name)


def test_any_rows_find_their_nested_scales():
    """Of 256 scales each: no weight of the model above has more."""
    weight = torch.randn(300, 64)
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    tensors = {"w.weight": codes}
    tensors |= {f"w.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    files = SimpleNamespace(
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        rows=lambda name, rows: tensors[name][rows],
    )
    stored = find_four_bit(files)["w.weight"]
    whole = stored.read(files, slice(0, 300))
    for rows in (slice(200, 290), slice(256, 300), slice(7, 8)):
        for part, values in zip(stored.read(files, rows), whole, strict=True):
            assert torch.equal(part, values[rows])


def draw(directory, scheme: str = "nf4", skip: tuple[str, ...] = ("lm_head",), **model):
    return make_blueprint(
        RunConfig(
            ModelConfig(str(directory), **model),
            DataConfig("unused"),
            dora=DoraConfig(rank=2),
            quant=QuantConfig(scheme=scheme, skip=list(skip)),
        ),
        directory,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "load_in_4bit is not set"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16'"),
    ],
)
def test_other_formats_are_refused(dense, tmp_path, changes, message):
    directory = shutil.copytree(dense, tmp_path / "other")
    set_quantization(directory, {**QUANTIZATION, **changes})
    for scheme in ("none", "nf4"):
        with pytest.raises(UserError, match=rf"^model\.path: .*quantization_config.*{message}"):
            draw(directory, scheme)
    draw(directory, init="random")  # its weights are not read


def test_what_does_not_fit_is_refused_by_name(dense, tmp_path):
    with pytest.raises(UserError, match=r"model\.path: .*set quant\.scheme=nf4$"):
        draw(quantized(dense, tmp_path / "a"), "none")
    with pytest.raises(UserError, match=r"q_proj\.weight' is in 4 bits in the checkpoint.*quant\.skip"):
        draw(tmp_path / "a", skip=("lm_head", "q_proj"))
    with pytest.raises(UserError, match=r"weight' is stored as 'fp4'"):
        draw(quantized(dense, tmp_path / "b", kind="fp4"))
    with pytest.raises(UserError, match=r"proj\.weight' has rows of (64|192) weights, .* of 128"):
        draw(quantized(dense, tmp_path / "c", block_size=128))


def test_damage_is_named(dense, tmp_path):
    directory = quantized(dense, tmp_path / "a")
    path, name = directory / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    whole = load_file(path)
    for change, message in (
        ({f"{name}.absmax": whole[f"{name}.absmax"][1:]}, r"absmax' is \[191\] of torch.uint8, not 192"),
        ({name: whole[name][:-1]}, r"up_proj\.weight' is \[6143, 1\]"),
        ({f"{name}.quant_map": whole[f"{name}.quant_map"] * 2}, "quant_map' is not that of nf4"),
        ({f"{name}.quant_state.bitsandbytes__nf4": torch.tensor([1], dtype=torch.uint8)}, "does not describe"),
    ):
        save_file({k: v.contiguous() for k, v in {**whole, **change}.items()}, path)
        with pytest.raises(UserError, match=message):
            draw(directory)
    save_file({k: v for k, v in whole.items() if not k.endswith("nested_quant_map")}, path)
    with pytest.raises(UserError, match=r"nested_quant_map' is \[\]"):
        draw(directory)


def test_what_the_checkpoint_left_in_16_bits_stays_so(dense, tmp_path):
    directory = quantized(dense, tmp_path / "a")
    tensors, wide = load_file(directory / "model.safetensors"), load_file(dense / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    kept = {key: value for key, value in tensors.items() if not key.startswith(name)}
    save_file({**kept, name: wide[name]}, directory / "model.safetensors")
    packed = draw(directory).model.model.layers[1].mlp
    assert packed.down_proj.weight.dtype == torch.bfloat16
    assert packed.up_proj.weight.dtype == torch.uint8


def test_merging_into_such_a_base(dense, tmp_path, capsys):
    """Gives the weights that bitsandbytes computes with, and the adapter's."""
    directory = quantized(dense, tmp_path / "a")
    letter_tokenizer().save_pretrained(directory)
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n' * 4)
    config = {
        "model": {"path": str(directory), "dtype": "float32"},
        "dora": {"rank": 2, "targets": ["q_proj", "k_proj", "down_proj"]},
        "quant": {"scheme": "nf4"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "seq_len": 16},
        "train": {"steps": 2, "lr": 0.01},
        "parallel": {"strategy": "single"},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["train", "--config", str(path)]) == 0
    assert main(["merge", "--config", str(path), str(tmp_path / "out")]) == 0
    merged, base = load_file(next((tmp_path / "out").glob("*.safetensors"))), theirs(directory)
    assert set(merged) == set(load_file(dense / "model.safetensors"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name, weight in base.items():
        adapted = name.split(".")[-2] in config["dora"]["targets"]
        assert torch.equal(merged[name], weight) != adapted
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=0.1)
    capsys.readouterr()
    assert main(["merge", "--config", str(path), "--base", "original", str(tmp_path / "other")]) == 2
    assert "is in 4 bits itself" in capsys.readouterr().err
    assert not list(tmp_path.glob("other*"))


def test_conv1d_layers_are_refused(tmp_path):
    """transformers stores them transposed, which a square one would not show."""
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=1, n_head=2)).save_pretrained(
        directory
    )
    tensors = load_file(directory / "model.safetensors")
    name = "transformer.h.0.attn.c_proj.weight"
    codes, state = functional.quantize_4bit(tensors[name], blocksize=64, quant_type="nf4")
    stored = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file({**tensors, name: codes, **stored}, directory / "model.safetensors", {"format": "pt"})
    set_quantization(directory, QUANTIZATION)
    config = RunConfig(
        ModelConfig(str(directory)), DataConfig("unused"), quant=QuantConfig(scheme="nf4"),
        dora=DoraConfig(targets=["c_attn"]),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"c_proj' is a Conv1D, .* use a 16-bit checkpoint"):
        make_blueprint(config, directory)
