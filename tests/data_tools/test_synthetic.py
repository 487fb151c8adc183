"""The synthetic tasks: what they hold, that they come again, and that their entropy is right."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.corpus import build_synthetic
from data_tools.synthetic import DOCUMENT_CHARACTERS, TASKS, example_at
from minillm.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def examples(task: str, count: int = 300) -> list[str]:
    return [example_at(5, number, [task]).text for number in range(count)]


def test_documents_fill_a_sequence_of_128_with_the_end_token():
    assert {len(text) for task in TASKS for text in examples(task)} == {DOCUMENT_CHARACTERS} == {127}


def test_repetition_and_copying():
    for text in examples("repetition"):
        first, *others = text.removeprefix("repeat: ").split(" ")
        assert 2 <= len(first) == len(set(first)) <= 4
        assert all(word == first for word in others[:-1]) and first.startswith(others[-1])
    for text in examples("copying"):
        assert re.fullmatch(r"copy: ([a-d]{4,8})( -> \1)+( |-|>|[a-d])*", text), text


def test_counting_and_addition():
    for text in examples("counting"):
        numbers = [int(word) for word in text.removeprefix("count: ").split(" ")[:-1]]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 20
    for text in examples("addition"):
        terms = text.removeprefix("add: ").split(" ")[:-1]
        for left, right in zip(terms, terms[1:]):
            assert left.split("=")[1] == right.split("+")[0]
        for term in terms:
            a, b, total = map(int, re.fullmatch(r"(\d+)\+(\d)=(\d+)", term).groups())
            assert a + b == total


def test_brackets_are_balanced():
    for text in examples("brackets"):
        first, *others = text.removeprefix("brackets: ").split(" ")
        assert len(first) == 8 and all(word == first for word in others[:-1])
        while first:
            shorter = first.replace("()", "").replace("[]", "").replace("{}", "")
            assert len(shorter) < len(first)
            first = shorter


@pytest.mark.parametrize(
    "task, exact",
    [
        ("counting", math.log(1000)),
        ("addition", math.log(100) + math.log(9)),
        ("repetition", math.log(3) + math.log(8 * 7) + (math.log(6) * 2 + math.log(5)) / 3),
        ("copying", math.log(5) + 6 * math.log(4)),
    ],
)
def test_entropy_by_hand(task, exact):
    found = [example_at(1, number, [task]).nats for number in range(4000)]
    assert sum(found) / len(found) == pytest.approx(exact, rel=0.01)


def test_entropy_of_brackets_is_that_of_their_distribution():
    """-ln of a text's chance is its entropy: the chances of all that were seen add up to one."""
    found = [example_at(2, number, ["brackets"]) for number in range(10_000)]
    nats = {example.text: example.nats for example in found}
    assert sum(math.exp(-value) for value in nats.values()) == pytest.approx(1, abs=0.03)
    likely = {text for text, value in nats.items() if value < 6.5}
    chance = sum(math.exp(-nats[text]) for text in likely)
    assert sum(example.text in likely for example in found) / len(found) == pytest.approx(chance, rel=0.05)


def test_the_first_character_is_given_and_the_rest_of_the_tasks_name_is_not():
    """Counting and copying begin alike: which of the two it is takes ln 2 nats."""
    tasks = list(TASKS)
    for number in range(50):
        among_all = example_at(3, number, tasks)
        extra = math.log(2) if among_all.task in ("counting", "copying") else 0
        assert among_all.nats > extra
        if among_all.task == "counting":
            assert among_all.nats == pytest.approx(math.log(1000) + math.log(2))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_writes_halves_apart_and_a_summary(tmp_path):
    line = [sys.executable, "-m", "data_tools.corpus", "synthetic", "--documents", "900", "--out"]
    done = subprocess.run([*line, tmp_path / "a"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the lowest loss is 0.06" in done.stdout
    build_synthetic(tmp_path / "b", 900)
    build_synthetic(tmp_path / "c", 900, seed=1)
    files = ["train.jsonl", "validation.jsonl", "summary.json"]
    a, b, c = ([(tmp_path / folder / name).read_bytes() for name in files] for folder in "abc")
    assert a == b and a[0] != c[0]
    train, validation = (read(tmp_path / "a" / name) for name in files[:2])
    assert len(train) + len(validation) == 900 and 20 <= len(validation) <= 80
    assert not {d["text"] for d in train} & {d["text"] for d in validation}
    summary = json.loads(a[2])
    assert summary["train"]["num_target_tokens"] == 127 * len(train)
    assert summary["entropy_floor_nats_per_token"] == summary["train"]["entropy_floor_nats_per_token"]
    for name, part in summary["train"]["by_task"].items():
        assert part["num_documents"] == sum(d["id"].startswith(name) for d in train)
        assert 0.03 < part["entropy_floor_nats_per_token"] < 0.1


def test_arguments_that_cannot_work(tmp_path):
    with pytest.raises(UserError, match=r"--tasks names \['sums'\]: valid are repetition,counting"):
        build_synthetic(tmp_path, tasks=["counting", "sums"])
    with pytest.raises(UserError, match="none"):
        build_synthetic(tmp_path, tasks=[])
    with pytest.raises(UserError, match="twice"):
        build_synthetic(tmp_path, tasks=["counting", "counting"])
    with pytest.raises(UserError, match="--validation-fraction"):
        build_synthetic(tmp_path, validation_fraction=0)
    with pytest.raises(UserError, match="validation.jsonl would be empty: raise --documents"):
        build_synthetic(tmp_path / "few", num_documents=2)
