"""The test of drift: an environment for each row of versions, the core set in each, one table at the end.

    bash tests/run.sh --versions [ROW ...]         (default: every row that this machine can make; --list names them)

Rows: `oldest` (setup.py's lower bounds, on Python 3.12 where there is one: what GPU images of today hold),
`constraints` (launch/constraints.txt), `newest` (what setup.py admits today), `pre` (constraints with transformers'
newest pre-release; with MINILLM_PRE=1 or by name), and `python3.10` ... for the constraints on every other
interpreter found on PATH or in pyenv.

Contract: stdlib only, because it runs before anything is installed. Environments stand under .venv-versions, or
MINILLM_VERSIONS_DIR, and are used again while what is asked of them is the same; MINILLM_VERSIONS_ONCE=1 deletes each
after its row (one with CUDA takes 5 GB). Exit code 1 where a row fails, 2 where one cannot be made.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import types
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "launch" / "constraints.txt"
FOLDER = Path(os.environ.get("MINILLM_VERSIONS_DIR") or ROOT / ".venv-versions").absolute()
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
MINORS = tuple(dict.fromkeys(("3.10", "3.11", "3.12", "3.13", HERE)))
SHOWN = ("torch", "deepspeed", "transformers", "numpy")
CHECKS = ("import", "run", "resume", "sample", "chat", "export", "llama", "qwen3-next", "deepseek")
LIMIT = 2 * 3600  # seconds for one row's core set


def requirements() -> dict[str, list[str]]:
    """Extra -> its requirements as they are written in setup.py; minillm's own under ""."""
    asked: dict = {}
    stand_in = types.ModuleType("setuptools")  # a new environment has none
    stand_in.setup = asked.update
    stand_in.find_packages = stand_in.find_namespace_packages = lambda *_, **__: []
    sys.modules["setuptools"] = stand_in
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        del sys.modules["setuptools"]
    return {"": asked["install_requires"], **asked["extras_require"]}


def lower_bounds() -> str:
    """Constraints that hold every direct requirement at the oldest version that setup.py admits."""
    lines = []
    for requirement in dict.fromkeys(line for group in requirements().values() for line in group):
        bound = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,[<!=\w.,]+)?", requirement)
        if bound is None:
            sys.exit(f"setup.py: {requirement!r} has no lower bound (NAME>=VERSION): the row `oldest` needs one")
        lines.append(f"{bound[1]}=={bound[2]}\n")
    return "".join(lines)


def interpreters() -> dict[str, str]:
    """Minor version -> an interpreter that has `venv`: this one, those on PATH, those of pyenv."""
    found = {}
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for minor in MINORS:
        places = [sys.executable, shutil.which(f"python{minor}"), *sorted(versions.glob(f"{minor}.*/bin/python3"))]
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2], sys._base_executable)"
        for place in filter(None, places):
            done = subprocess.run([str(place), "-c", code], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout.split()[0] == minor:
                found[minor] = done.stdout.split(maxsplit=1)[1].strip()
                break
    return found


class Row:
    """One environment and what came out of it.

    Attributes:
        steps: the arguments of each `pip install`, in order.
        versions: package -> installed version.
        outcome: check -> "ok", "FAIL" or "-" (not reached).
    """

    def __init__(self, name: str, python: str, steps: list[list[str]], constraints: str = ""):
        self.name, self.python, self.steps, self.constraints = name, python, steps, constraints
        self.folder = FOLDER / name
        self.log = FOLDER / f"{name}.log"
        self.versions: dict[str, str] = {}
        self.outcome = dict.fromkeys(CHECKS, "-")
        self.problem = ""
        self.install_seconds = self.core_seconds = 0.0

    @property
    def failed(self) -> bool:
        return bool(self.problem) or set(self.outcome.values()) != {"ok"}

    def make(self) -> None:
        """The environment; made anew where it was made of something else."""
        files = [path.read_text() for path in (CONSTRAINTS, ROOT / "setup.py")]
        asked = repr((self.python, self.steps, self.constraints, *files))
        stamp, wanted = self.folder / "made-of", hashlib.sha256(asked.encode()).hexdigest()
        moves = self.name in ("newest", "pre")  # what it holds depends on the day
        start = time.monotonic()
        if moves or not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._call([self.python, "-m", "venv", str(self.folder)])
            (self.folder / "constraints.txt").write_text(self.constraints)
            python = str(self.folder / "bin" / "python")
            index = subprocess.run(
                [python, "launch/torch_index.py"], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in self.steps:
                self._call([python, "-m", "pip", "install", *(["--extra-index-url", index] if index else []), *words])
            stamp.write_text(wanted)
        self.install_seconds = time.monotonic() - start
        listed = subprocess.run(
            [self.folder / "bin" / "python", "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        pairs = (line.partition("==") for line in listed.stdout.splitlines())
        self.versions = {name.lower(): version for name, _, version in pairs}

    def _call(self, words: list[str], **options: object) -> int:
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(words)}\n")
            log.flush()
            return subprocess.run(words, cwd=ROOT, stdout=log, stderr=log, check=True, **options).returncode

    def try_core(self) -> None:
        report = FOLDER / f"{self.name}.xml"
        report.unlink(missing_ok=True)
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        words = [str(self.folder / "bin" / "python"), "-m", "pytest", "tests/versions/core.py", f"--junitxml={report}"]
        start = time.monotonic()
        try:
            self._call(words, env=environment, timeout=LIMIT)
        except subprocess.CalledProcessError:
            pass  # the report says what failed
        self.core_seconds = time.monotonic() - start
        for case in ET.parse(report).iter("testcase") if report.exists() else ():
            name = re.sub(r"test_(parity\[)?|\]", "", case.get("name", ""))
            self.outcome[name] = "FAIL" if case.find("failure") is not None or case.find("error") is not None else "ok"

    def run(self) -> None:
        """Never raises for what pip or a check does: that is the row's outcome."""
        self.log.unlink(missing_ok=True)
        try:
            self.make()
            self.try_core()
        except (subprocess.SubprocessError, OSError) as error:
            self.problem = f"{type(error).__name__}: {error}"
        if self.failed:
            tail = self.log.read_text(errors="replace").splitlines()[-25:] if self.log.exists() else []
            print(f"-- {self.name}: {self.problem or 'a check failed'}; the end of {self.log}:", *tail, "--", sep="\n")
        if os.environ.get("MINILLM_VERSIONS_ONCE") == "1":
            shutil.rmtree(self.folder, ignore_errors=True)


def rows() -> dict[str, Row]:
    """Every row that this machine can make, in the order of the table."""
    if sys.version_info < (3, 10):  # noqa: UP036 (the driver runs before anything has looked)
        sys.exit(f"minillm needs Python 3.10 or newer; {sys.executable} is {HERE}: set PYTHON=/path/to/a/newer/one")
    found = interpreters()
    if HERE not in found:
        sys.exit(f"{sys.executable} has no venv module: install it (python3-venv), or set PYTHON to another Python")
    project, quiet = ["-e", ".[tests,tensorboard]"], ["--quiet", "--disable-pip-version-check"]
    tested = [*quiet, *project, "-c", str(CONSTRAINTS)]
    bounds = str(FOLDER / "oldest" / "constraints.txt")
    made = [
        Row("oldest", found.get("3.12", found[HERE]), [[*quiet, *project, "-c", bounds]], lower_bounds()),
        Row("constraints", found[HERE], [tested]),
        Row("newest", found[HERE], [[*quiet, "--upgrade", "--upgrade-strategy", "eager", *project]]),
        # A specifier that names a pre-release admits pre-releases of this one package.
        Row("pre", found[HERE], [tested, [*quiet, "--upgrade", "transformers>=5.17.0rc0"]]),
        *(Row(f"python{minor}", python, [tested]) for minor, python in found.items() if minor != HERE),
    ]
    return {row.name: row for row in made}


def table(done: list[Row]) -> str:
    """Rows of versions and outcomes in columns."""
    head = ["row", "python", *SHOWN, *CHECKS, "install s", "core s"]
    lines = [head]
    for row in done:
        python = row.versions and subprocess_version(row)
        lines.append([row.name, python or "-", *(row.versions.get(name, "-") for name in SHOWN), *row.outcome.values(),
                      f"{row.install_seconds:.0f}", f"{row.core_seconds:.0f}"])  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in lines)


def subprocess_version(row: Row) -> str:
    return subprocess.run([row.python, "-c", "import platform; print(platform.python_version())"],
                          capture_output=True, text=True).stdout.strip()  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash tests/run.sh --versions", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all but `pre`, which MINILLM_PRE=1 adds")
    parser.add_argument("--list", action="store_true", help="name the rows that this machine can make, and stop")
    arguments = parser.parse_args()
    possible = rows()
    if arguments.list:
        print(*(f"{name:12s} {row.python}" for name, row in possible.items()), sep="\n")
        return 0
    if unknown := [name for name in arguments.rows if name not in possible]:
        parser.error(f"no row {', '.join(unknown)} here; there are {', '.join(possible)}")
    wanted = arguments.rows or [name for name in possible if name != "pre" or os.environ.get("MINILLM_PRE") == "1"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    done = []
    for name in wanted:
        print(f"== {name} ({time.strftime('%T')}), log in {FOLDER / name}.log", flush=True)
        possible[name].run()
        done.append(possible[name])
    print(f"\n{table(done)}")
    return 1 if any(row.failed for row in done) else 0


if __name__ == "__main__":
    sys.exit(main())
