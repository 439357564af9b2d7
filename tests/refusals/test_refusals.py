"""A selection of the tables of mistakes (refusals.py has them all), and that the tables can fail."""

import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch

from dora_dist.config import RunConfig
from dora_dist.errors import UserError
from tests.refusals import refusals, refusals_yaml
from tests.refusals.refusals_files import Bomb, place, run_model
from tests.refusals.refusals_yaml import HEAD
from tests.support.refusals import CANARY, Case, failing
from tests.unit.models.test_weights import IDS


@pytest.mark.parametrize(("table", "every"), [("YAML", 2), ("data", 6), ("files", 4), ("adapters", 4)])
def test_mistakes_are_refused(table, every):
    refused, made, wrong = refusals.run_table(table, every)
    assert not wrong
    assert refused == made >= 15


def test_there_are_as_many_as_promised_and_none_twice():
    cases = {name: list(table()) for name, table in refusals.TABLES.items()}
    assert len(cases["YAML"]) >= 100 and len(cases["data"]) >= 200
    for table in cases.values():
        assert len({case.name for case in table}) == len(table)


@pytest.mark.parametrize(
    ("overrides", "lr"), [(["train.lr=1e-4"], 1e-4), (["train.lr=2E-5"], 2e-5), (["train.lr=.5"], 0.5), ([], 2e-4)]
)
def test_what_the_yaml_mistakes_are_made_in_is_valid(tmp_path, overrides, lr):
    config = refusals_yaml.read(tmp_path, HEAD, overrides)
    assert isinstance(config, RunConfig)
    assert config.train.lr == lr


def _fail(message: str):
    def run(directory: Path) -> None:
        raise UserError(message)

    return run


def _run_code(directory: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(directory.parent / CANARY)))  # noqa: S301 - that is what the bomb is for


def _read_outside(directory: Path) -> None:
    (directory.parent / "secret").write_text("x")
    (directory / "link").symlink_to(directory.parent / "secret")
    (directory / "link").read_text()
    raise UserError("told")


def _start_a_process(directory: Path) -> None:
    subprocess.run(["true"], check=True)
    raise UserError("told")


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda d: None, "not refused"),
        (lambda d: 1 / 0, "ZeroDivisionError"),
        (lambda d: (_ for _ in ()).throw(ValueError("told")), "ValueError: told"),
        (_fail("told\nin two lines"), "not one line"),
        (_fail("something"), "['told'] not in"),
        (_run_code, "code was run"),
        (_read_outside, "secret"),
        (_start_a_process, "subprocess.Popen"),
        (_fail("told"), ""),
    ],
)
def test_the_harness_sees_what_is_wrong(tmp_path, run, why):
    problem = failing(Case("x", run, ("told",)), tmp_path / "case")
    assert (why in problem) if why else problem == ""


def test_pickles_of_tensors_alone_can_be_allowed(tmp_path):
    plain = run_model(place("model", tmp_path / "plain"))
    pickled = place("model", tmp_path / "pickled")
    from safetensors.torch import load_file

    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    os.unlink(pickled / "model.safetensors")
    with torch.no_grad():
        got = run_model(pickled, allow_pickle=True)(input_ids=IDS).logits
        assert torch.equal(got, plain(input_ids=IDS).logits)


def test_links_inside_the_hubs_cache_are_followed(tmp_path):
    plain = place("model", tmp_path / "plain")
    blobs, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(plain.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    run_model(snapshot)
    (tmp_path / "linked").symlink_to(snapshot)  # the whole directory may be a link
    run_model(tmp_path / "linked")
    (tmp_path / "models--o--n" / "elsewhere").write_bytes((snapshot / "model.safetensors").read_bytes())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../elsewhere")
    with pytest.raises(UserError, match="leads out of its directory"):
        run_model(snapshot)


def test_a_known_model_with_code_of_its_own_is_loaded_without_it(tmp_path):
    import json

    path = place("model", tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.X", "AutoModelForCausalLM": "own.X"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / CANARY)!r})\n")
    assert type(run_model(path)).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / CANARY).exists()
