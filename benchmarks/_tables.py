"""Writes the tables of README.md and docs/ from benchmarks/results/*.json; what nobody measured is called so."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _gpu_tables import published
from _simulation_tables import planned, predicted, simulated

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/strategies.md", "docs/quantization.md", "docs/performance.md", "docs/scaling.md")
BEGIN = "<!-- performance: made by benchmarks/_tables.py -->"
COLUMNS = {
    "DoRA / PEFT LoRA": "ours dora / peft lora",
    "DoRA / PEFT DoRA": "ours dora / peft dora",
    "DoRA / our LoRA": "ours dora / ours lora",
}
MEMORY_COLUMNS = {
    "held after the build": "held_bytes",
    "peak while loading": "loading_peak_bytes",
    "peak in a step": "step_peak_bytes",
}
BLOCK_ROWS = {
    "4-bit weights held": "base_bytes",
    "all held after loading": "held_bytes",
    "peak while loading": "loading_peak_bytes",
    "the same with mapped pages of the files": "loading_peak_with_files_bytes",
    "counted: all held and one layer in 16 bits": "loading_limit_bytes",
    "held between forward and backward, without what grows with the tokens": "between_fixed_bytes",
    "saved for the backward, per token": "saved_per_token",
    "saved for the backward, besides": "saved_fixed_bytes",
    "peak in a step, without what grows with the tokens": "step_peak_fixed_bytes",
    "peak in a step, per token": "step_peak_per_token",
}
CHECKED = {  # how terms of the account begin -> what was measured of them in one block
    "4-bit codes": "base_bytes",
    "scales": "base_bytes",
    "A, B and m, fp32": "held_bytes",
    "gathered: as received": "step_peak_fixed_bytes",
    "gathered: copied out": "step_peak_fixed_bytes",
    "the largest layer's weight": "step_peak_fixed_bytes",
    "kept by the block": "saved_per_token",
}
BLOCKS_8B = 32
MEMORY_VERSIONS = {"torch": "torch", "deepspeed": "DeepSpeed"}


def records(script: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(case, record) of every device that `script` ran on."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        yield from json.loads(path.read_text()).get(script, {}).items()


def performance() -> str:
    """One row per device and case of step_time.py: medians of the rounds' own ratios."""
    lines = [
        "Time of a whole training step (all linear layers adapted), ratios; below 1 is faster:",
        "",
        "| device, model | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    devices = set()
    for case, record in records("step_time"):
        versions = record["versions"]
        devices.add(record["device"])
        names = {"torch": "torch", "peft": "PEFT"}
        if record["settings"]["four_bit"]:
            names["bitsandbytes"] = "bitsandbytes"
        stated = [f"{name} {versions[key]}" for key, name in names.items() if key in versions]
        when = ", ".join([*stated, record["date"]])
        about = f"{record['device']}, {case} ({when})"
        found = {key.replace("qdora", "dora").replace("qlora", "lora"): r for key, r in record["ratios"].items()}
        ratios = [found.get(key) for key in COLUMNS.values()]
        lines.append(
            f"| {about} | " + " | ".join(f"{r['median']:.2f}" if r else "not measured" for r in ratios) + " |"
        )
    if not any("CPU" not in device for device in devices):
        lines.append("| any GPU | " + " | ".join(["not measured"] * len(COLUMNS)) + " |")
    return "\n".join(lines)


def memory() -> str:
    """One table per device and case of strategy_memory.py, one row per strategy and number of ranks."""
    blocks = []
    for case, record in records("strategy_memory"):
        rows = list(record["strategies"].values())
        versions = [f"{name} {record['versions'][key]}" for key, name in MEMORY_VERSIONS.items()]
        about = f"{record['device']}, {case}: a base of {rows[0]['base_bytes'] / 1e6:.0f} MB"
        lines = [
            f"{about} ({', '.join([*versions, record['date']])})",
            "",
            "| strategy | ranks | " + " | ".join(MEMORY_COLUMNS) + " |",
            "|---" * (len(MEMORY_COLUMNS) + 2) + "|",
        ]
        for row in rows:
            sizes = [(row[key] / 1e6, row[key] / row["base_bytes"]) for key in MEMORY_COLUMNS.values()]
            name = " + ".join(f"`{part}`" for part in row["strategy"].split("+"))
            lines.append(
                f"| {name} | {row['ranks']} | " + " | ".join(f"{mb:.0f} MB, {x:.2f}x" for mb, x in sizes) + " |"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) or "Not measured."


def profiles() -> str:
    """One row per device and case of step_profile.py: the floor of the products, and what each kind takes."""
    lines = []
    for case, record in records("step_profile"):
        kinds = list(record["profile_seconds"])
        if not lines:
            heads = ["a step", "floor of its products", "norms by themselves", *kinds]
            lines = ["| ms | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        values = [record["step_seconds"], record["floor_seconds"], record["norm_seconds"]]
        values += [record["profile_seconds"][kind] for kind in kinds]
        rate = f"{record['product_flops_per_second'] / 1e9:,.0f} GFLOP/s"
        about = f"{record['device']}, {case}, {rate} (torch {record['versions']['torch']}, {record['date']})"
        lines.append(f"| {about} | " + " | ".join(f"{value * 1e3:.0f}" for value in values) + " |")
    return "\n".join(lines) or "Not measured."


def norms() -> str:
    """One row per device and weight of norm.py."""
    lines = [
        "| one weight | ms, ours | ms, PEFT | ours reads W at | scratch, ours | scratch, PEFT |",
        "|---|---|---|---|---|---|",
    ]
    devices = set()
    for case, record in records("norm"):
        if "norms" not in record:
            continue
        devices.add(record["device"])
        ways = [record["norms"].get(name) for name in ("ours", "peft")]
        seconds = [f"{way['seconds']['median'] * 1e3:,.1f}" if way else "not measured" for way in ways]
        scratch = [f"{way['scratch_bytes'] / 1e6:.2f} MB" if way else "not measured" for way in ways]
        rate = f"{ways[0]['weight_bytes_per_second'] / 1e9:.1f} GB/s"
        versions = record["versions"]
        when = f"torch {versions['torch']}, PEFT {versions['peft']}, {record['date']}"
        about = f"{record['device']}, {case} ({when})"
        lines.append(f"| {about} | {' | '.join([*seconds, rate, *scratch])} |")
    if not any("CPU" not in device for device in devices):
        lines.append("| any GPU" + " | not measured" * 5 + " |")
    return "\n".join(lines)


def refresh() -> str:
    """One table per device and block of norm.py, one row per strategy and number of ranks."""
    blocks = []
    devices = set()
    for case, record in records("norm"):
        if "refresh" not in record:
            continue
        devices.add(record["device"])
        sent = f"received, {BLOCKS_8B} blocks"
        when = f"torch {record['versions']['torch']}, {record['date']}"
        lines = [
            f"{record['device']}, {case.removeprefix('refresh, ')} ({when})",
            "",
            f"| strategy | ranks | ms | scratch | collectives | {sent} | their weights, in the same step |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in record["refresh"].values():
            received, weights = (BLOCKS_8B * row[key] for key in ("received_bytes", "weights_received_bytes"))
            share = f"{weights / 1e9:.1f} GB, {weights / received:,.0f}x" if weights else ""
            lines.append(
                f"| `{row['strategy']}` | {row['ranks']} | {row['seconds']['median'] * 1e3:.1f} | "
                f"{row['scratch_bytes'] / 1e6:.2f} MB | {sum(row['collectives'].values())} | "
                f"{received / 1e6:.1f} MB | {share} |"
            )
        blocks.append("\n".join(lines))
    if not any("CPU" not in device for device in devices):
        blocks.append("Any GPU: not measured.")
    return "\n\n".join(blocks)


def kept() -> str:
    """One row per device and case of memory.py: what autograd keeps between forward and backward."""
    names = {
        "ours DoRA": "ours {}dora",
        "ours LoRA": "ours {}lora",
        "PEFT DoRA": "peft {}dora",
        "PEFT LoRA": "peft {}lora",
    }
    lines = ["| MB kept for the backward | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for case, record in records("memory"):
        quant = "q" if record["settings"]["four_bit"] else ""
        found = [record["contenders"].get(name.format(quant)) for name in names.values()]
        about = f"{record['device']}, {case} ({record['date']})"
        cells = " | ".join(f"{values['saved_bytes'] / 1e6:.0f}" if values else "not measured" for values in found)
        lines.append(f"| {about} | {cells} |")
    return "\n".join(lines)


def folded() -> str:
    """One row per device and case of layer.py: the two ways to apply the ratio over a 4-bit weight."""
    ways = ("qdora", "qdora, ratio apart")
    lines = [
        "| a layer, forward and backward | time, on scales / apart | QDoRA / QLoRA | error of y, dx, dm | apart |",
        "|---|---|---|---|---|",
    ]
    for case, record in records("layer"):
        ratios = [record["ratios"][key]["median"] for key in ("qdora / qdora, ratio apart", "qdora / qlora")]
        errors = [", ".join(f"{record['errors'][way][key]:.1e}" for key in ("y", "dx", "dm")) for way in ways]
        about = f"{record['device']}, {case} (torch {record['versions']['torch']}, {record['date']})"
        lines.append(f"| {about} | {ratios[0]:.2f} | {ratios[1]:.2f} | {errors[0]} | {errors[1]} |")
    return "\n".join(lines)


def block() -> str:
    """One table per device and case of block_memory.py: a row per term, a column per strategy."""
    blocks = []
    for case, record in records("block_memory"):
        runs = list(record["strategies"].values())
        names = [" + ".join(f"`{part}`" for part in run["strategy"].split("+")) for run in runs]
        lines = [
            f"{record['device']}, {case}, one block (torch {record['versions']['torch']}, {record['date']})",
            "",
            "| measured, and measured / counted | "
            + " | ".join(f"{name} x{run['ranks']}" for name, run in zip(names, runs, strict=True)) + " |",
            "|---" * (len(runs) + 1) + "|",
        ]  # fmt: skip
        for title, key in BLOCK_ROWS.items():
            unit, name = (1e3, "kB") if key.startswith("saved") or key.endswith("token") else (1e6, "MB")
            sizes = [f"{(run['counted'] | run['measured'])[key] / unit:.0f} {name}" for run in runs]
            if all(key in run["counted"] and key in run["measured"] for run in runs):
                ratios = [run["measured"][key] / run["counted"][key] for run in runs]
                sizes = [f"{size}, {ratio:.2f}x" for size, ratio in zip(sizes, ratios, strict=True)]
            lines.append(f"| {title} | " + " | ".join(sizes) + " |")
        seconds = [f"{run['measured']['load_seconds']:.0f} s" for run in runs]
        lines.append("| loading, one thread a rank | " + " | ".join(seconds) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) or "Not measured."


def host() -> str:
    """What block_memory.py counts of the 70B model's host memory, and what it measured of that."""
    found = real_block()
    if found is None:
        return "Not counted."
    account, ranks, total = found["account"], found["account"]["settings"]["ranks"], found["account"]["host_total"]
    lines = ["| host memory of one process | GB | as torch pins it, GB | |", "|---|---|---|---|"]
    for name, term in account["host"].items():
        lines.append(f"| {name} | {gb(term['bytes'])} | {gb(term['pinned'])} | {how_known(name, found)} |")
    for name, n in (("one process", 1), (f"{ranks} processes", ranks)):
        lines.append(f"| **{name}** | **{gb(n * total['bytes'])}** | **{gb(n * total['pinned'])}** | |")
    offloaded = f"Without `cpu_offload` the {gb(total['bytes'])} GB would lie on each GPU."
    twice = gb(account["reading"])
    reading = f"While a rank reads its rows of the embeddings or the head, they lie there twice: {twice} GB"
    more = f"{offloaded} {reading} more, when gradients and moments do not exist yet."
    return "\n".join([*lines, "", *textwrap.wrap(more, 120)])


def gpu() -> str:
    """What block_memory.py counts of the 70B model's GPU memory: a row per term, a column per moment."""
    found = real_block()
    if found is None:
        return "Not counted."
    account = found["account"]
    moments, tokens = list(account["gpu_total"]), account["settings"]["tokens"]
    lines = [
        f"| GB of each GPU, {tokens} tokens | " + " | ".join(moments) + " | |",
        "|---" * (len(moments) + 2) + "|",
    ]
    for name, cells in account["gpu"].items():
        sizes = " | ".join(gb(cells[m]) if cells.get(m) else "" for m in moments)
        lines.append(f"| {name} | {sizes} | {how_known(name, found)} |")
    for size, key in ((tokens, "gpu_total"), (2 * tokens, "gpu_total_doubled")):
        sizes = " | ".join(f"**{gb(account[key][m])}**" for m in moments)
        lines.append(f"| **all, {size} tokens** | {sizes} | |")
    reserved = f"with {tokens} tokens it may reserve {gb(account['gpu_pools'])} GB."
    return "\n".join([*lines, "", f"torch keeps a pool of memory for each stream: {reserved}"])


def how_known(term: str, record: dict[str, Any]) -> str:
    """Counted alone, or checked by what one block was measured to take."""
    key = next((key for start, key in CHECKED.items() if term.startswith(start)), None)
    if key is None:
        return "counted"
    run = next(iter(record["strategies"].values()))
    return f"counted; in one block {run['measured'][key] / run['counted'][key]:.2f}x of it measured"


def real_block() -> dict[str, Any] | None:
    """The latest record of a block of the account's own shape."""
    found = [
        record
        for _, record in records("block_memory")
        if all(record["settings"][key] == record["account"]["settings"][key] for key in ("hidden", "intermediate"))
    ]
    return max(found, key=lambda record: record["date"], default=None)


def gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def updated(page: str) -> str:
    """`page` with each table that it has marks for made anew."""
    for make in (
        performance, memory, block, host, gpu, folded, profiles, kept, norms, refresh, published,
        simulated, planned, predicted,
    ):  # fmt: skip
        begin, end = BEGIN.replace("performance", make.__name__), f"<!-- /{make.__name__} -->"
        if begin in page:
            head, _, rest = page.partition(begin)
            page = f"{head}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(updated(path.read_text()))
