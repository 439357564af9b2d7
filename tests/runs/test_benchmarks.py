"""The benchmarks run, compare the same computation and write what they promise; their numbers are not judged."""

import json
import runpy
import sys
from itertools import pairwise

import pytest

from benchmarks.common import plotting
from benchmarks.planning.figure import curve_of
from benchmarks.planning.tables import efficiency, simulations
from benchmarks.scaling.curves import STRATEGIES, curves
from benchmarks.scaling.exposure import uncovered
from benchmarks.scaling.hosts import available
from tests.support.ranks import Ended, run_ranks
from tests.support.rounding import TRAINED

pytestmark = pytest.mark.ranks


def run(module: str, *arguments: str, ranks: int = 1, status: int = 0) -> Ended:
    done = run_ranks(ranks, run_module, f"benchmarks.{module}", *arguments)
    assert done.returncode == status, done.stderr
    return done


def run_module(name: str, *arguments: str) -> None:
    """As `python -m` does."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def test_step_time_writes_its_record_beside_others(tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "cpu.json"
    out.write_text('{"other": {"case": 1}}')
    size = "--hidden 64 --layers 1 --tokens 8 --batch 2 --rank 4 --rounds 3".split()
    printed = run("step.step_time", *size, "--device", "cpu", "--out", str(out)).stdout
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


@pytest.mark.parametrize("more", [[], ["--four-bit", "--dtype", "bfloat16"]])
def test_memory_and_profile_write_their_records(tmp_path, more):
    pytest.importorskip("peft")
    out = tmp_path / "cpu.json"
    size = "--hidden 64 --layers 1 --tokens 8 --batch 2 --rank 4 --rounds 1 --device cpu".split() + more
    run("step.step_time", *size, "--out", str(out))
    run("step.step_profile", *size, "--out", str(out))
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
    run("step.layer", *size, "--out", str(out))
    both = json.loads(out.read_text())["layer"]
    assert set(both) == {f"48x64 rank 4 tokens 8 {dtype}" for dtype in ("float32", "bfloat16")}
    for record in both.values():
        assert {"qdora / qdora, ratio apart", "qdora / qlora", "dora / peft dora"} <= set(record["ratios"])
        assert set(record["errors"]["peft dora"]) == {"y", "dx", "dA", "dB", "dm"}


def test_moe_writes_its_record(tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "cpu.json"
    size = "--hidden 24 --intermediate 20 --experts 4 --top-k 2 --tokens 16 --rank 3 --rounds 2 --device cpu"
    run("step.moe", *size.split(), "--out", str(out))
    run("step.moe", *size.split(), "--four-bit", "--out", str(out))
    record, four_bit = json.loads(out.read_text())["moe"].values()
    assert set(four_bit["pass_seconds"]) == {"ours dora", "ours lora"}
    contenders = {"ours dora", "ours lora", "peft lora", "frozen"}
    assert set(record["pass_seconds"]) == set(record["step_seconds"]) == set(record["saved_bytes"]) == contenders
    trained = {f"{name}.{kind}" for name in ("gate_up_proj", "down_proj") for kind in ("lora_A", "lora_B")}
    assert set(record["errors"]["peft lora"]) == {"y", "d x", "d weights", *(f"d {key}" for key in trained)}
    assert record["saved_bytes"]["ours dora"] < record["saved_bytes"]["peft lora"]


@pytest.mark.slow
def test_trainers_write_their_record(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    out = tmp_path / "cpu.json"
    size = "--hidden 64 --layers 1 --tokens 8 --rank 4 --rounds 1 --steps 1 --accumulation 2 --device cpu".split()
    run("step.trainers", *size, "--out", str(out), ranks=2)
    ((_, record),) = json.loads(out.read_text())["trainers"].items()
    assert record["settings"]["ranks"] == 2
    contenders = {"ours dora", "ours lora", "peft dora", "peft lora"}
    assert set(record["seconds"]) == set(record["wall_seconds"]) == set(record["first_loss"]) == contenders
    assert {"ours dora / peft dora", "ours dora / peft lora"} <= set(record["ratios"])


def test_norm_writes_its_records(tmp_path):
    out = tmp_path / "cpu.json"
    size = "--weights 24x16x4 --ranks 1 2 8 --hidden 256 --intermediate 64 --rank 4 --rounds 2".split()
    run("step.norm", *size, "--device", "cpu", "--out", str(out))
    (case, one), (_, block) = json.loads(out.read_text())["norm"].items()
    assert case == "24x16 rank 4 float32"
    assert 0 < one["norms"]["ours"]["scratch_bytes"] < one["norms"]["peft"]["scratch_bytes"]
    found = block["refresh"]
    assert list(found) == ["single x1", "ddp x2", "fsdp x2", "ddp x8", "fsdp x8"]
    # q, k, v, o (two heads) and down of 256 rows, gate and up of 64; six A's of 4 x 256 and one of 4 x 64.
    norms, factors = 4 * (5 * 256 + 2 * 64), 4 * 4 * (6 * 256 + 64)
    received = {name: values["received_bytes"] for name, values in found.items()}
    assert received == {
        "single x1": 0,
        "ddp x2": norms,
        "fsdp x2": norms + factors / 2,
        "ddp x8": 2 * norms * 7 / 8,
        "fsdp x8": 2 * norms * 7 / 8 + factors * 2 * 7 / 8,
    }


@pytest.mark.slow
def test_strategy_memory_writes_its_record(tmp_path):
    out = tmp_path / "cpu.json"
    size = "--strategies fsdp+cpu_offload --hidden 64 --layers 1 --rank 4 --rounds 1".split()
    run("planning.strategy_memory", *size, "--device", "cpu", "--out", str(out))
    ((_, record),) = json.loads(out.read_text())["strategy_memory"].items()
    (row,) = record["strategies"].values()
    assert (row["strategy"], row["ranks"]) == ("fsdp+cpu_offload", 2)
    assert row["base_bytes"] > 0 and row["held_bytes"] <= row["step_peak_bytes"]


def test_gpu_says_in_a_line_that_there_is_no_gpu(tmp_path):
    out = tmp_path / "gpu.json"
    printed = run("gpu", "--out", str(out)).stdout
    assert printed == "gpu: no CUDA device here; nothing was tested or measured\n"
    assert not out.exists()


def test_scaling_counts_what_the_sizes_say(tmp_path):
    """Of a strong step of 4 rows: 4 micro-batches of one process, 2 of each of two."""
    size = "--hidden 64 --layers 2 --rank 3 --tokens 8 --batch 1 --rounds 2 --warmup 1 --device cpu".split()
    size += ["--mode", "strong", "--global-batch", "4", "--out", str(tmp_path)]
    run("scaling", *size, "--strategies", "fsdp")
    run("scaling", *size, "--strategies", "fsdp", "ddp", ranks=2)
    alone, fsdp, ddp = (
        json.loads((tmp_path / f"strong-{name}-ranks-1-hosts.json").read_text())
        for name in ("fsdp-00001", "fsdp-00002", "ddp-00002")
    )

    def padded(rows: int, columns: int = 1) -> int:  # to the same number of rows on both ranks, in fp32
        return 4 * 2 * -(-rows // 2) * columns

    linears = [(64, 64)] * 4 + [(176, 64)] * 2 + [(64, 176)]
    factors = sum(padded(3, columns) for _, columns in linears)
    trained = factors + sum(padded(rows, 3) + padded(rows) for rows, _ in linears)
    block = trained + sum(padded(rows, columns) for rows, columns in linears) + 2 * padded(64)
    around = 2 * padded(2048, 64) + padded(64)  # embeddings, head and the last norm: frozen, for the forward alone
    norms = {"count": 1, "bytes": 2 * 4 * sum(rows for rows, _ in linears)}
    assert fsdp["purposes"] == {
        "forward gathers": {"all_gather": {"count": 2 * 5, "bytes": 2 * (2 * block + around)}},
        "backward gathers": {"all_gather": {"count": 2 * 2, "bytes": 2 * 2 * block}},
        "gradients": {"reduce_scatter": {"count": 2, "bytes": 2 * trained}},
        "optimizer step": {"all_reduce": {"count": 1, "bytes": 4}},
        "norms": {"all_gather": {"count": 1, "bytes": 2 * factors}, "all_reduce": norms},
    }
    exact = 4 * sum(3 * (rows + columns) + rows for rows, columns in linears)
    assert ddp["purposes"] == {  # after the last micro-batch alone
        "gradients": {"all_reduce": {"count": 1, "bytes": 2 * exact}},
        "norms": {"all_reduce": norms},
    }
    assert fsdp["collectives"]["all_reduce"] == {"count": 2, "bytes": 4 + norms["bytes"]}
    assert set(alone["purposes"]) == {"optimizer step", "norms"}  # whose parts are the whole
    assert fsdp["settings"]["trained_parameters"] == 2 * exact / 4
    for record in (alone, fsdp, ddp):
        accumulation = 4 // record["world_size"]
        assert record["settings"]["accumulation"] == accumulation
        assert record["first_loss"] == pytest.approx(alone["first_loss"], rel=TRAINED)
        assert len(record["rounds"]) == 2
        speed, step = record["tokens_per_second"], record["step_seconds"]
        assert speed["max"] == pytest.approx(4 * 8 / step["min"]) and speed["min"] <= speed["median"]
        exposed = record["exposed_seconds"]
        assert 0 <= exposed["least"]["median"] <= exposed["most"]["median"] < step["max"]
        assert 0 < record["norm_share"] < 1
    assert ddp["exposed_by_phase"]["least"]["backward"] > 0 < fsdp["exposed_by_phase"]["least"]["forward"]
    drawn = run("scaling", "--draw", "--out", str(tmp_path)).stdout
    assert "strong fsdp: hidden 64 layers 2 dora rank 3 float32, 32 tokens a step" in drawn
    assert tmp_path.with_name(f"{tmp_path.name}.png").is_file()


@pytest.mark.slow
def test_scaling_measures_links_and_refuses_rows_that_do_not_divide(tmp_path):
    run("scaling", *"--links --rounds 1 --device cpu --out".split(), str(tmp_path), ranks=2)
    record = json.loads((tmp_path / "links-00002-ranks-1-hosts.json").read_text())
    assert set(record["seconds"]) == {"all_gather", "reduce_scatter", "all_reduce"}
    for rows in record["seconds"].values():
        assert [row["bytes"] for row in rows] == [2**power for power in range(10, 26)]
        assert all(0 < row["min"] <= row["median"] for row in rows)
    done = run("scaling", *"--ranks 2 --mode strong --global-batch 3".split(), status=2)
    assert done.stderr == (
        "error: --global-batch: 3 rows cannot be shared evenly by 2 ranks; choose a multiple of 2\n"
    )


@pytest.mark.slow
def test_scaling_on_made_hosts_waits_for_their_link(tmp_path):
    reason = available()
    if reason is not None:
        pytest.skip(reason)
    size = "--hidden 64 --layers 1 --rank 3 --tokens 8 --rounds 2 --warmup 1 --device cpu --strategies ddp".split()
    run("scaling", *size, *"--hosts 2 --mbit 1000 --delay-ms 20 --out".split(), str(tmp_path))
    record = json.loads((tmp_path / "weak-ddp-00002-ranks-2-hosts.json").read_text())
    assert (record["hosts"], record["link"]) == (2, {"mbit": 1000.0, "delay_ms": 20.0})
    most = record["exposed_by_phase"]["most"]
    for phase in ("backward", "norms"):  # an all-reduce goes there and back
        assert most[phase] > 0.03
    assert record["step_seconds"]["min"] > 2 * 0.03


def test_scaling_draws_efficiency_against_the_smallest_world():
    def record(mode: str, ranks: int, speed: float, **settings) -> dict:
        same = {"hidden": 64, "layers": 2, "method": "dora", "rank": 4, "dtype": "float32"}
        return {
            "mode": mode, "strategy": "fsdp", "world_size": ranks, "hosts": 1,
            "settings": {**same, "tokens_per_rank": 64 if mode == "weak" else 64 // ranks, **settings},
            "tokens_per_second": {"median": speed, "min": speed - 1, "max": speed + 1},
        }  # fmt: skip

    made = [record("weak", 4, 300), record("weak", 1, 100), record("weak", 2, 180)]
    made += [record("strong", 8, 100, accumulation=1), record("strong", 2, 50, accumulation=4)]
    made += [record("weak", 2, 7, hidden=128)]
    found = {
        (mode, case): [(point.ranks, point.efficiency) for point in line]
        for (mode, _, case), line in curves(made).items()
    }
    assert found == {
        ("weak", "hidden 64 layers 2 dora rank 4 float32, 64 tokens a rank and step"): [
            (1, 1.0), (2, pytest.approx(0.9)), (4, pytest.approx(0.75)),
        ],
        ("strong", "hidden 64 layers 2 dora rank 4 float32, 64 tokens a step"): [
            (2, 1.0), (8, pytest.approx(0.5)),
        ],
        ("weak", "hidden 128 layers 2 dora rank 4 float32, 64 tokens a rank and step"): [(2, 1.0)],
    }  # fmt: skip
    assert uncovered([(0, 10), (5, 12), (20, 30)], by=[(8, 11), (25, 40)]) == 14


@pytest.mark.parametrize("last", [[1.0, 1.0, 1.0, 0.2], [0.30, 0.31, 0.32, 0.33], [5.0, 0.0, 5.0, 0.0]])
def test_names_of_curves_touch_neither_each_other_nor_the_frame(tmp_path, last):
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    lines = [plotting.Curve(f"curve {i}", i, [1, 2, 4], [1.0, 0.5, y]) for i, y in enumerate(last)]
    with plotting.figure(tmp_path / "curves.png", "a title", 1, 2, (12, 4)) as axes:
        for axis in axes[0]:
            plotting.draw_curves(axis, lines, "x", "y", "{:.2f}", bottom=0)
        axis.figure.draw_without_rendering()
        frame, names = axis.bbox, [Text.get_window_extent(text) for text in axis.texts]  # without the line to it
    assert len(names) == len(lines)
    assert all(frame.x0 < name.x0 and name.x1 < frame.x1 for name in names)
    assert all(frame.y0 < name.y0 and name.y1 < frame.y1 for name in names)
    names.sort(key=lambda name: name.y0)
    assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(names))


def test_no_two_simulated_curves_of_a_panel_look_alike():
    looks = [
        (case.split()[0], curve.style, curve.dashed)
        for case, found in simulations().items() if (parts := efficiency(found))
        for curve in [curve_of(case, parts)]
    ]  # fmt: skip
    assert len(looks) == len(set(looks)) > 5
    styles = (plotting.COLOURS, plotting.MARKERS, plotting.HATCHES)
    assert all(len(set(style)) == len(style) for style in styles)
    assert len(STRATEGIES) <= len(plotting.COLOURS)
