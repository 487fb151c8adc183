"""Away from the checkout: a wheel made from the sdist, in an environment of its own, in a folder that has only data.

Contract: nothing is downloaded; the new environment finds this one's packages by links, all but minillm, which it has
from its wheel alone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.launching import ROOT, TIMEOUT, environment, losses, words

pytest.importorskip("build", reason='pip install -e ".[tests]"')
SOURCES = ("setup.py", "README.md", "LICENSE", "minillm", "data_tools", "launch", "ds_configs")


def sh(*command: str | Path, cwd: Path) -> str:
    """Run it outside of the checkout, and without the checkout on the path; what it prints."""
    clean = {name: value for name, value in environment().items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def new_environment(folder: Path) -> Path:
    """A virtual environment with this one's packages; its bin folder."""
    sh(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not package.name.startswith(("minillm", "__")):
            (site / package.name).symlink_to(package)
    return folder / "bin"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what an installation needs, since a build writes into its folder."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(source, folder)
    return folder


@pytest.fixture(scope="module")
def built(sources) -> tuple[Path, Path]:
    """The sdist, and the wheel that was made from it."""
    dist = sources.with_name(sources.name + "-dist")
    sh(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, sources, cwd=sources.parent)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel, in a folder with a space in its name."""
    bin_folder = new_environment(tmp_path_factory.mktemp("away") / "an environment")
    pip = [sys.executable, "-m", "pip", "--python", bin_folder / "python"]
    sh(*pip, "install", "--quiet", "--no-deps", "--no-index", built[1], cwd=built[1].parent)
    return bin_folder


def test_the_wheel_carries_what_the_commands_read(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as file:
        modes = {info.filename: info.external_attr >> 16 for info in file.infolist()}
    modules = {path.relative_to(ROOT).as_posix() for folder in ("minillm", "data_tools") for path in
               (ROOT / folder).rglob("*.py")}  # fmt: skip
    started = ["launch/*.py", "launch/configs/*.yaml", "launch/slurm/*", "launch/supervise.sh", "ds_configs/*.json"]
    carried = [path.relative_to(ROOT).as_posix() for pattern in started for path in ROOT.glob(pattern)]
    assert len(carried) > 25
    assert modules | {f"minillm/{name}" for name in carried} <= set(modes)
    for name in ("data_tools/catalogue.yaml", "data_tools/cleaning/rules.yaml", "data_tools/inspection/page.html"):
        assert name in modes
    assert modes["minillm/launch/supervise.sh"] & 0o111 and modes["minillm/launch/slurm/rank.sh"] & 0o111
    tops = {name.split("/")[0] for name in modes}
    assert {top.partition("-")[0] for top in tops} == {"minillm", "data_tools", "minillm_stack"}  # no package `launch`
    (licence,) = [name for name in modes if name.endswith("LICENSE")]
    with zipfile.ZipFile(wheel) as file:
        assert file.read(licence) == (ROOT / "LICENSE").read_bytes()
        (metadata,) = [name for name in modes if name.endswith(".dist-info/METADATA")]
        assert re.search(r"^License(-Expression)?: Apache-2.0$", file.read(metadata).decode(), flags=re.MULTILINE)
    with tarfile.open(sdist) as file:
        assert set(carried) <= {name.partition("/")[2] for name in file.getnames()}


def test_the_commands_work_in_an_empty_folder(installed, tmp_path):
    """What needs no torch; minillm is the wheel's, and its folder does not become a place of top-level modules."""
    package = next(installed.parent.glob("lib/python*/site-packages")) / "minillm"
    assert sh(installed / "minillm", "--version", cwd=tmp_path).splitlines()[0].endswith(f" from {package}")
    assert "demo: 3,819,776 parameters" in sh(installed / "minillm", "describe", "demo", cwd=tmp_path)
    assert "\nbest: zero" in sh(installed / "minillm", "plan", "--config", "demo", cwd=tmp_path)
    dry = sh(installed / "minillm", "pretrain", "--config", "demo", "--deepspeed", "zero3", "--dry-run", cwd=tmp_path)
    assert "ZeRO-3, bf16" in dry and "3,819,776" in dry
    assert "usage: minillm data clean" in sh(installed / "minillm", "data", "clean", "--help", cwd=tmp_path)
    code = "import sys; from minillm.__main__ import main; sys.argv = ['x', 'pretrain', '--dry-run']\n"
    code += "try: main()\nexcept SystemExit: print(sys.path)"
    assert f"'{package}'" not in sh(installed / "python", "-c", code, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_from_pretraining_to_a_chat_and_an_export(installed, tiny_settings, tmp_path):
    """By the deepspeed launcher, in a folder with a space in its name, where all of it lands."""
    folder = tmp_path / "my models"
    folder.mkdir()
    settings = {**tiny_settings, "run_name": "tiny", "train.max_steps": 2, "log.wandb": "disabled"}
    settings = [word for word in words(settings) if not word.startswith("data.cache_dir=")]
    sh(installed / "minillm", "pretrain", "--config", "demo", "--master_port", "29473", *settings, cwd=folder)
    assert len(losses(folder / "runs" / "tiny")) == 2 and (folder / "data" / "cache").is_dir()
    chat = sh(installed / "minillm", "chat", "--prompt", "The list", "--max-new-tokens", "3", cwd=folder)
    assert "tiny step 2 (runs/tiny/checkpoints/step-000002)" in chat
    sh(installed / "minillm", "export", "tiny", "exported/tiny", cwd=folder)
    assert (folder / "exported" / "tiny" / "model.safetensors").is_file()


def test_a_checkout_works_without_pip_install(sources, tmp_path):
    """As `python -m minillm` in it, and by its scripts from anywhere."""
    python = new_environment(tmp_path / "env") / "python"
    for started in (["-m", "minillm", "pretrain"], ["launch/pretrain.py", "--deepspeed", "ds_configs/zero2.json"]):
        assert "ZeRO-2, bf16" in sh(python, *started, "--dry-run", cwd=sources)
    version = sh(python, "-m", "minillm", "--version", cwd=sources)
    assert version.splitlines()[0].endswith(f" from {sources / 'minillm'}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = sources / "launch" / "sft.py"
    assert "sft-demo (sft) in runs/sft-demo" in sh(python, script, "--dry-run", cwd=elsewhere)
