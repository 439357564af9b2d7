"""The merge verb: its logits are the adapter run's, its directory is whole or absent."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dora_dist.cli import main
from dora_dist.config import load_config
from dora_dist.dora import layers, norm_math
from dora_dist.models import merge, merge_weights
from tests.support.ranks import run_ranks
from tests.support.rounding import MODEL, assert_near, rounding

NF4 = {"scheme": "nf4", "block_size": 32}
GPT2 = {"rank": 2, "targets": ["c_attn", "c_proj", "c_fc"]}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40).view(1, -1)).logits.float()


def load(directory: Path, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, **kwargs).eval()


CASES = {
    "dora": {},
    "lora": {"method": "lora", "rank": 2, "targets": ["q_proj", "down_proj"]},
    "axis in, magnitude alone": {
        "rank": 2, "targets": ["q_proj"], "magnitude_only": ["o_proj"], "magnitude_axis": "in",
    },
    "nf4": {"quant": NF4},
    "nf4 in bfloat16": {"quant": NF4, "dtype": "bfloat16"},
    "saved": {"rank": 2, "targets": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "nf4 and saved in bfloat16": {
        "quant": NF4, "dtype": "bfloat16", "rank": 2, "targets": ["q_proj"], "modules_to_save": ["lm_head"],
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_merged_logits_are_the_adapters(run, tmp_path, capsys, case):
    path, adapted = run(**CASES[case])
    assert main(["merge", "--config", str(path), str(tmp_path / "out")]) == 0
    assert "their logits differ by" in capsys.readouterr().out
    wanted, dtype = logits(adapted), torch.bfloat16 if "bfloat16" in case else torch.float32
    merged = load(tmp_path / "out", dtype=dtype)
    bound = rounding(1, dtype) if dtype == torch.bfloat16 else rounding(MODEL, dtype)
    assert (logits(merged) - wanted).norm() <= bound * wanted.norm()
    tensors = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert {t.dtype for t in tensors.values()} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize(
    ("changes", "tied"),
    [({}, True), ({"targets": ["c_attn", "wte"]}, False), ({"modules_to_save": ["wte", "lm_head"]}, True)],
    ids=["tied", "embedding adapted", "embedding saved"],
)
def test_transposed_layers_and_tied_embeddings(run, tiny_gpt2, tmp_path, changes, tied):
    path, adapted = run(tiny_gpt2, **{**GPT2, **changes})
    assert main(["merge", "--config", str(path), str(tmp_path / "out")]) == 0
    merged = load(tmp_path / "out")
    assert_near(logits(merged), logits(adapted), MODEL)
    assert (merged.lm_head.weight is merged.transformer.wte.weight) == tied


def test_transposed_4_bit_weights(run, tiny_gpt2, tmp_path):
    path, adapted = run(tiny_gpt2, quant={**NF4, "double_quant": False, "skip": ["lm_head", "c_fc"]}, **GPT2)
    assert main(["merge", "--config", str(path), str(tmp_path / "out")]) == 0
    assert_near(logits(load(tmp_path / "out")), logits(adapted), MODEL)


def test_the_original_base_of_a_4_bit_run(run, tiny_llama, tmp_path, capsys):
    path, _ = run(quant=NF4)
    assert main(["merge", "--config", str(path), "--base", "original", str(tmp_path / "original")]) == 0
    told = capsys.readouterr().out
    assert main(["merge", "--config", str(path), str(tmp_path / "dequantized")]) == 0
    assert "original against" not in capsys.readouterr().out
    base, original, dequantized = (
        load(p).state_dict() for p in (tiny_llama, tmp_path / "original", tmp_path / "dequantized")
    )
    packed = [n for n in base if n.endswith("_proj.weight")]
    difference = torch.cat([(original[n] - dequantized[n]).flatten() for n in packed]).norm()
    ratio = difference / torch.cat([dequantized[n].flatten() for n in packed]).norm()
    assert f"{len(packed)} merged weights differ by {ratio:.3g} of" in told
    assert 0.01 < ratio < 0.2
    untouched = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(original[untouched], base[untouched])
    assert not torch.equal(dequantized[untouched], base[untouched])


def test_several_files_and_their_index(run, tiny_llama, tmp_path):
    path, adapted = run()
    adapter, out = (tmp_path / "run" / "adapter").rename(tmp_path / "elsewhere"), tmp_path / "deep" / "out"
    merge.run_merge(load_config(path), out, adapter, max_shard_bytes=3000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert [f.name for f in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    held = {f.name: load_file(f) for f in files}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    sizes = [[t.nbytes for t in tensors.values()] for tensors in held.values()]
    assert all(sum(size) <= 3000 or len(size) == 1 for size in sizes)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert_near(logits(load(out)), logits(adapted), MODEL)
    assert {p.name for p in tiny_llama.iterdir()} - {p.name for p in out.iterdir()} == {"model.safetensors"}


def test_one_model_is_held_at_a_time(run, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    path, _ = run()
    built, read, held = [], LlamaForCausalLM.from_pretrained, []

    def build(blueprint, strategy):
        built.append(merge_build(blueprint, strategy))
        return built[0]

    def from_pretrained(*args, **kwargs):
        held.extend(t.nbytes for t in built[0].model.state_dict().values() if not t.is_meta)
        return read(*args, **kwargs)

    merge_build = merge.build
    monkeypatch.setattr(merge, "build", build)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", from_pretrained)
    merge.run_merge(load_config(path), tmp_path / "out")
    assert built and held == []


def without_magnitude(weight, L, U, scaling, ratio, dim):
    norm_math.merge_(weight, L, U, scaling, None, dim)


def half_of_B(weight, L, U, scaling, ratio, dim):
    norm_math.merge_(weight, L, U, scaling / 2, ratio, dim)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [without_magnitude, half_of_B, lambda weight, *_: weight])
def test_a_wrong_merge_is_found(run, tmp_path, monkeypatch, wrong, dtype):
    """Tensor by tensor, in what was written."""
    path, _ = run(dtype=dtype, quant=NF4)
    monkeypatch.setattr(layers, "merge_", wrong)
    with pytest.raises(RuntimeError, match="random vectors"):
        merge.run_merge(load_config(path), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_of_another_base_is_found(run, tmp_path, monkeypatch, dtype):
    """Where each tensor is what it should be, and the model is not: its logits tell."""
    path, _ = run(dtype=dtype)
    monkeypatch.setattr(
        merge,
        "write_weights",
        lambda entries, *rest: merge_weights.write_weights([*entries[:-1], swapped(entries)], *rest),
    )
    with pytest.raises(RuntimeError, match="their logits differ"):
        merge.run_merge(load_config(path), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def swapped(entries):
    """The last tensor from the file's first one of its shape."""
    last = entries[-1]
    other = next(e for e in entries if e.shape == last.shape and e.name != last.name)
    return dataclasses.replace(last, source=other.source)


def test_an_error_half_way_leaves_nothing(run, tmp_path, monkeypatch):
    path, _ = run()
    written = []

    def fail(tensors, file, metadata):
        if len(written) == 2:
            raise OSError("full")
        written.append(file)
        save_file(tensors, file, metadata)

    monkeypatch.setattr(merge_weights, "save_file", fail)
    with pytest.raises(OSError, match="full"):
        merge.run_merge(load_config(path), tmp_path / "out", max_shard_bytes=3000)
    assert written and not list(tmp_path.glob("out*"))


def merge_and_die(config: Path, out: Path) -> None:
    def save(tensors, file, metadata):
        file.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    merge_weights.save_file = save
    main(["merge", "--config", str(config), str(out)])


@pytest.mark.ranks
def test_a_kill_half_way_leaves_no_directory_of_that_name(run, tmp_path):
    path, _ = run()
    done = run_ranks(1, merge_and_die, path, tmp_path / "out")
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [p.name.rpartition("-")[0] for p in tmp_path.glob("out*")] == ["out.partial"]
    assert main(["merge", "--config", str(path), str(tmp_path / "out")]) == 0


def test_mistakes_are_one_line(run, tmp_path, capsys):
    path, _ = run()

    def told(*arguments) -> str:
        assert main(["merge", "--config", str(path), *map(str, arguments)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error
        return error

    (tmp_path / "empty").mkdir()
    assert "empty: exists already" in told(tmp_path / "empty")
    assert "nowhere: not a PEFT adapter" in told("--adapter", tmp_path / "nowhere", tmp_path / "out")
    assert "scales" in told(tmp_path / "out", "dora.alpha=3")
    assert "model.init: random" in told(tmp_path / "out", "model.init=random")
    assert "data.train" in told(tmp_path / "out", "data.train=./nothing.jsonl")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in told(tmp_path / "file" / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_same_base_may_have_moved(run, tiny_llama, tmp_path, capsys):
    path, _ = run()
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    config = tmp_path / "run" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(tiny_llama)}))
    assert main(["merge", "--config", str(path), str(tmp_path / "right"), f"model.path={other}"]) == 0
    assert "warning" not in capsys.readouterr().out
    tensors = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    save_file(load_file(tensors), tensors)  # as PEFT writes it: nothing but the path is known
    assert main(["merge", "--config", str(path), str(tmp_path / "out"), f"model.path={other}"]) == 0
    assert f"trained on {str(tiny_llama)!r}; merging it into {str(other)!r}" in capsys.readouterr().out


def test_another_base_than_the_adapters_is_refused_unless_accepted(run, tiny_llama, tmp_path, capsys):
    path, _ = run()
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    arguments = ["merge", "--config", str(path), str(tmp_path / "out"), f"model.path={other}"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "was trained on another base" in error and "dora.accept_other_base=true" in error and "\n" not in error
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "dora.accept_other_base=true"]) == 0


def test_another_quantization_than_the_adapters_is_told(run, tmp_path, capsys):
    path, _ = run(quant=NF4)
    assert main(["merge", "--config", str(path), str(tmp_path / "right")]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["merge", "--config", str(path), str(tmp_path / "out"), "quant.scheme=none"]) == 0
    told = "with quantization nf4 (block_size 32, double_quant true), this one's is none"
    assert told in capsys.readouterr().err


def test_buffers_are_the_checkpoints(run, tiny_llama, tmp_path, monkeypatch):
    """A persistent buffer is not made anew."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    made = LlamaModel.__init__

    def with_buffer(self, config):
        made(self, config)
        self.register_buffer("scale", torch.tensor([1.0]))

    monkeypatch.setattr(LlamaModel, "__init__", with_buffer)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama))
    model.model.scale.fill_(3.0)
    shutil.copytree(tiny_llama, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    path, _ = run(tmp_path / "model", rank=2, targets=["q_proj"])
    assert main(["merge", "--config", str(path), str(tmp_path / "out")]) == 0
    assert load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")["model.scale"].item() == 3.0


def test_a_classifier_with_its_new_head(tiny_llama, tmp_path):
    from transformers import AutoModelForSequenceClassification

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "abc"[: i % 3 + 1], "label": i % 3}) + "\n" for i in range(6)))
    config = {
        "model": {"path": str(tiny_llama), "task": "sequence_classification", "num_labels": 3, "dtype": "float32"},
        "dora": {"rank": 2, "targets": ["q_proj"]},
        "data": {"train": str(rows), "seq_len": 16},
        "train": {"steps": 1, "lr": 0.1},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 0
    assert main(["merge", "--config", str(tmp_path / "run" / "config.yaml"), str(tmp_path / "out")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.num_labels == 3 and merged.config.pad_token_id == 0
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert torch.equal(merged.score.weight, trained["base_model.model.score.weight"])
