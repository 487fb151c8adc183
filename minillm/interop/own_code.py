"""Beside a saved model of ours, the code it needs: for families that no class of transformers computes.

Contract: the folder loads in a process that has torch and transformers only, with `trust_remote_code=True`. The code is
minillm/models (with minillm/settings/architecture.py and minillm/compat/transformers_api.py) as it stands, its imports
made relative: transformers' loader wants flat folders. Only what the model needs is copied.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import minillm.models
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM, MiniLLMModel
from minillm.utils.files import read_json, write_json

AUTO_CLASSES = {"AutoConfig": MiniLLMConfig, "AutoModel": MiniLLMModel, "AutoModelForCausalLM": MiniLLMForCausalLM}
_IMPORT = re.compile(r"^(\s*)from minillm\.(?:models\.|compat\.|settings\.)?(\w+) import", re.MULTILINE)


def add_own_code(folder: Path) -> list[str]:
    """Write the modules into a folder `save_pretrained` wrote and name them in its config.json; their file names."""
    sources = _needed_modules(AUTO_CLASSES["AutoModelForCausalLM"].__module__)
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(_IMPORT.sub(r"\1from .\2 import", text), encoding="utf-8")
    config = read_json(folder / "config.json")
    config["auto_map"] = {
        auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in AUTO_CLASSES.items()
    }
    write_json(folder / "config.json", config)
    return [f"{name}.py" for name in sources]


def _needed_modules(first: str) -> dict[str, str]:
    """The source of a module, and of every module of the project it imports, however deep; by its name alone."""
    root = Path(minillm.models.__file__).parents[2]
    sources: dict[str, str] = {}
    wanted = [first]
    while wanted:
        module = wanted.pop()
        name = module.rpartition(".")[2]
        if name in sources:
            continue
        sources[name] = root.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        wanted += _project_imports(sources[name])
    return dict(sorted(sources.items()))


def _project_imports(source: str) -> list[str]:
    return [
        node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minillm.")
    ]
