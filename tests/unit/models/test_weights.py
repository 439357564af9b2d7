"""Weights reach the model by slices, through transformers where nothing else reads them, or from a seed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_dist.cli import main
from dora_dist.config import DataConfig, DoraConfig, ModelConfig, RunConfig
from dora_dist.errors import UserError
from dora_dist.models import weights
from dora_dist.models.build import build, make_blueprint
from dora_dist.models.files import SafetensorsFiles
from dora_dist.parallel.process import Processes
from dora_dist.parallel.replicated import Single
from dora_dist.parallel.shards import Rectangle
from tests.support import ROOT
from tests.support.models import save_model
from tests.support.ranks import run_ranks
from tests.support.rounding import MODEL, assert_near
from tests.support.small import small_config

IDS = torch.tensor([[5, 9, 11, 20, 3]])


def built(path, **model):
    config = RunConfig(
        model=ModelConfig(path=str(path), dtype="float32", **model),
        dora=DoraConfig(rank=2, targets="all-linear"),
        data=DataConfig(train="unused"),
    )
    return build(make_blueprint(config, path), Single(Processes())).model


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_step_zero_is_the_base_model(name, request):
    from transformers import AutoModelForCausalLM

    path = request.getfixturevalue(name)
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(path)(input_ids=IDS).logits
        got = built(path)(input_ids=IDS).logits
    assert_near(got, want, MODEL)


def test_step_zero_in_bf16_has_ratio_one_to_the_bit(tiny_llama):
    config = RunConfig(
        model=ModelConfig(path=str(tiny_llama)),
        dora=DoraConfig(rank=2, targets="all-linear"),
        data=DataConfig(train="unused"),
    )
    model = build(make_blueprint(config, tiny_llama), Single(Processes())).model
    for layer in (m for m in model.modules() if hasattr(m, "magnitude")):
        assert layer.weight.dtype == torch.bfloat16
        assert layer.magnitude.dtype == layer.norm.dtype == torch.float32
        assert torch.equal(layer.magnitude, layer.norm)


def test_rows_are_read_alone(tiny_llama):
    files = SafetensorsFiles(tiny_llama)
    whole = load_file(tiny_llama / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    part = files.read("model.layers.0.mlp.up_proj.weight", Rectangle(torch.empty(3, 12), row=4))
    assert torch.equal(part, whole[4:7])
    part = files.read("model.layers.0.mlp.up_proj.weight", Rectangle(torch.empty(1, 5), row=4, col=2))
    assert torch.equal(part, whole[4:5, 2:7])


def test_large_tensors_are_read_a_few_rows_at_a_time(tiny_llama, monkeypatch):
    monkeypatch.setattr(weights, "_READ_ELEMENTS", 40)
    state = built(tiny_llama).state_dict()
    for name, tensor in load_file(tiny_llama / "model.safetensors").items():
        assert torch.equal(state[name], tensor), name


def test_sharded_files_with_an_index(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        assert_near(built(tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits, MODEL)


def test_a_tied_tensor_may_go_by_its_other_name(tmp_path):
    from transformers import AutoModelForCausalLM

    config = small_config("llama")
    config.tie_word_embeddings = True
    tied = save_model(AutoModelForCausalLM.from_config(config), tmp_path)
    want = load_file(tied / "model.safetensors")
    embedding = want.pop("model.embed_tokens.weight") + 1  # what freed memory does not hold by chance
    assert "lm_head.weight" not in want
    save_file({**want, "lm_head.weight": embedding}, tied / "model.safetensors", {"format": "pt"})
    model = built(tied)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("named", [0, 1])
def test_of_a_tensor_in_two_files_the_index_names_one(named, tmp_path):
    names = ["one.safetensors", "two.safetensors"]
    for number, name in enumerate(names):
        save_file({"both": torch.full((2, 3), number), f"own.{number}": torch.zeros(1)}, tmp_path / name)
    where = {"both": names[named], "own.0": names[0], "own.1": names[1]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert (SafetensorsFiles(tmp_path).rows("both", slice(None)) == named).all()


@pytest.fixture(scope="module")
def old_names(tiny_llama, tiny_gpt2, tmp_path_factory):
    """A GPT-2 checkpoint as on the hub: keys without the `transformer.` prefix."""
    from transformers import AutoModelForCausalLM

    directory = save_model(AutoModelForCausalLM.from_pretrained(tiny_gpt2), tmp_path_factory.mktemp("old"))
    tensors = load_file(directory / "model.safetensors")
    renamed = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def pickled(old_names, tmp_path_factory):
    directory = shutil.copytree(old_names, tmp_path_factory.mktemp("pickled") / "model")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


def test_pickles_go_through_transformers(pickled, tiny_gpt2):
    got, want = built(pickled, allow_pickle=True).state_dict(), built(tiny_gpt2).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_other_names_are_read_by_slices(old_names, tiny_gpt2, monkeypatch):
    monkeypatch.setattr("dora_dist.models.build.load_whole", None)
    got, want = built(old_names).state_dict(), built(tiny_gpt2).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


@pytest.mark.ranks
def test_what_is_loaded_whole_under_sharding(pickled, tiny_gpt2, tiny_rows, tmp_path):
    import yaml

    losses = []
    for path in (tiny_gpt2, pickled):
        text = {
            "model": {"path": str(path), "dtype": "float32", "allow_pickle": True},
            "dora": {"rank": 2, "targets": "all-linear"},
            "data": {"train": str(tiny_rows), "seq_len": 48},
            "train": {"steps": 1, "micro_batch_size": 4},
            "parallel": {"strategy": "fsdp"},
            "output_dir": str(tmp_path),
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(text))
        done = run_ranks(2, ROOT / "launch" / "train.py", "--config", str(tmp_path / "c.yaml"))
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("rank 0 loads all weights" in done.stdout) == (path == pickled)
        losses.append(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == losses[1]


def test_a_missing_tensor_is_named(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="no weights for 'model.layers.1.mlp.up_proj.weight'"):
        built(tmp_path)


def test_random_weights_need_no_files(tiny_llama, tmp_path):
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    one, two = built(tmp_path, init="random"), built(tmp_path, init="random")
    state = two.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in one.state_dict().items())
    blocks = [state[f"model.layers.{block}.mlp.up_proj.weight"] for block in (0, 1)]
    assert not torch.equal(*blocks)
    logits = one(input_ids=IDS).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_an_unreachable_hub_id_is_one_line(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("model: {path: nobody/nothing}\ndata: {train: x.jsonl}\n")
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err.strip()
    assert "model.path: 'nobody/nothing'" in error
    assert "\n" not in error
