"""Fixtures, and the order of the tests."""

import os
import signal
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tests.support import ROOT
from tests.support.models import make_rows, make_tiny_distilbert, make_tiny_gpt2, make_tiny_llama

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))  # the models are tiny
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; runs would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    """What starts processes comes first, in one worker of xdist; the other one takes the rest, file by file."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(key=lambda item: {"ranks": 0, "rehearsals": 1}.get(group_of(item), 2))


def group_of(item) -> str:
    if item.get_closest_marker("ranks"):
        return "ranks"
    if "rehearse" in item.fixturenames:
        return "rehearsals"  # what was rehearsed is shared
    return item.nodeid.partition("::")[0]


@pytest.fixture(scope="session")
def rehearse():
    """Rehearsals, each of which takes place once in a session."""
    from dora_dist.planning import rehearse

    class Shared(rehearse.Rehearsals):
        found: ClassVar[dict] = {}

        def __call__(self, job):
            model = (job.directory / "config.json").read_text()  # whatever its directory is called
            key = repr(job).replace(str(job.directory), model)
            if key not in self.found:
                self.found[key] = super().__call__(job)
            return self.found[key]

    with Shared() as rehearsals:
        yield rehearsals


@pytest.fixture(scope="session")
def quickstart_model() -> Path:
    return ROOT / "launch" / "quickstart" / "model"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> Path:
    return make_tiny_gpt2(tmp_path_factory.mktemp("tiny_gpt2"))


@pytest.fixture(scope="session")
def tiny_distilbert(tmp_path_factory) -> Path:
    return make_tiny_distilbert(tmp_path_factory.mktemp("tiny_distilbert"))


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", 24)
