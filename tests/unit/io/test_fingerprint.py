"""What identifies a base, a tokenizer and data: what changes them, and what must not."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_dist import DoraConfig, UserError, inject_dora, load_adapter, save_adapter
from dora_dist.cli import main
from dora_dist.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from dora_dist.data.run_data import RunData, load_tokenizer
from dora_dist.data.sources import find_source
from dora_dist.io.fingerprint import Base, base_fingerprint, tokenizer_fingerprint
from dora_dist.models.build import make_blueprint
from dora_dist.models.files import SafetensorsFiles
from dora_dist.parallel.process import Processes
from tests.support.data import load, make_tokenizer, write_jsonl
from tests.support.models import letter_tokenizer, llama
from tests.support.peft import CASES, logits, ours, randomized
from tests.support.rounding import MODEL, assert_near


def of(path, **settings) -> str:
    return base_fingerprint(SafetensorsFiles(path, **settings), path)


@pytest.fixture
def copy(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


def edit(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_base_is_the_same_however_it_is_spread_over_files(tiny_llama, copy, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="3KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    shutil.copy(tiny_llama / "config.json", tmp_path / "sharded")
    edit_config(copy, transformers_version="0", torch_dtype="float16", _name_or_path="elsewhere", use_cache=False)
    edit(copy, lambda tensors: None)
    assert of(tiny_llama) == of(copy) == of(tmp_path / "sharded")


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda p: edit(p, lambda t: t[NAME].add_(1e-3)),
        lambda p: edit(p, lambda t: t[NAME].view(-1)[-1:].add_(1)),
        lambda p: edit(p, lambda t: t.update({NAME: t[NAME].bfloat16()})),
        lambda p: edit(p, lambda t: t.update({NAME: t[NAME].reshape(12, 17)})),
        lambda p: edit(p, lambda t: t.update({"other": t.pop(NAME)})),
        lambda p: edit_config(p, rope_theta=5),
        lambda p: edit_config(p, rms_norm_eps=1e-3),
    ],
)
def test_another_base_is_another(tiny_llama, copy, change):
    change(copy)
    assert of(copy) != of(tiny_llama)


def test_a_large_tensor_is_sampled_from_start_to_end(tmp_path):
    """Changes that a training makes are found; of single bytes those in the windows."""
    (tmp_path / "config.json").write_text("{}")
    weight = torch.arange(1 << 18, dtype=torch.int32)
    found = set()
    for changed in (slice(0, 0), slice(0, 1), slice(-1, None), slice(0, None, 64), slice(1 << 17, 1 << 18)):
        tensor = weight.clone()
        tensor[changed] += 1
        save_file({"w": tensor}, tmp_path / "model.safetensors")
        found.add(of(tmp_path))
    assert len(found) == 5


def test_random_and_pickled_bases(tiny_llama, copy):
    assert base_fingerprint(None, tiny_llama, 1) == base_fingerprint(None, copy, 1)
    assert len({base_fingerprint(None, copy, 1), base_fingerprint(None, copy, 2), of(copy)}) == 3
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    first = of(copy, allow_pickle=True)
    torch.save({"w": torch.ones(3)}, copy / "pytorch_model.bin")
    assert of(copy, allow_pickle=True) != first


def test_a_tokenizer_is_the_same_whatever_it_encoded():
    tokenizer = make_tokenizer()
    first = tokenizer_fingerprint(tokenizer)
    untouched = tokenizer.backend_tokenizer.to_str()
    tokenizer(["fox", "the dog"], truncation=True, max_length=3, padding=True)
    assert tokenizer.backend_tokenizer.to_str() != untouched, "encoding left nothing behind, so this shows nothing"
    assert tokenizer_fingerprint(tokenizer) == first == tokenizer_fingerprint(make_tokenizer())


def test_another_tokenizer_is_another(tmp_path):
    changed = [make_tokenizer(), make_tokenizer(bos=False), make_tokenizer(end=True), letter_tokenizer()]
    for change in (
        lambda t: setattr(t, "chat_template", "{{ messages }}"),
        lambda t: setattr(t, "eos_token", "<pad>"),
        lambda t: t.add_tokens(["<new>"]),
        lambda t: setattr(t, "model_input_names", ["input_ids", "token_type_ids"]),
    ):
        changed.append(make_tokenizer())
        change(changed[-1])
    assert len({tokenizer_fingerprint(t) for t in changed}) == len(changed)


ROWS = [{"prompt": "the fox:", "completion": " jumps"}, {"prompt": "the dog:", "completion": " sleeps"}]


def test_encoded_rows(tmp_path):
    def fingerprint(rows, **settings):
        return load(write_jsonl(tmp_path / "a.jsonl", rows), **settings).fingerprint

    first = fingerprint(ROWS)
    assert fingerprint([{**row, "unused": 1} for row in ROWS]) == first
    others = [
        fingerprint(ROWS[::-1]), fingerprint(ROWS[:1]), fingerprint(ROWS, loss_on="all"),
        fingerprint(ROWS, seq_len=6),
        fingerprint([{**ROWS[0], "completion": " jumpz"}, ROWS[1]]),
    ]  # fmt: skip
    assert len({first, *others}) == 6
    examples = load(str(tmp_path / "a.jsonl"))
    labelled = dataclasses.replace(examples, labels=np.array([1]))
    assert examples.fingerprint != labelled.fingerprint


def test_sources(tmp_path):
    def fingerprint(directory):
        return find_source(str(tmp_path / directory)).fingerprint

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", ROWS)
        write_jsonl(tmp_path / name / "b.jsonl", ROWS[:1])
    first = fingerprint("one")
    assert fingerprint("two") == first
    (tmp_path / "two" / "b.jsonl").rename(tmp_path / "two" / "c.jsonl")
    renamed = fingerprint("two")
    write_jsonl(tmp_path / "two" / "a.jsonl", ROWS[::-1])
    assert len({first, renamed, fingerprint("two"), fingerprint("one/a.jsonl")}) == 4
    shutil.copy(tmp_path / "one" / "a.jsonl", tmp_path / "x.jsonl")
    assert fingerprint("one/a.jsonl") == fingerprint("x.jsonl")
    hub = {find_source(name).fingerprint for name in ("org/one", "org/two")}
    assert len(hub) == 2


def test_a_runs_data(tiny_llama, tiny_rows, tmp_path):
    def fingerprints(**data):
        config = RunConfig(ModelConfig(str(tiny_llama)), DataConfig(train=str(tiny_rows), seq_len=48, **data))
        config = dataclasses.replace(config, dora=DoraConfig(rank=2), train=TrainConfig(steps=1))
        tokenizer = load_tokenizer(tiny_llama)
        model = make_blueprint(config, tiny_llama).model
        return RunData(config.data, config.train, config.model.task, model, tokenizer, Processes()).fingerprints()

    first, evaluated, streamed = fingerprints(), fingerprints(eval=str(tiny_rows)), fingerprints(streaming=True)
    assert first["tokenizer"] == tokenizer_fingerprint(load_tokenizer(tiny_llama))
    assert first["eval"] == "none" and evaluated == {**first, "eval": first["train"]}
    assert streamed == {**first, "train": find_source(str(tiny_rows)).fingerprint}


def adapted(base: Base | None):
    return inject_dora(llama(), DoraConfig(rank=3, alpha=7, targets=CASES["llama"].targets), base).eval()


def test_an_adapter_names_its_base_and_peft_reads_it_all_the_same(tmp_path):
    from peft import PeftModel

    model = randomized(adapted(Base("a" * 64, "none")))
    save_adapter(model, tmp_path / "known")
    save_adapter(randomized(ours(CASES["llama"])), tmp_path / "unknown")
    file = tmp_path / "known" / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "base_fingerprint": "a" * 64, "base_quantization": "none"}
    for _ in range(5):  # safetensors orders metadata at random, each time anew
        save_adapter(model, tmp_path / "again")
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    plain = load_file(tmp_path / "unknown" / file.name)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in load_file(file).items())
    peft = PeftModel.from_pretrained(llama(), tmp_path / "known").eval()
    held = {name.replace(".default", ""): tensor for name, tensor in peft.state_dict().items()}
    for name, tensor in plain.items():
        assert torch.equal(held[name if name in held else name + ".weight"], tensor), name
    assert_near(logits(peft), logits(model), MODEL)


def test_an_adapter_of_another_base_is_refused_unless_accepted(tmp_path, capsys):
    save_adapter(randomized(adapted(Base("a" * 64, "nf4 (...)"))), tmp_path)
    fresh = adapted(Base("b" * 64))
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(UserError, match=r"another base \(fingerprint a{12}, this model's is b{12}\); set dora"):
        load_adapter(fresh, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    want = logits(load_adapter(llama(), tmp_path).eval())  # a bare model's base is not known
    assert capsys.readouterr().err == ""
    assert torch.equal(logits(load_adapter(fresh, tmp_path, accept_other_base=True)), want)
    assert "warning: " in capsys.readouterr().err
    assert torch.equal(logits(load_adapter(adapted(Base("a" * 64, "nf4 (...)")), tmp_path)), want)
    assert torch.equal(logits(load_adapter(adapted(None), tmp_path)), want)
    assert capsys.readouterr().err == ""


def test_a_run_continues_only_from_an_adapter_of_its_base(tiny_llama, copy, tiny_rows, tmp_path, capsys):
    text = f"""
model: {{path: {tiny_llama}, dtype: float32}}
dora: {{rank: 2, targets: [q_proj]}}
data: {{train: {tiny_rows}, seq_len: 48}}
train: {{steps: 1}}
output_dir: {tmp_path}/run
"""
    (tmp_path / "c.yaml").write_text(text)
    arguments = ["train", "--config", str(tmp_path / "c.yaml")]
    assert main(arguments) == 0
    again = [*arguments, f"dora.init_from={tmp_path}/run/adapter", f"output_dir={tmp_path}/again"]
    assert main(again) == 0
    edit(copy, lambda tensors: tensors[NAME].add_(0.1))
    capsys.readouterr()
    assert main([*again, f"model.path={copy}"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: dora.init_from: ") and "another base" in error and "\n" not in error
    assert main([*again, f"model.path={copy}", "dora.accept_other_base=true"]) == 0
