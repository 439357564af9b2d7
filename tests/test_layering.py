"""The rooms of the package: imports go down their list, no circle is inside one, and each says what it is for."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dora_dist"

# The highest first. A room's files may import those of its own and of the rooms below it.
ROOMS = "cli planning integrations training models adapters dora quant data parallel io settings".split()
WITHOUT_FOLDER = {"cli": "cli", **dict.fromkeys(["config", "schema", "errors", "device"], "settings")}
DISTRIBUTED = ("parallel.", "planning.fake_group")
OPTIONAL = {
    "accelerate",
    "trl",
    "deepspeed",
    "bitsandbytes",
    "peft",
    "datasets",
    "wandb",
    "tensorboard",
    "matplotlib",
    "lm_eval",
}
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def room_of(module: str) -> str:
    return WITHOUT_FOLDER[module] if module in WITHOUT_FOLDER else module.split(".")[0]


def imports(path: Path, everywhere: bool = True) -> list[str]:
    """Absolute names of what a file imports: anywhere in it, in functions and for types too, or at module level
    only. `from a import b` gives a and a.b, since b may be a module."""
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
    """The files of this package among `names`."""
    return {name.removeprefix("dora_dist.") for name in names if name.startswith("dora_dist.")} & set(FILES)


def circle(modules: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; [] where there is none."""
    left = dict(modules)
    while free := [name for name, needed in left.items() if not needed & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


def test_every_file_is_in_a_room():
    assert {room_of(module) for module in FILES} == set(ROOMS)
    folders = {path.parent.name for path in PACKAGE.rglob("*.py")} - {PACKAGE.name}
    assert folders == set(ROOMS) - {"cli", "settings"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down(room):
    inside = {}
    for module in (name for name in FILES if room_of(name) == room):
        others = own(imports(FILES[module]))
        for other in others:
            assert ROOMS.index(room_of(other)) >= ROOMS.index(room), f"{module} imports {other}, which is above it"
        inside[module] = {other for other in others if room_of(other) == room}
    assert circle(inside) == []
    if (PACKAGE / room).is_dir():
        about = ast.parse((PACKAGE / room / "__init__.py").read_text())
        told = ast.get_docstring(about) or ""
        own_names = room == "integrations"  # users import from there
        assert told and (own_names or len(about.body) == 1), "it says what the room is for, no more"
        untold = [name for name in inside if name.split(".")[1] not in re.findall(r"\w+", told)]
        assert not untold, f"{room}/__init__.py does not say what these do: {untold}"


def test_only_parallel_uses_torch_distributed():
    for module, path in FILES.items():
        uses = [n for n in imports(path) if n.startswith("torch.distributed") or "DistributedData" in n]
        assert module.startswith(DISTRIBUTED) or not uses, f"{module}: {uses}"


def test_optional_packages_are_imported_where_they_are_used():
    for module, path in FILES.items():
        assert not {name.split(".")[0] for name in imports(path, everywhere=False)} & OPTIONAL, module


def test_this_test_sees_imports_and_circles(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        "import peft\nfrom dora_dist.dora import norm_cache\ndef f():\n    from dora_dist.data.rows import Row\n"
    )
    assert own(imports(path)) == {"dora.norm_cache", "data.rows"}
    assert own(imports(path, everywhere=False)) == {"dora.norm_cache"}
    assert "peft" in imports(path, everywhere=False)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
