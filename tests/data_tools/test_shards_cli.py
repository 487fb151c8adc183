"""`python -m data_tools.shards`: the whole way from a corpus to token shards, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import webdataset

from data_tools.shards import build_shards, main
from data_tools.shuffle import shuffled_records
from minillm.data.tokenizer import build_char_tokenizer
from minillm.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def write_corpus(path: Path, count: int = 200) -> list[dict]:
    documents = [{"id": f"doc-{n}", "text": f"document {n} 文 " * (n % 9 + 1)} for n in range(count)]
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    path.write_text("".join(lines), encoding="utf-8")
    return documents


def run_main(*arguments: object) -> int:
    """Exit code of the command line in this process."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code or 0
    return 0


def read_back(folder: Path) -> list[dict]:
    """Documents of text shards as webdataset reads them."""
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    return [json.loads(sample["json"]) for sample in webdataset.WebDataset(paths, shardshuffle=False)]


def test_from_corpus_to_verified_token_shards(tmp_path, capsys):
    documents = write_corpus(tmp_path / "corpus.jsonl")
    build_char_tokenizer(document["text"] for document in documents).save_pretrained(tmp_path / "tokenizer")
    text, tokens = tmp_path / "text", tmp_path / "tokens"
    assert run_main("build", "--corpus", tmp_path / "corpus.jsonl", "--out", text, "--shard-size", "64k") == 0
    tokenize = ("tokenize", "--shards", text, "--tokenizer", tmp_path / "tokenizer", "--out", tokens)
    assert run_main(*tokenize, "--workers", "2") == 0
    assert run_main("verify", text) == run_main("verify", tokens) == 0
    said = capsys.readouterr().out
    assert "200 documents in 4 text shards" in said and "4 text shards, 200 samples, all whole" in said
    assert "1 token shards, 200 documents" in said
    assert run_main(*tokenize) == 0 and "holds these token shards already" in capsys.readouterr().out


def test_every_document_comes_out_once_shuffled_over_the_whole_corpus(tmp_path):
    documents = write_corpus(tmp_path / "corpus.jsonl")
    build_shards(tmp_path / "corpus.jsonl", tmp_path / "a", shard_size=64 << 10)
    build_shards(tmp_path / "corpus.jsonl", tmp_path / "b", shard_size=64 << 10)
    build_shards(tmp_path / "corpus.jsonl", tmp_path / "c", shard_size=64 << 10, seed=1)
    first, again, other = (read_back(tmp_path / name) for name in "abc")
    assert first == again != other
    by_id = sorted(first, key=lambda document: int(document["id"].split("-")[1]))
    assert by_id == documents and first != documents
    index = json.loads((tmp_path / "a/index.json").read_text())
    for shard in index["shards"]:
        path = tmp_path / "a" / shard["name"]
        assert path.stat().st_size == shard["bytes"] <= (64 << 10) + 10240
        ids = [json.loads(s["json"])["id"] for s in webdataset.WebDataset(str(path), shardshuffle=False)]
        assert len(ids) == shard["num_samples"]
        numbers = [int(name.split("-")[1]) for name in ids]
        assert min(numbers) < 40 and max(numbers) >= 160  # each shard draws from the whole corpus
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "index.json", *(shard["name"] for shard in index["shards"])
    ]  # fmt: skip
    assert (tmp_path / "a/text-000000.tar").read_bytes() == (tmp_path / "b/text-000000.tar").read_bytes()


@pytest.mark.parametrize("num_buckets", [1, 3, 50])
def test_shuffle_in_buckets_keeps_every_record(tmp_path, num_buckets):
    records = [bytes([n % 251]) * (n % 40) + str(n).encode() for n in range(500)]
    out = list(shuffled_records(iter(records), tmp_path, num_buckets=num_buckets, seed=1))
    assert sorted(out) == sorted(records) and out != records
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b'{"text": "  "}\n', "is empty"),
        (b'{"text": "caf\xe9"}\n', "is not UTF-8"),
        (b'{"text": "' + b"x" * 9000 + b'"}\n', "longer than a shard of 8192 bytes: raise --shard-size or split"),
        (
            b'{"text": "x"}\n{"messages": [{"role": "user", "content": "x"}]}\n',
            "document c.jsonl:2: texts and conversations are mixed",
        ),
    ],
)
def test_bad_corpora_are_named_and_nothing_is_left(tmp_path, content, message, capsys):
    (tmp_path / "c.jsonl").write_bytes(content)
    out = tmp_path / "out"
    assert run_main("build", "--corpus", tmp_path / "c.jsonl", "--out", out, "--shard-size", 8192) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl"]


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    write_corpus(tmp_path / "c.jsonl", 3)
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.999999999.tmp").mkdir()  # as a killed run leaves it
    build_shards([tmp_path / "c.jsonl"], tmp_path / "out")  # an empty folder is free
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "out"]
    with pytest.raises(UserError, match="out exists already: remove it or choose another --out"):
        build_shards([tmp_path / "c.jsonl"], tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_verify_lists_every_problem(tmp_path, capsys):
    documents = write_corpus(tmp_path / "c.jsonl")
    build_char_tokenizer(document["text"] for document in documents).save_pretrained(tmp_path / "tokenizer")
    text, tokens = tmp_path / "text", tmp_path / "tokens"
    build_shards(tmp_path / "c.jsonl", text, shard_size=64 << 10)
    run_main("tokenize", "--shards", text, "--tokenizer", tmp_path / "tokenizer", "--out", tokens)
    data = (text / "text-000001.tar").read_bytes()
    (text / "text-000001.tar").write_bytes(data[:700] + b"?" + data[701:])
    (text / "text-000002.tar").unlink()
    (text / "stranger.tar").write_bytes(b"")
    data = bytearray((tokens / "tokens-000000.tar").read_bytes())
    data[700] ^= 1
    (tokens / "tokens-000000.tar").write_bytes(data)
    capsys.readouterr()
    assert run_main("verify", text) == 2
    said = capsys.readouterr().err
    assert "text-000001.tar does not match" in said and "text-000002.tar is missing" in said
    assert "stranger.tar is not listed" in said and "3 problems" in said
    assert run_main("verify", tokens) == 2
    assert "chunk 0 (tokens from 0 to 8191) does not match its checksum" in capsys.readouterr().err
    assert run_main("verify", tmp_path / "tokenizer") == 2
    assert "holds no shards" in capsys.readouterr().err


def test_help_is_quick_and_names_the_commands():
    began = time.process_time()
    out = subprocess.run(
        [sys.executable, "-m", "data_tools.shards", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    assert all(word in out for word in ("build", "tokenize", "verify")) and time.process_time() - began < 5
