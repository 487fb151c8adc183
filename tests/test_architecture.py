"""The import law, read from the syntax trees: arrows only point down, DeepSpeed and W&B stay where they belong.

Imports inside functions count.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.support.launching import ROOT

ENTRIES = ("chat", "describe", "export", "parity", "plan", "versions")
SETTINGS = "minillm.settings"
CORE = {"utils", "compat", "run_folder", "settings"}
FLOORS = {  # what each part may import of the project, besides itself
    "utils": set(),
    "compat": {"utils"},
    "run_folder": {"utils"},
    "settings": {"run_folder", "utils"},
    "planning": {"settings", "utils"},
    "models": {"settings", "compat"},  # of settings, architecture.py alone: see below
    "data": {"compat", "utils"},
    "interop": {"models", *CORE},
    "training": {"planning", "models", "data", "interop", *CORE},
    "preflight": {"training", "planning", "models", "data", "interop", *CORE},
    "inference": {"models", "data", "compat", "utils"},
    "data_tools": {"data", "compat", "utils"},
    "launch": {"preflight", "training", "planning", "interop", "data_tools", *CORE},
    "": {"interop"},  # minillm/__init__.py: minillm.load
    "__main__": {"utils", ""},  # starts the entries by their names: a table, no imports
    **{name: {"training", "planning", "inference", "interop", "models", "data", "", *CORE} for name in ENTRIES},
}
ONLY_IN = {
    "deepspeed": {"training/engine.py", "compat/deepspeed_api.py"},
    "wandb": {"training/trackers.py", "report.py"},
}
MODELS_MAY_USE = {"torch", "transformers", *sys.stdlib_module_names}


def sources() -> list[Path]:
    return sorted(p for folder in ("minillm", "data_tools", "launch") for p in (ROOT / folder).rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[0] != "minillm":
        return relative.parts[0]
    return "" if relative.name == "__init__.py" and len(relative.parts) == 2 else Path(relative.parts[1]).stem


def imported(path: Path) -> list[str]:
    """Every module a file imports, at any depth of the file; relative imports are refused on the way."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = node.module == "minillm"  # from minillm import chat
            found += [f"{node.module}.{alias.name}" if inside else node.module for alias in node.names]
    return found


def project_part(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "data_tools":
        return "data_tools"
    if parts[0] == "minillm":
        return parts[1] if len(parts) > 1 else ""
    return None


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    part = part_of(path)
    assert part in FLOORS, f"{path}: add its floor to this test"
    for module in imported(path):
        target = project_part(module)
        allowed = target is None or target == part or target in FLOORS[part]
        assert allowed, f"{path.relative_to(ROOT)} ({part}) imports {module}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_stay_in_their_places(path):
    place = path.relative_to(ROOT / "minillm").as_posix() if path.is_relative_to(ROOT / "minillm") else "elsewhere"
    for module in imported(path):
        top = module.split(".")[0]
        if top in ONLY_IN:
            assert any(place == ok or place.startswith(ok + "/") for ok in ONLY_IN[top]), f"{path} imports {module}"


def test_models_carry_their_own_code():
    """An export with its modeling code needs torch and transformers only; moe_deepspeed.py is training's alone."""
    for path in (ROOT / "minillm" / "models").glob("*.py"):
        assert "minillm.models.moe_deepspeed" not in imported(path), path
        for module in imported(path) if path.name != "moe_deepspeed.py" else ():
            own = module.startswith(("minillm.models", f"{SETTINGS}.architecture", "minillm.compat.transformers_api"))
            assert module.split(".")[0] in MODELS_MAY_USE or own, f"{path}: {module}"


def private_names(path: Path) -> set[str]:
    """Attributes that a file reads or writes on others' objects, and that their authors do not document."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and (node.attr.startswith("ds_") or re.match("_[^_]", node.attr))
    }


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_undocumented_api_is_reached_through_compat_alone(path):
    """Of transformers, classes at its top level and its logging; of DeepSpeed, `import deepspeed` (its engine)."""
    if path.parent.name == "compat":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("transformers", "deepspeed"):
            names = {alias.name for alias in node.names}
            public = node.module == "transformers" and all(name[0].isupper() for name in names)
            assert public or (node.module, names) == ("transformers.utils", {"logging"}), ast.unparse(node)
        if isinstance(node, ast.Import):
            assert not [a.name for a in node.names if a.name.startswith(("transformers.", "deepspeed."))], path
    compat = [ROOT / "minillm" / "compat" / name for name in ("transformers_api.py", "deepspeed_api.py")]
    hidden = set().union(*map(private_names, compat))
    assert {"_name_or_path", "ds_tensor", "_hp_optimizer_states_linked"} <= hidden
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not hidden & (private_names(path) | strings)


def test_no_cycles():
    files = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in sources()
        if p.is_relative_to(ROOT / "minillm") or p.is_relative_to(ROOT / "data_tools")
    }
    graph = {name: {m for m in imported(path) if m in files and m != name} for name, path in files.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_nothing_is_unpickled():
    """Checkpoints, shards and caches are data: no pickle, no torch.load, no numpy objects."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, path
        assert "pickle" not in [m.split(".")[0] for m in imported(path)], path


def test_the_top_level_is_as_given():
    visible = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    built = {"data", "runs", "build", "dist", "minillm.egg-info", "minillm_stack.egg-info", "__pycache__"}
    expected = {"launch", "ds_configs", "minillm", "data_tools", "tests", "setup.py"}
    expected |= {"README.md", "README.zh.md", "LICENSE", "CITATION.cff", "CHANGELOG.md"}
    assert visible - built == expected
