"""What `make` installs is what pyproject.toml asks for, pinned; the two commands of the README are there."""

import re
import sys
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(python: str) -> dict[str, str]:
    """Package -> the version that constraints.txt fixes for one version of Python."""
    found: dict[str, str] = {}
    for pin in constraints():
        if (pin.marker or Marker("python_version > '0'")).evaluate({"python_version": python}):
            assert canonicalize_name(pin.name) not in found, f"{pin.name} is pinned twice for Python {python}"
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and "*" not in specifier.version, f"{pin} fixes no version"
            found[canonicalize_name(pin.name)] = specifier.version
    return found


def test_torch_is_pinned_without_a_build():
    assert [str(pin) for pin in constraints() if pin.name == "torch"] == ["torch==2.13.0"]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_to_a_version_that_it_allows(python):
    pinned, metadata = pins(python), project()
    extras = [line for lines in metadata["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, metadata["dependencies"] + extras):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in constraints.txt for Python {python}"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} against {version}"


def test_the_package_has_the_version_of_pyproject():
    import dora_dist

    assert dora_dist.__version__ == project()["version"]


def test_the_console_script_exists():
    from dora_dist.cli import entry

    assert project()["scripts"] == {"dora-dist": f"{entry.__module__}:{entry.__name__}"}


def test_ci_runs_the_makefile_s_tests():
    script = ROOT / ".ci" / "run"
    assert re.search(r"^make test-all\b", script.read_text(), re.MULTILINE)
    assert script.stat().st_mode & 0o111, "not executable"


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no README.md")
@pytest.mark.parametrize("command", ["make quickstart", "make test", "make test-all"])
def test_the_readme_names_the_command(command):
    assert command in (ROOT / "README.md").read_text()
    assert re.search(rf"^{command.removeprefix('make ')}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_built_in_shapes_are_packaged():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = [path for path in (ROOT / "dora_dist").rglob("*") if path.is_file()]
    others = {path.name for path in files if path.suffix not in (".py", ".pyc")}
    assert set(data["dora_dist.planning"]) == others
