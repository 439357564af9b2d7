"""Merging bases whose tensors transformers renames or fuses: what is written has the names that they have."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dora_dist.cli import main
from dora_dist.config import load_config
from dora_dist.dora import layers
from dora_dist.models import merge, origins
from tests.support.models import save_model
from tests.support.published import in_fp8, in_mxfp4
from tests.support.rounding import MODEL, rounding
from tests.support.small import small_config, small_model
from tests.unit.models.test_merge import NF4, half_of_B, load, logits, without_magnitude


@pytest.fixture(scope="module")
def renamed(tmp_path_factory) -> dict[str, Path]:
    """Bases whose tensors transformers renames (GPT-2 without its prefix) or fuses (experts; DeepSeek-V3 also has
    a buffer, its router's correction bias)."""
    found = {}
    for name in ("gpt2", "mixtral", "deepseek_v3", "gpt_oss"):
        torch.manual_seed(0)
        config = small_config(name)
        config.initializer_range, config.num_key_value_heads = 0.3, config.num_attention_heads
        model = type(small_model(name))(config)
        found[name] = save_model(model, tmp_path_factory.mktemp(name))
    path = found["gpt2"] / "model.safetensors"
    tensors = load_file(path)
    save_file({n.removeprefix("transformer."): t for n, t in tensors.items()}, path, {"format": "pt"})
    return found


FILE = "model-00001-of-00001.safetensors"
RENAMED = {
    "renamed, tied": ("gpt2", {"rank": 2, "targets": ["c_attn", "c_fc"]}),
    "renamed, parting": ("gpt2", {"rank": 2, "targets": ["c_attn", "wte"]}),
    "fused": ("mixtral", {"rank": 2, "targets": ["q_proj", "o_proj"], "modules_to_save": ["mlp.gate"]}),
    "fused, with a buffer": ("deepseek_v3", {"rank": 2, "targets": ["o_proj"], "magnitude_only": ["down_proj"]}),
    "fused, in 4 bits": ("mixtral", {"rank": 2, "targets": ["q_proj", "o_proj"], "quant": NF4}),
    "experts": ("mixtral", {"rank": 2, "targets": ["experts", "q_proj"]}),
    "experts, a magnitude per input": ("deepseek_v3", {"rank": 2, "targets": ["experts"], "magnitude_axis": "in"}),
    "experts, transposed": ("gpt_oss", {"rank": 2, "targets": ["experts"], "attention": "eager"}),
}


@pytest.mark.parametrize("case", RENAMED)
def test_a_base_that_transformers_renames_keeps_its_names(run, renamed, tmp_path, capsys, case):
    name, settings = RENAMED[case]
    path, adapted = run(renamed[name], **settings)
    assert main(["merge", "--config", str(path), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert "their logits differ by" in capsys.readouterr().out
    wanted, merged = logits(adapted), load(tmp_path / "out")
    assert (logits(merged) - wanted).norm() <= rounding(MODEL, torch.float32) * wanted.norm()
    if name == "gpt2":  # transformers compares the tensors when it loads them; other readers go by this
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config.get("tie_word_embeddings", True) == (case == "renamed, tied")
    else:
        written, base = load_file(tmp_path / "out" / FILE), load_file(renamed[name] / "model.safetensors")
        assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in base.items()}
        experts = [n for n in base if ".experts." in n]
        changed = "experts" in settings["targets"] or "quant" in settings
        parts = settings.get("magnitude_only", [".experts."] if changed else [])
        kept = [n for n in experts if not any(key in n for key in parts) or n.endswith("bias")]
        assert experts and [n for n in experts if torch.equal(written[n], base[n])] == kept


QUANTIZED = {
    "fp8": ("qwen3_moe", lambda path: in_fp8(path, (8, 4)), {}),
    "fp8, in 4 bits": ("qwen3_moe", lambda path: in_fp8(path, (8, 4)), {"quant": NF4}),
    "mxfp4": ("gpt_oss", in_mxfp4, {"attention": "eager"}),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_a_quantized_base_is_written_in_the_dtype_of_the_run(run, tmp_path, capsys, case):
    name, quantize, settings = QUANTIZED[case]
    torch.manual_seed(0)
    config = small_config(name)
    config.initializer_range, config.intermediate_size = 0.3, 64
    base = save_model(AutoModelForCausalLM.from_config(config), tmp_path / "base")
    shapes = {key: tensor.shape for key, tensor in load_file(base / "model.safetensors").items()}
    quantize(base)
    path, adapted = run(base, rank=2, targets=["q_proj", "o_proj"], **settings)
    assert main(["merge", "--config", str(path), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    written = load_file(tmp_path / "out" / FILE)
    assert {key: tensor.shape for key, tensor in written.items()} == shapes
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    wanted = logits(adapted)
    assert (logits(load(tmp_path / "out")) - wanted).norm() <= rounding(MODEL, torch.float32) * wanted.norm()


@pytest.mark.parametrize("wrong", [without_magnitude, half_of_B])
def test_a_wrong_merge_of_a_renamed_base_is_found(run, renamed, tmp_path, monkeypatch, wrong):
    path, _ = run(renamed["gpt2"], rank=2, targets=["c_attn"])
    monkeypatch.setattr(layers, "merge_", wrong)
    with pytest.raises(RuntimeError, match="random vectors"):
        merge.run_merge(load_config(path), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_renamed_base_in_several_files(run, renamed, tmp_path, capsys):
    path, _ = run(renamed["mixtral"], rank=2, targets=["q_proj"], quant=NF4)
    merge.run_merge(load_config(path), tmp_path / "out", base="original", max_shard_bytes=20_000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    told = capsys.readouterr().out
    assert len(files) > 3 and f"in {len(files)} files" in told
    assert "merged weights differ by" in told


def test_a_base_that_cannot_be_read_by_slices_is_loaded_whole(run, renamed, tmp_path, monkeypatch, capsys):
    """It is written under the model's own names, which transformers loads, too."""
    path, adapted = run(renamed["mixtral"], rank=2, targets=["q_proj"])
    monkeypatch.setattr(origins, "_converted", lambda *_: {})
    monkeypatch.setattr(merge, "free_host_memory", lambda: 1000.0)
    assert main(["merge", "--config", str(path), str(tmp_path / "out")]) == 2
    assert "'model.layers.0.mlp.experts.gate_up_proj' cannot be read" in capsys.readouterr().err
    monkeypatch.setattr(merge, "free_host_memory", lambda: 1e12)
    assert main(["merge", "--config", str(path), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert "rank 0 loads all weights" in capsys.readouterr().out
    wanted, merged = logits(adapted), load(tmp_path / "out")
    assert (logits(merged) - wanted).norm() <= rounding(MODEL, torch.float32) * wanted.norm()
