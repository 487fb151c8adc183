"""launch/environment.sh: what it installs with, when again, and one clear line where it cannot.

The real script, pip and venv, on a project without requirements, in a folder with a space in its name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.launching import ROOT

SETUP = "from setuptools import setup\nsetup(name='toy-of-a-test', version='1', py_modules=[], install_requires=[{}])\n"


class Checkout:
    """A project with our launch/environment.sh, and a virtual environment that sees this one's pip and setuptools."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "launch").mkdir(parents=True)
        for name in ("environment.sh", "torch_index.py"):
            shutil.copy(ROOT / "launch" / name, folder / "launch" / name)
        self.constrain("toy-of-a-test==1\ntorch==2.13.0\n")
        (folder / "setup.py").write_text(SETUP.format(""))

    def constrain(self, text: str) -> None:
        (self.folder / "launch" / "constraints.txt").write_text(text)

    def activate(self) -> dict[str, str]:
        """Variables of an active environment of its own."""
        environment = self.folder / "its environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        site = next(environment.glob("lib/python*/site-packages"))
        (site / "more.pth").write_text(sysconfig.get_paths()["purelib"])
        return {"VIRTUAL_ENV": str(environment), "PATH": f"{environment / 'bin'}:{os.environ['PATH']}"}

    def source(self, *before: str, extras: str = "", **variables: str) -> subprocess.CompletedProcess:
        """`. launch/environment.sh`, as quickstart.sh does it."""
        left = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "MINILLM_NEWEST")}
        # Build isolation would fetch setuptools.
        quick = {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1", "MINILLM_TORCH_INDEX": ""}
        script = f"set -euo pipefail; . launch/environment.sh {extras}; echo sourced; command -v python"
        return subprocess.run(
            [*before, "bash", "-c", script], cwd=self.folder, env={**left, **quick, **variables},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip


def installs(done: subprocess.CompletedProcess) -> bool:
    assert done.returncode == 0, done.stderr
    assert "sourced" in done.stdout
    return "== installing" in done.stdout


def refused(done: subprocess.CompletedProcess) -> str:
    """The error, after what pip or venv said."""
    assert done.returncode == 2 and "sourced" not in done.stdout, done
    assert "unbound variable" not in done.stderr
    return done.stderr[done.stderr.index("error: minillm" if "error: minillm" in done.stderr else "error: ") :]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "a folder" / "toy")


def test_it_installs_once_and_leaves_a_torch_that_was_there(checkout):
    """The environment sees this one's torch, so torch's line is left out; for the rest the constraints hold."""
    active = checkout.activate()
    script = Path(active["VIRTUAL_ENV"], "bin", "deepspeed")
    script.write_text(f"#!{script.with_name('python')}\nfrom deepspeed.launcher.runner import main\n")  # as pip does
    script.chmod(0o755)
    assert installs(checkout.source(**active))
    assert not installs(checkout.source(MINILLM_NEWEST="0", **active))
    assert "usage: " in subprocess.run([script, "--help"], capture_output=True, text=True).stdout
    used = Path(active["VIRTUAL_ENV"], ".minillm-constraints.txt").read_text()
    assert used == "toy-of-a-test==1\n"


@pytest.mark.slow
def test_it_installs_again_when_something_changes(checkout):
    active = checkout.activate()
    assert installs(checkout.source(**active))
    assert installs(checkout.source(MINILLM_NEWEST="1", **active))
    assert not installs(checkout.source(MINILLM_NEWEST="1", **active))
    assert installs(checkout.source(**active))  # back to what is tested
    assert installs(checkout.source(extras="tests", **active))
    assert not installs(checkout.source(**active))
    checkout.constrain("toy-of-a-test==2\n")
    assert "pip could not install" in refused(checkout.source(**active))  # the constraints say 2, and here is 1


def test_pip_without_a_network_says_how_to_go_on(checkout):
    (checkout.folder / "setup.py").write_text(SETUP.format("'a-package-that-is-nowhere'"))
    active = checkout.activate()
    said = refused(checkout.source(extras="tests", **active))
    assert said.startswith("error: pip could not install minillm")
    for part in ("pip download -d wheels -c ", "'.[tests]'", "PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels", "activate an"):
        assert part in said
    assert not Path(active["VIRTUAL_ENV"], ".minillm-installed").exists()  # it counts for nothing


def test_no_venv_module(checkout, tmp_path):
    """Debian's python3 without python3-venv."""
    (tmp_path / "without" / "ensurepip").mkdir(parents=True)
    (tmp_path / "without" / "ensurepip" / "__init__.py").write_text("raise ModuleNotFoundError('as on Debian')\n")
    python = tmp_path / "python3"
    python.write_text(f"#!/bin/sh\nPYTHONPATH='{tmp_path / 'without'}' exec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    said = refused(checkout.source(PYTHON=str(python)))
    assert said.count("\n") == 1 and "has no venv module" in said and "python3-venv" in said
    assert not (checkout.folder / ".venv").exists()


def test_no_python_and_an_old_one(checkout):
    assert "there is no /nowhere/python: install" in refused(checkout.source(PYTHON="/nowhere/python"))
    old = [shutil.which(f"python3.{minor}") for minor in (9, 8, 7)]
    old += map(str, (Path.home() / ".pyenv" / "versions").glob("3.9.*/bin/python3"))
    works = [p for p in old if p and subprocess.run([p, "-c", ""], capture_output=True).returncode == 0]
    if not works:
        pytest.skip("no Python below 3.10 here")
    said = refused(checkout.source(PYTHON=works[0]))
    assert said.startswith("error: minillm needs Python 3.10 or newer; ") and said.count("\n") == 1
    for words in (["-m", "minillm.chat"], ["-m", "data_tools.corpus"], [str(ROOT / "launch" / "pretrain.py")]):
        done = subprocess.run([works[0], *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "needs Python 3.10" in done.stderr


def test_a_read_only_checkout(checkout):
    """A mount, since root may write past permissions."""
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c",
             'mount --bind . . && mount -o remount,ro,bind . && cd "$PWD" && exec "$@"', "sh"]  # fmt: skip
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], cwd=checkout.folder).returncode:
        pytest.skip("this machine does not let us mount a folder read-only")
    said = refused(checkout.source(*mount))
    assert said.count("\n") == 1 and f"error: {checkout.folder} is read-only" in said and "copy or clone" in said


def test_where_torch_comes_from(tmp_path):
    def asked(**variables: str) -> tuple[str, str]:
        words = [sys.executable, "-S", str(ROOT / "launch" / "torch_index.py")]  # -S: no torch is installed
        left = {k: v for k, v in os.environ.items() if k != "MINILLM_TORCH_INDEX"}
        done = subprocess.run(words, env={**left, **variables}, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip(), done.stderr

    assert asked(MINILLM_TORCH_INDEX="https://wheels.example/cpu") == ("https://wheels.example/cpu", "")
    assert asked(MINILLM_TORCH_INDEX="") == ("", "")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert asked(PATH=f"{tmp_path}:{os.environ['PATH']}") == ("", "")


def test_nothing_is_installed_where_the_python_is_to_be_taken_as_it_is(tmp_path):
    checkout = Checkout(tmp_path / "a folder")
    script = "set -euo pipefail; . launch/environment.sh tests; echo $PYTHONPATH"
    done = subprocess.run(
        ["bash", "-c", script], cwd=checkout.folder, capture_output=True, text=True,
        env={**os.environ, "MINILLM_NO_INSTALL": "1", "PYTHONPATH": "theirs"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{checkout.folder}:theirs\n", "")
    assert {path.name for path in checkout.folder.iterdir()} == {"launch", "setup.py"}
