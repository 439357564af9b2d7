"""The benchmarks run, compare the same computation and write what they promise; their numbers are not judged."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, child_environment


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=child_environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


def test_step_time_writes_its_record_beside_others(tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "cpu.json"
    out.write_text('{"other": {"case": 1}}')
    size = "--hidden 64 --layers 1 --tokens 8 --batch 2 --rank 4 --rounds 3".split()
    printed = run("step_time.py", *size, "--device", "cpu", "--out", str(out)).stdout
    results = json.loads(out.read_text())
    assert results["other"] == {"case": 1}
    ((case, record),) = results["step_time"].items()
    assert case in printed
    contenders = {"ours dora", "ours lora", "peft dora", "peft lora"}
    assert {"device", "date", "versions", "settings", "rounds", "seconds", "ratios", "first_loss"} <= set(record)
    assert set(record["seconds"]) == set(record["first_loss"]) == contenders
    assert record["rounds"] == 3
    assert record["settings"]["rank"] == 4
    assert "ours dora / peft lora" in record["ratios"]
    for ratio in record["ratios"].values():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert ratio["of_medians"] > 0


@pytest.mark.parametrize("more", [[], ["--four-bit"]])
def test_memory_and_profile_write_their_records(tmp_path, more):
    pytest.importorskip("peft")
    out = tmp_path / "cpu.json"
    size = "--hidden 64 --layers 1 --tokens 8 --batch 2 --rank 4 --rounds 1 --device cpu".split() + more
    run("memory.py", *size, "--out", str(out))
    run("step_profile.py", *size, "--out", str(out))
    results = json.loads(out.read_text())
    ((_, memory),), ((_, found),) = results["memory"].items(), results["step_profile"].items()
    kept = {name: values["saved_bytes"] for name, values in memory["contenders"].items()}
    assert set(kept) == {
        f"{who} {'q' if more else ''}{what}" for who in ("ours", "peft") for what in ("dora", "lora")
    }
    ours, theirs = ("ours qdora", "peft qdora") if more else ("ours dora", "peft dora")
    assert 0 < kept[ours] < kept[theirs]
    assert found["floor_seconds"] > 0 and found["profile_seconds"]["products"] > 0


def test_layer_writes_its_record(tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "cpu.json"
    size = "--shapes 48x64 --ranks 4 --tokens 8 --rounds 2 --device cpu".split()
    run("layer.py", *size, "--out", str(out))
    both = json.loads(out.read_text())["layer"]
    assert set(both) == {f"48x64 rank 4 tokens 8 {dtype}" for dtype in ("float32", "bfloat16")}
    for record in both.values():
        assert {"qdora / qdora, ratio apart", "qdora / qlora", "dora / peft dora"} <= set(record["ratios"])
        assert set(record["errors"]["peft dora"]) == {"y", "dx", "dA", "dB", "dm"}


def test_norm_writes_its_records(tmp_path):
    out = tmp_path / "cpu.json"
    size = "--weights 24x16x4 --ranks 1 2 8 --hidden 256 --intermediate 64 --rank 4 --rounds 2".split()
    run("norm.py", *size, "--device", "cpu", "--out", str(out))
    (case, one), (_, block) = json.loads(out.read_text())["norm"].items()
    assert case == "24x16 rank 4 float32"
    assert 0 < one["norms"]["ours"]["scratch_bytes"] < one["norms"]["peft"]["scratch_bytes"]
    found = block["refresh"]
    assert list(found) == ["single x1", "ddp x2", "fsdp x2", "ddp x8", "fsdp x8"]
    # q, o of 256 rows, k, v of 128 (one head), gate, up of 64, down of 256; six A's of 4 x 256 and one of 4 x 64.
    norms, factors = 4 * (3 * 256 + 2 * 128 + 2 * 64), 4 * 4 * (6 * 256 + 64)
    received = {name: values["received_bytes"] for name, values in found.items()}
    assert received == {
        "single x1": 0,
        "ddp x2": norms,
        "fsdp x2": norms + factors / 2,
        "ddp x8": 2 * norms * 7 / 8,
        "fsdp x8": 2 * norms * 7 / 8 + factors * 2 * 7 / 8,
    }


def test_strategy_memory_writes_its_record(tmp_path):
    out = tmp_path / "cpu.json"
    size = "--strategies fsdp+cpu_offload --hidden 64 --layers 1 --rank 4 --rounds 1".split()
    run("strategy_memory.py", *size, "--device", "cpu", "--out", str(out))
    ((_, record),) = json.loads(out.read_text())["strategy_memory"].items()
    (row,) = record["strategies"].values()
    assert (row["strategy"], row["ranks"]) == ("fsdp+cpu_offload", 2)
    assert row["base_bytes"] > 0 and row["held_bytes"] <= row["step_peak_bytes"]


def test_block_memory_writes_what_it_measured_beside_what_it_counted(tmp_path):
    out = tmp_path / "cpu.json"
    size = (
        "--strategies fsdp --hidden 256 --intermediate 704 --heads 4 --kv-heads 2 --rank 4 --tokens 8 16".split()
    )
    run("block_memory.py", *size, "--out", str(out))
    ((_, record),) = json.loads(out.read_text())["block_memory"].items()
    (row,) = record["strategies"].values()
    measured, counted = row["measured"], row["counted"]
    assert (row["strategy"], row["ranks"]) == ("fsdp", 2)
    assert set(counted) - {"loading_limit_bytes"} <= set(measured)
    assert measured["base_bytes"] == counted["base_bytes"]
    assert measured["saved_per_token"] == pytest.approx(counted["saved_per_token"], rel=0.05)
    account = record["account"]
    assert account["host_total"]["pinned"] * account["settings"]["ranks"] < 64e9
    assert max(account["gpu_total"].values()) < 24564 * 2**20


def test_gpu_says_in_a_line_that_there_is_no_gpu(tmp_path):
    out = tmp_path / "gpu.json"
    printed = run("gpu.py", "--out", str(out)).stdout
    assert printed == "gpu: no CUDA device here; nothing was tested or measured\n"
    assert not out.exists()
