"""Every mistake of tests/settings/mistakes.py is one error that names it, all of them come at once, nothing is written.

tests/faults/test_damage_configs.py makes some of them on the real command line.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minillm.settings.resolve import check_places, resolve, uses_builtin_data
from minillm.utils.errors import UserError
from tests.faults.damage_files import contents
from tests.settings.mistakes import JSONS, WORDS, YAMLS, ZERO2
from tests.support.launching import ROOT

BATCH = ("train.train_batch_size=16", "train.train_micro_batch_size_per_gpu=8")


def error_of(folder: Path, words: tuple[str, ...] = (), yaml: str | None = None, json_text: str | None = None) -> str:
    """What a start is told that has these words, this YAML instead of the demo's, or this JSON."""
    json_text = json.dumps(ZERO2) if json_text is None else json_text
    (folder / "ds.json").write_bytes(json_text.encode("utf-8", "surrogateescape"))
    config = "demo"
    if yaml is not None:
        config = str(folder / "bad.yaml")
        Path(config).write_bytes(yaml.encode("utf-8", "surrogateescape"))
    before = contents(folder)
    with pytest.raises(UserError) as error:
        resolved = resolve(
            config, [f"run_root={folder / 'runs'}", *words], str(folder / "ds.json"), stage="pretrain", world_size=1,
            configs_dir=ROOT / "launch" / "configs",
        )  # fmt: skip
        check_places(resolved.run, reads=not uses_builtin_data(resolved.run))
    assert contents(folder) == before
    return str(error.value)


def check(error: str, expected: list[str]) -> None:
    for part in expected:
        assert part in error, error


@pytest.mark.parametrize("words, expected", [row for rows in WORDS.values() for row in rows])
def test_a_mistake_on_the_command_line_is_named_with_its_fix(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    check(error_of(tmp_path, (words,) if isinstance(words, str) else words), expected)


@pytest.mark.parametrize("text, expected", YAMLS)
def test_a_mistake_in_the_yaml_is_named(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    check(error_of(tmp_path, yaml=text), expected)


@pytest.mark.parametrize("change, expected", JSONS)
def test_a_mistake_in_the_json_is_named_with_its_fix(tmp_path, change, expected):
    text = change if isinstance(change, str) else json.dumps({**ZERO2, **change})
    check(error_of(tmp_path, BATCH, json_text=text), expected)


def test_experts_that_cannot_run_under_the_json(tmp_path):
    words = ("model.preset=moe-876m", "model.moe_backend=deepspeed")
    text = json.dumps({**ZERO2, "zero_optimization": {"stage": 3}})
    check(error_of(tmp_path, words, json_text=text), ["cannot run under ZeRO-3", "moe_backend"])


def test_all_mistakes_of_words_and_json_come_in_one_error(tmp_path):
    words = ("optim.learning_rat=1", "train.max_steps=-1", "model.hiden_size=3", "log.every=0", "x=1")
    error = error_of(tmp_path, words, json_text='{"zero_optimization": {"stage": 9}, "what": 1}')
    assert "7 problems" in error and error.count("\n") == 7
    check(error, ["learning_rat:", "max_steps = -1", "hiden_size", "every = 0", "x:", "stage = 9", "what is not a"])
