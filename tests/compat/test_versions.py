"""Installed, admitted and tested versions: the files agree with each other, and a wrong environment is one line.

The wrong environments are real ones (`python -m venv`), with the metadata that installers leave and without the
packages: the check comes before anything is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import packaging
import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from minillm.compat import versions
from tests.support.launching import ROOT
from tests.test_import_time import modules_after

PYTHONS = ("3.10.13", "3.11.7", "3.12.1", "3.13.0")
RIGHT = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "deepspeed": "0.19.8", "numpy": "2.4.6",
         "tokenizers": "0.23.3", "safetensors": "0.8.0", "pyyaml": "6.0.4"}  # fmt: skip
MOVES = ("torch", "deepspeed", "transformers", "webdataset", "wandb", "gensim", "numpy", "pydantic", "ruff", "pytest")


def driver():
    """tests/versions/drive.py, which reads setup.py without setuptools."""
    spec = importlib.util.spec_from_file_location("drive", ROOT / "tests" / "versions" / "drive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GROUPS = driver().requirements()
REQUIREMENTS = [Requirement(line) for line in dict.fromkeys(line for group in GROUPS.values() for line in group)]
PINS = [line for line in (ROOT / "launch" / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_one_tested_version_inside_its_range(python):
    pinned: dict[str, str] = {}
    system = {"python_full_version": python, "python_version": python.rpartition(".")[0], "sys_platform": "linux",
              "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython"}  # fmt: skip
    for line in PINS:
        pin, _, marker = line.partition(" ; ")
        name, version = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)", pin).groups()  # no +local: it would hold to one build
        assert not name.startswith(("nvidia-", "cuda-", "triton")), f"{name}: torch pins it"
        if not marker or Marker(marker).evaluate(system):
            assert name not in pinned, name
            pinned[name] = version
    for requirement in REQUIREMENTS:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but {version} in launch/constraints.txt"


def test_every_requirement_has_a_lower_bound_and_what_moves_an_upper_one():
    assert driver().lower_bounds().count("==") == len(REQUIREMENTS)
    bounded = {r.name for r in REQUIREMENTS if any(part.operator == "<" for part in r.specifier)}
    assert set(MOVES) <= bounded


@pytest.mark.parametrize(
    "version, admitted, expected",
    [
        ("2.13.0+cpu", ">=2.11,<2.15", ""),
        ("2.11.0a0+eb65b36914.nv26.02", ">=2.11,<2.15", ""),  # NVIDIA's images
        ("2.10.1", ">=2.11,<2.15", versions.TOO_OLD),
        ("2.15.0.dev20260101", ">=2.11,<2.15", versions.TOO_NEW),
        ("6.0.0rc1", ">=5.17,<6", versions.TOO_NEW),
        ("5.9", ">=5.17,<6", versions.TOO_OLD),  # numbers, not letters
        ("84.2.1", "", ""),
    ],
)
def test_judge(version, admitted, expected):
    assert versions.judge(version, admitted) == expected


def test_the_check_imports_nothing_that_costs():
    new = modules_after("from minillm.compat.versions import TRAINING, environment_problem as e; e(TRAINING)")
    assert not {name.split(".")[0] for name in new} & {"packaging", "email", "inspect", "dataclasses", "torch"}
    assert "importlib.metadata" not in new


class Bare:
    """A real environment into which metadata can be put."""

    def __init__(self, folder: Path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        self.site = next(folder.glob("lib/python*/site-packages"))
        shutil.copytree(Path(packaging.__file__).parent, self.site / "packaging")

    def hold(self, installed: dict[str, str], minillms: dict[str, Path]) -> None:
        """Exactly these packages, and a distribution of minillm for each name, editable from its folder."""
        for old in self.site.glob("*.dist-info"):
            shutil.rmtree(old)
        for name, version in installed.items():
            self._write(name, version, "")
        asked = [line + f'; extra == "{extra}"' * bool(extra) for extra, group in GROUPS.items() for line in group]
        requires = "".join(f"Requires-Dist: {line}\n" for line in asked)
        for name, root in minillms.items():
            info = self._write(name, "0.1.0", requires)
            (info / "top_level.txt").write_text("data_tools\nminillm\n")
            url = {"dir_info": {"editable": True}, "url": root.as_uri()}
            (info / "direct_url.json").write_text(json.dumps(url))

    def _write(self, name: str, version: str, more: str) -> Path:
        info = self.site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{more}\nText\n")
        return info

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "MINILLM_ANY_VERSION")}
        environment |= {"PYTHONPATH": str(ROOT), **variables}
        return subprocess.run(
            [self.python, *words], cwd=self.site, env=environment, capture_output=True, text=True, timeout=60
        )


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return Bare(tmp_path_factory.mktemp("bare") / "env")


@pytest.mark.parametrize("words", [("minillm.chat", "nothing"), ("minillm.export", "nothing", "out")])
@pytest.mark.parametrize(
    "changed, said",
    [
        ({"transformers": "6.1.0"}, "transformers 6.1.0 is too new (admitted >=5.17,<6, tested 5."),
        ({"torch": "2.9.1+cu130"}, "torch 2.9.1+cu130 is too old (admitted >=2.11,<2."),
        ({"transformers": None}, "transformers is not installed (admitted >=5.17,<6, tested 5."),
    ],
)
def test_a_wrong_version_is_one_line_with_the_command_that_mends_it(bare, words, changed, said):
    bare.hold({name: v for name, v in {**RIGHT, **changed}.items() if v}, {"some-name": ROOT})
    done = bare.run("-m", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {said}"), done.stderr
    mends = f"Mend it: {bare.python} -m pip install -e {ROOT} -c {ROOT}/launch/constraints.txt"
    assert mends in done.stderr


def test_the_wrong_python_is_one_line(bare):
    """`python launch/pretrain.py` outside the environment: nothing is there."""
    bare.hold({}, {})
    done = bare.run(str(ROOT / "launch" / "pretrain.py"), "--help")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: torch is not installed (tested 2.13.0); transformers is not installed")


def test_any_version_makes_it_a_warning(bare):
    bare.hold({**RIGHT, "transformers": "6.1.0"}, {"some-name": ROOT})
    done = bare.run("-m", "minillm.chat", "nothing", MINILLM_ANY_VERSION="1")
    assert done.stderr.startswith("[minillm] warning: transformers 6.1.0 is too new")
    assert "No module named 'yaml'" in done.stderr  # it went on


def test_right_versions_are_passed_over_in_silence(bare):
    for minillms in ({"some-name": ROOT}, {"some-name": ROOT, "its-old-name": ROOT}, {}):
        bare.hold(RIGHT, minillms)
        done = bare.run("-c", "from minillm.compat import versions as v; v.check_environment(('torch', 'deepspeed'))")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_two_minillms_are_one_line_that_names_both(bare, tmp_path):
    bare.hold(RIGHT, {"some-name": ROOT, "other-name": tmp_path})
    done = bare.run("-m", "minillm.chat", "nothing")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    for part in ("two minillms", f"some-name 0.1.0 in {ROOT}", f"other-name 0.1.0 in {tmp_path}",
                 "pip uninstall other-name"):  # fmt: skip
        assert part in done.stderr


def test_the_table(bare, tmp_path):
    bare.hold({**RIGHT, "numpy": "1.26.4"}, {"some-name": ROOT})
    done = bare.run("-m", "minillm.versions")
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert done.returncode == 1 and "mend it: " in done.stderr
    assert rows["torch"].endswith("as tested") and rows["transformers"].endswith("admitted")
    assert rows["numpy"].endswith("too old") and rows["webdataset"].endswith("missing")
    assert rows["gensim"].endswith("not installed (extra workshop)")
    bare.hold(RIGHT, {"some-name": tmp_path})  # another checkout's installation says nothing about this one
    done = bare.run("-m", "minillm.versions", "--json")
    assert json.loads(done.stdout)[0] == {"name": "torch", "installed": "2.13.0+cpu", "admitted": "",
                                          "tested": "2.13.0", "extra": "", "verdict": "as tested"}  # fmt: skip
    assert f"has some-name from {tmp_path}" in done.stderr


def test_away_from_a_checkout_the_packages_themselves_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "PACKAGE", tmp_path / "site-packages" / "minillm")  # a wheel without launch/
    said = versions.mending_command([("transformers", ">=5.17,<6"), ("torch", ">=2.11,<2.15")], {"torch": "2.13.0"})
    assert said == f"{sys.executable} -m pip install 'transformers>=5.17,<6' torch==2.13.0"
