"""The layer tables: their rows add up to the built model, errors name what is valid, and the picture is one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from minillm import describe
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.settings.accounting import describe_layers
from minillm.settings.presets import PRESETS
from tests.support.launching import ROOT


@pytest.mark.parametrize("name", PRESETS)
def test_rows_are_those_of_the_built_layers(name):
    with torch.device("meta"):
        model = MiniLLMForCausalLM(MiniLLMConfig(**PRESETS[name]))
    built = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert [layer["total"] for layer in describe_layers(PRESETS[name])] == built
    lines = describe.layer_table(name, PRESETS[name], 512)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in lines[0]
    total = 0
    for line in lines[3:]:
        row = re.match(r"  (embed|other|ahead|\d+(?:-(\d+))?) +([\d,]+)", line)
        if row:
            first, _, last = row[1].partition("-")
            number = int(last) - int(first) + 1 if last else 1
            total += number * int(row[3].replace(",", ""))
    assert total == sum(p.numel() for p in model.parameters())


def test_the_command_answers_without_torch_and_draws(tmp_path):
    code = (
        "import sys; from minillm.describe import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    words = ["qwen3-next-mini", "char-tiny", "--draw", str(tmp_path / "a" / "layers.png")]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gated DeltaNet + sparse" in done.stdout and "learned positions" in done.stdout
    assert (tmp_path / "a" / "layers.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["demmo"], "did you mean `demo`"),
        (["demo", "head_dmi=3"], "did you mean `head_dim"),
        (["demo", "num_key_value_heads=3"], "must divide num_attention_heads"),
        (["demo", "--seq-len", "0"], "--seq-len 0"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        describe.main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
