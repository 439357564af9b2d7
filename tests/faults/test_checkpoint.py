"""A run goes on from its checkpoint as if nothing had happened: a selection of `make faults`; and refusals."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dora_dist.cli import main
from dora_dist.training.resume import FORMAT
from tests.faults import whole_runs
from tests.faults.case import STEPS, Case
from tests.faults.saves import damaged_checkpoints, full_disks, killed_saves, make_loop, train_and_save
from tests.support.models import make_tiny_llama, make_tiny_mixture

pytestmark = pytest.mark.ranks
# Weights from config.json alone: what is in files is tested elsewhere.
EXPERTS = {"model.init": "random", "dora.targets": ["experts.gate_up_proj", "q_proj"]}
WITH_MAGNITUDE_ONLY = {"dora.magnitude_only": ["experts.down_proj"]}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("faults"))


def all_hold(count: whole_runs.Count) -> bool:
    return count.held == count.tried > 0


def train(case, name, *overrides) -> int:
    words = [
        "train",
        "--config",
        str(case.config),
        f"output_dir={case.scratch / name}",
        "parallel.strategy=single",
    ]
    return main([*words, *overrides])


@pytest.fixture(scope="module")
def whole(case):
    """A run of one process without an interruption."""
    assert train(case, "whole", "checkpoint.keep=9") == 0
    return case.scratch / "whole"


def continued(case, whole, step, *overrides, name="continued") -> int:
    """The status of a run that goes on from the whole one's checkpoint of a step."""
    case.forget(name)
    shutil.copytree(whole, case.scratch / name)
    for other in case.steps(name):
        if other > step:
            shutil.rmtree(case.scratch / name / "checkpoints" / f"step-{other:08}")
    return train(case, name, "checkpoint.keep=9", *overrides)


def test_a_checkpoint_is_safetensors_and_json_and_a_peft_adapter(case, whole):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert case.steps("whole") == [2, 4, 6, 8, 10, 12]
    directory = whole / "checkpoints" / "step-00000012"
    assert {path.suffix for path in directory.iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["format"] == FORMAT and manifest["step"] == STEPS
    assert manifest["files"].keys() == {p.name for p in directory.iterdir()} - {"manifest.json"}
    assert {"config", "world_size", "strategy", "fingerprints", "versions"} <= manifest["run"].keys()
    trained, adapter = (load_file(place / "adapter_model.safetensors") for place in (directory, whole / "adapter"))
    assert trained.keys() == adapter.keys()
    assert all(torch.equal(trained[name], adapter[name]) for name in adapter)
    moments = load_file(directory / "optimizer.safetensors")
    assert all(moments[f"{name}.exp_avg"].shape == tensor.shape for name, tensor in trained.items())
    assert all(moments[f"{name}.step"].item() == STEPS for name in trained)
    base = AutoModelForCausalLM.from_pretrained(case.scratch / "model", dtype=torch.float32)
    PeftModel.from_pretrained(base, directory)


@pytest.mark.parametrize("more", [{}, {"data.streaming": True}, {"data.packing": False, "log.every": 3}], ids=str)
def test_resumed_from_each_step_it_is_the_same_to_the_bit(more, tmp_path):
    assert all_hold(whole_runs.every_step(Case(tmp_path, **more), 6))


@pytest.mark.parametrize(
    "more",
    [
        {"dora.method": "lora"},
        {"dora.magnitude_axis": "in", "dora.modules_to_save": ["lm_head"], "dora.targets": ["q_proj", "v_proj"]},
        {"dora.magnitude_only": ["o_proj"], "train.activation_checkpointing": True},
        {"quant.scheme": "nf4", "model.dtype": "bfloat16"},
        {"dora.magnitude_only": ["k_proj"], "dora.modules_to_save": ["lm_head"], "model.dtype": "bfloat16"},
        {"model.dtype": "float16"},
        {**EXPERTS, **WITH_MAGNITUDE_ONLY},
    ],
    ids=str,
)
def test_whatever_is_trained_resumes(more, tmp_path):
    make = make_tiny_mixture if more.items() >= EXPERTS.items() else make_tiny_llama
    assert all_hold(whole_runs.every_step(Case(tmp_path, make, **more), 3))


def test_the_loss_scale_is_restored(case):
    loop = make_loop(case, case.scratch / "scale", "model.dtype=float16")
    scale = loop.trainer.built.engine.loss_scale
    scale.value, scale.good_steps = 2.0**7, 41
    train_and_save(loop)
    other = make_loop(case, case.scratch / "scale", "model.dtype=float16")
    found, _ = other.checkpoints.find()
    other.checkpoints.restore(found, other.trainer.built)
    restored = other.trainer.built.engine.loss_scale
    assert (restored.value, restored.good_steps) == (scale.value, scale.good_steps) == (2.0**7, 42)


@pytest.mark.slow
def test_ranks_that_die_go_on(case):
    assert all_hold(whole_runs.killed_rank(case, 1))


def test_a_process_that_is_asked_to_stop_exits_with_75(case):
    assert all_hold(whole_runs.asked_to_stop(case, 1, "none"))


def test_from_one_strategy_and_number_of_ranks_to_another(case):
    assert all_hold(whole_runs.moved(case, ("fsdp zero3 single",)))


@pytest.mark.slow
@pytest.mark.parametrize("more", [WITH_MAGNITUDE_ONLY, {"dora.method": "lora"}], ids=str)
def test_so_do_experts(more, tmp_path):
    case = Case(tmp_path, make_tiny_mixture, **EXPERTS, **more)
    assert all_hold(whole_runs.moved(case, ("fsdp zero3 single",)))


def test_a_gradient_that_is_not_finite_moves_no_rank(case):
    assert all_hold(whole_runs.not_finite(case, ("fsdp",)))


def test_killed_damaged_or_without_room_an_older_one_stands(case):
    assert all_hold(whole_runs.Count(*killed_saves(case, every=9, random_kills=5)))
    assert all_hold(whole_runs.Count(*damaged_checkpoints(case, flips=20)))
    assert all_hold(whole_runs.Count(*full_disks(case, 3)))


def test_where_a_checkpoint_cannot_be_written_the_run_can_end(case):
    loop = make_loop(case, case.scratch / "stop", "checkpoint.on_failure=stop")
    loop.checkpoints.directory.write_text("in the way")
    with pytest.raises(
        RuntimeError, match="step 1: the checkpoint was not written: .*Not a directory|File exists"
    ):
        train_and_save(loop)


MISTAKES = {
    "rank": ({"dora.rank_pattern": {"q_proj": 1}}, "dora.rank_pattern {'q_proj': 1}, was {}"),
    "length": ({"data.seq_len": 48}, "data.seq_len 48, was 64"),
    "seed": ({"train.seed": 1}, "train.seed 1, was 0"),
    "4 bits": ({"quant.scheme": "nf4"}, "quant.scheme 'nf4', was 'none'"),
    "rows a step": ({"train.accumulation": 4}, "a step takes 4 rows"),
    "rows": ({"data.train": "more.jsonl"}, "data.train: the rows are others"),
    "base": ({"model.path": "other"}, "model.path: the base model is another"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_another_run_is_refused_and_the_difference_shown(name, case, whole, capsys):
    settings, told = MISTAKES[name]
    if name == "rows":
        rows = (case.scratch / "rows.jsonl").read_text()
        (case.scratch / "more.jsonl").write_text(rows.replace("alpha", "ALPHA", 1))
    if name == "base":
        shutil.copytree(case.scratch / "model", case.scratch / "other", dirs_exist_ok=True)
        path = case.scratch / "other" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-20:] = bytes(20)
        path.write_bytes(data)
    settings = {k: str(case.scratch / v) if k in ("data.train", "model.path") else v for k, v in settings.items()}
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    assert continued(case, whole, 4, *words) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and told in error and "checkpoint.force=true" in error
    assert case.curve("continued") == case.curve("whole")  # nothing was cut


def test_forced_it_goes_on_and_what_may_change_is_told(case, whole, capsys):
    assert continued(case, whole, 4, "data.seq_len=48", "train.lr=0.01", "checkpoint.force=true") == 0
    told = capsys.readouterr().out
    assert "changed since then: data.seq_len 48, was 64; train.lr 0.01, was 0.02" in told
    assert [line[0] for line in case.curve("continued")] == list(range(1, STEPS + 1))
    assert case.curve("continued")[:4] == case.curve("whole")[:4]


def test_a_named_checkpoint_starts_a_run_elsewhere_and_the_later_ones_here_are_set_aside(case, whole, capsys):
    resume = f"checkpoint.resume={whole / 'checkpoints' / 'step-00000006'}"
    case.forget("elsewhere")
    assert train(case, "elsewhere", resume) == 0
    assert case.curve("elsewhere") == case.curve("whole")[6:]
    assert case.steps("elsewhere") == [10, 12]
    assert train(case, "elsewhere", resume, "train.steps=14") == 0  # the same path again: from its own newest
    assert [line[0] for line in case.curve("elsewhere")] == [7, 8, 9, 10, 11, 12, 13, 14]
    case.forget("here")
    shutil.copytree(whole, case.scratch / "here")
    resume = f"checkpoint.resume={case.scratch / 'here' / 'checkpoints' / 'step-00000006'}"
    assert train(case, "here", resume, "train.lr=0.03") == 0
    assert [line[0] for line in case.curve("here")] == list(range(1, STEPS + 1))
    aside = {path.name for path in (case.scratch / "here" / "checkpoints").glob("aside-*")}
    assert aside == {f"aside-1-step-{step:08}" for step in (8, 10, 12)}
    assert "is set aside" in capsys.readouterr().out


def test_begun_anew_nothing_is_lost(case, whole):
    assert continued(case, whole, 12, "checkpoint.resume=none", "train.steps=2") == 0
    assert len(case.curve("continued")) == 2 and case.steps("continued") == [2]
    assert len(list((case.scratch / "continued" / "checkpoints").glob("aside-1-*"))) == 6


def test_a_finished_run_trains_nothing_more(case, whole, capsys):
    assert continued(case, whole, 12) == 0
    assert "no step is left to train" in capsys.readouterr().out
    assert case.curve("continued") == case.curve("whole")


def test_damaged_checkpoints_are_named(case, whole, capsys):
    case.forget("damaged-run")
    shutil.copytree(whole, case.scratch / "damaged-run")
    directory = case.scratch / "damaged-run" / "checkpoints"
    (directory / "step-00000012" / "rng.safetensors").unlink()
    assert train(case, "damaged-run") == 0
    told = capsys.readouterr().out
    assert "step-00000012 is damaged" in told and "resumed from" in told and "step-00000010" in told
    for path in directory.glob("step-*"):
        (path / "manifest.json").write_text("{}")
    assert train(case, "damaged-run") == 2
    assert "every checkpoint in" in capsys.readouterr().err
