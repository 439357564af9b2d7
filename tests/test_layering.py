"""Imports point downwards: mathematics knows no modules, modules no distribution, backends not each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dora_dist"

# Lowest first. A file may import those of the lines above it; files of one line do not import each other.
LAYERS = [
    ["errors", "launcher", "patches", "phases", "target"],
    ["schema", "files", "durable", "forked"],
    ["config", "fingerprint"],
    ["quant", "trace", "hardware"],
    ["nf4_triton"],
    ["nf4_kernels", "triton_kernels"],
    ["kernels"],
    ["decomposition"],
    ["products", "kept_output", "shards"],
    ["packed"],
    [
        "functional",
        "optimizer_state",
        "data",
        "attention",
        "loss",
        "deepspeed_config",
        "health",
        "identity",
        "prequantized",
        "backends.rendezvous",
    ],
    ["backends.process"],
    ["engine", "backends.watchdog", "backends.rehearsal", "pieces"],
    ["backends.replicated", "backends.fsdp", "backends.zero", "layers"],
    ["backends.strategy"],
    ["weights", "inject", "norms"],
    ["peft_format", "pack", "participation"],
    ["adapter_files"],
    ["adapter"],
    ["hf_model", "progress"],
    ["build", "known_models"],
    ["rundata", "merge_weights", "optim"],
    ["checkpoint", "merge_loaded"],
    ["trainer"],
    ["stand_ins", "merge"],
    ["rehearse"],
    ["cost"],
    ["plan"],
    ["fits", "train"],
    ["cli"],
]
OPTIONAL = {"deepspeed", "bitsandbytes", "peft", "datasets", "wandb", "tensorboard", "matplotlib", "lm_eval"}
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" or path.parent.name == "data"
}


def unit(module: str) -> str:
    """What the table lists: the files of data/ are one unit, free among themselves."""
    return "data" if module.split(".")[0] == "data" else module


def imports(path: Path, everywhere: bool = True) -> list[str]:
    """Absolute names of what a file imports, anywhere in it or at module level only. `from a import b` gives
    a and a.b, since b may be a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = set()
    if not everywhere:
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {id(n) for function in functions for n in ast.walk(function)}
    names = []
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def own(names: list[str]) -> set[str]:
    """The units of this package among `names`."""
    short = {name.removeprefix("dora_dist.") for name in names if name.startswith("dora_dist.")}
    return {unit(name) for name in short if name in FILES or name == "data"}


def test_the_table_names_every_file():
    units = [name for line in LAYERS for name in line]
    assert sorted(units) == sorted({unit(name) for name in FILES})


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downwards(module):
    height = {name: i for i, line in enumerate(LAYERS) for name in line}
    me = unit(module)
    for other in own(imports(FILES[module])) - ({me} if me == "data" else set()):
        assert height[other] < height[me], f"{module} imports {other}, which is not below it"


@pytest.mark.parametrize("module", FILES)
def test_only_backends_import_torch_distributed(module):
    uses = [n for n in imports(FILES[module]) if n.startswith("torch.distributed") or "DistributedData" in n]
    assert module.startswith("backends.") or not uses


@pytest.mark.parametrize("module", FILES)
def test_optional_packages_are_imported_where_they_are_used(module):
    top = {name.split(".")[0] for name in imports(FILES[module], everywhere=False)}
    assert not top & OPTIONAL


def test_this_test_sees_imports(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        "import peft\nfrom dora_dist import norms\ndef f():\n    from dora_dist.data.rows import Row\n"
    )
    assert own(imports(path)) == {"norms", "data"}
    assert own(imports(path, everywhere=False)) == {"norms"}
    assert "peft" in imports(path, everywhere=False)
