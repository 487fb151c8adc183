"""From a YAML file and `section.key=value` words to a RunConfig: default < YAML < command line.

Contract: no torch, no transformers: `--dry-run` answers in under a second. Every problem is found at once and described
by key, value, rule, fix and place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from minillm.settings.run import DataSource, RunConfig, check_run_config
from minillm.utils.errors import UserError, nearest
from minillm.utils.places import find_named
from minillm.utils.yaml_values import load_yaml


def load_run_config(config: str, overrides: list[str], *, stage: str, configs_dir: Path) -> tuple[RunConfig, list[str]]:
    """Read launch/configs/NAME.yaml (or a path), apply `section.key=value` words, check everything.

    Returns:
        The configuration and every problem found in it, one sentence each; a section with a problem holds defaults, so
        that the caller can go on checking before it raises.

    Raises:
        UserError: there is no such file, or it is not YAML.
    """
    path = find_config(config, configs_dir)
    values = read_yaml(path)
    origin: dict[str, str] = {}
    problems = apply_overrides(values, overrides, origin)
    values.setdefault("run_name", path.stem)
    if values.get("stage") not in (None, stage):
        problems.append(f"stage = {values['stage']!r}: launch/pretrain.py and launch/sft.py decide it; leave it out")
    values["stage"] = stage
    try:
        run = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += [describe_problem(item, origin, path) for item in error.errors()]
        broken = {item["loc"][0] for item in error.errors()}
        run = RunConfig.model_validate({k: v for k, v in values.items() if k not in broken})
        if "train" in broken:
            run.train.max_steps = 1  # so that its absence is not reported on top
    return run, problems + check_run_config(run)


def find_config(config: str, configs_dir: Path) -> Path:
    """A path, or a name in launch/configs."""
    if (path := find_named(config, configs_dir, ".yaml")) is not None:
        return path
    names = sorted(p.stem for p in configs_dir.glob("*.yaml"))
    raise UserError(f"--config {config}: no such file, and no such name in {configs_dir}{nearest(config, names)}")


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a mapping of sections, not a {type(values).__name__}")
    return values


def apply_overrides(values: dict[str, Any], overrides: list[str], origin: dict[str, str]) -> list[str]:
    """Write `a.b=value` words into `values`; the words' keys go into `origin` so that errors can say where from."""
    problems = []
    for word in overrides:
        key, separator, text = word.partition("=")
        if not separator or not key:
            problems.append(f"`{word}`: an override is written section.key=value, for example optim.learning_rate=3e-4")
            continue
        try:
            value = load_yaml(text) if text else None
        except yaml.YAMLError:
            problems.append(f"{key}: `{text}` is not a YAML value; quote it")
            continue
        target = values
        *sections, last = key.split(".")
        for part in sections:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
            if not isinstance(target, dict):
                problems.append(f"`{word}`: {part} is not a section")
                break
        else:
            target[last] = value
            origin[key] = "command line"
    return problems


def valid_keys(location: tuple) -> list[str]:
    """The keys that the section at `location` takes."""
    section: Any = RunConfig
    for part in location:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        annotation = field.annotation if field else None
        if isinstance(part, int):
            section = DataSource
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    return list(section.model_fields)


def _sections() -> list[str]:
    """The keys at the top that hold other keys."""
    return [name for name in RunConfig.model_fields if valid_keys((name,)) != valid_keys(())]


def describe_problem(item: dict[str, Any], origin: dict[str, str], path: Path) -> str:
    """One pydantic error as a sentence: key, value, rule, fix, place."""
    location = tuple(p for p in item["loc"] if p not in ("str", "list[DataSource]", "none"))
    key = ".".join(str(p) for p in location)
    where = next((origin[k] for k in origin if k == key or k.startswith(key + ".")), str(path))
    if item["type"] == "extra_forbidden":
        elsewhere = []
        if len(location) == 1:
            elsewhere = [f"{name}.{key}" for name in _sections() if key in valid_keys((name,))]
        near = nearest(str(location[-1]), valid_keys(location[:-1]))
        return f"{key}: unknown key{f'; did you mean `{elsewhere[0]}`?' if elsewhere else near} (from {where})"
    section: Any = RunConfig
    field = None
    for part in location:
        field = getattr(section, "model_fields", {}).get(part) if isinstance(part, str) else None
        section = field.annotation if field else DataSource
    rule = item["msg"][0].lower() + item["msg"][1:]
    what = f" ({field.description})" if field is not None and field.description else ""
    return f"{key} = {item['input']!r}: {rule}{what} (from {where})"
