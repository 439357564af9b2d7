"""Pages that state what the code says are checked against it."""

import dataclasses
import importlib.util
import re

import pytest
import yaml

from benchmarks import report
from dora_dist.config import RunConfig, load_config, parse_yaml
from tests.support import ROOT


def test_the_configuration_page_is_the_configuration(tmp_path):
    page = (ROOT / "docs" / "configuration.md").read_text()
    block = re.search(r"```yaml\n(.*?)```", page, re.DOTALL).group(1)
    shown = parse_yaml(block)
    minimal = {"model": {"path": shown["model"]["path"]}, "data": {"train": shown["data"]["train"]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(minimal))
    assert shown == dataclasses.asdict(load_config(tmp_path / "c.yaml"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_committed_configuration_is_valid(path):
    assert isinstance(load_config(path), RunConfig)
    assert len(path.read_text().splitlines()) <= 60


PAGES = pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name
)


@PAGES
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} -> {target}"


@PAGES
def test_files_and_commands_that_are_named_exist(page):
    text = page.read_text()
    folders = "dora_dist|launch|configs|examples|benchmarks|tests|docs"
    for path in re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), path
    rooms = "|".join(folder.name for folder in (ROOT / "dora_dist").iterdir() if folder.is_dir())
    for path in re.findall(rf"(?<![\w/.])((?:{rooms})/\w+\.py)", text):
        assert (ROOT / "dora_dist" / path).exists(), path
    for module in re.findall(r"python -m ((?:benchmarks|tests)[\w.]*\w)", text):
        assert importlib.util.find_spec(module), module
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = re.findall(r"`[^`\n]+`|```.*?```", text, re.DOTALL)
    assert set(re.findall(r"(?:^|`|\n)make ([a-z-]+)", "\n".join(code))) <= targets


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        *(f"docs/{page}.md" for page in ("strategies", "quantization", "performance", "scaling", "integrations")),
    ],
)
def test_the_pages_figures_are_those_of_the_result_files(name):
    assert name in report.PAGES
    page = (ROOT / name).read_text()
    assert "made by benchmarks/report.py" in page
    assert report.updated(page) == page
