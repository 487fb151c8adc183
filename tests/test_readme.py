"""Every README: its commands run as written, its paths and links lead somewhere, and its numbers are the code's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minillm import plan
from minillm.settings.accounting import cache_bytes, flops_per_token, num_parameters
from minillm.settings.presets import PRESETS
from tests.support.launching import ROOT, TIMEOUT, environment
from tests.support.tiny_data import sentences

FRONT, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
ROOMS = ("launch", "ds_configs", "minillm", "data_tools", "tests", ".github")
PAGES = sorted([FRONT, CHINESE, ROOT / "CHANGELOG.md", *(p for room in ROOMS for p in (ROOT / room).rglob("*.md"))])
POEMS = ROOT.parent / "shared" / "data" / "tang-poems"
CODE = re.compile(r"^ *```.*?^ *```$", flags=re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`((?:\.github|data_tools|ds_configs|launch|minillm|tests)/[\w/.\-]+)`")  # a path from the root

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return CODE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> list[str]:
    """The text in a page's blocks of code of these languages ("" for a block that names none)."""
    found = (block.partition("\n") for block in CODE.findall(page.read_text(encoding="utf-8")))
    return [text.rpartition("```")[0] for fence, _, text in found if fence.strip("` ") in languages]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_room_has_its_page():
    rooms = ["launch", "ds_configs", "data_tools", "tests", "tests/gpu", "tests/faults", "tests/benchmarks", "minillm"]
    rooms += [f"minillm/{name}" for name in
              ("settings", "planning", "models", "data", "training", "preflight", "interop")]  # fmt: skip
    linked = re.findall(r"\]\(([^)#]+)", FRONT.read_text(encoding="utf-8"))
    for room in rooms:
        assert (ROOT / room / "README.md") in PAGES, room
        assert f"{room}/README.md" in linked, f"{room}/README.md is not reached from the front page"


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert ROOT in (file.resolve(), *file.resolve().parents), f"{target} leaves the repository"
        assert not anchor or anchor in anchors(file), target


@each_page
def test_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    assert "../shared" not in text, "a path outside of the repository"
    assert "@@" not in text, "a placeholder is left"
    for name in FILE.findall(prose(page)):
        assert "NAME" in name or (ROOT / name).exists(), name
    for name in re.findall(r"\b(?:ds_configs|launch|tests)/[\w/.\-]+\.(?:json|py|sh|sbatch)\b", text):
        assert "NAME" in name or (ROOT / name).exists(), name
    for name in re.findall(r"`(bench_\w+\.py)", text):
        assert (ROOT / "tests" / "benchmarks" / name).exists(), name
    for name in re.findall(r"python -m ((?:minillm|data_tools|tests)\.[\w.]+\w)", text):
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists(), name
    for name in re.findall(r"--config ([a-z][\w\-]*)(?![\w.\-])", text):
        assert (ROOT / "launch" / "configs" / f"{name}.yaml").exists(), name
    for name in re.findall(r"model\.preset=([a-z][\w\-]*)", text):
        assert name in PRESETS, name


@each_page
def test_lines_fit(page):
    for line in prose(page).splitlines():
        assert len(line) <= 120 or line.startswith("|"), line


@pytest.mark.parametrize("page", [FRONT, CHINESE], ids=lambda path: path.name)
def test_a_front_page_is_short(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 180


def test_both_front_pages_have_the_same_commands():
    def commands(page: Path) -> list[str]:
        """The lines of its blocks, without comments and what stands in angle brackets."""
        lines = "\n".join(blocks(page, "", "bash")).splitlines()
        return [re.sub(r"\s+#.*|<.*?>", "", line) for line in lines]

    assert commands(FRONT) == commands(CHINESE)


@pytest.mark.parametrize("page", [FRONT, CHINESE], ids=lambda path: path.name)
def test_parameter_counts_are_the_codes(page):
    rows = re.findall(r"\| `(demo|dense-26m)` \| ([\d.]+)M:", page.read_text(encoding="utf-8"))
    assert len(rows) == 2
    for name, millions in rows:
        assert f"{num_parameters(PRESETS[name])['total'] / 1e6:.1f}" == millions


def test_the_table_of_architectures_is_the_codes():
    columns = r"^\| `([\w-]+)` \| ([\d.]+)M \| ([\d.]+)M \| ([\d.]+) \| ([\d,]+) \|"
    table = (ROOT / "minillm" / "models" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(columns, table, flags=re.MULTILINE)
    assert [row[0] for row in rows] and {row[0] for row in rows} == set(PRESETS)
    for name, *numbers in rows:
        fields = PRESETS[name]
        counts, length = num_parameters(fields), min(512, fields["max_position_embeddings"])
        millions = [f"{counts[key] / 1e6:.1f}" for key in ("total", "active")]
        operations = f"{flops_per_token(fields, length) / 1e9:.2f}"
        assert numbers == [*millions, operations, f"{cache_bytes(fields, length) // length:,}"], name


def test_the_plans_are_those_of_the_command(capsys):
    """Each block of the planning page is a part of what its first line prints, in the same order."""
    shown = [block for block in blocks(ROOT / "minillm" / "planning" / "README.md", "") if block.startswith("$ ")]
    assert len(shown) == 3
    for block in shown:
        command, *lines = block.splitlines()
        assert plan.main(command.removeprefix("$ python -m minillm.plan ").split()) == 0
        printed = iter(capsys.readouterr().out.splitlines())
        for line in lines:
            assert any(line == other.rstrip() for other in printed), f"{command}\n{line}"


def run_block(block: str, folder: Path, **variables: str) -> str:
    """Run the lines in a folder that links to launch and ds_configs; what they print."""
    for name in ("launch", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", block], cwd=folder, env={**environment(), "PATH": path, **variables}, capture_output=True,
        text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not POEMS.is_dir(), reason="../shared/data/tang-poems is absent")
def test_the_chinese_way_runs_as_written(tmp_path):
    """From raw poems to a sampled one, on one file of them and for five steps."""
    (block,) = blocks(ROOT / "data_tools" / "README.zh.md", "bash")
    assert block.count("--config tang-poems\n") == 1
    block = block.replace("--config tang-poems\n", "--config tang-poems train.max_steps=5 validation.every=0\n")
    poems = tmp_path / "poems"
    poems.mkdir()
    (poems / "poet.tang.0.json").symlink_to(POEMS / "poet.tang.0.json")
    printed = run_block(block, tmp_path, POEMS=str(poems))
    assert "done: 5 steps" in printed
    assert re.search(r"clean: (1,000|9\d\d) of 1,000 records kept", printed)
    assert (tmp_path / "data" / "tang-poems" / "inspect" / "index.html").exists()


def test_your_own_text_runs_as_written(tmp_path):
    """The bash block, word for word, in a folder that holds only some texts and links to launch and ds_configs."""
    (block,) = blocks(FRONT, "bash")
    texts = tmp_path / "my-texts"
    texts.mkdir()
    for number, text in enumerate(sentences(3, 300)):
        (texts / f"文档{number}.txt").write_text(text, encoding="utf-8")
    assert "done: 20 steps" in run_block(block, tmp_path)
    assert (tmp_path / "exported" / "mine" / "config.json").exists()
    assert (tmp_path / "runs" / "mine" / "plots" / "loss.png").stat().st_size > 5000
