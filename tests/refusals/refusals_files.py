"""Mistakes and attacks in files from others: safetensors headers, indices, links, pickles, code, adapters."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dora_dist import DoraConfig, inject_dora, load_adapter, save_adapter
from dora_dist.config import DataConfig, ModelConfig, RunConfig
from dora_dist.data.run_data import load_tokenizer
from dora_dist.io.fingerprint import Base
from dora_dist.models.build import build, make_blueprint
from dora_dist.models.huggingface import resolve_model
from dora_dist.parallel.process import Processes
from dora_dist.parallel.replicated import Single
from tests.refusals.refusals_data import write
from tests.refusals.refusals_headers import Change, damages
from tests.support.data import load, make_tokenizer
from tests.support.models import llama, save_model
from tests.support.peft import CASES, randomized
from tests.support.refusals import CANARY, Case

Q = "model.layers.0.self_attn.q_proj.weight"


class Bomb:
    """Makes the canary when it is unpickled."""

    def __init__(self, place: Path):
        self.place = str(place)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.place,)


@cache
def saved(kind: str) -> dict[str, bytes]:
    """The files of a tiny model with one token a letter, or of an adapter of it, whose base is 'a...a'."""
    with tempfile.TemporaryDirectory() as place:
        if kind == "model":
            save_model(llama(max_position_embeddings=64), Path(place))
        else:
            save_adapter(randomized(injected()), place)
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


def injected(fingerprint: str = "a" * 64, quantization: str = "none") -> torch.nn.Module:
    config = DoraConfig(rank=3, alpha=7, targets=CASES["llama"].targets)
    return inject_dora(llama(), config, Base(fingerprint, quantization)).eval()


def place(kind: str, directory: Path) -> Path:
    directory.mkdir()
    for name, content in saved(kind).items():
        (directory / name).write_bytes(content)
    return directory


def run_model(path: Path, **model) -> object:
    """What a run does with a model before it trains."""
    directory = resolve_model(str(path))
    config = RunConfig(
        model=ModelConfig(path=str(path), dtype="float32", **model),
        dora=DoraConfig(rank=2, targets="all-linear"),
        data=DataConfig(train="unused"),
    )
    blueprint = make_blueprint(config, directory)
    load_tokenizer(directory)
    return build(blueprint, Single(Processes())).model


def _model(change: Change, directory: Path, **settings) -> object:
    path = place("model", directory / "model")
    change(path)
    return run_model(path, **settings)


def adapter(change: Change, directory: Path, bare: bool = False) -> object:
    path = place("adapter", directory / "adapter")
    change(path)
    return load_adapter(llama() if bare else injected(), path)


def _indexed(weight_map: Any, path: Path, name: str = "model.safetensors") -> None:
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (path / f"{name}.index.json").write_text(text)


def _outside(path: Path) -> Path:
    """A valid file beside the case's directory, where nothing may be read."""
    target = path.parents[1] / f"outside-{path.parent.name}.safetensors"
    shutil.copyfile(path / "model.safetensors", target)
    return target


def _link_weights(name: str, path: Path) -> None:
    target = _outside(path)
    (path / "model.safetensors").unlink()
    (path / name).symlink_to(target)
    if name != "model.safetensors":
        _indexed({Q: name}, path)


def _link_through_a_directory(path: Path) -> None:
    _outside(path)
    (path / "up").symlink_to("../..")
    _indexed({Q: f"up/outside-{path.parent.name}.safetensors"}, path)


INDICES: dict[str, tuple[Any, str]] = {
    "a file above": ({Q: "../outside.safetensors"}, "'../outside.safetensors' is not the name of a file beside"),
    "an absolute path": ({Q: "/etc/passwd"}, "'/etc/passwd' is not the name of a file beside it"),
    "a file below": ({Q: "a/b.safetensors"}, "'a/b.safetensors' is not the name"),
    "the directory above": ({Q: ".."}, "'..', which is missing"),
    "the directory itself": ({Q: "."}, "'.' is not the name"),
    "no name": ({Q: ""}, "'' is not the name"),
    "NUL": ({Q: "a\0b"}, "is not the name"),
    "a number": ({Q: 3}, "3 is not the name of a file"),
    "a list": ({Q: ["model.safetensors"]}, "is not the name of a file"),
    "a missing file": ({Q: "model-00001-of-00002.safetensors"}, "which is missing"),
    "no tensors": ({}, "no 'weight_map'"),
    "no object": ([1], "no 'weight_map'"),
    "a list at the top": ("[]", "no 'weight_map'"),
    "no JSON": ('{"weight_map": ', "not valid JSON"),
    "a key twice": ('{"weight_map": {"a": "x", "a": "../y"}}', "the key 'a' stands twice"),
    "NaN": ('{"weight_map": NaN}', "NaN is not JSON"),
}


def edit(name: str, path: Path, **changes: Any) -> None:
    file = path / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _own_code(path: Path) -> None:
    code = f"import os\nos.mkdir({str(path.parents[1] / CANARY)!r})\n"
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py"):
        (path / name).write_text(code)


def _own_config(path: Path) -> None:
    _own_code(path)
    classes = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    edit("config.json", path, model_type="x", auto_map=classes)


def _own_tokenizer(path: Path) -> None:
    _own_code(path)
    edit("config.json", path, model_type="x")
    classes = {"AutoTokenizer": ["tokenization_x.X", None]}
    edit("tokenizer_config.json", path, tokenizer_class="X", auto_map=classes)


def _own_tokenizer_alone(directory: Path) -> object:
    path = place("model", directory / "model")
    _own_tokenizer(path)
    return load_tokenizer(path)


def _pickled(path: Path, name: str = "pytorch_model.bin", bomb: bool = True) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save({**tensors, **({"x": Bomb(path.parents[1] / CANARY)} if bomb else {})}, path / name)


def _pickle_elsewhere(path: Path) -> None:
    _pickled(path)
    shutil.move(path / "pytorch_model.bin", path.parents[1] / f"outside-{path.parent.name}.bin")
    _indexed({Q: f"../../outside-{path.parent.name}.bin"}, path, "pytorch_model.bin")


def _names_another_base(path: Path) -> None:
    """Where names differ, transformers loads the model, and would follow an adapter's base."""
    tensors = {n.removeprefix("model."): t for n, t in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/etc"}))


MODELS: dict[str, tuple[Change, dict, str]] = {
    "a link out": (partial(_link_weights, "model.safetensors"), {}, "a link that leads out of its directory"),
    "an indexed link out": (partial(_link_weights, "a.safetensors"), {}, "a link that leads out of its directory"),
    "through a linked directory": (_link_through_a_directory, {}, "is not the name of a file beside it"),
    "a pickle": (partial(_pickled, bomb=False), {}, "set model.allow_pickle=true"),
    "a pickle bomb": (_pickled, {}, "set model.allow_pickle=true"),
    "a pickle bomb, allowed": (_pickled, {"allow_pickle": True}, "cannot be loaded"),
    "a bomb named .pt": (partial(_pickled, name="model.pt"), {}, "as pickles only ('model.pt')"),
    "a bomb named .pt, allowed": (partial(_pickled, name="model.pt"), {"allow_pickle": True}, "only ('model.pt')"),
    "a bomb elsewhere": (_pickle_elsewhere, {"allow_pickle": True}, "is not the name of a file beside it"),
    "a bomb named safetensors": (
        lambda path: torch.save(Bomb(path.parents[1] / CANARY), path / "model.safetensors"), {}, "not a readable",
    ),
    "a model with code": (_own_config, {}, "config.json"),
    "a redirection": (_names_another_base, {}, "holds an adapter_config.json"),
    "config.json a list": (lambda path: (path / "config.json").write_text("[]"), {}, "config.json"),
    "config.json too deep": (lambda path: (path / "config.json").write_text("[" * 100_000), {}, "config.json"),
    "config.json not text": (lambda path: (path / "config.json").write_bytes(b"\xff\xfe"), {}, "config.json"),
    "sizes that are none": (lambda path: edit("config.json", path, num_hidden_layers="two"), {}, "config.json"),
    "too many layers": (lambda path: edit("config.json", path, num_hidden_layers=3), {}, "model.layers.2"),
    "tokenizer cut off": (
        lambda path: (path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes()[:-40]), {},
        "has no usable tokenizer",
    ),
}  # fmt: skip
TEMPLATES = {
    "a template that reaches for Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "one that imports": "{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir('%s') }}",
    "one that does not end": "{% for x in range(10**9) %}{{ x }}{% endfor %}",
}


def _template(template: str, directory: Path) -> object:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template.replace("%s", str(directory.parent / CANARY))
    row = {"messages": [{"role": "assistant", "content": "dog"}]}
    return load(str(write(directory / "t.jsonl", [json.dumps(row)])), tokenizer)


def cases() -> Iterator[Case]:
    saved("model"), saved("adapter")  # made now, not while a case is watched
    for name, damage, message in damages():
        for kind, make in (("model", _model), ("adapter", adapter)):
            file = f"{kind}/{'adapter_' * (kind == 'adapter')}model.safetensors"
            run = partial(make, lambda path, d=damage, f=file: d(path.parent / f))
            yield Case(f"{kind}, {name}", run, (f"{{d}}/{file}", message))
    for name, (weight_map, message) in INDICES.items():
        yield Case(f"index, {name}", partial(_model, partial(_indexed, weight_map)), ("index.json", message))
    for name, (change, settings, message) in MODELS.items():
        yield Case(name, partial(_model, change, **settings), (message,))
    yield Case("a tokenizer with code", _own_tokenizer_alone, ("has no usable tokenizer",))
    for name, template in TEMPLATES.items():
        yield Case(name, partial(_template, template), ("t.jsonl:1: the chat template refuses",))
