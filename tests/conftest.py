"""Fixtures: tiny models in Hugging Face layout, made here from fixed seeds, and runs of several processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))  # the models are tiny
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; runs would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    """What starts processes comes first, in one worker of xdist; the other one takes the rest, file by file."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(key=lambda item: {"ranks": 0, "rehearsals": 1}.get(group_of(item), 2))


def group_of(item) -> str:
    if item.get_closest_marker("ranks"):
        return "ranks"
    if "rehearse" in item.fixturenames:
        return "rehearsals"  # what was rehearsed is shared
    return item.nodeid.partition("::")[0]


@pytest.fixture(scope="session")
def rehearse():
    """Rehearsals, each of which takes place once in a session."""
    from dora_dist.planning import rehearse

    class Shared(rehearse.Rehearsals):
        found: ClassVar[dict] = {}

        def __call__(self, job):
            model = (job.directory / "config.json").read_text()  # whatever its directory is called
            key = repr(job).replace(str(job.directory), model)
            if key not in self.found:
                self.found[key] = super().__call__(job)
            return self.found[key]

    with Shared() as rehearsals:
        yield rehearsals


@pytest.fixture(scope="session")
def quickstart_model() -> Path:
    return ROOT / "launch" / "quickstart" / "model"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


def make_tiny_llama(directory: Path) -> Path:
    """An awkward Llama: 17 intermediate features, 2 rows in k and v, biases, zero rows; the quickstart's words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=12, intermediate_size=17, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
        model.model.layers[0].mlp.down_proj.weight[3].zero_()
        model.model.layers[1].self_attn.v_proj.weight[1].zero_()
        model.model.layers[1].mlp.up_proj.weight[:, 5].zero_()
    return save_model(model, directory)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> Path:
    """Conv1D layers and tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=96, n_positions=64, n_embd=10, n_layer=2, n_head=2, n_inner=17, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return save_model(GPT2LMHeadModel(config), tmp_path_factory.mktemp("tiny_gpt2"))


@pytest.fixture(scope="session")
def tiny_distilbert(tmp_path_factory) -> Path:
    return make_tiny_distilbert(tmp_path_factory.mktemp("tiny_distilbert"))


def make_tiny_distilbert(directory: Path) -> Path:
    """A bare encoder, as on the hub: a classifier's head is new."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=96, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32, pad_token_id=0,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, initializer_range=0.2,
    )  # fmt: skip
    return save_model(DistilBertForMaskedLM(config), directory)


def save_model(model: torch.nn.Module, directory: Path) -> Path:
    model.save_pretrained(directory)
    letter_tokenizer().save_pretrained(directory)
    return directory


def letter_tokenizer():
    """One token per printable ASCII character: 95 of them, ids 1..95, and padding 0."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, **{chr(c): c - 31 for c in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="~")


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", 24)


def make_rows(path: Path, count: int) -> Path:
    """prompt_completion rows of different lengths."""
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()
    rows = [
        {"prompt": f"{words[i % 12]} {i}:", "completion": " " + " ".join(words[i % 5 : i % 5 + 1 + i % 4])}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def torchrun(ranks: int, script: Path, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a script under torchrun on CPU; output is captured."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        str(script), *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=child_environment())


def child_environment() -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
