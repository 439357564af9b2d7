"""Tables of one device's times and memory, each from the records of one script."""

from typing import Any

from benchmarks.common.markdown import any_gpu, measured_by, table
from benchmarks.common.results import records

COLUMNS = {
    "DoRA / PEFT LoRA": "ours dora / peft lora",
    "DoRA / PEFT DoRA": "ours dora / peft dora",
    "DoRA / our LoRA": "ours dora / ours lora",
}
CONTENDERS = {
    "ours DoRA": "ours dora",
    "PEFT DoRA": "peft dora",
    "ours LoRA": "ours lora",
    "PEFT LoRA": "peft lora",
}
PUBLISHED = (
    "arXiv 2603.22276 (H200, 36 layers): PEFT's DoRA 13,653 ms, their kernels 9,104 ms, 1.50",
    "PEFT's MetaMathQA (28 layers): LoRA 188 ms a step and 22.3 GB, DoRA 238 ms and 24.5 GB, 1.26 of LoRA",
)
BLOCKS_8B = 32
KEPT_BY_EXPERTS = ("ours dora", "ours lora", "peft lora", "frozen")


def performance() -> str:
    """step_time: medians of the rounds' own ratios."""
    rows, found_records = [], list(records("step_time"))
    for case, record in found_records:
        names = {"torch": "torch", "peft": "PEFT"}
        if record["settings"]["four_bit"]:
            names["bitsandbytes"] = "bitsandbytes"
        found = {key.replace("qdora", "dora").replace("qlora", "lora"): r for key, r in record["ratios"].items()}
        rows.append([measured_by(record, case, **names), *(median(found.get(key)) for key in COLUMNS.values())])
    title = "Time of a whole training step (all linear layers adapted), ratios; below 1 is faster:"
    rows += any_gpu((record for _, record in found_records), len(COLUMNS))
    return f"{title}\n\n{table(['device, model', *COLUMNS], rows)}"


def median(values: dict[str, float] | None) -> str:
    return f"{values['median']:.2f}" if values else "not measured"


def profiles() -> str:
    """step_profile: the floor of the products, and what each kind of operator takes."""
    rows, kinds = [], list[str]()
    for case, record in records("step_profile"):
        kinds = list(record["profile_seconds"])
        values = [record[f"{name}_seconds"] for name in ("step", "floor", "norm")]
        values += record["profile_seconds"].values()
        rate = f"{record['product_flops_per_second'] / 1e9:,.0f} GFLOP/s"
        rows.append([measured_by(record, f"{case}, {rate}", torch="torch"), *(f"{v * 1e3:.0f}" for v in values)])
    heads = ["ms", "a step", "floor of its products", "norms by themselves", *kinds]
    return table(heads, rows) if rows else "Not measured."


def norms() -> str:
    """norm: one weight."""
    found = [(case, record) for case, record in records("norm") if "norms" in record]
    rows = []
    for case, record in found:
        ways = [record["norms"].get(name) for name in ("ours", "peft")]
        seconds = [f"{way['seconds']['median'] * 1e3:,.1f}" if way else "not measured" for way in ways]
        scratch = [f"{way['scratch_bytes'] / 1e6:.2f} MB" if way else "not measured" for way in ways]
        rate = f"{record['norms']['ours']['weight_bytes_per_second'] / 1e9:.1f} GB/s"
        rows.append([measured_by(record, case, torch="torch", peft="PEFT"), *seconds, rate, *scratch])
    rows += any_gpu((record for _, record in found), 5)
    heads = ["one weight", "ms, ours", "ms, PEFT", "ours reads W at", "scratch, ours", "scratch, PEFT"]
    return table(heads, rows)


def refresh() -> str:
    """norm: a table for each block, by strategy and number of ranks."""
    found = [(case, record) for case, record in records("norm") if "refresh" in record]
    heads = ["strategy", "ranks", "ms", "scratch", "collectives", f"received, {BLOCKS_8B} blocks",
             "their weights, in the same step"]  # fmt: skip
    blocks = []
    for case, record in found:
        title = measured_by(record, case.removeprefix("refresh, "), torch="torch")
        blocks.append(f"{title}\n\n{table(heads, map(refresh_row, record['refresh'].values()))}")
    if any_gpu((record for _, record in found), 0):
        blocks.append("Any GPU: not measured.")
    return "\n\n".join(blocks)


def refresh_row(row: dict[str, Any]) -> list[str]:
    received, weights = (BLOCKS_8B * row[key] for key in ("received_bytes", "weights_received_bytes"))
    return [
        f"`{row['strategy']}`", f"{row['ranks']}", f"{row['seconds']['median'] * 1e3:.1f}",
        f"{row['scratch_bytes'] / 1e6:.2f} MB", f"{sum(row['collectives'].values())}", f"{received / 1e6:.1f} MB",
        f"{weights / 1e9:.1f} GB, {weights / received:,.0f}x" if weights else "",
    ]  # fmt: skip


def kept() -> str:
    """step_time: what autograd keeps between forward and backward."""
    order = ["ours DoRA", "ours LoRA", "PEFT DoRA", "PEFT LoRA"]
    rows = []
    for case, record in records("memory"):
        quant = " q" if record["settings"]["four_bit"] else " "
        found = [record["contenders"].get(CONTENDERS[name].replace(" ", quant)) for name in order]
        sizes = [f"{values['saved_bytes'] / 1e6:.0f}" if values else "not measured" for values in found]
        rows.append([measured_by(record, case), *sizes])
    return table(["MB kept for the backward", *order], rows)


def experts() -> str:
    """moe: ratios of passes and steps, and what autograd keeps."""
    pairs = {
        "a step, DoRA / our LoRA": ("step", "ours dora / ours lora"),
        "a step, DoRA / PEFT LoRA": ("step", "ours dora / peft lora"),
        "a pass, DoRA / our LoRA": ("pass", "ours dora / ours lora"),
        "a pass, DoRA / frozen": ("pass", "ours dora / frozen"),
        "a pass, our LoRA / frozen": ("pass", "ours lora / frozen"),
        "a pass, experts at once / in turn": ("pass", "ours dora, experts at once / ours dora, experts in turn"),
    }
    rows, found = [], list(records("moe"))
    for case, record in found:
        cells = [median(record[f"{kind}_ratios"].get(pair)) for kind, pair in pairs.values()]
        kept = record["saved_bytes"]
        sizes = [f"{kept[who] / 1e6:.0f}" if who in kept else "not measured" for who in KEPT_BY_EXPERTS]
        names = {} if record["settings"]["four_bit"] else {"peft": "PEFT"}
        about = measured_by(record, case, torch="torch", transformers="transformers", **names)
        rows.append([about, *cells, " / ".join(sizes)])
    rows += any_gpu((record for _, record in found), len(pairs) + 1)
    return table(["a block", *pairs, f"MB kept: {', '.join(KEPT_BY_EXPERTS)}"], rows)


def trainers() -> str:
    """trainers: ratios of steps, by process time and by the wall."""
    rows, found = [], list(records("trainers"))
    for case, record in found:
        cells = [median(record["ratios"].get(pair)) for pair in COLUMNS.values()]
        cells += [median(record["wall_ratios"].get(pair)) for pair in list(COLUMNS.values())[:2]]
        names = {"torch": "torch", "transformers": "transformers", "trl": "TRL", "peft": "PEFT"}
        rows.append([measured_by(record, case, **names), *cells])
    rows += any_gpu((record for _, record in found), len(COLUMNS) + 2)
    heads = [*COLUMNS, "by the wall, DoRA / PEFT LoRA", "by the wall, DoRA / PEFT DoRA"]
    return table(["a step of SFTTrainer", *heads], rows)


def folded() -> str:
    """layer: the two ways to apply the ratio over a 4-bit weight."""
    rows = []
    for case, record in records("layer"):
        ratios = [median(record["ratios"][f"qdora / {other}"]) for other in ("qdora, ratio apart", "qlora")]
        ways = [record["errors"][way] for way in ("qdora", "qdora, ratio apart")]
        errors = [", ".join(f"{way[key]:.1e}" for key in ("y", "dx", "dm")) for way in ways]
        rows.append([measured_by(record, case, torch="torch"), *ratios, *errors])
    heads = [
        "a layer, forward and backward",
        "time, on scales / apart",
        "QDoRA / QLoRA",
        "error of y, dx, dm",
        "apart",
    ]
    return table(heads, rows)


def published() -> str:
    """published: ms a cycle and GB at its peak, and the ratios."""
    rows = []
    for case, record in records("published"):
        pairs = ("peft dora / ours dora", "ours dora / peft lora")
        cells = [published_cell(record, who) for who in CONTENDERS.values()]
        cells += [median(record["ratios"].get(pair)) for pair in pairs]
        rows.append([measured_by(record, case, torch="torch", peft="peft"), *cells])
    heads = ["ms a cycle, peak", *CONTENDERS, "PEFT DoRA / ours", "ours / PEFT LoRA"]
    return f"Published: {'; '.join(PUBLISHED)}.\n\n{table(heads, rows or any_gpu((), len(heads) - 1))}"


def published_cell(record: dict[str, Any], who: str) -> str:
    if who not in record["seconds"]:
        return "not measured"
    milliseconds = f"{record['seconds'][who]['median'] * 1e3:,.0f} ms"
    memory = record["peak_memory_bytes"].get(who)
    return f"{milliseconds}, {memory / 1e9:.1f} GB" if memory else milliseconds
