"""Merging bases whose tensors transformers renames or fuses: it loads and saves them whole."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_dist.cli import main
from dora_dist.config import load_config
from dora_dist.dora import layers
from dora_dist.models import merge, merge_loaded
from tests.support.models import letter_tokenizer, save_model
from tests.support.rounding import MODEL, rounding
from tests.support.small import small_config, small_model
from tests.unit.models.test_merge import NF4, half_of_B, load, logits, without_magnitude


@pytest.fixture(scope="module")
def renamed(tmp_path_factory) -> dict[str, Path]:
    """Bases whose tensors transformers renames (GPT-2 without its prefix) or fuses (experts; DeepSeek-V3 also has
    a buffer, its router's correction bias)."""
    found = {}
    for name in ("gpt2", "mixtral", "deepseek_v3"):
        torch.manual_seed(0)
        config = small_config(name)
        config.initializer_range, config.num_key_value_heads = 0.3, config.num_attention_heads
        model = type(small_model(name))(config)
        found[name] = save_model(model, tmp_path_factory.mktemp(name))
    path = found["gpt2"] / "model.safetensors"
    tensors = load_file(path)
    save_file({n.removeprefix("transformer."): t for n, t in tensors.items()}, path, {"format": "pt"})
    return found


RENAMED = {
    "renamed, tied": ("gpt2", {"rank": 2, "targets": ["c_attn", "c_fc"]}),
    "renamed, parting": ("gpt2", {"rank": 2, "targets": ["c_attn", "wte"]}),
    "fused": ("mixtral", {"rank": 2, "targets": ["q_proj", "o_proj"], "modules_to_save": ["mlp.gate"]}),
    "fused, with a buffer": ("deepseek_v3", {"rank": 2, "targets": ["o_proj"], "magnitude_only": ["down_proj"]}),
    "fused, in 4 bits": ("mixtral", {"rank": 2, "targets": ["q_proj", "o_proj"], "quant": NF4}),
}


@pytest.mark.parametrize("case", RENAMED)
def test_a_base_that_transformers_renames_is_merged_by_it(run, renamed, tmp_path, capsys, case):
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
        written, base = (load_file(d / "model.safetensors") for d in (tmp_path / "out", renamed[name]))
        assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in base.items()}
        experts = [n for n in base if ".experts." in n]
        kept = [n for n in experts if not ("down" in n and "magnitude_only" in settings)]
        assert kept and [n for n in experts if torch.equal(written[n], base[n])] == kept


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


def test_a_base_that_memory_does_not_hold_is_refused_with_a_way_that_works(
    run, renamed, tmp_path, monkeypatch, capsys
):
    path, _ = run(renamed["mixtral"], rank=2, targets=["q_proj"])
    monkeypatch.setattr(merge_loaded, "available_memory", lambda: 1000.0)
    assert main(["merge", "--config", str(path), str(tmp_path / "out")]) == 2
    assert "save_pretrained(DIRECTORY, save_original_format=False)" in capsys.readouterr().err
    anew = tmp_path / "anew"
    load(renamed["mixtral"]).save_pretrained(anew, save_original_format=False)
    letter_tokenizer().save_pretrained(anew)
    words = ["merge", "--config", str(path), str(tmp_path / "out"), f"model.path={anew}"]
    assert main([*words, "dora.accept_other_base=true"]) == 0, capsys.readouterr().err
