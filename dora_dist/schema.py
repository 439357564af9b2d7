"""Settings as dataclasses: strict YAML in, typed and checked sections out.

A wrong key, type, choice or range is a `UserError` that names the key and what would be valid. A section is
checked when it is made, whether from a file or in Python.
"""

import dataclasses
import re
import reprlib
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from dora_dist.errors import UserError, nearest


def setting(default: Any, *, low: float | None = None, high: float | None = None, positive: bool = False) -> Any:
    """A field with a range: `low` <= value <= `high`, and > 0 where `positive`."""
    metadata = {"low": low, "high": high, "positive": positive}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Section:
    """Base of every section: checks its own fields' types, choices and ranges. `TrainConfig` is the section
    `train`; `RunConfig` holds the sections."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        section = type(self).__name__.removesuffix("Config").lower()
        for spec in dataclasses.fields(self):
            key = spec.name if section == "run" else f"{section}.{spec.name}"
            value = getattr(self, spec.name)
            _check_type(key, value, hints[spec.name])
            check_range(key, value, spec.metadata)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of duplicate keys silently, reads 1e-4 as a string, 1:30 as 90 and 010 as 8; users
    mean none of these."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} must be a string", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _check_size(node: yaml.Node) -> None:
    """Aliases can make a few lines stand for more values than any memory holds, or for endlessly many."""
    left, stack = _MAX_VALUES, [node]
    while stack:
        node, left = stack.pop(), left - 1
        if left < 0:
            raise yaml.constructor.ConstructorError(
                None, None, f"with its aliases it holds more than {_MAX_VALUES:,} values", node.start_mark
            )
        if isinstance(node, yaml.SequenceNode):
            stack += node.value
        elif isinstance(node, yaml.MappingNode):
            stack += [part for pair in node.value for part in pair]


_MAX_VALUES = 100_000
_NUMBERS = {  # YAML 1.2's
    "int": r"^[-+]?(0|[1-9][0-9_]*)$",
    "float": r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9_]*)([eE][-+]?[0-9]+)?$|^[-+]?[0-9]+[eE][-+]?[0-9]+$"
    r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$",
}
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}  # a date is a string here
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in _REPLACED]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _form in _NUMBERS.items():
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_form), list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError, also where PyYAML raises what Python does (`!!int x`, a thousand brackets)."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise yaml.YAMLError(f"a value does not fit its tag: {error}") from None


def apply_override(tree: dict, override: str) -> None:
    """Lay `key.sub=value` over a tree that was read from YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: overrides are written key.sub=value, such as train.lr=1e-4")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"{override!r}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.get(parent)
        if child is None:
            child = tree[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"{override!r}: {parent!r} is a value, not a section")
        tree = child
    tree[last] = value


def build_section(prefix: str, cls: Any, tree: Any) -> Any:
    """An instance of the dataclass `cls` from a mapping; sections are built recursively."""
    if not isinstance(tree, Mapping):
        raise UserError(f"{prefix}: expected a section of keys, found {describe_value(tree)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else name
        if name not in fields:
            raise UserError(f"{key}: unknown key; {nearest(name, fields)}")
        hint = hints[name]
        values[name] = (
            build_section(key, hint, {} if value is None else value) if dataclasses.is_dataclass(hint) else value
        )
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in values:
            hint = hints[name]
            if dataclasses.is_dataclass(hint):
                build_section(name, hint, {})  # names the section's own missing key
            raise UserError(f"{prefix}.{name}: missing; this key has no default")
    return cls(**values)


_LARGEST = sys.float_info.max  # whole numbers may lie beyond, NaN is not below


def _check_type(key: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        choices = get_args(hint) if get_origin(hint) is Literal and isinstance(value, str) else ()
        close = nearest(value, choices) if choices else ""
        hint_text = f"; {close}" if close.startswith("did you mean") else ""
        raise UserError(f"{key}: expected {_name_type(hint)}, found {describe_value(value)}{hint_text}")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if hint is Any:
        return True
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str) and value != ""
    return isinstance(value, hint)


def difference_between_ranks(trees: Sequence[Mapping[str, Any]]) -> str | None:
    """One line naming the first key in which the settings of a rank differ from rank 0's; None: all are equal.

    Args:
        trees: each rank's settings as a dictionary, in order of ranks.
    """
    flat = [dict(_leaves(tree)) for tree in trees]
    for rank, other in enumerate(flat[1:], start=1):
        for key in [*flat[0], *(key for key in other if key not in flat[0])]:
            mine, theirs = ([repr(tree[key])] if key in tree else [] for tree in (flat[0], other))
            if mine != theirs:
                one, two = (_SHORT.repr(tree[key]) if key in tree else "nothing" for tree in (flat[0], other))
                return f"{key}: {one} on rank 0, {two} on rank {rank}; every rank needs the same configuration"
    return None


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_range(key: str, value: Any, metadata: Mapping[str, Any]) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    low, high = metadata.get("low"), metadata.get("high")
    if low is not None and value < low:
        raise UserError(f"{key}: {value} is too small; at least {low}")
    if high is not None and value > high:
        raise UserError(f"{key}: {value} is too large; at most {high}")
    if metadata.get("positive") and value <= 0:
        raise UserError(f"{key}: {value} must be greater than 0")


def _name_type(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin in (Union, types.UnionType):
        return " or ".join(_name_type(arg) for arg in args)
    if origin is list:
        return f"a list of {_PLURAL[args[0]]}"
    if origin is dict:
        return f"a mapping of names to {_PLURAL[args[1]]}"
    return _SINGULAR.get(hint, getattr(hint, "__name__", str(hint)))


_SINGULAR = {
    int: "a whole number", float: "a number", str: "a string", bool: "true or false", type(None): "null",
}  # fmt: skip
_PLURAL = {int: "whole numbers", float: "numbers", str: "strings", Any: "values"}


_SHORT = reprlib.Repr()  # what aliases or a whole file in the wrong place stand for is not told in full
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def describe_value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"the {type(value).__name__} {_SHORT.repr(value)}" if not isinstance(value, str) else _SHORT.repr(value)
