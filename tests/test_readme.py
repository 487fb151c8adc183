"""The README's commands run as written, its paths exist, and its numbers are the code's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.settings.accounting import cache_bytes, flops_per_token, num_parameters
from minillm.settings.presets import PRESETS
from tests.support.launching import ROOT, TIMEOUT, environment
from tests.support.tiny_data import sentences

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")
POEMS = ROOT.parent / "shared" / "data" / "tang-poems"


def test_links_lead_to_files():
    links = r"\]\(([^)#]+)\)"
    rooms = [f"{room}/{link}" for room in ("data_tools", "tests/gpu")
             for link in re.findall(links, (ROOT / room / "README.md").read_text(encoding="utf-8"))]  # fmt: skip
    targets = re.findall(links, README) + [link for link in re.findall(links, CHINESE) if "://" not in link] + rooms
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`((?:tests|minillm|launch|ds_configs)/[\w/.\-]+\.(?:py|sh|json|yaml))`", README):
        assert (ROOT / name).exists(), name


def test_parameter_counts_are_the_codes():
    for name, millions in re.findall(r"\| `(demo|dense-26m)` \| ([\d.]+)M:", README):
        assert f"{num_parameters(PRESETS[name])['total'] / 1e6:.1f}" == millions


def test_the_table_of_architectures_is_the_codes():
    columns = r"^\| `([\w-]+)` \| ([\d.]+)M \| ([\d.]+)M \| ([\d.]+) \| ([\d,]+) \|"
    rows = re.findall(columns, README, flags=re.MULTILINE)
    assert {row[0] for row in rows} == set(PRESETS) - {"demo"}
    for name, *numbers in rows:
        fields = PRESETS[name]
        counts, length = num_parameters(fields), min(512, fields["max_position_embeddings"])
        millions = [f"{counts[key] / 1e6:.1f}" for key in ("total", "active")]
        operations = f"{flops_per_token(fields, length) / 1e9:.2f}"
        assert numbers == [*millions, operations, f"{cache_bytes(fields, length) // length:,}"], name


def test_no_placeholder_is_left():
    assert "@@" not in README + CHINESE


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
    (block,) = re.findall(r"```bash\n(.*?)```", CHINESE, flags=re.DOTALL)
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
    (block,) = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    texts = tmp_path / "my-texts"
    texts.mkdir()
    for number, text in enumerate(sentences(3, 300)):
        (texts / f"文档{number}.txt").write_text(text, encoding="utf-8")
    assert "done: 20 steps" in run_block(block, tmp_path)
    assert (tmp_path / "exported" / "mine" / "config.json").exists()
    assert (tmp_path / "runs" / "mine" / "plots" / "loss.png").stat().st_size > 5000
