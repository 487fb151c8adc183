"""YAML as people mean it: only what looks like a number is one, and a key stands once.

Contract: true, false, null and numbers as JSON writes them (and .5, 1., .inf, .nan) are what they say; everything else
is text as it was written: 0123, 1_000, 1:30, 2024-11-27, yes, no, on, off. (YAML 1.1, PyYAML's own rules, makes 83,
1000, 90, a date and truths of these; ruamel.yaml, which reads YAML 1.2, still makes 123, 1000 and a date.) A number
remembers its spelling, for a reader who wants text: see `as_written`.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class WrittenInt(int):
    """A whole number and how it was written."""

    text: str


class WrittenFloat(float):
    """A number and how it was written."""

    text: str


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        plain = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE]
        for number, key in enumerate(plain):
            if key.value in (other.value for other in plain[:number]):
                place = f"line {key.start_mark.line + 1}"
                raise yaml.constructor.ConstructorError(problem=f"{key.value} is given twice ({place}); keep one")
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"  # <<, which may come several times
_RULES = {
    _MERGE: (r"<<", "<"),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
for _tag, (_pattern, _first) in _RULES.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


def _written(kind: type, plain: Any):
    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        number = kind(plain(loader, node))
        number.text = node.value
        return number

    return construct


_Loader.add_constructor(
    "tag:yaml.org,2002:int", _written(WrittenInt, lambda loader, node: int(loader.construct_scalar(node)))
)
_Loader.add_constructor("tag:yaml.org,2002:float", _written(WrittenFloat, yaml.SafeLoader.construct_yaml_float))


def load_yaml(text: str) -> Any:
    """What a YAML text says; numbers are WrittenInt and WrittenFloat.

    Raises:
        yaml.YAMLError, RecursionError: it is not YAML, or a key is given twice.
    """
    return yaml.load(text, _Loader)


def as_written(value: Any) -> Any:
    """The text of a number, also of those in a list; anything else as it is."""
    if isinstance(value, list):
        return [item.text if isinstance(item, (WrittenInt, WrittenFloat)) else item for item in value]
    return value.text if isinstance(value, (WrittenInt, WrittenFloat)) else value


def as_number(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """Plain numbers in place of written ones, however deep; what an alias repeats is one object before and after."""
    seen = {} if seen is None else seen
    if isinstance(value, WrittenInt):
        return int(value)
    if isinstance(value, WrittenFloat):
        return float(value)
    if not isinstance(value, (dict, list)):
        return value
    if id(value) not in seen:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        plain = {as_number(key): as_number(item, seen) for key, item in pairs}
        seen[id(value)] = plain if isinstance(value, dict) else list(plain.values())
    return seen[id(value)]
