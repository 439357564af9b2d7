"""The YAML's numbers, and where the settings of two ranks part."""

import dataclasses

import pytest

from dora_dist.config import DataConfig, ModelConfig, RunConfig
from dora_dist.schema import difference_between_ranks, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5", 0.5), ("5.", 5.0), ("1_000", 1000), ("-3", -3),
        ("0", 0), ("010", "010"), ("1:30", "1:30"), ("0x1f", "0x1f"), ("1.2.3", "1.2.3"), ("1e5x", "1e5x"),
        ("2024-01-02", "2024-01-02"), ("'1e-4'", "1e-4"), ("yes", True), ("~", None), (".inf", float("inf")),
    ],
)  # fmt: skip
def test_what_is_a_number(text, value):
    found = parse_yaml(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([{}, {}, {}], None),
        ([{}], None),
        ([{}, {}, {"train.lr": 1e-3}], "train.lr: 0.0002 on rank 0, 0.001 on rank 2; every rank needs the same"),
        ([{}, {"parallel.deepspeed": {"a": {"b": 1}}}], "parallel.deepspeed: {} on rank 0, nothing on rank 1"),
        ([{"dora.targets": ["q"]}, {"dora.targets": "q"}], "dora.targets: ['q'] on rank 0, 'q' on rank 1"),
        ([{"train.seed": 1}, {"train.seed": True}], "train.seed: 1 on rank 0, True on rank 1"),
        ([{}, {"data.eval": "x"}, {"train.lr": 1}], "data.eval: None on rank 0, 'x' on rank 1"),
    ],
)
def test_the_first_difference_between_ranks_is_named(changes, told):
    trees = []
    for change in changes:
        tree = dataclasses.asdict(RunConfig(ModelConfig(path="m"), DataConfig(train="t")))
        for key, value in change.items():
            section, _, name = key.partition(".")
            tree[section][name] = value
        trees.append(tree)
    message = difference_between_ranks(trees)
    assert message is None if told is None else message.startswith(told)
